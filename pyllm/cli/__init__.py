"""The command line: ``pyllm generate | chat | info | pull | bench``.

Text goes to standard output, everything about it to standard error. Exit codes: 0; 2 for bad input,
with one line that says what was expected and what came; 130 after Ctrl-C.
"""

import sys


def main(arguments=None) -> int:
    """Runs the command line; returns the exit code."""
    from pyllm.cli.app import run

    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    try:
        return run(arguments) or 0
    except SystemExit as error:  # argparse has said why
        return error.code or 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        sys.stderr.close()
        return 0
    except Exception as error:
        return _report(error, debug)


def _report(error: Exception, debug: bool) -> int:
    # Those of the benchmarks' typer, by what they have: newer releases carry a click of their own.
    if type(error).__name__ == "Abort":  # Ctrl-C
        return 130
    if hasattr(error, "exit_code"):
        if hasattr(error, "show"):  # a usage error
            error.show()
        return error.exit_code
    if debug:
        raise error
    print(f"error: {error or type(error).__name__}", file=sys.stderr)
    expected = isinstance(error, (ValueError, TypeError, OSError, RuntimeError, MemoryError))
    if not expected:
        print("This looks like a bug in pyllm; --debug shows where.", file=sys.stderr)
    return 2 if expected else 1
