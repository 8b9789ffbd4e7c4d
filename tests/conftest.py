import sys
from pathlib import Path

import pytest

# cases.py and compare.py are imported by their plain names, from bench/ too.
sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))


@pytest.fixture(scope="session")
def smollm2():
    """The path of the real default model, fetched into the user's cache on first use."""
    from pyllm.loading import LoadError, resolve

    try:
        return resolve("smollm2-135m")
    except LoadError as error:
        pytest.skip(f"the default model could not be fetched: {error}")
