"""Causal tracing: which clean states bring the answer back when the subject is corrupted.

Paper:    Meng, Bau, Andonian, Belinkov 2022, Locating and editing factual associations in GPT, arXiv 2202.05262,
          section 2.1 and appendix B. Resampled subjects: Zhang and Nanda 2024, arXiv 2309.16042.
Needs:    facts that the model answers; per fact one clean and `samples` corrupted forward passes, and one suffix
          sweep over all tokens and layers.
Differs:  noise is drawn anew for each fact (seeded by its id), the same for every restoration of that fact; the window
          of MLP and attention restorations is the same share of the depth as the paper's 10 of 48 layers; the
          probability of an answer of several tokens is the geometric mean over its tokens.
Fails:    noise takes a model off its distribution, and where an effect peaks is weakly related to where an edit works
          best (Hase et al. 2023, arXiv 2301.04213): sweep the layers as well.
"""

import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.attribution import Attribution
from mech_unlearn.core import Fact, Site, SiteKind
from mech_unlearn.locate.patching.token_classes import CLASSES, token_classes
from mech_unlearn.locate.signature import takes_settings_of
from mech_unlearn.model.answers import answer_rows, answer_score, equal_shape
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.sweep import Patch, Recording, put, record, refuse_interventions, sweep
from mech_unlearn.model.tokens import Query, make_queries

CORRUPTIONS = ("noise", "resample", "zero")
SEVERED = {None: None, "mlp": "mlp_out", "attention": "attn_out"}


@dataclass(frozen=True, kw_only=True)
class _Setting:
    kind: SiteKind
    window: int
    samples: int
    corruption: str
    scale: float
    """Standard deviation of the noise."""
    sever: SiteKind | None
    seed: int
    max_tokens: int


def _embeddings(model: Model, tokens: Sequence[int]) -> Float[Tensor, "pos d_model"]:
    kept: list[Tensor] = []
    with torch.no_grad(), model.hooks(("hook_embed", lambda x: kept.append(x[0]))):
        model.logits(torch.tensor([list(tokens)], device=model.device))
    return kept[0]


def subject_sigma(model: Model, queries: Sequence[Query]) -> float:
    """Standard deviation over all entries of the embeddings of all subjects' tokens, as in the paper's code."""
    subjects = {query.prompt[slice(*query.span)] for query in queries}
    return torch.cat([_embeddings(model, tokens) for tokens in subjects]).float().std(unbiased=False).item()


def window_layers(center: int, width: int, n_layers: int) -> range:
    """Layers of a window around a centre: l-5..l+4 for a width of 10, cut off at the ends (the paper's code)."""
    return range(max(0, center - width // 2), min(n_layers, center + (width + 1) // 2))


def _corrupted(
    query: Query, clean: Float[Tensor, "pos d_model"], subjects: dict[tuple[int, ...], Tensor], setting: _Setting
) -> Float[Tensor, "sample pos d_model"]:
    """Embeddings of a query's corrupted copies; only the subject's differ from the clean ones."""
    a, b = query.span
    out = clean.expand(setting.samples, -1, -1).clone()
    generator = torch.Generator().manual_seed(zlib.crc32(f"{setting.seed} {query.fact.id}".encode()))
    if setting.corruption == "zero":
        out[:, a:b] = 0
    elif setting.corruption == "noise":
        noise = torch.randn(setting.samples, b - a, clean.shape[-1], generator=generator)
        out[:, a:b] += (setting.scale * noise).to(out)
    else:
        own = query.prompt[a:b]
        others = [tokens for tokens in subjects if len(tokens) == len(own) and tokens != own]
        if not others:
            raise ValueError(
                f"fact {query.fact.id!r}: no other subject has {len(own)} tokens to be put in its place; give more "
                "facts, or use corruption='noise'"
            )
        drawn = torch.randint(len(others), (setting.samples,), generator=generator).tolist()
        out[:, a:b] = torch.stack([subjects[others[i]] for i in drawn]).to(out)
    return out


def _record(
    model: Model, queries: Sequence[Query], subjects: dict[tuple[int, ...], Tensor], setting: _Setting
) -> tuple[Recording, Recording]:
    """The clean run of queries of equal shape, and the corrupted one; corrupted rows are ordered query by query."""
    ids = torch.tensor([query.full[:-1] for query in queries], device=model.device)
    layers = range(model.n_layers)
    embeddings: list[Tensor] = []
    wanted = [Site(layer, setting.kind) for layer in layers] if setting.kind != "resid_post" else []
    frozen = [Site(layer, setting.sever) for layer in layers] if setting.sever else []
    clean = record(model, ids, writes=[("hook_embed", lambda x: embeddings.append(x))], keep=wanted, cache=False)
    drowned = torch.cat(
        [_corrupted(query, x, subjects, setting) for query, x in zip(queries, embeddings[0], strict=True)]
    )
    rows = ids.repeat_interleave(setting.samples, 0)
    return clean, record(model, rows, writes=[("hook_embed", lambda _: drowned)], keep=frozen)


def _restorations(
    clean: Recording, corrupted: Recording, place: int, setting: _Setting, centers: Sequence[int]
) -> list[Patch]:
    """One patch per layer: the clean states of its window put back at one place of every corrupted row."""
    rows = torch.arange(len(corrupted.ids), device=corrupted.ids.device)
    at = torch.full((len(rows),), place)
    out = []
    for center in centers:
        window = [Site(i, setting.kind) for i in window_layers(center, setting.window, clean.model.n_layers)]
        writes = [(s, put(at, clean.state(s)[:, place].repeat_interleave(setting.samples, 0))) for s in window]
        if setting.sever:
            above = [Site(i, setting.sever) for i in range(center + 1, clean.model.n_layers)]
            writes += [(s, put(at, corrupted.state(s)[:, place])) for s in above]
        out.append(Patch(rows, tuple(writes), place))
    return out


def _trace_group(
    model: Model, queries: Sequence[Query], subjects: dict[tuple[int, ...], Tensor], setting: _Setting
) -> tuple[Float[Tensor, "query place layer"], Tensor, Tensor]:
    """Effects, clean and corrupted probability of queries of equal shape; places before the subject have none."""
    clean, corrupted = _record(model, queries, subjects, setting)
    read = answer_rows(queries)
    answers = [query.answers[0] for query in queries for _ in range(setting.samples)]
    p_clean = answer_score(model, clean.resid[-1][:, read], [q.answers[0] for q in queries], "probability")
    p_corrupted = answer_score(model, corrupted.resid[-1][:, read], answers, "probability")
    p_corrupted = p_corrupted.unflatten(0, (len(queries), -1)).mean(1)
    effects = torch.zeros(len(queries), len(queries[0].prompt), model.n_layers)
    patches, where = [], []
    for place in range(queries[0].span[0], len(queries[0].prompt)):
        # after the last layer only the positions that predict the answer are read
        top = model.n_layers - (setting.kind == "resid_post" and place < read[0])
        patches += _restorations(clean, corrupted, place, setting, range(top))
        where += [(place, layer) for layer in range(top)]
    for start in range(0, len(patches), chunk := max(1, 8 * setting.max_tokens // corrupted.ids.numel())):
        states = sweep(corrupted, patches[start : start + chunk], read, max_tokens=setting.max_tokens)
        p = answer_score(model, torch.cat(states), answers * len(states), "probability")
        means = p.unflatten(0, (len(states), len(queries), -1)).mean(-1).cpu()
        for (place, layer), value in zip(where[start : start + chunk], means, strict=True):
            effects[:, place, layer] = value - p_corrupted.cpu()
    return effects, p_clean.cpu(), p_corrupted.cpu()


@torch.no_grad()
def _trace(
    model: Model, queries: Sequence[Query], setting: _Setting
) -> tuple[list[Float[Tensor, "prompt_token layer"]], Tensor, Tensor]:
    """Effect of each restoration for each query, and its clean and corrupted probability."""
    refuse_interventions(model)
    subjects = {}
    if setting.corruption == "resample":
        subjects = {t: _embeddings(model, t) for t in dict.fromkeys(q.prompt[slice(*q.span)] for q in queries)}
    effects: list[Tensor] = [torch.empty(0)] * len(queries)
    p_clean, p_corrupted = torch.zeros(len(queries)), torch.zeros(len(queries))
    for members in equal_shape(queries, max(1, setting.max_tokens // (setting.samples * model.n_layers))):
        part = [queries[i] for i in members]
        found, p_clean[members], p_corrupted[members] = _trace_group(model, part, subjects, setting)
        for i, effect in zip(members, found, strict=True):
            effects[i] = effect
    return effects, p_clean, p_corrupted


def _setting(
    model: Model,
    queries: Sequence[Query],
    kind: str = "resid_post",
    window: int | None = None,
    samples: int = 10,
    corruption: str = "noise",
    noise: float = 3.0,
    sigma: float | None = None,
    sever: str | None = None,
    seed: int = 0,
    max_tokens: int = 32_768,
) -> tuple[_Setting, str]:
    if not queries:
        raise ValueError("no facts to locate: give at least one")
    if kind not in ("resid_post", "mlp_out", "attn_out"):
        raise ValueError(f"kind {kind!r}: choose resid_post, mlp_out or attn_out")
    if corruption not in CORRUPTIONS or sever not in SEVERED:
        raise ValueError(
            f"corruption={corruption!r}, sever={sever!r}: choose {', '.join(CORRUPTIONS)}; and None, 'mlp', 'attention'"
        )
    if sever is not None and kind != "resid_post":
        raise ValueError(f"sever={sever!r} cuts modules above a restored resid_post; kind {kind!r} restores modules")
    if samples < 1 or noise <= 0 or (window is not None and window < 1):
        raise ValueError(f"samples={samples}, noise={noise}, window={window}: all must be positive")
    if corruption == "zero":
        samples = 1  # nothing is random: all samples would be the same
    if sigma is None and corruption == "noise":
        sigma = subject_sigma(model, queries)
    width = 1 if kind == "resid_post" else max(1, round(model.n_layers * 10 / 48)) if window is None else window
    if kind == "resid_post" and window not in (None, 1):
        warnings.warn("a window of resid_post is its last layer alone: window is ignored", stacklevel=4)
    setting = _Setting(
        kind=kind, window=width, samples=samples, corruption=corruption, scale=noise * (sigma or 0.0),
        sever=SEVERED[sever], seed=seed, max_tokens=max_tokens,
    )  # fmt: skip
    restored = kind if kind == "resid_post" else f"{kind}, windows of {width} layers"
    how = {
        "noise": f"noise {noise:g} x {sigma or 0:.3g} on all subject tokens",
        "resample": "another subject's embeddings on all subject tokens",
        "zero": "zero embeddings on all subject tokens",
    }[corruption]
    cut = "" if sever is None else f", {sever} severed above it at its token"
    return setting, f"restored: {restored}{cut}; {how}, {samples} samples"


def causal_trace_per_fact(
    model: Model,
    facts: Sequence[Fact],
    *,
    kind: str = "resid_post",
    window: int | None = None,
    samples: int = 10,
    corruption: str = "noise",
    noise: float = 3.0,
    sigma: float | None = None,
    sever: str | None = None,
    seed: int = 0,
    max_tokens: int = 32_768,
) -> Attribution:
    """Indirect effect of each token class and layer for each fact: axes (fact, token, layer), probability.

    The effect is P(answer) with the clean state restored minus P(answer) corrupted, both the mean over the samples,
    on the main prompt; the mean over the tokens of a class, NaN where a prompt has none.

    Args:
        kind: restore the residual stream after a layer ("resid_post"), or the outputs of a window of layers
            ("mlp_out", "attn_out").
        window: layers of a window; by default 10 / 48 of the depth, as in the paper.
        samples: corrupted copies (10 in the paper); one where nothing is random.
        corruption: of all the subject's token embeddings: "noise" (the paper), "resample" (those of another of the
            facts' subjects, of as many tokens) or "zero".
        noise: standard deviation of the noise in multiples of sigma (3 in the paper).
        sigma: by default measured: the standard deviation of the subjects' embeddings.
        sever: "mlp" or "attention": above the restored state these modules' outputs at its token stay corrupted
            (the paper's figure 3), so that only what the others do with it counts.
        seed: of the noise and of the subjects drawn.
        max_tokens: tokens in a batch at the most; bounds memory.

    Raises:
        ValueError: no facts, settings out of range, no subject to resample, or activation interventions in force.
    """
    queries = make_queries(model.tokenizer, facts, "prompt", distractors=False)
    setting, note = _setting(
        model, queries, kind, window, samples, corruption, noise, sigma, sever, seed, max_tokens
    )  # fmt: skip
    effects, clean, corrupted = _trace(model, queries, setting)
    table = torch.full((len(facts), len(CLASSES), model.n_layers), float("nan"))
    for i, (query, effect) in enumerate(zip(queries, effects, strict=True)):
        for c, places in enumerate(token_classes(query).values()):
            if places:
                table[i, c] = effect[places].mean(0)
    return Attribution(
        name=f"causal trace, {setting.kind}",
        values=table,
        axes=("fact", "token", "layer"),
        labels={"fact": tuple(f.id for f in facts), "token": CLASSES, "layer": tuple(range(model.n_layers))},
        unit="change of P(answer)",
        n=len(facts),
        note=f"{note}; mean P clean {clean.mean():.3f}, corrupted {corrupted.mean():.3f}",
    )


@takes_settings_of(causal_trace_per_fact)
def causal_trace(model: Model, facts: Sequence[Fact], **settings: Any) -> Attribution:
    """Average over facts (those whose prompt has the class) of `causal_trace_per_fact`: axes (token, layer)."""
    return causal_trace_per_fact(model, facts, **settings).mean(facts)


@takes_settings_of(causal_trace_per_fact)
def causal_trace_tokens(model: Model, fact: Fact, **settings: Any) -> Attribution:
    """Indirect effect of each token of one fact's main prompt and layer: axes (token, layer), probability.

    Takes the settings of `causal_trace_per_fact`; the noise is that of the same fact there if `sigma` is given.
    """
    queries = make_queries(model.tokenizer, [fact], "prompt", distractors=False)
    setting, note = _setting(model, queries, **settings)
    (effect,), clean, corrupted = _trace(model, queries, setting)
    words = model.tokenizer.convert_ids_to_tokens(list(queries[0].prompt))
    return Attribution(
        name=f"causal trace of {fact.id}, {setting.kind}",
        values=effect,
        axes=("token", "layer"),
        labels={"token": tuple(f"{i} {w}" for i, w in enumerate(words)), "layer": tuple(range(model.n_layers))},
        unit="change of P(answer)",
        n=1,
        note=f"{note}; P clean {clean.item():.3f}, corrupted {corrupted.item():.3f}",
    )
