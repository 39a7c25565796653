"""One folder per question, with its answer: `python -m experiments.NNN_question.run` from the root of the checkout.

What they share: `runner` (command line, processes, finished cells, results), `tables` and `figures`, `scratch` and
`ensemble` (models from scratch, sharded models), `study` and `from_scratch` (004 and 005: what is measured, and
how they run).
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads make small models crawl
