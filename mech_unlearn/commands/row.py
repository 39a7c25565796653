"""One audited model as one row: measure its outputs, run the restoration tests, judge each fact."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from mech_unlearn.attribution import as_table
from mech_unlearn.core import Fact, Measurement, Verdict
from mech_unlearn.metrics import forget_recall, general_kl, heldout_recall, mean_ci, recall
from mech_unlearn.metrics.forms import FormReport, by_form
from mech_unlearn.model.bridge import Model
from mech_unlearn.restoration import Reference, Result, audit
from mech_unlearn.verdict.calibration import Calibration
from mech_unlearn.verdict.claims import EXPLAINED, corrected_intervals, corrected_shares, unexplained
from mech_unlearn.verdict.verdict import Health, Thresholds, lost_without_verdict
from mech_unlearn.verdict.verdict import judge as judge_results
from mech_unlearn.verdict.verdicts import Verdicts


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What a model's outputs say; None where there was nothing to measure it on."""

    forget_recall: Measurement
    heldout_recall: Measurement | None
    neighbor_recall: Measurement | None
    general_kl: Measurement | None
    forms: FormReport
    """The facts asked in other forms: cloze, question, multiple choice, reversed, held-out phrasing."""

    def to_json(self, seed: int = 0) -> dict[str, Any]:
        """Each measurement by its name, `forms` with one per form, and `worst_form`."""
        single = {name: value for name, value in vars(self).items() if name != "forms"}
        return {name: value and value.to_json() for name, value in single.items()} | self.forms.to_json(seed)


def measure_outputs(
    full: Model, model: Model, facts: Sequence[Fact], neighbors: Sequence[Fact], texts: Sequence[str], seed: int
) -> Outputs:
    """Recall of the facts, also form by form, and of the neighbours' main prompts, and drift on texts."""
    held = [fact for fact in facts if fact.heldout]
    return Outputs(
        forget_recall=forget_recall(model, facts, seed),
        heldout_recall=heldout_recall(model, held, seed) if held else None,
        neighbor_recall=recall(model, neighbors, "prompt", seed) if neighbors else None,
        general_kl=general_kl(full, model, texts, seed) if texts else None,
        forms=by_form(model, facts, neighbors),
    )


def _mean(
    result: Result | None, testable: Bool[Tensor, " fact"], values: str, unit: str, seed: int
) -> dict[str, Any] | None:
    """Mean over the testable facts of a result's per-fact numbers; None where no fact was tested."""
    if result is None:
        return None
    numbers = getattr(result, values)
    kept = (testable & ~numbers.isnan()).nonzero()[:, 0].tolist()
    if not kept:
        return None
    clusters = [result.facts[i].group or result.facts[i].subject for i in kept]
    return mean_ci(numbers[kept], unit, clusters, seed).to_json()


@dataclass(frozen=True, eq=False, kw_only=True)
class Audited:
    """What outputs and restoration tests say of one model: all that a verdict reads. `judge` gives the verdicts."""

    name: str
    outputs: Outputs
    results: Mapping[str, Result]
    """Test -> a number per fact."""
    health: Health
    held_back: bool
    """The weights are the full model's, and only an intervention keeps the answers back."""
    full: str
    """Hash of the full model."""
    calibration: Calibration | None
    seed: int

    @property
    def facts(self) -> tuple[Fact, ...]:
        return self.results["output"].facts

    def measurements(self) -> dict[str, Any]:
        """Each measurement of the outputs, and the mean score of each test over the testable facts, by name."""
        testable, results = self.results["output"].columns["testable"].bool(), self.results
        share = "share of the gap between retrained and full"
        scores = {"writeback": "writeback", "rho_sae": "sae", "relearn_recovery": "relearn", "int4_recovery": "int4"}
        uds = _mean(results.get("uds"), testable, "score_raw", "UDS, 0 as full, 1 as retrained", self.seed)
        means = {
            key: _mean(results.get(test), testable, "recoverability", share, self.seed) for key, test in scores.items()
        }
        return self.outputs.to_json(self.seed) | {"uds": uds} | means

    def __repr__(self) -> str:
        return f"Audited({self.name!r}, {len(self.facts)} facts, tests: {', '.join(self.results)})"

    def _repr_html_(self) -> str:
        """The measurements with their intervals, for Jupyter."""
        numbers = {key: x for key, x in self.measurements().items() if isinstance(x, Mapping) and "ci" in x}
        rows = [
            (key, f"{x['value']:.3f}", "[{:.3f}, {:.3f}]".format(*x["ci"]), x["n"], x["unit"])
            for key, x in numbers.items()
        ]
        return as_table(("measurement", "value", "95 % interval", "n", "unit"), rows, self.name)


def measure(
    reference: Reference,
    model: Model,
    *,
    name: str,
    neighbors: Sequence[Fact],
    texts: Sequence[str],
    full_neighbor_recall: Measurement | None,
    seed: int,
    calibration: Calibration | None = None,
) -> Audited:
    """Run the tests of a reference on a model, and measure its outputs."""
    case = reference.case
    outputs = measure_outputs(case.full, model, case.facts, neighbors, texts, seed)
    full = case.full.hash()
    return Audited(
        name=name,
        outputs=outputs,
        results=audit(reference, model, name),
        health=Health(
            neighbor_recall=outputs.neighbor_recall,
            full_neighbor_recall=full_neighbor_recall,
            general_kl=outputs.general_kl,
        ),
        held_back=bool(model.in_force.interventions) and model.hash() == full,
        full=full,
        calibration=calibration,
        seed=seed,
    )


def judge(audited: Audited, thresholds: Thresholds | None = None) -> Verdicts:
    """The verdict on each fact: by the audit's calibration, else by provisional thresholds."""
    return judge_results(
        audited.results,
        audited.health,
        thresholds or Thresholds(),
        held_back=audited.held_back,
        calibration=audited.calibration,
        full=audited.full,
    )


def audit_row(
    reference: Reference,
    model: Model,
    *,
    name: str,
    method: str | None,
    truth: str | None,
    neighbors: Sequence[Fact],
    texts: Sequence[str],
    full_neighbor_recall: Measurement | None,
    thresholds: Thresholds,
    seed: int,
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """Row, records, verdicts and layer curves of one model: a cell of a run directory."""
    audited = measure(
        reference, model, name=name, neighbors=neighbors, texts=texts, full_neighbor_recall=full_neighbor_recall,
        seed=seed, calibration=calibration,
    )  # fmt: skip
    verdicts, facts, results = judge(audited, thresholds), reference.case.facts, audited.results
    testable = results["output"].columns["testable"].bool()
    row = {
        "name": name,
        "method": method,
        "truth": truth,
        **audited.measurements(),
        "verdicts": verdicts.shares(),
        "no_verdict": lost_without_verdict(verdicts),
        "judged": "calibrated" if calibration else "provisional",
        **_seen(calibration, audited.full, facts),
        "corrected": _corrected(verdicts, facts, calibration, seed),
    }
    return {
        "row": row,
        "records": [record for result in results.values() for record in result.records()],
        "verdicts": [verdict.to_json() for verdict in verdicts],
        "curves": {test: layer_curve(results[test], testable) for test in ("uds", "uds_subject") if test in results},
    }


def _seen(calibration: Calibration | None, full: str, facts: Sequence[Fact]) -> dict[str, Any]:
    """Whether the calibration was measured on some of these groups in this full model, and on how many of them; None
    without a calibration, or with one that does not tell."""
    groups = tuple(dict.fromkeys(fact.group or fact.subject for fact in facts))
    seen = calibration.in_sample(full, groups) if calibration else None
    return {"in_sample": None if seen is None else any(seen), "in_sample_groups": None if seen is None else sum(seen)}


def _corrected(
    verdicts: Sequence[Verdict], facts: Sequence[Fact], calibration: Calibration | None, seed: int
) -> dict[str, Any] | None:
    """Shares of truths freed from the verdict's own errors, with intervals, and what they leave unexplained; no shares
    where that is more than `claims.EXPLAINED`. None without a calibration whose errors were measured."""
    found = Verdicts(verdicts).shares()
    if calibration is None or "confusion_by_group" not in calibration.provenance or not sum(found.values()):
        return None
    labels: dict[str, dict[str, int]] = {}
    for verdict, fact in zip(verdicts, facts, strict=True):
        if "not_testable" not in verdict.flags:
            here = labels.setdefault(fact.group or fact.subject, {})
            here[verdict.label] = here.get(verdict.label, 0) + 1
    confusion = calibration.provenance["confusion"]
    value = corrected_shares(found, confusion)
    off = unexplained(found, value, confusion)
    if off > EXPLAINED:
        return {"unexplained": off, "shares": None}
    ends = corrected_intervals(labels, calibration.provenance["confusion_by_group"], seed)
    unit = "share of testable facts, freed from the verdict's measured errors; n counts groups"
    kept = {truth: {"value": value[truth], "ci": list(ends[truth]), "n": len(labels), "unit": unit} for truth in value}
    return {"unexplained": off, "shares": kept}


def layer_curve(result: Result, testable: Bool[Tensor, " fact"]) -> list[float | None]:
    """Erased share by layer, over the testable facts: mean drop caused by the model's states over that by retrained
    states.

    None where retrained states cost less than 0.05 nats on average.
    """
    drop, never = (result.curves[name][:, testable].nanmean(1) for name in ("drop", "drop_R"))
    return [(d / n).item() if n > 0.05 else None for d, n in zip(drop, never, strict=True)]
