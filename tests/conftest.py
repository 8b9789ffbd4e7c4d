import sys
from pathlib import Path

import pytest

# cases.py and compare.py are imported by their plain names, from bench/ too.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def smollm2():
    """The path of the real default model, fetched into the user's cache on first use."""
    from pyllm.loading import LoadError, resolve

    try:
        return resolve("smollm2-135m")
    except LoadError as error:
        pytest.skip(f"the default model could not be fetched: {error}")
