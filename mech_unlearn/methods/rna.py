"""Rna: another method's training, with noise on the states that its retain loss is compared with.

Paper:    Huu-Tien et al. 2025, Improving the Robustness of Representation Misdirection for Large Language Model
          Unlearning (random noise augmentation), arXiv 2501.19202.
Changes:  what the base changes.
Needs:    what the base needs, and the untrained model's outputs on each retained batch: one forward pass.
Differs:  the variance of the noise is given as a share of the mean square of the states, pads left out, so that it
          means the same at every layer and model; a base that trains retained rows by NLL compares them by KL with the
          noisy untrained model instead, which has no such outputs otherwise.
Fails:    robust to a forgotten name in a retained question only as far as the noise resembles what such a name does to
          the states; too much noise blurs the retained answers.
"""

from dataclasses import dataclass

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.methods.npo import Npo
from mech_unlearn.methods.writing import keys
from mech_unlearn.model.bridge import Model
from mech_unlearn.training.around import PLAIN, Around, Trains
from mech_unlearn.training.objective import Noise
from mech_unlearn.training.wrapping import extended, require_trains, wrapped


@dataclass(frozen=True, kw_only=True)
class Rna:
    """Settings of the noise; `fit` trains the base with it."""

    base: Trains = Npo()
    """The method that trains, with its settings."""
    layer: int | None = None
    """Layer after which the untrained model's resid_post gets noise; None is the last of `keys.default_layers`."""
    nu: float = 1e-2
    """Variance of the noise as a share of the mean square of the states; 1e-3 to 5e-2."""
    seed: int = 0
    """Draws the noise; the base has a seed of its own."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet, around: Around = PLAIN) -> Edit:
        """The change that the base's training makes.

        Raises:
            ValueError: a base that does not train or has no retained rows, noise where the base's losses do not read,
                nu below 0, or what the base refuses.
        """
        require_trains(self.base, "rna")
        if self.nu < 0:
            raise ValueError(f"nu={self.nu}: a variance is not negative")
        layer = keys.default_layers(model.n_layers)[-1] if self.layer is None else self.layer
        inner = extended(around, "rna", self, retain="kl", noise=Noise(layer, self.nu, self.seed))
        return wrapped(self.base.fit(model, forget, retain, inner), "rna", self)
