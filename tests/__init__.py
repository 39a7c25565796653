"""Tests mirror the package: `tests/a/test_b.py` is about `mech_unlearn/a/b.py`. Shared helpers lie at the top."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads make small models crawl
