"""How fast the package is against a stated reference: `python -m speed`."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads make small models crawl
os.environ.setdefault("HF_HUB_OFFLINE", "1")
