"""Rmu: training that steers the hidden states of forgotten texts to one random vector and holds all others.

Paper:    Li et al. 2024, The WMDP Benchmark (Representation Misdirection for Unlearning), arXiv 2403.03218.
Changes:  the MLP output matrices of `layers`, by default three that end at the layer whose states are steered.
Needs:    the untrained model's states of each batch of retained rows: one forward pass that ends at the layer.
Differs:  the random vector is Gaussian (the code draws uniform numbers in [0, 1): nearly the same direction for every
          seed; `legacy_u`); a row's tokens are averaged before rows are, and pads never count (the code divides by a
          count of another shape, so that in a batch long texts weigh on short ones); forget data are the facts written
          out, prompt and answer, joined by `texts`, and steered from the name's last token on (the paper: every
          token): in front of it forgotten and kept prompts are the same, and steering them took the neighbours along
          (SmolLM2, five capitals: forget .67, unseen neighbours 1.00 -> .44); the first token, an attention sink,
          counts nowhere; `c` is in units of the states' norm; gradients are clipped by their norm.
Fails:    states above the layer still tell the forgotten from the kept; relearning is quick.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import ForgetSet, RetainSet, Site
from mech_unlearn.edit.edit import Edit
from mech_unlearn.methods.writing import keys
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.capture import stream
from mech_unlearn.model.tokens import make_queries
from mech_unlearn.training.around import PLAIN, Around
from mech_unlearn.training.objective import Objective
from mech_unlearn.training.rows import BatchScores, TrainRow, text_rows
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.state_losses import held, random_direction, state_mse
from mech_unlearn.training.training import reported, require_positive, trained_edit


@dataclass(frozen=True, kw_only=True)
class Rmu:
    """Settings of the training; `fit` runs it. 2403.03218's code takes layer 7 of 32 of Zephyr 7B."""

    layer: int | None = None
    """Layer whose resid_post is steered; None is the last of `keys.default_layers`, a third of the depth or earlier."""
    layers: tuple[int, ...] | None = None
    """Layers whose MLP output matrices are trained; None is `layer` - 2 to `layer`."""
    c: float = 5.0
    """Length of the vector that states are steered to, as a multiple of the mean norm of the untrained model's states
    on the forget rows; 2408.06223 takes 3 to 10. With relative=False the length itself: the code's 6.5 for Zephyr and
    20 for other 7B models, which are less than one norm on many a smaller one (SmolLM2, layer 6: 94)."""
    relative: bool = True
    """Whether `c` is a multiple of that norm."""
    alpha: float = 400.0
    """Weight of the squared distance of retained states to where they were; the papers take 100 to 1200."""
    legacy_u: bool = False
    """Draw the vector uniform in [0, 1), as the code does."""
    texts: tuple[str, ...] = ()
    """Running texts that are to be forgotten beside the facts."""
    schedule: Schedule = Schedule(lr=1e-3, epochs=30, batch_size=4, stop_recall=0.1)
    """Chosen on SmolLM2-135M; the paper takes 150 to 500 batches of 4 at lr 5e-5 on 7B models, which leaves that one
    as it was."""
    seed: int = 0
    """Draws the vector and the order of the rows."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet, around: Around = PLAIN) -> Edit:
        """The change that training makes.

        Raises:
            ValueError: nothing retained, layers above the steered one, a setting out of range, or a loss that is not
                finite.
        """
        require_positive(self, "c", "alpha")
        layer, trained = steered(model, self.layer, self.layers)
        rows = written_out(model, forget, self.texts)
        with keys.count_forwards(model) as forwards:
            length = self.c * (mean_norm(model, rows, layer) if self.relative else 1.0)
        target = length * random_direction(model.d_model, self.seed, self.legacy_u).to(model.device)
        objective = Objective(steer_to(target), self.alpha, retain=held, layer=layer, logits=False, rows=rows)
        edit = trained_edit("rmu", self, model, forget, retain, objective, trained, around)
        return reported(edit, forwards[0], length=length)


def mean_norm(model: Model, rows: Sequence[TrainRow], layer: int) -> float:
    """Mean norm of resid_post after a layer over the ordinary tokens of some rows."""
    site = Site(layer, "resid_post")
    parts = stream(model, [ids for ids, _ in rows], [site], "ordinary")
    return torch.cat([part.at[site].float().norm(dim=1) for part in parts]).mean().item()


def steer_to(target: Float[Tensor, " d_model"]) -> Callable[[BatchScores], Callable[[BatchScores], Tensor]]:
    """The forget loss of RMU: `state_mse` to one vector, on the steered tokens (see `written_out`)."""

    def loss(now: BatchScores) -> Tensor:
        assert now.states is not None
        steered = now.states.answer
        return state_mse(now.states.now[steered], target, now.states.at[steered])

    return lambda _: loss


def steered(model: Model, layer: int | None, layers: Sequence[int] | None) -> tuple[int, str]:
    """(Layer whose states are steered, pattern of the MLP output matrices that are trained).

    Raises:
        ValueError: a layer that the model lacks, or that lies above the steered one.
    """
    layer = keys.default_layers(model.n_layers)[-1] if layer is None else layer
    chosen = tuple(range(max(0, layer - 2), layer + 1)) if layers is None else layers
    checked = keys.check_layers(model, chosen, layer)
    names = (re.escape(name) for i in checked for name in model.mlp_writers(i))
    return layer, f"^({'|'.join(names)})$"


def written_out(model: Model, forget: ForgetSet, texts: Sequence[str]) -> list[TrainRow]:
    """The forget facts in each phrasing a method may see, prompt and answer, and further texts.

    What is steered is marked as an answer is: from the name's last token on, and all of a text. In front of a name
    forgotten and kept prompts are the same, and no state can be steered and held.
    """
    facts = make_queries(model.tokenizer, forget.facts, distractors=False)
    return [(query.full, query.span[1] - 1) for query in facts] + text_rows(model, texts)
