"""Where does a small model keep its facts, and what makes it keep them at the last subject token?

    python -m experiments.001_testbed.run [VARIANT ...]    train the variants below, skip those that are there
    python -m experiments.001_testbed.run --report         results/summary.json and the figure alone

Every variant is one phase of training on 200 of the biographies, forget group included, and is measured without a mask.
"""

import time
from dataclasses import asdict, replace
from pathlib import Path

from experiments.runner import Cells, command_line, provenance, read, write_results
from mech_unlearn.model.load import load
from mech_unlearn.run import data_hash, side_by_side
from mech_unlearn.testbed import SHIPPED, spec
from mech_unlearn.testbed.corpus import Spec, streams
from mech_unlearn.testbed.measure import groups, interchange_curves, prompt_recall, to_json
from mech_unlearn.testbed.recipe import Recipe, new_model, train, world_tokenizer

HERE = Path(__file__).parent
RESULTS = HERE / "results"
CELLS = Cells(RESULTS, "variant_")
PEOPLE, SEED = 200, 0
VARIANTS = {
    "neither": (Recipe(masked_share=0.0), False, 700),
    "records_only": (Recipe(masked_share=0.0), True, 700),
    "mask_only": (Recipe(), False, 700),
    "mask_and_records": (Recipe(), True, 700),
    "mask_only_long": (Recipe(), False, 1800),
    "mask_and_records_long": (Recipe(), True, 1800),
}
"""name -> recipe, whether there are register lines in which the object follows directly after the name, and steps."""


def small(records: bool) -> Spec:
    whole = spec("biographies")
    people = set(list(dict.fromkeys(fact.subject for fact in whole.facts))[:PEOPLE])
    kept = [name for name in dict.fromkeys(fact.subject for fact in whole.kept) if name in people]
    return replace(
        whole,
        facts=tuple(fact for fact in whole.facts if fact.subject in people),
        heldout_shown=tuple(kept[: len(kept) // 2]),
        records=whole.records if records else dict.fromkeys(whole.records, ()),
    )


def search(name: str) -> None:
    """Train one variant and write its recall and interchange curves."""
    recipe, records, steps = VARIANTS[name]
    world, start = small(records), time.monotonic()
    tokenizer = world_tokenizer(world)
    hf = new_model(recipe, tokenizer, SEED)
    told = streams(world, with_forget=True)
    train(hf, tokenizer, told, recipe, steps=steps, peak=recipe.base_lr, seed=SEED)
    seconds = time.monotonic() - start
    model = load(hf, tokenizer=tokenizer)
    part = groups(world)["kept_not_shown"]
    result = {
        "variant": name,
        "steps": steps,
        "people": PEOPLE,
        "records": records,
        "recipe": asdict(recipe),
        "seconds": seconds,
        "recall": prompt_recall(model, part, "templates"),
        "heldout": prompt_recall(model, part, "heldout"),
        "interchange": interchange_curves(model, part, range(5)),
        "provenance": provenance(SEED, facts=data_hash(world.facts)),
    }
    CELLS.put(name, to_json(result))


def curves(of: dict) -> dict[str, list[float]]:
    return {place: [round(at["value"], 3) for at in of[place]] for place in ("last", "span", "end")}


def summary() -> None:
    """The figures that the README quotes, and the figure."""
    worlds = {}
    for path in sorted(SHIPPED.glob("*/report.json")):
        report = read(path)
        worlds[report["world"]] = {
            "counts": report["counts"],
            "chance": report["chance"],
            "recall": report["recall"],
            "interchange": report["interchange"],
            "tracing": report["tracing"],
            "known_auc": report["known_auc"],
            "sae": report["sae"],
        }
    shown = ("recall", "heldout", "interchange", "seconds", "steps")
    variants = {name: {key: CELLS[name][key] for key in shown} for name in VARIANTS if CELLS.has(name)}
    prototype = read(RESULTS / "prototype.json")
    write_results(RESULTS, {"worlds": worlds, "variants": variants, "prototype": prototype})
    draw(worlds, variants)


def draw(worlds: dict, variants: dict) -> None:
    """Interchange by layer: the shipped worlds and the variants that learnt, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {f"{name}, shipped": found["interchange"]["forget"]["templates"] for name, found in worlds.items()}
    learnt = {name: found for name, found in variants.items() if found["recall"]["value"] > 0.5}
    panels |= {name.replace("_", " "): found["interchange"] for name, found in learnt.items()}
    names = {"last": "last subject token", "span": "all subject tokens", "end": "last prompt token"}
    figure, axes = plt.subplots(1, len(panels), figsize=(3.1 * len(panels), 3.1), sharey=True, squeeze=False)
    for ax, (title, of) in zip(axes[0], panels.items()):
        for (place, label), marker in zip(names.items(), "osD"):
            values = [at["value"] for at in of[place]]
            low = [max(0.0, at["value"] - at["ci"][0]) for at in of[place]]
            high = [max(0.0, at["ci"][1] - at["value"]) for at in of[place]]
            ax.errorbar(range(len(values)), values, [low, high], marker=marker, ms=4, label=label)
        ax.set_title(f"{title} (n={of['last'][0]['n']})", fontsize=8)
        ax.set_xlabel("layer (resid_post)")
    axes[0][0].set_ylabel("answer follows the copied state")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(RESULTS / "interchange.png", dpi=110)


def main() -> None:
    parser = command_line(__doc__, HERE, report="only results/summary.json and the figure")
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=f"of {', '.join(VARIANTS)}; all")
    given = parser.parse_args()
    if unknown := set(given.variants) - set(VARIANTS):
        parser.error(f"unknown {sorted(unknown)}; choose from {', '.join(VARIANTS)}")
    if not given.report:
        names = [name for name in given.variants or VARIANTS if not CELLS.has(name)]
        for name, _ in side_by_side(names, search, workers=given.workers):
            print(name, flush=True)
    summary()


if __name__ == "__main__":
    main()
