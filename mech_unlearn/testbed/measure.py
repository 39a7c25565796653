"""What a model of a world knows, and where it keeps it: recall, interchange, causal tracing, knownness.

Everything is measured on the plain forward pass, without any mask.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mech_unlearn.core import Entity, Fact, Measurement, Site
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.latents import entity_states, fvu, load_sae
from mech_unlearn.model.load import load
from mech_unlearn.model.scores import score
from mech_unlearn.model.tokens import Query, buckets, encode, make_queries, make_query
from mech_unlearn.testbed.corpus import Spec, constant_guess, constant_guess_shares

SwapPosition = Literal["last", "span", "end"]
SWAP_POSITIONS: tuple[SwapPosition, ...] = ("last", "span", "end")


def share(hits: int, n: int, unit: str) -> Measurement:
    """A share of n with its 95 % Wilson score interval (Wilson 1927, JASA 22:209)."""
    if n == 0:
        raise ValueError(f"no cases to take the share of ({unit})")
    z = 1.959964
    centre, spread = (hits + z * z / 2), z * (hits * (n - hits) / n + z * z / 4) ** 0.5
    return Measurement(
        value=hits / n, ci=((centre - spread) / (n + z * z), (centre + spread) / (n + z * z)), n=n, unit=unit
    )


def prompt_recall(model: Model, facts: Sequence[Fact], which: Literal["templates", "prompt", "heldout"]) -> Measurement:
    """Share of prompts after which greedy decoding gives the whole object; n counts facts times phrasings."""
    queries = make_queries(model.tokenizer, facts, which, distractors=False)
    exact = score(model, queries).exact
    return share(int(exact.sum()), len(queries), "share of prompts")


def swaps(queries: Sequence[Query]) -> list[tuple[Query, Query]]:
    """(source, target) pairs: the same phrasing and number of name tokens, different first answer tokens.

    Each query is the source once, its target is the next fitting one; queries without a partner are left out.
    """
    alike: dict[tuple, list[Query]] = {}
    for query in queries:
        width = query.span[1] - query.span[0]
        alike.setdefault((query.fact.relation, query.template, width), []).append(query)
    pairs = []
    for group in alike.values():
        for i, source in enumerate(group):
            rest = (*group[i + 1 :], *group[:i])
            target = next((t for t in rest if t.answers[0][0] != source.answers[0][0]), None)
            if target is not None:
                pairs.append((source, target))
    return pairs


def _positions(query: Query, place: SwapPosition) -> list[int]:
    a, b = query.span
    return {"last": [b - 1], "span": list(range(a, b)), "end": [len(query.prompt) - 1]}[place]


@torch.no_grad()
def _states(model: Model, ids: Tensor) -> dict[int, Tensor]:
    kept: dict[int, Tensor] = {}

    def keep(layer: int):
        return lambda x: kept.__setitem__(layer, x.clone())

    with model.hooks(*((Site(layer, "resid_post"), keep(layer)) for layer in range(model.n_layers))):
        model.logits(ids)
    return kept


@torch.no_grad()
def interchange_curves(
    model: Model, facts: Sequence[Fact], templates: Sequence[int] = (0, 1)
) -> dict[SwapPosition, list[Measurement]]:
    """place -> by layer, how often the answer follows a residual stream copied from another subject's prompt.

    The states of the source prompt at resid_post of one layer replace those of the target prompt at the last
    subject token, all subject tokens, or the last prompt token; a hit is the source's first answer token on top.
    An interchange intervention as in Geiger et al. 2021, arXiv 2106.02997.

    Args:
        templates: indices into `fact.templates`; -1 stands for the held-out phrasings.
    """
    forms = [(f, t) for f in facts for i in templates for t in (f.heldout if i < 0 else (f.templates[i],))]
    pairs = swaps([make_query(model.tokenizer, replace(fact, distractors=()), form) for fact, form in forms])
    hits = {place: [0] * model.n_layers for place in SWAP_POSITIONS}
    groups: dict[tuple, list[int]] = {}
    for i, (source, _) in enumerate(pairs):
        groups.setdefault((source.span, len(source.prompt)), []).append(i)
    for members in groups.values():
        source = torch.tensor([pairs[i][0].prompt for i in members], device=model.device)
        target = torch.tensor([pairs[i][1].prompt for i in members], device=model.device)
        wanted = torch.tensor([pairs[i][0].answers[0][0] for i in members], device=model.device)
        states = _states(model, source)
        for place in SWAP_POSITIONS:
            at = _positions(pairs[members[0]][0], place)
            for layer in range(model.n_layers):
                with model.hooks((Site(layer, "resid_post"), _copier(states[layer], at))):
                    best = model.logits(target)[:, -1].argmax(-1)
                hits[place][layer] += int((best == wanted).sum())
    return {place: [share(h, len(pairs), "share of swaps") for h in hits[place]] for place in SWAP_POSITIONS}


def _copier(states: Tensor, at: Sequence[int]):
    def write(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, at] = states[:, at]
        return x

    return write


@torch.no_grad()
def tracing(model: Model, facts: Sequence[Fact], *, seed: int = 0) -> dict[str, Any]:
    """Causal tracing at the last subject token: mean probability of the first answer token, clean, corrupted and by
    layer with the clean resid_post restored.

    Subject embeddings are corrupted by Gaussian noise of three standard deviations of the subject embeddings.
    Source: Meng et al. 2022, arXiv 2202.05262, section 2.1.
    """
    queries = [make_query(model.tokenizer, replace(fact, distractors=()), fact.prompt) for fact in facts]
    generator = torch.Generator().manual_seed(seed)
    embed = Site(0, "resid_pre")
    table = next(w for name, w in model.held.items() if name.endswith("embed_tokens.weight"))
    tokens = sorted({token for q in queries for token in q.prompt[q.span[0] : q.span[1]]})
    scale = 3 * table[tokens].std().item()
    totals = {"clean": 0.0, "corrupted": 0.0} | {f"L{layer}": 0.0 for layer in range(model.n_layers)}
    for members in buckets([query.prompt for query in queries]):
        ids = torch.tensor([queries[i].prompt for i in members], device=model.device)
        spans = torch.tensor([queries[i].span for i in members])
        wanted = torch.tensor([queries[i].answers[0][0] for i in members], device=model.device)
        inside = (torch.arange(ids.shape[1]) >= spans[:, :1]) & (torch.arange(ids.shape[1]) < spans[:, 1:])
        noise = torch.randn((*ids.shape, model.d_model), generator=generator) * scale * inside[..., None]
        corrupt = (embed, lambda x, noise=noise: x + noise.to(x))
        clean = _states(model, ids)
        rows, last = torch.arange(len(ids)), spans[:, 1] - 1

        def total(*writes: Any, ids: Tensor = ids, wanted: Tensor = wanted) -> float:
            with model.hooks(*writes):
                return model.logits(ids)[:, -1].softmax(-1)[torch.arange(len(ids)), wanted].sum().item()

        totals["clean"] += total()
        totals["corrupted"] += total(corrupt)
        for layer in range(model.n_layers):

            def restore(x: Tensor, rows: Tensor = rows, last: Tensor = last, kept: Tensor = clean[layer]) -> Tensor:
                x = x.clone()
                x[rows, last] = kept[rows, last]
                return x

            totals[f"L{layer}"] += total(corrupt, (Site(layer, "resid_post"), restore))
    return {"unit": "probability of the first answer token", "n": len(queries), "noise_sd": scale} | {
        key: value / len(queries) for key, value in totals.items()
    }


def known_auc(
    model: Model, known: Sequence[Entity], unknown: Sequence[Entity], template: str, layer: int
) -> Measurement:
    """ROC AUC of a logistic probe for known against unknown names, on the half of the names it was not fitted on.

    The interval is that of Hanley and McNeil 1982, Radiology 143:29.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    n = min(len(known), len(unknown))
    site = Site(layer, "resid_post")
    x = torch.stack([entity_states(model, group[:n], [template], site)[:, 0] for group in (known, unknown)]).numpy()
    fit, test = x[:, : n // 2], x[:, n // 2 :]
    m, d = test.shape[1], x.shape[-1]
    probe = LogisticRegression(max_iter=2000, C=0.1).fit(fit.reshape(-1, d), [1] * (n // 2) + [0] * (n // 2))
    auc = float(roc_auc_score([1] * m + [0] * m, probe.decision_function(test.reshape(-1, d))))
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    error = ((auc * (1 - auc) + (m - 1) * (q1 - auc**2 + q2 - auc**2)) / m**2) ** 0.5
    low, high = max(0.0, auc - 1.959964 * error), min(1.0, auc + 1.959964 * error)
    return Measurement(value=auc, ci=(low, high), n=2 * m, unit="ROC AUC over names")


def groups(spec: Spec) -> dict[str, tuple[Fact, ...]]:
    """Facts of the forget group, and of kept subjects whose held-out phrasings were shown in training or not."""
    shown = set(spec.heldout_shown)
    return {
        "forget": spec.forget.facts,
        "kept_shown": tuple(fact for fact in spec.kept if fact.subject in shown),
        "kept_not_shown": tuple(fact for fact in spec.kept if fact.subject not in shown),
    }


def measure_world(spec: Spec, folder: Path) -> dict[str, Any]:
    """What the models of a world know and where; plain JSON, each number with its interval and n."""
    parts, guess = groups(spec), constant_guess_shares(spec)
    models = {path.parent.name: load(path.parent) for path in sorted(folder.glob("*/config.json"))}
    models.pop("base", None)
    full, entities = models["full"], {name: _entities(facts) for name, facts in parts.items()}
    probes = [(layer, template) for layer in (1, 2) for template in (facts_prompts(spec))]
    result = {
        "world": spec.name,
        "counts": {name: {"facts": len(facts), "subjects": len(entities[name])} for name, facts in parts.items()}
        | {"unknown": {"facts": 0, "subjects": len(spec.unknown)}},
        "chance": {
            "by_relation": guess,
            "mean_over_forget_facts": sum(guess[fact.relation] for fact in parts["forget"]) / len(parts["forget"]),
            "constant_guess_on_forget_facts": constant_guess(spec),
        },
        "recall": {
            name: {
                part: {
                    "templates": prompt_recall(model, facts, "templates"),
                    "heldout": prompt_recall(model, facts, "heldout"),
                }
                for part, facts in parts.items()
            }
            for name, model in models.items()
        },
        "interchange": {
            part: {
                "templates": interchange_curves(full, parts[part][:480], range(len(parts[part][0].templates))),
                "heldout": interchange_curves(full, parts[part][:480], (-1,)),
            }
            for part in ("forget", "kept_not_shown")
        },
        "tracing": {part: tracing(full, parts[part][:480]) for part in ("forget", "kept_not_shown")},
        "known_auc": [
            {"layer": layer, "template": t, "auc": known_auc(full, entities["kept_not_shown"], spec.unknown, t, layer)}
            for layer, t in probes
        ],
        "sae": [_sae_report(full, path, spec) for path in sorted(folder.glob("saes/L*"))],
    }
    return to_json(result)


def _entities(facts: Sequence[Fact]) -> tuple[Entity, ...]:
    return tuple({fact.subject: fact.entity for fact in facts}.values())


def facts_prompts(spec: Spec) -> list[str]:
    """Two prompts of the first fact: one that starts with the name, one with the relation before the name."""
    templates = spec.facts[0].templates
    return [next(t for t in templates if t.startswith("{}")), next(t for t in templates if not t.startswith("{}"))]


def _sae_report(model: Model, path: Path, spec: Spec) -> dict[str, Any]:
    sae = load_sae(path, model)
    texts = [fact.prompt.replace("{}", fact.subject) for fact in spec.facts] + list(spec.retain.texts)
    rows = [encode(model.tokenizer, text).ids for text in texts]
    return {
        "site": str(sae.site),
        "d_sae": sae.d_sae,
        "l0": sae.mean_l0,
        "fvu": fvu(model, sae, rows),
        "texts": len(rows),
    }


def to_json(value: Any) -> Any:
    """Measurements inside dicts and lists as plain JSON values."""
    if isinstance(value, Measurement):
        return value.to_json()
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return value
