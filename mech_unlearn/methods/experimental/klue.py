"""Klue: the neurons that hold the knowledge itself, not the answer's surface, are trained to forget.

Paper:    Yang et al. 2025, FaithUn: Toward Faithful Forgetting in Language Models by Investigating the
          Interconnectedness of Knowledge, arXiv 2502.19207. Neurons by attribution less that of superficial contexts;
          only rows that are still answered are trained on.
Changes:  row j of W_in and W_gate and column j of W_out, for the chosen neurons j; nothing else.
Needs:    a forward and backward pass over the forget rows and over the superficial contexts of their answers.
Differs:  the method's code is not public: share, alpha and the contexts are our working definition. Attribution is
          max over tokens of activation x gradient of P(answer), on the input of W_out, at each token that is read
          (prompt, and the answer before its last token). Contexts of an answer: prompts about other subjects that do
          not ask for it, and retained facts with the same answer. A row is left out of an epoch once it is no longer
          answered (greedy, all tokens); the paper's bound by probability is not used.
Fails:    neurons are taken to be the unit; where a fact is spread over the residual stream, 5 % of them leave it there.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import Fact, ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.methods.localized import neuron_masks
from mech_unlearn.methods.npo import npo_loss
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.tokens import Ask, tokenize
from mech_unlearn.training.around import PLAIN, Around
from mech_unlearn.training.losses import ascent
from mech_unlearn.training.objective import Objective
from mech_unlearn.training.rows import BatchScores, TrainRow, collate, forward
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.trainee import Trainee
from mech_unlearn.training.training import reported, require_positive, trained_edit
from mech_unlearn.training.wrapping import extended

Forgetting = Literal["npo", "ga"]


@dataclass(frozen=True, kw_only=True)
class Klue:
    """Settings of locating and training; `fit` does both."""

    share: float = 0.05
    """Share of all neurons that is trained; 0.01 to 0.1."""
    alpha: float = 1.0
    """Weight of the superficial attribution that is subtracted; 0 leaves it out."""
    contexts: int = 4
    """Superficial contexts per answer and kind, at most."""
    loss: Forgetting = "npo"
    """What is minimised on forget rows: "npo", or "ga" for gradient ascent."""
    beta: float = 0.1
    """Inverse temperature of NPO."""
    forget_weight: float = 1.0
    """Weight of the forget loss."""
    retain_weight: float = 1.0
    """Weight of the NLL per token on retained answers and texts; 0 trains on the forget rows alone."""
    schedule: Schedule = Schedule(lr=5e-5, epochs=10, weight_decay=0.0, skip_forgotten=True)
    """lr 5e-6 to 5e-5; small models trained from scratch need 1e-4 to 1e-2."""
    seed: int = 0
    """Draws the contexts and the order of the rows."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet, around: Around = PLAIN) -> Edit:
        """The change that training makes to the chosen neurons.

        Raises:
            ValueError: no superficial contexts, nothing retained, a setting out of range, or a loss that is not finite.
        """
        require_positive(self, "beta")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share}")
        if self.alpha < 0 or self.contexts < 1:
            raise ValueError(f"alpha={self.alpha} and contexts={self.contexts}: at least 0 and 1")
        if self.loss not in get_args(Forgetting):
            raise ValueError(f"loss must be 'npo' or 'ga', got {self.loss!r}")
        shallow = superficial_rows(model, forget.facts, retain.facts, self.contexts, self.seed) if self.alpha else []
        chosen: list[tuple[int, int]] = []

        def mask(run: Trainee) -> dict[str, Tensor]:
            chosen[:] = self._neurons(model, run, shallow)
            masks = neuron_masks(model, chosen)
            return {name: masks.get(name, torch.zeros(w.shape, dtype=torch.bool)) for name, w in run.weights.items()}

        matrices = neuron_masks(model, [(layer, 0) for layer in range(model.n_layers)])
        inner = extended(around, "klue", self, masks=(mask,))
        objective = Objective(self._loss, self.retain_weight, self.forget_weight)
        pattern = "^(" + "|".join(name.replace(".", r"\.") for name in matrices) + ")$"
        edit = trained_edit("klue", self, model, forget, retain, objective, pattern, inner)
        return reported(edit, neurons=len(chosen), neurons_of=model.n_layers * _width(model))

    def _loss(self, before: BatchScores) -> Callable[[BatchScores], Tensor]:
        if self.loss == "ga":
            return ascent
        return lambda now: npo_loss(now.logprob, before.logprob[now.row], self.beta)

    def _neurons(self, model: Model, run: Trainee, shallow: Sequence[tuple[float, TrainRow]]) -> list[tuple[int, int]]:
        rows = run.asked[: run.n_forget]
        score = attribution(model, run, rows, [1 / len(rows)] * len(rows), self.schedule.batch_size)
        if shallow:
            weights, contexts = zip(*shallow, strict=True)
            score = score - self.alpha * attribution(model, run, contexts, weights, self.schedule.batch_size)
        n = max(1, round(self.share * score.numel()))
        layer, neuron = torch.unravel_index(score.flatten().topk(n).indices, score.shape)
        return sorted(zip(layer.tolist(), neuron.tolist(), strict=True))


def superficial_rows(
    model: Model, facts: Sequence[Fact], kept: Sequence[Fact], n: int, seed: int
) -> list[tuple[float, TrainRow]]:
    """(Weight, row) of the superficial contexts of each answer; weights average within and then over forget rows.

    At most n retained facts with the same answer, and n prompts about retained facts with another answer, in whose
    place the answer is put.

    Raises:
        ValueError: an answer without any.
    """
    order, out = random.Random(seed), []
    times = Counter(fact.object for fact in facts for _ in fact.templates)
    for answer, count in times.items():
        same = [fact for fact in kept if fact.object == answer]
        other = [fact for fact in kept if fact.object != answer and fact.subject != answer]
        some = order.sample(same, min(n, len(same))) + [
            replace(fact, object=answer, distractors=()) for fact in order.sample(other, min(n, len(other)))
        ]
        if not some:
            raise ValueError(f"no retained fact to ask {answer!r} superficially with: give retained facts, or alpha=0")
        asked = tokenize(model.tokenizer, [Ask(fact, fact.prompt) for fact in some], distractors=False)
        share = count / times.total() / len(asked)
        out += [(share, (query.full, len(query.prompt))) for query in asked]
    return out


def attribution(
    model: Model, run: Trainee, rows: Sequence[TrainRow], weights: Sequence[float], size: int
) -> Float[Tensor, "layer neuron"]:
    """Weighted sum over rows of max over tokens of activation x gradient of P(answer), on the input of W_out.

    Source: 2502.19207, by our working definition; P is the product over the answer's tokens.
    """
    from tqdm import tqdm

    total = torch.zeros(model.n_layers, _width(model))
    for start in tqdm(range(0, len(rows), size), desc="locating", unit="batch", delay=2, leave=False):
        members = range(start, min(start + size, len(rows)))
        batch = collate(rows, members, run.fill, run.device)
        seen: list[Tensor] = []
        with ExitStack() as stack:
            for layer in range(model.n_layers):
                module = run.hf.get_submodule(model.w_out(layer)[0].removesuffix(".weight"))
                stack.callback(module.register_forward_pre_hook(_watch(seen)).remove)
            scores = forward(run.hf, batch)
        found = torch.autograd.grad(scores.logprob.exp().sum(), seen)
        run.n_forward, run.n_backward = run.n_forward + 1, run.n_backward + 1
        read = batch.mask.bool()
        read[torch.arange(len(read)), batch.mask.sum(1) - 1] = False  # nothing is predicted from the last token
        share = torch.tensor([weights[i] for i in members])
        for layer, (h, g) in enumerate(zip(seen, found, strict=True)):
            best = (h.detach() * g).masked_fill(~read[..., None], float("-inf")).amax(1)
            total[layer] += share @ best.float().cpu()
    return total


def _watch(seen: list[Tensor]) -> Callable[[Any, tuple], tuple]:
    def keep(_: Any, args: tuple) -> tuple:
        x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
        seen.append(x)
        return (x, *args[1:])

    return keep


def _width(model: Model) -> int:
    return model.held[model.w_out(0)[0]].numel() // model.d_model
