"""The Triton kernels, as a package whose files lie elsewhere.

They are in ``kernels/`` at the top of the source tree, and in a folder beside this file once
installed. That folder has no ``__init__.py`` (its README says why), so ``__path__`` points to it.
"""

from pathlib import Path

_HERE = Path(__file__).parent
__path__ = [str(_HERE / "kernels" if (_HERE / "kernels").is_dir() else _HERE.parent / "kernels")]
