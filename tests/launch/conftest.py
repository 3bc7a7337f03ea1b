"""Makes the toy task and data importable by name, as a user's own modules are."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "framework"))
