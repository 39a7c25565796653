"""Causal tracing: which clean states bring the answer back when the subject is drowned in noise.

Paper:    Meng, Bau, Andonian, Belinkov 2022, Locating and editing factual associations in GPT, arXiv 2202.05262,
          section 2.1 and appendix B.
Needs:    facts that the model answers; per fact about half of n_layers forward passes of tokens x samples rows.
Differs:  noise is drawn anew for each fact (seeded by its id), the same for every restoration of that fact; the window
          of MLP and attention restorations is the same share of the depth as the paper's 10 of 48 layers; the
          probability of an answer of several tokens is the geometric mean over its tokens. Nothing is recomputed below
          the patched layer: rows join at it and all layers share each block call; the effects are the same.
Fails:    noise takes a model off its distribution, and where an effect peaks is weakly related to where an edit works
          best (Hase et al. 2023, arXiv 2301.04213): sweep the layers as well.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import Attribution, Fact, Site, SiteKind
from mech_unlearn.locate.average import over_facts
from mech_unlearn.locate.logit_lens import answer_logprobs
from mech_unlearn.locate.token_classes import CLASSES, token_classes
from mech_unlearn.model import Model
from mech_unlearn.prompts import Query, make_queries


@dataclass(frozen=True, kw_only=True)
class _Setting:
    kind: SiteKind
    window: int
    samples: int
    scale: float  # standard deviation of the noise
    seed: int
    max_tokens: int


@dataclass(frozen=True, eq=False, kw_only=True)
class _Runs:
    """Clean and corrupted states of facts of equal length; corrupted rows are ordered fact by fact."""

    clean: Float[Tensor, "layer fact pos d_model"]
    """At the kind of site that is restored."""
    pre: Float[Tensor, "layer_or_end row pos d_model"]
    """Corrupted residual stream before each layer, and after the last one."""
    calls: list[tuple[tuple, dict[str, Any]]]
    """What each block was given beside the hidden states."""
    p_clean: Float[Tensor, " fact"]
    p_corrupted: Float[Tensor, " fact"]


def subject_sigma(model: Model, queries: Sequence[Query]) -> float:
    """Standard deviation over all entries of the embeddings of all subjects' tokens, as in the paper's code."""
    kept: list[Tensor] = []
    with torch.no_grad(), model.hooks(("hook_embed", lambda x: kept.append(x[0]))):
        for tokens in {query.prompt[slice(*query.span)] for query in queries}:
            model.logits(torch.tensor([tokens], device=model.device))
    return torch.cat(kept).float().std(unbiased=False).item()


def window_layers(center: int, width: int, n_layers: int) -> range:
    """Layers of a window around a centre: l-5..l+4 for a width of 10, cut off at the ends (the paper's code)."""
    return range(max(0, center - width // 2), min(n_layers, center + (width + 1) // 2))


def _noise(query: Query, d_model: int, setting: _Setting) -> Float[Tensor, "sample pos d_model"]:
    a, b = query.span
    generator = torch.Generator().manual_seed(zlib.crc32(f"{setting.seed} {query.fact.id}".encode()))
    noise = torch.zeros(setting.samples, len(query.full) - 1, d_model)
    noise[:, a:b] = setting.scale * torch.randn(setting.samples, b - a, d_model, generator=generator)
    return noise


def _record(model: Model, ids: Tensor) -> list[tuple[tuple, dict[str, Any]]]:
    """What the model gives each block beside the hidden states, for one row; it holds for all rows of that length."""
    calls: list[tuple[tuple, dict[str, Any]]] = []

    def keep(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append((args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))

    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in model.bridge.blocks]
    try:
        model.logits(ids[:1])
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _block(model: Model, layer: int, x: Tensor, call: tuple[tuple, dict[str, Any]]) -> Tensor:
    out = model.bridge.blocks[layer](x, *call[0], **call[1])
    return out[0] if isinstance(out, tuple) else out


def _probability(model: Model, final: Float[Tensor, "row pos d_model"], queries: Sequence[Query]) -> Tensor:
    """Probability of the answer (geometric mean over its tokens) of rows that cycle through the queries' samples."""
    start, size = len(queries[0].prompt) - 1, len(queries[0].answers[0])
    targets = torch.tensor([query.answers[0] for query in queries])
    per_query = len(final) // len(queries)
    states = final[:, start : start + size].flatten(0, 1)
    logprob = answer_logprobs(model, states, targets.repeat_interleave(per_query, 0).flatten())
    return logprob.unflatten(0, (-1, size)).mean(1).exp()


def _run(model: Model, queries: Sequence[Query], setting: _Setting) -> _Runs:
    ids = torch.tensor([query.full[:-1] for query in queries], device=model.device)
    layers = range(model.n_layers)
    clean: list[Tensor] = []
    final: list[Tensor] = []
    last = Site(model.n_layers - 1, "resid_post")
    reads = [(Site(layer, setting.kind), lambda x: clean.append(x)) for layer in layers]
    with model.hooks(*reads, (last, lambda x: final.append(x))):
        model.logits(ids)
    noise = torch.cat([_noise(query, model.d_model, setting) for query in queries]).to(model.device, model.dtype)
    pre: list[Tensor] = []
    reads = [(Site(layer, "resid_pre"), lambda x: pre.append(x)) for layer in layers]
    with model.hooks(("hook_embed", lambda x: x + noise), *reads, (last, lambda x: pre.append(x))):
        model.logits(ids.repeat_interleave(setting.samples, 0))
    corrupted = _probability(model, pre[-1], queries).unflatten(0, (len(queries), -1)).mean(1)
    return _Runs(
        clean=torch.stack(clean),
        pre=torch.stack(pre),
        calls=_record(model, ids),
        p_clean=_probability(model, final[0], queries),
        p_corrupted=corrupted,
    )


def _restore(
    model: Model, runs: _Runs, queries: Sequence[Query], places: Sequence[int], setting: _Setting
) -> Float[Tensor, "fact place layer"]:
    """P(answer) with one clean state (or window) put back, mean over samples, for each place and layer.

    One sweep upwards: the rows of a restoration join the batch at the first layer that it changes.
    """
    n_layers, count, rows = model.n_layers, len(places), runs.pre.shape[1]
    at = torch.tensor(places, device=model.device)
    every = torch.arange(count, device=model.device)
    clean = runs.clean[:, :, at].repeat_interleave(setting.samples, 1).transpose(1, 2)  # layer place row d_model
    windows = [window_layers(center, setting.window, n_layers) for center in range(n_layers)]
    batch = runs.pre.new_empty(0, *runs.pre.shape[2:])
    centers: list[int] = []

    def join(center: int, state: Float[Tensor, "row pos d_model"]) -> Tensor:
        centers.append(center)
        cohort = state.expand(count, *state.shape).clone()
        if setting.kind == "resid_post":
            cohort[every, :, at] = clean[center].to(cohort)
        return torch.cat([batch, cohort.flatten(0, 1)])

    def put(x: Tensor, layer: int, members: list[int]) -> Tensor:
        out = x.clone().unflatten(0, (len(centers), count, rows))
        which = torch.tensor(members, device=model.device)
        out[which[:, None], every[None], :, at[None]] = clean[layer].to(out)
        return out.flatten(0, 2)

    for layer in range(n_layers):
        if setting.kind == "resid_post":
            if centers:
                batch = _block(model, layer, batch, runs.calls[layer])
            batch = join(layer, runs.pre[layer + 1])
            continue
        for center in [c for c in range(n_layers) if windows[c].start == layer]:
            batch = join(center, runs.pre[layer])
        members = [i for i, center in enumerate(centers) if layer in windows[center]]
        with model.hooks((Site(layer, setting.kind), lambda x, a=layer, b=members: put(x, a, b))):
            batch = _block(model, layer, batch, runs.calls[layer])
    repeated = [query for _ in range(len(centers) * count) for query in queries]
    p = _probability(model, batch, repeated).unflatten(0, (n_layers, count, len(queries), setting.samples))
    return p.mean(-1).permute(2, 1, 0)


@torch.no_grad()
def _trace(
    model: Model, queries: Sequence[Query], setting: _Setting
) -> tuple[list[Float[Tensor, "prompt_token layer"]], Tensor, Tensor]:
    """Effect of each restoration for each query, and its clean and corrupted probability."""
    if model.active:
        raise ValueError("causal tracing calls the blocks one by one and cannot run under activation interventions")
    groups: dict[tuple[int, int], list[int]] = {}
    for i, query in enumerate(queries):
        groups.setdefault((len(query.full), len(query.prompt)), []).append(i)
    effects: list[Tensor] = [torch.empty(0)] * len(queries)
    p_clean, p_corrupted = torch.zeros(len(queries)), torch.zeros(len(queries))
    for (length, width), members in groups.items():
        one = setting.samples * model.n_layers * (length - 1)  # tokens of one place of one fact at the top of the sweep
        size = max(1, setting.max_tokens // (one * width))
        step = max(1, min(width, setting.max_tokens // one))
        for start in range(0, len(members), size):
            chosen = members[start : start + size]
            part = [queries[i] for i in chosen]
            runs = _run(model, part, setting)
            restored = [_restore(model, runs, part, range(width)[a : a + step], setting) for a in range(0, width, step)]
            change = torch.cat(restored, 1) - runs.p_corrupted[:, None, None]
            for i, effect in zip(chosen, change, strict=True):
                effects[i] = effect
            p_clean[chosen], p_corrupted[chosen] = runs.p_clean, runs.p_corrupted
    return effects, p_clean, p_corrupted


def _setting(
    model: Model,
    queries: Sequence[Query],
    kind: str = "resid_post",
    window: int | None = None,
    samples: int = 10,
    noise: float = 3.0,
    sigma: float | None = None,
    seed: int = 0,
    max_tokens: int = 32_768,
) -> tuple[_Setting, str]:
    if not queries:
        raise ValueError("no facts to locate: give at least one")
    if kind not in ("resid_post", "mlp_out", "attn_out"):
        raise ValueError(f"kind {kind!r}: choose resid_post, mlp_out or attn_out")
    if samples < 1 or noise <= 0 or (window is not None and window < 1):
        raise ValueError(f"samples={samples}, noise={noise}, window={window}: all must be positive")
    if sigma is None:
        sigma = subject_sigma(model, queries)
    width = 1 if kind == "resid_post" else max(1, round(model.n_layers * 10 / 48)) if window is None else window
    setting = _Setting(kind=kind, window=width, samples=samples, scale=noise * sigma, seed=seed, max_tokens=max_tokens)
    restored = kind if kind == "resid_post" else f"{kind}, windows of {width} layers"
    return setting, f"restored: {restored}; noise {noise:g} x {sigma:.3g} on all subject tokens, {samples} samples"


def causal_trace_per_fact(
    model: Model,
    facts: Sequence[Fact],
    *,
    kind: str = "resid_post",
    window: int | None = None,
    samples: int = 10,
    noise: float = 3.0,
    sigma: float | None = None,
    seed: int = 0,
    max_tokens: int = 32_768,
) -> Attribution:
    """Indirect effect of each token class and layer for each fact: axes (fact, token, layer), probability.

    The effect is P(answer) with the clean state restored minus P(answer) corrupted, both the mean over the samples,
    on the main prompt; the mean over the tokens of a class, NaN where a prompt has none.

    Args:
        kind: restore the residual stream after a layer, or the MLP or attention outputs of a window of layers.
        window: layers of a window; by default 10 / 48 of the depth, as in the paper.
        samples: corrupted copies (10 in the paper).
        noise: standard deviation of the noise in multiples of sigma (3 in the paper).
        sigma: by default measured: the standard deviation of the subjects' embeddings.
        max_tokens: tokens in a batch at the most; bounds memory.

    Raises:
        ValueError: no facts, settings out of range, or activation interventions in force.
    """
    queries = make_queries(model.tokenizer, facts, "prompt", distractors=False)
    setting, note = _setting(model, queries, kind, window, samples, noise, sigma, seed, max_tokens)
    effects, clean, corrupted = _trace(model, queries, setting)
    table = torch.full((len(facts), len(CLASSES), model.n_layers), float("nan"))
    for i, (query, effect) in enumerate(zip(queries, effects, strict=True)):
        for c, places in enumerate(token_classes(query).values()):
            if places:
                table[i, c] = effect[places].mean(0)
    return Attribution(
        name=f"causal trace, {kind}",
        values=table,
        axes=("fact", "token", "layer"),
        labels={"fact": tuple(f.id for f in facts), "token": CLASSES, "layer": tuple(range(model.n_layers))},
        unit="change of P(answer)",
        n=len(facts),
        note=f"{note}; mean P clean {clean.mean():.3f}, corrupted {corrupted.mean():.3f}",
    )


def causal_trace(model: Model, facts: Sequence[Fact], **settings: Any) -> Attribution:
    """Average over facts (those whose prompt has the class) of `causal_trace_per_fact`: axes (token, layer)."""
    return over_facts(causal_trace_per_fact(model, facts, **settings), facts)


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
