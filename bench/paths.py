"""Puts the tests on Python's path: of them benches take tests/support. Imported before it."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))
