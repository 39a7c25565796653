"""What the command `calibrate` does on a user's own models and files, without the printing."""

import sys
from pathlib import Path

from mech_unlearn.commands.inputs import entities, read_lines
from mech_unlearn.commands.options import CalibrateOptions
from mech_unlearn.core import RetainSet
from mech_unlearn.data.jsonl import load_facts


def run_calibrate(options: CalibrateOptions) -> tuple[Path, str]:
    """Pools of known truth from a user's own models, and the calibration they give: (its file, what it says of itself).

    Raises:
        ValueError: bad or too little input, or a folder with pools of other models.
    """
    from mech_unlearn.testbed.materials import Lab, Materials, groups_of
    from mech_unlearn.testbed.pools import cells, make_pools, read_pool
    from mech_unlearn.verdict.calibration import save
    from mech_unlearn.verdict.evaluation import leave_one_out, rates, rotate
    from mech_unlearn.verdict.fitting import fit_whole, require_enough

    out, seed = options.out, options.seed
    known, kept = load_facts(options.facts), load_facts(options.retain)
    subjects = {fact.subject for fact in known}
    materials = Materials(
        full=options.full,
        references=tuple(options.reference),
        retrained=tuple(options.retrained),
        facts=known,
        retain=RetainSet(
            neighbors=tuple(fact for fact in kept if fact.subject not in subjects),
            texts=read_lines(options.texts),
            unknown=entities(options.unknown, known),
        ),
        sae=options.sae,
        device=options.device,
        dtype=options.dtype,
    )
    require_enough(len(groups_of(known)))
    lab = Lab(materials)
    made_from = {"models_from": "pools of your own models", **lab.described()}
    make_pools(materials, out, workers=options.workers, log=lambda line: print(line, file=sys.stderr))
    pool = read_pool([cell for cell in cells(out) if not cell["kind"].startswith("mixture")])
    measured = rates(rotate(pool, seed), leave_one_out(pool, seed))
    made = fit_whole(pool, lab.full.hash(), seed, **made_from, **measured)
    save(made, out / "calibration.json")
    return out / "calibration.json", made.describe()
