"""Probe: can a classifier trained on facts that U kept read the forgotten ones off U's states?

Paper:    probes with control tasks, Hewitt and Liang 2019, arXiv 1909.03368; on unlearned models Lynch et al. 2024,
          arXiv 2402.16835; code length, Voita and Titov 2020, arXiv 2003.12298.
Changes:  nothing; classifiers are fitted beside the model.
Needs:    facts of the same relations about other subjects (`Case.others`), one forward pass per prompt, and per place
          (layer x last subject token or last prompt token), relation and model one fit.
Differs:  trained on kept subjects and tested on forgotten ones, so that it cannot have memorised their answers. The
          L2 strength is chosen once, on the full model's kept facts, by 5-fold cross-validation over subjects. The
          control task keeps the labels of a relation and deals them out to other subjects; as no subject is both
          trained on and tested, no label can be memorised: the control measures chance and leaks, not the capacity of
          the probe, and selectivity is accuracy above chance. Code length: the receiver already has the kept facts;
          the forgotten subjects follow in blocks of .1, .2, .4, .8, 1. The place is chosen on TUNE. A negative margin
          counts as 0: a probe that takes a name for another one is sure and wrong, and knows no less than one that is
          unsure. Without retrained models the level of ignorance is the full model's score of those sham facts whose
          object the probe knows.
Fails:    that a probe reads it does not say that U uses it. It finds what is written in the same code as kept facts;
          with few kept subjects per object it finds nothing, then full and retrained agree and the test is silent.

`score_raw` is the margin in nats: log p(true object) - log mean p(distractor) of the probe, 0 at the least.
recoverability is kappa of it. Columns: accuracy (also _F and _R), control_accuracy, selectivity (accuracy -
control_accuracy), mdl_bits (also _F, _R; log2 of the number of objects is the cost without any probe).
`accuracy_kappa` gives kappa of the accuracy and its 95 % interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mech_unlearn.core import Fact, Measurement
from mech_unlearn.metrics.intervals import DRAWS
from mech_unlearn.model.bridge import Model
from mech_unlearn.restoration.engine.case import Case
from mech_unlearn.restoration.engine.levels import Levels
from mech_unlearn.restoration.engine.normalise import MIN_GAP, mean_by_fact, relation_mean, sham_facts
from mech_unlearn.restoration.engine.readouts import Read, ReadLevels, readout_result
from mech_unlearn.restoration.states.probe_fit import Fit, code_lengths, fit_linear, make_fit
from mech_unlearn.restoration.states.probe_tasks import PLACES, Setup, features, make_setup
from mech_unlearn.verdict.result import Result

STRENGTHS = (0.01, 0.1, 1.0)
"""Values of C that are tried."""
PROBE_FOLDS = 5


@dataclass(frozen=True, eq=False)
class Scored:
    read: Read
    hits: Float[Tensor, "point fact"]
    """Share of a fact's TEST phrasings that the probe gets right."""


@dataclass(frozen=True, eq=False)
class ProbeLevels:
    setup: Setup
    fit: Fit
    kind: str
    strength: float
    levels: ReadLevels
    full: Scored
    never: tuple[Scored, ...]
    bits: dict[tuple[int, int], Float[Tensor, " fact"]] = field(default_factory=dict)
    """(Model, point) -> code length; model -1 is the full one. Filled when first needed."""


def _margins(
    table: Float[Tensor, "point test class"],
    objects: Sequence[str],
    facts: Sequence[Fact],
    true: Int[Tensor, " test"],
) -> Float[Tensor, "point test"]:
    """log p(object) - log mean p(distractor) in nats, 0 if negative, of each row's fact, which may be a sham.

    Distractors that the probe does not know are left out; without any all other objects stand in, but for the true one
    (`true`, a label). NaN where the probe does not know the object, or nothing stands against it.
    """
    columns = []
    for row, (fact, label) in enumerate(zip(facts, true.tolist(), strict=True)):
        known = [objects.index(d) for d in fact.distractors if d in objects]
        wrong = known or [i for i, name in enumerate(objects) if name != fact.object and i != label]
        if fact.object not in objects or not wrong:
            columns.append(torch.full(table.shape[:1], torch.nan))
            continue
        own, count = table[:, row, objects.index(fact.object)], torch.tensor(float(len(wrong)))
        columns.append((own - (table[:, row, wrong].logsumexp(-1) - count.log())).clamp(min=0))
    return torch.stack(columns, 1)


def _asked_mean(values: Float[Tensor, "point fact"], facts: Sequence[Fact]) -> Float[Tensor, "point fact"]:
    """Each value replaced by the mean over those facts of its relation that have one; NaN if none has."""
    return relation_mean(values.nan_to_num(), facts) / relation_mean((~values.isnan()).float(), facts)


def _score(case: Case, setup: Setup, x: Float[Tensor, "point query d_model"], fit: Fit, shams: bool = False) -> Scored:
    """Fit on kept rows and read the forgotten ones; with `shams` the margins of sham facts instead."""
    margin = torch.full((len(x), setup.forgotten), torch.nan)
    hits = torch.full((len(x), setup.forgotten), torch.nan)
    asked = {f.id: f for f in (sham_facts(case.facts, case.seed) if shams else case.facts)}
    for task in setup.tasks:
        if len(task.asked):
            table = fit(x[:, task.kept], task.label, task.subject, x[:, task.asked], len(task.objects))
            facts = [asked[setup.queries[i].fact.id] for i in task.asked.tolist()]
            margin[:, task.asked] = _margins(table, task.objects, facts, task.true)
            hits[:, task.asked] = (table.argmax(-1) == task.true).float()
    tune, test = setup.queries[: setup.tune], setup.queries[setup.tune : setup.forgotten]
    read = [
        mean_by_fact(margin[:, : setup.tune], tune, setup.tune_facts),
        mean_by_fact(margin[:, setup.tune :], test, case.facts),
    ]
    if shams:
        read = [_asked_mean(read[0], setup.tune_facts), _asked_mean(read[1], case.facts)]
    return Scored(Read(*read), mean_by_fact(hits[:, setup.tune :], test, case.facts))


def choose_strength(setup: Setup, x: Float[Tensor, "point query d_model"], layers: int, seed: int) -> float:
    """C with the highest mean log-probability of held-out kept subjects, two thirds up, on the two largest relations.

    Objects that no other subject has are left out; without any others nothing can be learnt and C is the largest.
    """
    generator = torch.Generator().manual_seed(seed)
    points = [p * layers + min(layers - 1, round(2 * layers / 3)) for p in range(len(PLACES))]
    totals, counted = dict.fromkeys(STRENGTHS, 0.0), 0
    for task in sorted(setup.tasks, key=lambda t: -len(t.kept))[:2]:
        names = task.subject.unique()
        fold_of = torch.randperm(len(names), generator=generator) % PROBE_FOLDS
        fold = fold_of[torch.searchsorted(names, task.subject)]
        rows = x[points][:, task.kept]
        for c in STRENGTHS:
            for k in range(PROBE_FOLDS):
                test = (fold == k) & torch.isin(task.label, task.label[fold != k])
                counted += int(test.sum())
                if test.any():
                    table = fit_linear(
                        rows[:, fold != k],
                        task.label[fold != k],
                        task.subject[fold != k],
                        rows[:, test],
                        len(task.objects),
                        c=c,
                    )
                    right = table.gather(2, task.label[test].expand(len(points), -1)[..., None])
                    totals[c] += right.clamp(min=-10).sum().item()
    return max(totals, key=lambda c: totals[c]) if counted else STRENGTHS[-1]


def prepare(case: Case, shared: Levels | None = None, *, kind: str = "linear") -> ProbeLevels:
    """Fit and read the full and the retrained models.

    Args:
        kind: "linear" or "mlp".

    Raises:
        ValueError: an unknown kind, or no kept facts of the forgotten relations.
    """
    make_fit(kind, STRENGTHS[0], case.seed)
    setup = make_setup(case)
    x = features(case.full, setup)
    c = choose_strength(setup, x, case.full.n_layers, case.seed) if kind == "linear" else float("nan")
    fit = make_fit(kind, c, case.seed)
    full = _score(case, setup, x, fit)
    never = tuple(_score(case, setup, features(model, setup), fit) for model in case.retrained)
    reads = tuple(s.read for s in never) or (_score(case, setup, x, fit, shams=True).read,)
    layers = tuple(range(case.full.n_layers)) * len(PLACES)
    points = tuple(f"{place}, layer {layer}" for place in PLACES for layer in range(case.full.n_layers))
    return ProbeLevels(setup, fit, kind, c, ReadLevels(points, layers, full.read, reads, MIN_GAP), full, never)


def _bits(case: Case, ready: ProbeLevels, x: Float[Tensor, "point query d_model"]) -> Float[Tensor, " fact"]:
    """Code length of each forgotten fact's object in bits, mean over TEST phrasings; x has one point."""
    setup, generator = ready.setup, torch.Generator().manual_seed(case.seed)
    bits = torch.full((setup.forgotten,), torch.nan)
    for task in setup.tasks:
        test = task.asked >= setup.tune
        asked, owner = task.asked[test], task.owner[test]
        if not len(asked):
            continue
        names = owner.unique()
        order = names[torch.randperm(len(names), generator=generator)].tolist()
        known = (x[:, task.kept], task.label, task.subject)
        coded = (x[:, asked], task.true[test], owner)
        bits[asked] = code_lengths(ready.fit, known, coded, len(task.objects), order)
    return mean_by_fact(bits[None, setup.tune :], setup.queries[setup.tune : setup.forgotten], case.facts)[0]


def _control(case: Case, ready: ProbeLevels, x: Float[Tensor, "point query d_model"]) -> Float[Tensor, " fact"]:
    """Share of phrasings that a probe of the control task gets right; x has one point."""
    setup, generator = ready.setup, torch.Generator().manual_seed(case.seed)
    hits = torch.full((1, setup.forgotten), torch.nan)
    for task in setup.tasks:
        everyone = torch.cat([task.subject, task.owner])
        names, first = everyone.unique(return_inverse=True)
        label = torch.zeros(len(names), dtype=torch.long).index_put((first,), torch.cat([task.label, task.true]))
        drawn = label[torch.randperm(len(names), generator=generator)][first]
        kept, wanted = drawn[: len(task.kept)], drawn[len(task.kept) :]
        if len(task.asked):
            table = ready.fit(x[:, task.kept], kept, task.subject, x[:, task.asked], len(task.objects))
            hits[:, task.asked] = (table.argmax(-1) == wanted).float()
    return mean_by_fact(hits[:, setup.tune :], setup.queries[setup.tune : setup.forgotten], case.facts)[0]


def _known_bits(case: Case, ready: ProbeLevels, which: int, point: int) -> Float[Tensor, " fact"]:
    model = case.full if which < 0 else case.retrained[which]
    if (which, point) not in ready.bits:
        ready.bits[which, point] = _bits(case, ready, features(model, ready.setup)[point][None])
    return ready.bits[which, point]


def audit(case: Case, ready: ProbeLevels, model: Model, name: str) -> Result:
    """Fit probes on the facts that the audited model kept, and read the forgotten ones."""
    keep, x = case.others_than(model), features(model, ready.setup)
    scored = _score(case, ready.setup, x, ready.fit)

    def columns(point: int) -> dict[str, Tensor]:
        own = x[point][None]
        control = _control(case, ready, own)
        out = {
            "accuracy": scored.hits[point],
            "accuracy_F": ready.full.hits[point],
            "control_accuracy": control,
            "selectivity": scored.hits[point] - control,
            "mdl_bits": _bits(case, ready, own),
            "mdl_bits_F": _known_bits(case, ready, -1, point),
        }
        if keep:
            out["accuracy_R"] = torch.stack([ready.never[k].hits[point] for k in keep]).mean(0)
            out["mdl_bits_R"] = torch.stack([_known_bits(case, ready, k, point) for k in keep]).mean(0)
        return out

    return readout_result(
        case,
        ready.levels,
        model,
        scored.read,
        test="probe" if ready.kind == "linear" else "probe_mlp",
        name=name,
        cost_fe=len(ready.setup.queries) / len(case.facts),
        columns=columns,
    )


def accuracy_kappa(found: Result, seed: int = 0) -> Measurement:
    """(acc(U) - acc(R)) / (acc(F) - acc(R)) of the probe with its 95 % bootstrap interval over subjects.

    Raises:
        ValueError: no retrained models, or no fact that the probe was asked.
    """
    if "accuracy_R" not in found.columns:
        raise ValueError("kappa of the accuracy compares with retrained models: give Case(retrained=...)")
    table = torch.stack([found.columns[name] for name in ("accuracy", "accuracy_F", "accuracy_R")]).double()
    asked = ~table.isnan().any(0)
    if not asked.any():
        raise ValueError("the probe was asked none of the facts: their objects do not occur among the kept facts")
    names = [fact.subject for fact, ok in zip(found.facts, asked.tolist(), strict=True) if ok]
    order = list(dict.fromkeys(names))
    index = torch.tensor([order.index(n) for n in names])
    sums = torch.zeros(3, len(order), dtype=torch.float64).index_add(1, index, table[:, asked])
    drawn = torch.randint(len(order), (DRAWS, len(order)), generator=torch.Generator().manual_seed(seed))

    def kappa(total: Tensor) -> Tensor:
        return (total[0] - total[2]) / (total[1] - total[2])

    low, high = kappa(sums[:, drawn].sum(-1)).nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Measurement(value=kappa(sums.sum(1)).item(), ci=(low, high), n=int(asked.sum()), unit="kappa of accuracy")
