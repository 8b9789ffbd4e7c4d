"""``python -m bench`` in the repository is ``pyllm bench``."""

import sys

from pyllm.cli import main

sys.exit(main(["bench", *sys.argv[1:]]))
