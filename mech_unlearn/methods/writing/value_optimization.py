"""What a rank-one edit writes: a vector per name, found by gradient descent, that changes how questions are answered.

The vector delta is added at the name's last token, to what one MLP's output matrix gives (ROME) or to the residual
stream after a layer (MEMIT). Minimised per name, in nats:

    fit + kl_weight * KL(p_delta || p_0) + decay * ||delta|| / ||v_0||^2 + sadr_weight * drift
    with ||delta|| <= clamp ||v_0||

`fit` is a mean over questions; the KL is of the next-token distribution at the last token of the bare name; v_0 is the
vector that delta is added to, mean over the name's contexts.

Sources: ROME 2202.05262 (eq. 4) and its code, MEMIT 2210.07229 (eq. 16), SADR 2502.14838.
Differs: the decay has ||delta|| to the first power over ||v_0||^2, as in ROME's code (its text has none);
    several names are optimised in one batch, each with a delta of its own: terms are summed over names, Adam and the
    clamp work per name, and a name that reached `stop_loss` is left alone, so that none feels the others;
    one delta per name serves all its questions (the papers have one per fact), as unlearning asks for;
    the KL is taken after the bare name, where the codes have "{} is a": nothing behind a token reaches it;
    the KL is that of ROME's code, F.kl_div(log p_0, log p_delta, log_target=True), which is KL(p_delta || p_0): the
    paper writes it the other way round;
    prefixes are dealt out to the questions in turn (the codes ask every question behind every prefix);
    Adam's step is relative to the root mean square of v_0, because an absolute one fits one model's scale.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mech_unlearn.core import Fact, ForgetSet, RetainSet
from mech_unlearn.methods.writing.questions import Optimize, Questions, make_questions, questions_of
from mech_unlearn.model.bridge import Model

EPS = 1e-8


@dataclass(frozen=True, eq=False)
class Values:
    """What the optimisation found."""

    deltas: Float[Tensor, "name d_model"]
    """Float64."""
    loss: Float[Tensor, " name"]
    """The last loss that was measured, nats."""
    first_loss: Float[Tensor, " name"]
    """The loss at delta = 0, nats."""
    n_forward: int
    n_backward: int


def kl(p: Float[Tensor, "row d_vocab"], q: Float[Tensor, "row d_vocab"]) -> Float[Tensor, " row"]:
    """KL(p || q) of two sets of log-probabilities, nats."""
    return (p.exp() * (p - q).masked_fill(p == -math.inf, 0)).sum(-1)


def entropy_gap(logprobs: Float[Tensor, "row d_vocab"]) -> Float[Tensor, " row"]:
    """log V minus the entropy, nats: how far from uniform; 0 at the maximum of the entropy.

    Source: the max-entropy defence of 2309.17410, with an offset so that its minimum is 0.
    """
    return math.log(logprobs.shape[-1]) + (logprobs.exp() * logprobs).sum(-1)


def attention_drift(
    before: Float[Tensor, "row head pos"], now: Float[Tensor, "row head pos"], at: Int[Tensor, " row"]
) -> Float[Tensor, " row"]:
    """KL(before || now) of one layer's attention from one query, nats, summed over the heads that over-attend.

    Those whose attention to position `at` exceeds the largest of any head before; so exactly 0 where nothing changed.

    Source: 2502.14838; the comparison and the KL are per question here, there on the mean over prompts. A weight of 0
    contributes 0, and now is bounded below by 1e-8 (the code adds that to both without renormalising).
    """
    rows = torch.arange(len(at), device=at.device)
    over = (now[rows, :, at] > before[rows, :, at].max(1, keepdim=True).values).detach()
    each = (torch.xlogy(before, before) - before * now.clamp(min=EPS).log()).sum(-1)
    return (each * over).sum(1)


def clamped(delta: Float[Tensor, "name d_model"], limit: Float[Tensor, " name"]) -> Float[Tensor, "name d_model"]:
    """Each row shortened to its limit where it is longer."""
    norm = delta.norm(dim=1)
    return delta * torch.where(norm > limit, limit / norm.clamp(min=1e-30) * (1 - 1e-6), torch.ones_like(norm))[:, None]


def module_path(model: Model, layer: int, where: Literal["mlp", "resid"]) -> str:
    """HF path of the module whose output delta is added to: the layer's MLP output matrix (before a norm behind it) or
    the layer."""
    return model.w_out(layer)[0].removesuffix(".weight") if where == "mlp" else model.block(layer)


def optimized(
    model: Model,
    names: Mapping[str, Sequence[Fact]],
    initial: Float[Tensor, "name d_model"],
    forget: ForgetSet,
    retain: RetainSet,
    path: str,
    settings: Optimize,
    before: Sequence[str],
    seed: int,
) -> Values:
    """A delta for each name, `settings.batch_size` at a time, on a float32 copy of the model as it is now.

    Args:
        names: name -> facts to be asked for; see `by_name`.
        initial: v_0 of each name, the vectors that delta is added to.
        path: HF path of the module whose output delta is added to; see `module_path`.
        before: prefixes that some of the questions stand behind; see `prefixes`.
        seed: draws unknown entities.

    Raises:
        ValueError: an edit of activations in force, no unknown entities for target "unknown", no end token for target
            "empty", a refusal that cannot be written, or a loss that is not finite.
    """
    from tqdm.auto import tqdm

    if model.in_force.interventions:
        raise ValueError(
            f"{model.name!r} has an edit of activations in force, which optimisation does not see; leave it"
        )
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        hf = model.plain_copy().float().requires_grad_(False)
    chunks = [list(names)[i : i + settings.batch_size] for i in range(0, len(names), settings.batch_size)]
    passes, done = [0, 0], []
    with tqdm(total=len(names), desc="values", unit="name", delay=2, disable=None) as bar:
        for i, chunk in enumerate(chunks):
            asked = {name: questions_of(names[name], before, settings.max_prompts) for name in chunk}
            questions = make_questions(model, hf, asked, forget, retain, settings, seed, passes)
            own = initial[i * settings.batch_size :][: len(chunk)].to(model.device).float()
            done.append(descend(hf, questions, own, path, settings, passes))
            bar.update(len(chunk))
    deltas, loss, first = (torch.cat(parts) for parts in zip(*done, strict=True))
    return Values(deltas.double(), loss, first, *passes)


@contextmanager
def added(hf: Any, path: str, delta: Tensor, questions: Questions) -> Iterator[None]:
    """Add each name's delta to the output of a module at the name's last token, in each row about it."""
    rows = torch.arange(len(questions.ids), device=delta.device)

    def hook(_: Any, __: tuple, out: Any) -> Any:
        given = out[0] if isinstance(out, tuple) else out
        by_row = given.reshape(*questions.ids.shape, -1)  # OPT joins rows and positions before its MLP
        x = by_row.index_put((rows, questions.at), delta[questions.owner].to(given), accumulate=True).reshape(
            given.shape
        )
        return (x, *out[1:]) if isinstance(out, tuple) else x

    handle = hf.get_submodule(path).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def look(
    hf: Any, path: str, delta: Tensor, questions: Questions, attention: bool
) -> tuple[Float[Tensor, "token d_vocab"], Float[Tensor, "name d_vocab"], list[Float[Tensor, "question head pos"]]]:
    """(Log-probabilities where the fit is, those after the bare names, per layer the attention of each question's last
    token)."""
    n = len(questions.last)
    rows, pos = questions.where
    bare = torch.arange(n, len(questions.ids), device=rows.device)
    spots = torch.cat([pos, questions.at[n:]])
    kept, index = spots.unique(return_inverse=True)
    with added(hf, path, delta, questions):
        out = hf(
            input_ids=questions.ids, attention_mask=questions.mask, use_cache=False, logits_to_keep=kept,
            output_attentions=attention,
        )  # fmt: skip
    logprobs = out.logits[torch.cat([rows, bare]), index].float().log_softmax(-1)
    every = torch.arange(n, device=rows.device)
    patterns = [layer[every, :, questions.last].float() for layer in out.attentions] if attention else []
    return logprobs[: len(rows)], logprobs[len(rows) :], patterns


def _mean_of(values: Float[Tensor, " item"], group: Int[Tensor, " item"], n: int) -> Float[Tensor, " group"]:
    """Mean of each group's values."""
    total = torch.zeros(n, device=values.device).index_add(0, group, values)
    return total / torch.bincount(group, minlength=n).clamp(min=1)


def loss_of(
    hf: Any, questions: Questions, initial: Float[Tensor, "name d_model"], path: str, settings: Optimize
) -> Callable[[Tensor], Float[Tensor, " name"]]:
    """The loss of each name as a function of the deltas, against the model without them."""
    n, sadr = len(initial), settings.sadr_weight > 0
    with torch.no_grad():
        _, bare_before, patterns_before = look(hf, path, torch.zeros_like(initial), questions, sadr)
    scale = initial.norm(dim=1).square()

    def fit(logprobs: Tensor) -> Tensor:
        if questions.goal is not None:
            return kl(questions.goal.log(), logprobs)
        if settings.target == "entropy":
            return entropy_gap(logprobs)
        return -logprobs.gather(1, questions.wanted[:, None])[:, 0]

    def loss(delta: Tensor) -> Tensor:
        logprobs, bare, patterns = look(hf, path, delta, questions, sadr)
        per_row = _mean_of(fit(logprobs), questions.where[0], len(questions.last))
        owner = questions.owner[: len(questions.last)]
        total = _mean_of(per_row, owner, n) + settings.kl_weight * kl(bare, bare_before)
        for before, now in zip(patterns_before, patterns, strict=True):
            drift = attention_drift(before, now, questions.at[: len(questions.last)])
            total = total + settings.sadr_weight * _mean_of(drift, owner, n)
        return total + settings.decay * delta.norm(dim=1) / scale

    return loss


def descend(
    hf: Any, questions: Questions, initial: Float[Tensor, "name d_model"], path: str, settings: Optimize,
    passes: list[int],
) -> tuple[Float[Tensor, "name d_model"], Float[Tensor, " name"], Float[Tensor, " name"]]:  # fmt: skip
    """(Deltas, loss of each when it stopped, loss at delta = 0) by projected Adam; a name that is done stays put."""
    norm = initial.norm(dim=1)
    if not (norm > 0).all():
        raise ValueError(f"the output of {path!r} is zero at a name's last token: nothing to scale delta by")
    loss = loss_of(hf, questions, initial, path, settings)
    passes[0] += 1
    unit = norm[:, None] / math.sqrt(initial.shape[1])
    scaled = torch.zeros_like(initial, requires_grad=True)  # delta in units of the root mean square of v_0
    adam = torch.optim.Adam([scaled], lr=settings.lr)
    running, last, first = torch.ones_like(norm, dtype=torch.bool), norm.clone(), norm.clone()
    for step in range(settings.steps + 1):
        found = loss(scaled * unit)
        passes[0] += 1
        if not found.isfinite().all():
            raise ValueError(f"the loss is not finite after {step} steps: lower lr={settings.lr}")
        first = found.detach() if step == 0 else first
        last = torch.where(running, found.detach(), last)
        running = running & (last >= settings.stop_loss)
        if step == settings.steps or not running.any():
            break
        adam.zero_grad()
        found[running].sum().backward()
        passes[1] += 1
        old = scaled.detach().clone()
        adam.step()
        with torch.no_grad():
            scaled.copy_(torch.where(running[:, None], clamped(scaled, settings.clamp * norm / unit[:, 0]), old))
    return (scaled * unit).detach(), last, first
