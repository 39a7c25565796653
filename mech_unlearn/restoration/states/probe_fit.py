"""Classifiers of the probe test: linear and with one hidden layer, many places at once, and their code length.

Paper:    linear: multinomial logistic regression, L2, as in arXiv 1909.03368; code length by online coding: Voita and
          Titov 2020, arXiv 2003.12298, section 2.2.
Needs:    the CPU; sklearn for the linear probe.
Differs:  both give log-probabilities over all classes of a relation; a class that no training row shows has
          probability 0. Inputs are standardised by the training rows. The MLP (256 units, GELU, dropout 0.2, weight
          decay 1e-3, at most 200 epochs, each one step over all rows) is kept at the epoch of its lowest validation
          loss over a fifth of the subjects, for each place by itself (over the training rows where each object has
          one subject).
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

HIDDEN, DROPOUT, DECAY, EPOCHS, RATE, PATIENCE = 256, 0.2, 1e-3, 200, 5e-3, 10
BLOCKS = (0.1, 0.2, 0.4, 0.8, 1.0)
"""Fractions of the coded subjects after which the probe is fitted anew. Source: arXiv 2003.12298, coarsened."""
FLOOR = 1e-4
"""Probability below which no class falls in a code: a code has to have a word for everything."""

TrainRows = Float[Tensor, "place row d"]
TestRows = Float[Tensor, "place test d"]
Fit = Callable[[TrainRows, Int[Tensor, " row"], Int[Tensor, " row"], TestRows, int], Float[Tensor, "place test class"]]
"""(training rows, their labels, their subjects, test rows, number of classes) -> log-probabilities."""


def standardised(train: TrainRows, test: TestRows) -> tuple[TrainRows, TestRows]:
    """Both in units of the training rows' mean and standard deviation, per coordinate; 0 where these are constant."""
    mean, sd = train.mean(1, keepdim=True), train.std(1, keepdim=True, correction=0)
    scale = torch.where(sd > 1e-5 * sd.amax(2, keepdim=True), 1 / sd.clamp(min=1e-12), 0.0)
    return (train - mean) * scale, (test - mean) * scale


def fit_linear(
    train: TrainRows, label: Tensor, subject: Tensor, test: TestRows, classes: int, *, c: float = 0.1
) -> Float[Tensor, "place test class"]:
    """A logistic regression at each place; on one thread, because small fits lose from more."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    x, y = standardised(train.float(), test.float())
    out = torch.full((len(x), y.shape[1], classes), -torch.inf)
    seen = label.unique()
    if len(seen) == 1:
        out[..., seen] = 0.0
        return out
    for place in range(len(x)):
        with threadpool_limits(1):
            model = LogisticRegression(C=c, max_iter=1000).fit(x[place].numpy(), label.numpy())
            out[place][:, seen] = torch.from_numpy(model.predict_log_proba(y[place].numpy())).float()
    return out


def _validation(label: Tensor, subject: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(Rows that validate, rows that train): a fifth of the subjects, such that every class keeps a row to train on;
    where no subject can be spared, all rows do both."""
    names = subject.unique()
    spare = torch.bincount(label)
    validate = torch.zeros(len(label), dtype=torch.bool)
    wanted = max(1, len(names) // 5)
    for name in names[torch.randperm(len(names), generator=generator)]:
        rows = subject == name
        left = spare - torch.bincount(label[rows], minlength=len(spare))
        if wanted and bool((left[label[rows]] > 0).all()):
            validate, spare, wanted = validate | rows, left, wanted - 1
    return (validate, ~validate) if validate.any() else (~validate, ~validate)


def fit_mlp(
    train: TrainRows, label: Tensor, subject: Tensor, test: TestRows, classes: int, *, seed: int = 0
) -> Float[Tensor, "place test class"]:
    """One hidden layer at each place, all places in one batch."""
    x, y = standardised(train.float(), test.float())
    generator = torch.Generator().manual_seed(seed)
    validate, train_on = _validation(label, subject, generator)
    seen = torch.zeros(classes, dtype=torch.bool)
    seen[label[train_on]] = True
    places, width = len(x), x.shape[2]

    def weights(*shape: int) -> Tensor:
        return (torch.randn(places, *shape, generator=generator) / shape[0] ** 0.5).requires_grad_()

    first, second = weights(width, HIDDEN), weights(HIDDEN, classes)
    bias = [torch.zeros(places, 1, n, requires_grad=True) for n in (HIDDEN, classes)]
    optimiser = torch.optim.AdamW([first, second, *bias], lr=RATE, weight_decay=DECAY)

    def run(rows: Tensor, keep: Tensor | float = 1.0) -> Tensor:
        hidden = torch.nn.functional.gelu(rows @ first + bias[0]) * keep
        return (hidden @ second + bias[1]).masked_fill(~seen, -torch.inf).log_softmax(-1)

    fitted, checked = label[train_on], label[validate]
    best = torch.full((places,), torch.inf)
    out, since = torch.zeros(places, y.shape[1], classes), 0
    for _ in range(EPOCHS):
        drop = (torch.rand(len(fitted), HIDDEN, generator=generator) >= DROPOUT) / (1 - DROPOUT)
        with torch.enable_grad():
            table = run(x[:, train_on], drop)
            loss = -table.gather(2, fitted.expand(places, -1)[..., None]).mean()
            optimiser.zero_grad()
            (loss * places).backward()
        optimiser.step()
        with torch.no_grad():
            table = run(x[:, validate])
            now = -table.gather(2, checked.expand(places, -1)[..., None]).mean((1, 2))
            better = now < best
            out = torch.where(better[:, None, None], run(y), out)
        best, since = torch.minimum(best, now), 0 if better.any() else since + 1
        if since > PATIENCE:
            break
    return out


def make_fit(kind: str, c: float, seed: int) -> Fit:
    """The classifier of a kind, `linear` or `mlp`.

    Raises:
        ValueError: another kind.
    """
    if kind not in ("linear", "mlp"):
        raise ValueError(f"unknown probe {kind!r}; choose linear or mlp")
    return partial(fit_linear, c=c) if kind == "linear" else partial(fit_mlp, seed=seed)


def code_lengths(
    fit: Fit,
    known: tuple[TrainRows, Int[Tensor, " row"], Int[Tensor, " row"]],
    coded: tuple[TestRows, Int[Tensor, " test"], Int[Tensor, " test"]],
    classes: int,
    order: Sequence[int],
) -> Float[Tensor, " test"]:
    """Bits that the label of each coded row costs when a probe predicts it from what was coded before.

    Subjects are sent in blocks; each block is coded by a probe fitted to the known rows and to all blocks sent before,
    then joins the training rows. No label is seen before it was coded. Only the first place is used.

    Args:
        known: rows, labels and subjects that the receiver has from the start.
        coded: rows, labels and subjects to be sent.
        order: the subjects of `coded` in the order in which they are sent.
    """
    x, label, subject = known
    rows, wanted, who = coded
    at = torch.tensor([list(order).index(s) for s in who.tolist()])
    bits, start = torch.zeros(len(wanted)), 0
    for share in BLOCKS:
        end = max(start, round(share * len(order)))
        block, before = (at >= start) & (at < end), at < start
        start = end
        if not block.any():
            continue
        table = fit(
            torch.cat([x, rows[:, before]], 1)[:1],
            torch.cat([label, wanted[before]]),
            torch.cat([subject, who[before]]),
            rows[:1, block],
            classes,
        )[0]
        p = table.exp() * (1 - classes * FLOOR) + FLOOR
        bits[block] = -p[torch.arange(int(block.sum())), wanted[block]].log2()
    return bits
