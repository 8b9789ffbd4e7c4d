"""The one rule for "correct": it lives in the package, where benchmarks find it too."""

from pyllm.testing import EPS, assert_close, poisoned

__all__ = ["EPS", "assert_close", "poisoned"]
