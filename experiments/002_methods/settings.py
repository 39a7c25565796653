"""The methods, what is fixed for the small models of the testbed, and the grid that the shared search goes through."""

from dataclasses import fields, replace
from itertools import product
from typing import Any

from mech_unlearn.methods import METHODS, Npo, Unlikelihood
from mech_unlearn.methods.writing.questions import Optimize
from mech_unlearn.training.schedule import Schedule

TRAINED = {"epochs": 4, "batch_size": 48}
"""As many passes for every training method that does not say otherwise; what stops them earlier is `stop_recall`."""
ABOVE_CHANCE = 0.02
"""Training ends after the epoch in which recall on the forget rows is at most this above chance."""
REFUSALS = {"biographies": ("Nobody", "a stranger"), "wikidata": ("a thing", "a place")}
"""What methods that teach to refuse offer: the worlds' vocabularies have no sentence that says so."""
STATES = {"lr": 3e-3, "epochs": 6, "batch_size": 32}
"""For methods that train states after one layer: as many passes for all of them."""
NPO = Npo(schedule=Schedule(lr=7e-4, **TRAINED), retain_weight=5.0, beta=1.0)
"""What wrappers wrap, but for the rate where they say so; its settings are those that the demo uses."""
BASES = {"lat": Unlikelihood(schedule=Schedule(lr=2e-4, **TRAINED | {"epochs": 2}), retain_weight=8.0)}
"""What is wrapped in its place."""


def grid(**values: tuple) -> list[dict[str, Any]]:
    return [dict(zip(values, point, strict=True)) for point in product(*values.values())]


KEPT = grid(lr=(3e-4, 7e-4), retain_weight=(1.0, 5.0))
ALONE = grid(lr=(1e-5, 5e-5, 2e-4, 7e-4))
WRAPPED = ({"lr": 3e-4}, {"lr": 7e-4})
GRID: dict[str, list[dict[str, Any]]] = {
    # closed forms
    "rocr": grid(layers=((0, 1), (0, 1, 2)), energy=(0.05, 0.1, 0.2)),
    "rocr to a neutral anchor": grid(layers=((0, 1), (0, 1, 2)), energy=(0.1, 0.2)),
    "sae_shift": grid(layers=((0, 1), (1, 2)), protect=(("entities", "prompts", "texts"), ("entities",))),
    "sae_shift as a hook": grid(shared=(None, 8, 16)),
    "rome": grid(layer=(1, 2)),
    "r_rome": grid(layer=(1, 2)),
    "memit": grid(layers=((0, 1), (0, 1, 2))),
    "memit, null space": grid(layers=((0, 1), (0, 1, 2))),
    # neurons, directions, latents
    "needle": grid(n=(1, 20), epochs=(0, 4)),
    "knowledge_neuron_erase": grid(n=(5, 20)),
    "knowledge_neuron_update": grid(lambda_new=(8.0, 1.0, 0.1)),
    "directional_ablation": grid(rank=(6, 16)),
    "directional_ablation of weights": grid(rank=(1, 4)),
    "leace": grid(where=("from",)),
    "sae_clamp": grid(k=(20, 100), c=(5.0, 25.0)),
    "ssd": grid(alpha=(10.0, 2.0, 1.0), lambda_=(1.0, 0.3)),
    # states
    "rmu": grid(layer=(2,), c=(20.0, 40.0), relative=(False,), alpha=(2.0, 10.0)),
    "adaptive_rmu": grid(layer=(2, 4), beta=(1.5, 5.0)),
    "srmu": grid(layer=(2, 4), c=(2.0,), alpha=(2.0, 10.0)),
    "lat": grid(base=({"lr": 2e-4}, {"lr": 4e-4}), eps=(0.05, 0.1), pgd_steps=(6,)),
    "kif": grid(lr=(3e-4, 1e-3), retain_weight=(1.0, 10.0)),
    "kif, capsule": grid(strength=(0.8, 1.0)),
    "sae_iru": grid(objective=("bands", "prototype"), n_latents=(64, 512)),
    "klue": grid(lr=(1e-3, 5e-3), retain_weight=(1.0, 5.0)),
    # outputs
    "last_layer_ascent": grid(lr=(2e-3, 4e-3), retain_weight=(2.0, 5.0)),
    "grad_ascent": ALONE,
    "grad_ascent of embeddings": grid(lr=(1e-3, 3e-3, 1e-2)),
    "grad_diff": KEPT,
    "kl_min": grid(lr=(3e-4, 7e-4), retain_weight=(5.0, 20.0)),
    "npo": KEPT,
    "sim_npo": KEPT,
    "idk_dpo": KEPT,
    "alt_po": KEPT,
    "undial": grid(lr=(3e-4, 7e-4), retain_weight=(0.0, 1.0)),
    "flat": ALONE,
    "catnip": ALONE,
    "shred": ALONE,
    "task_vector": grid(lr=(1e-4, 7e-4), scale=(0.5, 2.0)),
    # wrappers around npo
    "gu": grid(base=WRAPPED, k=(2,)),
    "wagle": grid(base=WRAPPED, rho=(0.2, 0.8)),
    "lora": grid(base=({"lr": 2e-3}, {"lr": 5e-3}), rank=(8,)),
    "localized": grid(base=({"lr": 7e-4}, {"lr": 2e-3}), layers=((0, 1, 2),)),
    "rna": grid(base=WRAPPED, layer=(2,), nu=(0.01,)),
    # known suppressors
    "in_context": grid(examples=(0, 2)),
    "token_guard": [{}],
}
OUTPUTS_ONLY = ("in_context",)
"""An instruction shifts every position, so that no test on states can be made."""


def tests_of(name: str, tests: tuple[str, ...]) -> tuple[str, ...]:
    """Which of the tests on states an intervention can be put to."""
    return ("output",) if name in OUTPUTS_ONLY else tests


def make(name: str, at: Any, chosen: dict[str, Any], seed: int) -> Any:
    """The method of that name with the settings of a grid point."""
    kind = METHODS[name.split(" ")[0].rstrip(",")]
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in chosen.items()}
    if "base" in given:
        plain = BASES.get(name, NPO)
        base = replace(plain, seed=seed, schedule=replace(plain.schedule, stop_recall=stop(at), **given.pop("base")))
        seeded = {"seed": seed} if "seed" in kind.__dataclass_fields__ else {}
        return kind(base=base, **given, **seeded)
    return scheduled(kind, fixed(name, at) | given, seed)


def scheduled(kind: Any, given: dict[str, Any], seed: int) -> Any:
    """The method with these settings, of which those of training change its own schedule."""
    if "schedule" not in kind.__dataclass_fields__:
        return kind(**given, seed=seed)
    names = {f.name for f in fields(Schedule)}
    rates = replace(kind.schedule, **{k: v for k, v in given.items() if k in names})
    return kind(schedule=rates, **{k: v for k, v in given.items() if k not in names}, seed=seed)


def stop(at: Any) -> float:
    return round(at.chance + ABOVE_CHANCE, 3)


def fixed(name: str, at: Any) -> dict[str, Any]:
    trained = {**TRAINED, "stop_recall": stop(at)}
    refusals = {"refusals": REFUSALS[at.name]}
    known = {
        "rocr": {"z_layer": 3},
        "rocr to a neutral anchor": {"z_layer": 3, "anchor": "neutral"},
        "sae_shift": {"sae": at.sae, "mode": "weights"},
        "sae_shift as a hook": {"sae": at.sae},
        "sae_clamp": {"sae": at.sae},
        "memit": {"z_layer": 3, "ridge": 0.05, "optimize": Optimize(clamp=0.75)},
        "memit, null space": {"z_layer": 3, "optimize": Optimize(clamp=0.75), "project": "null_space"},
        "needle": {"lr": 0.02},
        "directional_ablation": {"layers": (0, 1, 2, 3), "where": "from", "center": "reference"},
        "directional_ablation of weights": {"mode": "weights"},
        "leace": {"layers": (0, 1, 2)},
        "in_context": {"style": "flipped"},
        "rmu": STATES,
        "adaptive_rmu": {**STATES, "alpha": 2.0},
        "srmu": STATES,
        "kif": {**trained, **refusals, "ewc": 0.5},
        "kif, capsule": {"mode": "capsule", **refusals},
        "sae_iru": {"sae": at.sae, "lr": 3e-3, "batch_size": 32},
        "klue": TRAINED,
        "last_layer_ascent": {"epochs": 25, "batch_size": 48, "max_nll": 12.0, "stop_recall": stop(at)},
        "grad_ascent of embeddings": {**trained, "only": "embeddings"},
        "task_vector": TRAINED,
        "idk_dpo": {**trained, **refusals},
        "flat": {**trained, **refusals},
    }
    closed = ("rome", "r_rome", "knowledge_neuron_erase", "knowledge_neuron_update", "ssd", "token_guard")
    return known.get(name, {} if name in closed else trained)
