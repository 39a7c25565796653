"""Does acting where a locator points hurt the fact more than acting elsewhere, and does editing there work best?

    python -m experiments.006_acting.run [WORLD ...]   ablations, agreement and edits by layer (minutes per world)
    python -m experiments.006_acting.run planted       share of planted facts found at the layer they were written into

Each writes its part of results/summary.json. Locators see the main prompt only; paraphrases are what is acted on.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.runner import command_line, provenance, read, write_results
from mech_unlearn.attribution import Attribution
from mech_unlearn.core import Fact, ForgetSet
from mech_unlearn.locate.acting.act import act_per_fact
from mech_unlearn.locate.lenses.direct_logit_attribution import direct_logit_attribution_per_fact
from mech_unlearn.locate.neurons.knowledge_neurons import knowledge_neurons_per_fact
from mech_unlearn.locate.patching.activation_patching import activation_patching_per_fact
from mech_unlearn.locate.patching.attribution_patching import agreement, attribution_patching_per_fact
from mech_unlearn.locate.patching.causal_trace import causal_trace_per_fact
from mech_unlearn.locate.patching.path_patching import path_patching_per_fact
from mech_unlearn.methods import Rocr
from mech_unlearn.metrics import recall
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.load import load
from mech_unlearn.model.scores import per_fact, score
from mech_unlearn.model.tokens import make_queries
from mech_unlearn.run import data_hash, side_by_side
from mech_unlearn.testbed import WORLDS, open_world

HERE = Path(__file__).parent
RESULTS = HERE / "results"
FACTS, NEIGHBORS, DRAWS, SEED = 60, 200, 10, 0
PLANTED = "planted"
NEEDS_OTHERS = (activation_patching_per_fact, attribution_patching_per_fact, path_patching_per_fact)


@dataclass(frozen=True)
class Look:
    """A locator with its settings, and how its top sites are acted on."""

    run: Callable[..., Attribution]
    settings: dict[str, Any] = field(default_factory=dict)
    acting: dict[str, Any] = field(default_factory=dict)


def looks() -> dict[str, Look]:
    out = {}
    for kind, more in (("resid_post", {}), ("mlp_out", {"window": 1})):
        out[f"causal_trace {kind}"] = Look(causal_trace_per_fact, {"kind": kind, **more}, {"kind": kind, "k": 3})
    for kind in ("resid_post", "mlp_out", "attn_out"):
        acting = {"kind": kind, "k": 3}
        out[f"activation_patching {kind}"] = Look(activation_patching_per_fact, {"kind": kind}, acting)
        for steps in (1, 8):
            name = f"attribution_patching {kind}, {steps} steps"
            out[name] = Look(attribution_patching_per_fact, {"kind": kind, "steps": steps}, acting)
    out["knowledge_neurons"] = Look(knowledge_neurons_per_fact, {"which": "prompt"}, {"k": 20})
    out["direct_logit_attribution by layer"] = Look(direct_logit_attribution_per_fact, {"by": "layer"}, {"k": 2})
    out["direct_logit_attribution by head"] = Look(direct_logit_attribution_per_fact, {"by": "head"}, {"k": 3})
    out["path_patching"] = Look(path_patching_per_fact, {}, {"k": 3, "at": "all", "rank": "low"})
    return out


def chosen(facts: Sequence[Fact]) -> tuple[Fact, ...]:
    """Facts of many subjects, in their order."""
    picked = {f.id for f in random.Random(SEED).sample(list(facts), min(FACTS, len(facts)))}
    return tuple(f for f in facts if f.id in picked)


def cells(each: Attribution, facts: Sequence[Fact]) -> dict[str, Any]:
    """The mean of every value over facts with its interval, unit and n, the facts that have it."""
    result = each.mean(facts)
    assert result.low is not None and result.high is not None
    count = (~each.values.isnan()).sum(0).tolist()
    columns = (result.values.tolist(), result.low.tolist(), result.high.tolist(), count)
    rows = zip(result.labels["sites"], *columns, strict=True)
    return {name: {"value": v, "ci": [a, b], "n": n, "unit": result.unit} for name, v, a, b, n in rows}


def layer_profile(result: Attribution) -> tuple[str, Tensor]:
    """(What it is, one value per fact and layer): the last subject token's, or a sum over what a layer has."""
    values = result.values
    if "token" in result.axes:
        return "last subject", values[:, result.labels["token"].index("last subject")]
    if "component" in result.axes:
        return "MLP at the last prompt token", values[:, 1:, result.labels["component"].index("mlp")]
    sign = -1 if result.name.startswith("path patching") else 1
    return f"sum over the layer's {result.axes[2]}s", sign * values.nan_to_num().sum(2)


def locate_and_act(model: Model, facts: Sequence[Fact], others: Sequence[Fact]) -> tuple[dict, dict[str, Tensor], dict]:
    """(Falls by locator, layer profile of each fact by locator, results)."""
    seen = tuple(replace(fact, paraphrases=(), heldout=()) for fact in facts)
    out, profiles, results = {}, {}, {}
    for name, look in looks().items():
        start = time.monotonic()
        more = {"others": others} if look.run in NEEDS_OTHERS else {}
        result = look.run(model, seen, **look.settings, **more)
        middle = time.monotonic()
        falls = {}
        for ablation, draws in (("resample", DRAWS), ("zero", 5)):
            found = act_per_fact(
                model, facts, result, **look.acting, ablation=ablation, others=others, random_draws=draws
            )
            falls[ablation] = {"note": found.note, **cells(found, facts)}
        what, profile = layer_profile(result)
        profiles[name], results[name] = profile, result
        out[name] = {"falls": falls, "profile_of": what, "profile": profile.nanmean(0).tolist(),
                     "seconds_locating": middle - start, "seconds_acting": time.monotonic() - middle}  # fmt: skip
        print(name, {k: round(v["value"], 2) for k, v in falls["resample"].items() if k != "note"}, flush=True)
    return out, profiles, results


def agreements(model: Model, facts: Sequence[Fact], others: Sequence[Fact], known: dict[str, Attribution]) -> dict:
    """Attribution patching against activation patching, by kind of site and number of steps."""
    out = {}
    for kind, at in (("resid_post", None), ("mlp_out", None), ("attn_out", None), ("z", "last prompt"),
                     ("q", "last prompt"), ("k", "last subject")):  # fmt: skip
        settings: dict[str, Any] = {"kind": kind, "at": at, "others": others}
        true = known.get(f"activation_patching {kind}") or activation_patching_per_fact(model, facts, **settings)
        for steps in (1, 8):
            guess = known.get(f"attribution_patching {kind}, {steps} steps")
            guess = guess or attribution_patching_per_fact(model, facts, steps=steps, **settings)
            where = f"{kind} at {at}" if at else kind
            out[f"{where}, {steps} steps"] = agreement(true, guess, k=3)
    return out


def falls_of(before: Tensor, model: Model, facts: Sequence[Fact]) -> Tensor:
    queries = make_queries(model.tokenizer, facts, distractors=False)
    return before - per_fact(score(model, queries), queries, facts).logprob


def edits(model: Model, world: Any, facts: Sequence[Fact]) -> tuple[dict, Tensor]:
    """(Recall after a closed-form write into each layer alone, each fact's fall of log-probability [fact, layer])."""
    neighbors = tuple(random.Random(SEED).sample(list(world.retain.neighbors), NEIGHBORS))
    queries = make_queries(model.tokenizer, facts, distractors=False)
    before = per_fact(score(model, queries), queries, facts).logprob
    rows: dict[str, Any] = {
        "before": {
            "forget": recall(model, world.forget.facts).to_json(),
            "neighbors": recall(model, neighbors).to_json(),
        }
    }
    falls = []
    for layer in range(model.n_layers):
        edit = Rocr(layers=(layer,), z_layer=layer).fit(model, ForgetSet(facts=world.forget.facts), world.retain)
        with edit.on(model):
            rows[f"layer {layer}"] = {
                "forget": recall(model, world.forget.facts).to_json(),
                "neighbors": recall(model, neighbors).to_json(),
            }
            falls.append(falls_of(before, model, facts))
        print(layer, {k: round(v["value"], 3) for k, v in rows[f"layer {layer}"].items()}, flush=True)
    return rows, torch.stack(falls, 1)


def against_editing(profiles: dict[str, Tensor], falls: Tensor, facts: Sequence[Fact]) -> dict:
    """Spearman correlation of each locator's layer profile with editing success: over layers of the mean, and, as in
    Hase et al. 2023, over facts within each layer."""
    from scipy.stats import spearmanr

    table = Attribution(name="", values=falls, axes=("fact", "layer"), unit="", n=len(facts),
                        labels={"fact": tuple(f.id for f in facts), "layer": tuple(range(falls.shape[1]))})  # fmt: skip
    mean = table.mean(facts)
    assert mean.low is not None and mean.high is not None
    out: dict[str, Any] = {
        "fall_by_layer": [
            {"value": v, "ci": [a, b], "n": len(facts), "unit": "fall of the log-probability (nats per token)"}
            for v, a, b in zip(mean.values.tolist(), mean.low.tolist(), mean.high.tolist(), strict=True)
        ]
    }
    for name, profile in profiles.items():
        over_layers = float(spearmanr(profile.nanmean(0).numpy(), falls.mean(0).numpy())[0])  # pyright: ignore[reportArgumentType]
        within = []
        for layer in range(falls.shape[1]):
            known = ~profile[:, layer].isnan()
            x, y = profile[known, layer].numpy(), falls[known, layer].numpy()
            within.append(float(spearmanr(x, y)[0]) if known.sum() > 2 and x.std() > 0 and y.std() > 0 else None)  # pyright: ignore
        out[name] = {
            "spearman_over_layers": over_layers, "n_layers": falls.shape[1],
            "spearman_over_facts_by_layer": within, "n_facts": len(facts),
        }  # fmt: skip  # pyright: ignore
    return out


def save(part: str, data: dict) -> None:
    path = RESULTS / "summary.json"
    write_results(RESULTS, {**(read(path) if path.exists() else {}), part: data})


def world_part(name: str) -> dict[str, Any]:
    """Ablations, agreement and edits by layer on a world."""
    start = time.monotonic()
    world = open_world(name)
    model = load(world.full)
    facts, others = chosen(world.forget.facts), world.retain.neighbors
    acted, profiles, results = locate_and_act(model, facts, others)
    seen = tuple(replace(fact, paraphrases=(), heldout=()) for fact in facts)
    agree = agreements(model, seen, others, results)
    rows, falls = edits(model, world, facts)
    return {
        "facts": len(facts), "subjects": len({f.subject for f in facts}), "acting": acted, "agreement": agree,
        "editing": {"recall": rows, **against_editing(profiles, falls, facts)},
        "seconds": time.monotonic() - start,
        "provenance": provenance(SEED, facts=data_hash(facts), model=model.hash()),
    }  # fmt: skip


def planted() -> dict[str, Any]:
    """The shares that tests/locate/test_planted_truth.py asserts."""
    from tests.locate.test_planted_truth import all_shares

    start = time.monotonic()
    return {**all_shares(24), "seconds": time.monotonic() - start}


def compute(part: str) -> dict[str, Any]:
    return planted() if part == PLANTED else world_part(part)


def main() -> None:
    parser = command_line(__doc__, HERE)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join((*WORLDS, PLANTED))}; all worlds")
    given = parser.parse_args()
    if unknown := set(given.parts) - {*WORLDS, PLANTED}:
        parser.error(f"unknown {sorted(unknown)}; choose from {', '.join((*WORLDS, PLANTED))}")
    for part, found in side_by_side(given.parts or list(WORLDS), compute, workers=given.workers):
        save(part, found)


if __name__ == "__main__":
    main()
