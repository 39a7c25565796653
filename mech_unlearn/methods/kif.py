"""Kif: a forgotten subject's direction is found in the MLP outputs and suppressed, by a capsule or by training.

Paper:    2026, Knowledge Immunization Framework (later ERUF), arXiv 2601.10566: its losses, distilled into weights.
Changes:  mode "distil": query, value and output matrices of the attention, full rank; where a model keeps query, key
          and value in one matrix (GPT-2, GPT-NeoX) that one. Mode "capsule": MLP outputs of one layer, along one
          direction, from each subject's last token on; no weights.
Needs:    the MLP outputs of forget and retained prompts (the signature), log-probabilities of answers and refusals
          before training, the gradients of `fisher_rows` retained rows one by one.
Differs:  the signature says in the report in which layer the forgotten prompts stand out, and is not hooked into
          training: the paper trains with suppressing hooks in every MLP and takes them out afterwards, so that its
          students never see the states they work on, and applies a direction of one layer to all; what is preferred is
          a refusal, not the text of a suppressed model; full rank in place of LoRA of rank 4 (wrap for that); the
          Fisher information is a mean of squares over single rows (15 prompts in two phrasings in the code) of the
          retain set; KL on retained answers and texts (the anchors); a signature is measured on prompts it was not
          made of. The capsule's gate is the subject's tokens, in place of a router by similarity and a sigmoid of the
          projection, and it has no push towards a refusal.
Fails:    one direction for all subjects: a capsule takes away what they share, not what each one's answers are.
          On the biographies world it changes no answer (recall 1.00, n = 1200).
          Distilled it is output-level: attention learns to look away, what the MLPs hold is still there and other
          phrasings or a few relearned facts call it up.
"""

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mech_unlearn.core import ForgetSet, RetainSet, Site
from mech_unlearn.edit.edit import Edit
from mech_unlearn.edit.interventions import Affine
from mech_unlearn.methods.unlikelihood import log_not, unlikelihood_loss
from mech_unlearn.methods.writing import keys
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.tokens import make_queries
from mech_unlearn.training.around import PLAIN, Around
from mech_unlearn.training.losses import dpo_loss, mean_of_rows
from mech_unlearn.training.objective import Objective
from mech_unlearn.training.rows import REFUSALS, AnswerTokens, BatchScores, collate, nll, refusal_rows
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.signature import Signature, signature
from mech_unlearn.training.trainee import Trainee
from mech_unlearn.training.training import reported, require_positive, trained_edit

ATTENTION = r"(self_attn\.[qvo]_proj|attn\.c_(attn|proj)|attention\.(query_key_value|dense))\.weight$"
"""Query, value and output matrices of Llama, Gemma, Qwen, OLMo; of GPT-2; of GPT-NeoX."""
MOST_PROMPTS = 200
"""Prompts of each kind that the signature is taken from, evenly spaced."""


@dataclass(frozen=True, kw_only=True)
class Kif:
    """Settings of the training; `fit` runs it. Defaults: 2601.10566's code."""

    mode: Literal["distil", "capsule"] = "distil"
    """"distil": train; "capsule": an intervention, which only `strength` and `seed` concern."""
    strength: float = 0.8
    """Mode "capsule": share of the projection on the direction that is taken out; 0.8 to 1."""
    beta: float = 0.02
    """Inverse temperature of the preference."""
    refusals: tuple[str, ...] = REFUSALS
    """Texts that are to be preferred; one is drawn per prompt. Written in words the tokenizer knows."""
    ul_weight: float = 0.03
    """Weight of -log(1 - p) on forgotten answers."""
    name_weight: float = 0.02
    """Weight of -log(1 - sum of p over the tokens of the subject's name) where an answer stands."""
    retain_weight: float = 0.03
    """Weight of the KL from the untrained model on retained answers and texts."""
    ewc: float = 5.0
    """Weight of the squared change of each entry times its Fisher information on retained rows; 0 leaves it out."""
    fisher_rows: int = 64
    """Retained rows, evenly spaced, that the Fisher information is taken from."""
    forget_weight: float = 1.0
    """Weight of preference, answer and name loss together."""
    schedule: Schedule = Schedule(lr=5e-6, epochs=5, batch_size=2)
    trainable: str = ATTENTION
    """Regular expression for the names of the weights to train."""
    seed: int = 0
    """Draws the refusals, the bootstraps and the order of the rows."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet, around: Around = PLAIN) -> Edit:
        """The change that training makes.

        Raises:
            ValueError: no retained facts, a refusal that the tokenizer cannot write, a setting out of range, or a loss
                that is not finite.
        """
        require_positive(self, "beta", "retain_weight", "fisher_rows", "strength")
        if self.mode not in ("distil", "capsule"):
            raise ValueError(f"mode must be 'distil' or 'capsule', got {self.mode!r}")
        if not retain.facts:
            raise ValueError("the retain set holds no facts: Kif tells forgotten prompts from retained ones")
        if self.mode == "capsule":
            return self._capsule(model, forget, retain, around)
        refused = refusal_rows(model.tokenizer, forget.facts, self.refusals, random.Random(self.seed))
        with keys.count_forwards(model) as forwards:
            found = report_of(self._signature(model, forget, retain))
        names = name_tokens(model, forget)
        objective = Objective(
            lambda before: self._loss(before, names),
            self.retain_weight,
            self.forget_weight,
            retain="kl",
            others=refused,
        )
        anchored = replace(around, penalty=Anchor(self.ewc, self.fisher_rows) if self.ewc else None)
        edit = trained_edit("kif", self, model, forget, retain, objective, self.trainable, anchored)
        return reported(edit, forwards[0], **found)

    def _signature(self, model: Model, forget: ForgetSet, retain: RetainSet) -> Signature:
        groups = []
        for facts in (forget.facts, retain.facts):
            prompts = [query.prompt for query in make_queries(model.tokenizer, facts, distractors=False)]
            groups.append(prompts[:: -(-len(prompts) // MOST_PROMPTS)])
        return signature(model, *groups, seed=self.seed)

    def _capsule(self, model: Model, forget: ForgetSet, retain: RetainSet, around: Around) -> Edit:
        if around != PLAIN:
            raise ValueError('a capsule is not trained, so that nothing can be wrapped around it: set mode="distil"')
        start = time.perf_counter()
        with keys.count_forwards(model) as forwards:
            found = self._signature(model, forget, retain)
        contexts = keys.contexts_of(forget.facts)
        subjects = (keys.spellings(model.tokenizer, name, contexts) for name in keys.names_of(forget.entities))
        capsule = suppressor(found, self.strength, tuple(dict.fromkeys(s for group in subjects for s in group)))
        report = {**report_of(found), "n_forward": forwards[0], "n_backward": 0, "seconds": time.perf_counter() - start}
        recipe = {"method": "kif", "settings": asdict(self), "seed": self.seed, "report": report}
        return Edit(name="kif", base=model.hash(), interventions=(capsule,), recipe=recipe)

    def _loss(
        self, before: BatchScores, names: Bool[Tensor, "row d_vocab"]
    ) -> Callable[[BatchScores], Float[Tensor, ""]]:
        def loss(now: BatchScores) -> Tensor:
            answers, refusals = now.logprob.chunk(2)
            answers_before, refusals_before = before.logprob[now.row].chunk(2)
            told = first_rows(now.each, len(answers))
            return (
                dpo_loss(refusals, refusals_before, answers, answers_before, self.beta)
                + self.ul_weight * unlikelihood_loss(told)
                + self.name_weight * name_loss(told, names[now.row[: len(answers)]])
            )

        return loss


def report_of(found: Signature) -> dict[str, Any]:
    """The signature's layer and effect size with its 95 % interval."""
    k = found.layer
    interval = [found.low[k].item(), found.high[k].item()]
    return {"signature_layer": k, "signature_effect": found.effect[k].item(), "signature_ci": interval}


def suppressor(found: Signature, strength: float, subjects: tuple[tuple[int, ...], ...]) -> Affine:
    """z <- z - strength (d . z) d on standardised MLP outputs z, from each subject's last token on.

    Source: 2601.10566, the capsule, with the gate open wherever a subject was read.
    """
    left = (strength * found.std * found.direction)[:, None].float()
    right = (found.direction / found.std)[None].float()
    site, center = Site(found.layer, "mlp_out"), found.mean.float()
    return Affine(site=site, subjects=subjects, left=left, right=right, center=center, where="from")


@dataclass(eq=False)
class Anchor:
    """Elastic weight consolidation: `weight` x sum F_i (theta_i - theta_i before)^2.

    Source: 1612.00796, eq. 3 (there with a factor of one half), as 2601.10566 uses it.
    """

    weight: float
    rows: int
    fisher: dict[str, Tensor] | None = None

    def __call__(self, run: Trainee) -> Float[Tensor, ""]:
        before = dict(run.frozen.named_parameters())
        if self.fisher is None:
            self.fisher = fisher(run, self.rows)
        terms = [(self.fisher[name] * (w - before[name]).square()).sum() for name, w in run.weights.items()]
        return self.weight * torch.stack(terms).sum()


def fisher(run: Trainee, most: int) -> dict[str, Tensor]:
    """Mean over retained rows of the squared gradient of each row's NLL per token, at the untrained weights.

    One row at a time: the square of a batch's mean gradient is another, smaller number.

    Raises:
        ValueError: what is trained is not part of the untrained model (an adapter's factors).
    """
    before = dict(run.frozen.named_parameters())
    if missing := [name for name in run.weights if name not in before]:
        raise ValueError(f"{missing[0]!r} is no weight of the untrained model: set ewc=0 to train an adapter")
    weights = [before[name].requires_grad_(True) for name in run.weights]
    total = [torch.zeros_like(w) for w in weights]
    chosen = range(0, len(run.kept), -(-len(run.kept) // most))
    try:
        for i in chosen:
            loss = nll(run.read(run.frozen, collate(run.kept, [i], run.fill, run.device)))
            run.n_backward += 1
            for sum_, gradient in zip(total, torch.autograd.grad(loss, weights), strict=True):
                sum_ += gradient.square()
    finally:
        for w in weights:
            w.requires_grad_(False)
    return {name: sum_ / len(chosen) for name, sum_ in zip(run.weights, total, strict=True)}


def name_tokens(model: Model, forget: ForgetSet) -> Bool[Tensor, "row d_vocab"]:
    """For each row of `rows.answer_rows` the tokens that its subject's name has in the prompt."""
    queries = make_queries(model.tokenizer, forget.facts, distractors=False)
    names = torch.zeros(len(queries), model.hf.config.vocab_size, dtype=torch.bool)
    for i, query in enumerate(queries):
        names[i, list(query.prompt[slice(*query.span)])] = True
    return names.to(model.device)


def first_rows(each: AnswerTokens, n: int) -> AnswerTokens:
    """The tokens of the first n rows of a batch."""
    here = each.at < n
    return replace(each, logits=each.logits[here], wanted=each.wanted[here], at=each.at[here])


def name_loss(each: AnswerTokens, names: Bool[Tensor, "row d_vocab"]) -> Float[Tensor, ""]:
    """-log(1 - sum of p over the name's tokens), nats: mean over each row's answer tokens, then over rows.

    Source: 2601.10566 (NameUL).
    """
    return mean_of_rows(-log_not(each.logits, names[each.at]), each.at)
