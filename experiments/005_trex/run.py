"""T-REx from scratch: a small model learns real subjects, forgets 1, 5 and 10 % of them, and everything is measured.

    python -m experiments.005_trex.run WORK [--data DIR] [--quick]      all stages; goes on where it stopped

WORK keeps the models and cells; results/ gets summary.json, tables.md and the figures. `--quick`: sixty subjects, two
minutes, results in WORK.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from experiments.from_scratch import command
from experiments.runner import SHARED_DATA
from experiments.scratch import Plan, deal, make_vocabulary
from experiments.study import Size, Study, epochs, every
from mech_unlearn.model.bridge import Model
from mech_unlearn.testbed.recipe import Recipe

from . import corpus, report
from .corpus import Trex

HERE = Path(__file__).parent
DATA = SHARED_DATA / "trex"
RECIPE = Recipe(n_layers=4, d_model=128, d_mlp=384, gate=2, base_steps=700, continue_steps=300, forget_weight=3)
SHARDS, SHARD_STEPS, POSITIONS, PIECES = 4, 100, 192, 2500
AUDITED = 100
"""Facts audited per size at the most, every k-th of them."""


@lru_cache(maxsize=2)
def read(data: Path, quick: bool) -> Trex:
    return corpus.read(data, 60, 10) if quick else corpus.read(data)


def make_study(data: Path, quick: bool) -> Study:
    """The experiment on the published files."""
    trex = read(data, quick)
    told = corpus.texts(trex)
    shares = {"10": 0.10, "01": 0.05} if quick else corpus.SHARES
    gone = {name: trex.gone(share) for name, share in shares.items()}
    recipe = replace(RECIPE, base_steps=100, continue_steps=100) if quick else RECIPE
    plan = Plan(
        texts=told, requests=gone, tokenizer=make_vocabulary(*corpus.words(trex), PIECES), recipe=recipe,
        shards=deal(trex.order, 2 if quick else SHARDS, 0), retrained={} if quick else dict.fromkeys(gone, 2),
        shard_steps=30 if quick else SHARD_STEPS, positions=POSITIONS,
    )  # fmt: skip
    return Study(
        name="trex",
        plan=plan,
        sizes={name: size_of(trex, gone[name]) for name in gone},
        methods=few if quick else methods,
        locators=locate,
        facts=trex.facts,
        counts={
            "subjects": len(trex.order), "facts": len(trex.facts), "texts": len(told),
            "Wikipedia sentences": sum(map(len, trex.sentences.values())), "held-back sentences": len(trex.held),
            "unknown names": len(trex.unknown), "left out": dict(trex.left_out),
            "forgotten subjects": {name: len(names) for name, names in gone.items()},
        },
    )  # fmt: skip


def size_of(trex: Trex, gone: frozenset[str]) -> Size:
    forget, retain = corpus.sets(trex, gone)
    kept = retain.neighbors
    shown = every([fact for fact in kept if fact.subject in trex.shown], 150)
    others = every([fact for fact in kept if fact.subject not in trex.shown], 150)
    return Size(
        forget=forget, retain=retain, audited=every(forget.facts, AUDITED), kept=every(kept, 250),
        texts=corpus.known_sentences(trex), unseen=trex.held,
        asked={
            "kept, trained phrasings": every(kept, 150),
            "kept, held-out phrasing, shown with them": corpus.heldout(shown),
            "kept, held-out phrasing, never shown with them": corpus.heldout(others),
        },
    )  # fmt: skip


def methods(at: Size) -> Mapping[str, Any]:
    """The methods, with the settings that 002 found for `wikidata` where the models are alike."""
    from mech_unlearn.methods import GradDiff, IdkDpo, LastLayerAscent, Npo, Rmu, Rocr
    from mech_unlearn.training.schedule import Schedule

    kept = Schedule(lr=7e-4, epochs=epochs(at), batch_size=24, stop_recall=0.1)
    ascent = Schedule(lr=4e-3, epochs=2 * epochs(at), batch_size=24, weight_decay=0.0, stop_recall=0.05)
    return {
        "npo": Npo(schedule=kept, retain_weight=5.0, beta=1.0),
        "idk_dpo": IdkDpo(schedule=kept, retain_weight=5.0, refusals=corpus.REFUSALS),
        "grad_diff": GradDiff(schedule=replace(kept, lr=3e-4), retain_weight=5.0),
        "rmu": Rmu(schedule=replace(kept, lr=3e-3, stop_recall=None), layer=1, c=20.0, relative=False, alpha=2.0),
        "last_layer_ascent": LastLayerAscent(schedule=ascent, max_nll=12.0, retain_weight=2.0),
        "rocr": Rocr(layers=(0, 1), z_layer=1, energy=0.8),
    }


def few(at: Size) -> Mapping[str, Any]:
    """Three of the methods, for the quick run."""
    return {name: m for name, m in methods(at).items() if name in ("npo", "last_layer_ascent", "rocr")}


def locate(model: Model, at: Size) -> dict[str, Any]:
    """Two causal locators by layer and token class, and where they agree."""
    from mech_unlearn.locate import LOCATORS
    from mech_unlearn.locate.acting.consensus import consensus

    facts = every(at.audited, 60)
    found = {
        "causal_trace": LOCATORS["causal_trace"].run(model, facts, samples=4, seed=0),
        "activation_patching": LOCATORS["activation_patching"].run(model, facts, others=at.kept, seed=0),
    }
    return {name: result.to_json() for name, result in (found | {"consensus": consensus(found)}).items()}


def main() -> None:
    command(__doc__, make_study, DATA, "folder of facts.jsonl.gz and relations.json", HERE, report.write)


if __name__ == "__main__":
    main()
