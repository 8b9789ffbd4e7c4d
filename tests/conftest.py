import sys
from pathlib import Path

# cases.py and compare.py are imported by their plain names, from bench/ too.
sys.path.insert(0, str(Path(__file__).parent))
