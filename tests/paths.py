"""Where the repository is, and where published data and real models may lie."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHARED_DATA = Path(os.environ.get("MECH_UNLEARN_DATA", ROOT.parent / "shared" / "data"))
REAL = Path(os.environ.get("MECH_UNLEARN_REAL", ROOT / ".real"))
"""Made by `make real`."""
