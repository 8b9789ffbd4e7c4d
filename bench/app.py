"""``pyllm bench``: the commands are in `commands`."""

from .commands import kernels, models, results  # noqa: F401  they add themselves
from .commands.common import app


def main(arguments):
    """Runs a command."""
    if arguments[:1] in (["--profile"], ["--emulate"]):
        arguments = [arguments[0].removeprefix("--"), *arguments[1:]]
    return app(args=arguments, prog_name="pyllm bench", standalone_mode=False)
