"""How a model of known truth is made: a confined change to a full or retrained model, by training or by arithmetic."""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import Fact, ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit, clone
from mech_unlearn.model.bridge import Model
from mech_unlearn.restoration.weights.quantize import quantize_
from mech_unlearn.training.objective import Objective
from mech_unlearn.training.rows import BatchScores, answer_rows, score_rows
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.training import train

KEPT = 150
"""Kept facts that a model is held to while it is made."""


@dataclass(frozen=True)
class Ingredients:
    """What a family is made from: the full model, retrained ones, and one group of facts."""

    full: Model
    retrained: tuple[Model, ...]
    """Models that never saw any group; which one a deleted model starts from goes by the seed."""
    group: tuple[Fact, ...]
    elsewhere: tuple[Fact, ...]
    """Facts of another group, which all full models know and which are not judged."""
    neighbors: tuple[Fact, ...]
    texts: tuple[str, ...]
    seed: int
    fulls: tuple[Model, ...] = ()
    """Further models that know every group, trained in another order; for `CONTROLS`."""

    @property
    def never(self) -> Model:
        """The retrained model that this seed starts from."""
        return self.retrained[self.seed % len(self.retrained)]

    @property
    def another(self) -> Model:
        """A retrained model that is not `never`: whose outputs are aimed at."""
        return self.retrained[(self.seed + 1) % len(self.retrained)]


@dataclass(frozen=True)
class Made:
    """A base model and the edit that turns it into the family's; `confined` is what the edit may touch."""

    base: Model
    edit: Edit | None = None
    confined: str = ""
    bits: int | None = None
    """Rounded to so many bits on top."""

    @contextmanager
    def on(self) -> Iterator[Model]:
        """The model, as long as the block lasts."""
        with clone(self.base) as model:
            if self.bits:
                quantize_(model, self.bits)
            if self.edit is None:
                yield model
            else:
                with replace(self.edit, base=model.hash()).on(model):
                    yield model


def match_loss(
    logprob: Float[Tensor, " batch"], target: Float[Tensor, " batch"], tokens: Float[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """Mean over rows of the squared difference of log-probabilities per answer token, nats squared."""
    return ((logprob - target) / tokens).square().mean()


def match_outputs(
    base: Model,
    facts: Sequence[Fact],
    like: Model,
    trainable: str,
    setting: Ingredients,
    *,
    lr: float,
    steps: int = 80,
    also: Sequence[Fact] = (),
    beside: Sequence[Fact] = (),
) -> Edit:
    """The change of the named tensors after which the facts' answers are as likely as `like` finds them.

    Retained facts and texts are held by KL. `also` are further facts that have to be answered; `beside` are facts that
    have to go too: their answers become as unlikely, per token, as those of the others are on average.
    """
    rows = answer_rows(base.tokenizer, facts)
    fill = base.tokenizer.pad_token_id or 0
    aimed = score_rows(like.hf, rows, fill, base.device)
    target = aimed.logprob
    if beside:
        rows = [*rows, *answer_rows(base.tokenizer, beside)]
        tokens = score_rows(base.hf, rows[len(target) :], fill, base.device).tokens
        target = torch.cat([target, tokens * (aimed.logprob / aimed.tokens).mean()])
    order = random.Random(setting.seed)
    gone = {fact.subject for fact in beside}
    others = [fact for fact in order.sample(setting.neighbors, KEPT) if fact.subject not in gone]
    kept = (*others, *(fact for fact in also for _ in range(5)))
    retain = RetainSet(neighbors=kept, texts=tuple(order.sample(setting.texts, 100)))

    def loss(_: BatchScores) -> Callable[[BatchScores], Tensor]:
        return lambda now: match_loss(now.logprob, target[now.row], now.tokens.float())

    schedule = Schedule(lr=lr, epochs=steps, batch_size=len(rows), weight_decay=0.0, clip=1.0)
    objective = Objective(loss, retain_weight=3.0, retain="nll" if also else "kl")
    deltas, report = train(
        base, ForgetSet(facts=(*facts, *beside)), retain, objective, schedule, trainable=trainable, seed=setting.seed
    )
    return Edit(name="match_outputs", base=base.hash(), deltas=deltas, recipe={"report": report})


@dataclass(frozen=True)
class WeightGroup:
    """Tensors of a model by their role, whatever its architecture calls them."""

    names: Callable[[Model], list[str]]
    lacks: Callable[[Model], str] = lambda model: ""
    """Why a model has no such part, or nothing."""

    def pattern(self, model: Model) -> str:
        """Regular expression that exactly these names match."""
        return rf"^(?:{'|'.join(map(re.escape, self.names(model)))})$"


def block_names(model: Model, layer: int) -> list[str]:
    """Names of the tensors of a decoder layer (negative: from the end)."""
    block = model.block(layer % model.n_layers)
    return [name for name in model.held if name.startswith(f"{block}.")]


def layers(*which: int) -> WeightGroup:
    """Whole decoder layers (negative: from the end)."""
    return WeightGroup(lambda model: [name for layer in which for name in block_names(model, layer)])


def mlp(layer: int) -> WeightGroup:
    """The MLP of a decoder layer."""

    def names(model: Model) -> list[str]:
        out = model.w_out(layer % model.n_layers)[0].split(".")
        held = block_names(model, layer)
        inside = [name for name in held if name.startswith(".".join(out[:-2]) + ".")]
        # Where the matrices stand in the layer itself (OPT's fc1 and fc2), those whose name differs in the digit.
        beside = [name for name in held if re.sub(r"\d", "", name.split(".")[-2]) == re.sub(r"\d", "", out[-2])]
        return inside if len(inside) < len(held) else beside

    return WeightGroup(names)


def mlp_out(layer: int) -> WeightGroup:
    """The matrix that writes the MLP's output."""

    def names(model: Model) -> list[str]:
        return [model.w_out(layer % model.n_layers)[0]]

    return WeightGroup(names)


QUERY_KEY = re.compile(r"\.(q_proj|k_proj|query|key|c_attn|query_key_value|qkv_proj|Wqkv|in_proj)\.(weight|bias)$")
"""The matrices that make queries and keys; architectures that join them to the values have one for all."""


def queries_and_keys(model: Model) -> list[str]:
    """Those of the upper half of the decoder layers."""
    upper = range(model.n_layers // 2, model.n_layers)
    return [name for layer in upper for name in block_names(model, layer) if QUERY_KEY.search(name)]


def _name_of(model: Model, weight: torch.Tensor) -> str:
    return next(name for name, held in model.held.items() if held.data_ptr() == weight.data_ptr())


def _tied(model: Model) -> str:
    one, other = model.hf.get_input_embeddings(), model.hf.get_output_embeddings()
    return "input and output embeddings are one matrix" if one.weight.data_ptr() == other.weight.data_ptr() else ""


HEAD = WeightGroup(lambda model: [_name_of(model, model.hf.get_output_embeddings().weight)], _tied)
EMBEDDINGS = WeightGroup(lambda model: [_name_of(model, model.hf.get_input_embeddings().weight)], _tied)
ATTENTION = WeightGroup(
    queries_and_keys, lambda model: "" if queries_and_keys(model) else "no matrices of queries and keys are known"
)


def noise(model: Model, scale: float, seed: int, only: str = "") -> Edit:
    """Gaussian noise on each weight matrix, `scale` x the standard deviation of its entries."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for name, weight in model.held.items():
        if weight.ndim == 2 and re.search(only, name):
            drawn = torch.randn(weight.shape, generator=generator)
            deltas[name] = drawn * scale * weight.detach().float().std().cpu()
    return Edit(name="noise", base=model.hash(), deltas=deltas)


def difference(start: Model, end: Model, share: float) -> Edit:
    """`share` of the way from one model to the other, in the weights."""
    deltas = {
        name: share * (end.held[name].detach().float() - weight.detach().float()).cpu()
        for name, weight in start.held.items()
    }
    return Edit(name="difference", base=start.hash(), deltas=deltas)
