"""The benchmarks, as a package whose files lie elsewhere.

They are in ``bench/`` at the top of the source tree. Installed, that folder is beside this file,
and being a package of this name it is what is imported.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parents[1] / "bench")]
