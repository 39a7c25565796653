"""From scores to a label per fact: with a calibration by p-values, without one by provisional thresholds.

**Calibrated** (`calibration.py`): the measurements of a fact are set against models whose truth is known. Each of
intact, suppressed, deleted, collapsed gets a p-value; those at or below alpha are ruled out; one left is the verdict,
otherwise it is *undetermined*. P("deleted" is said of a suppressed fact) <= alpha for models of a known family, each
of which blocks in one place: two blocks at once passed for a deletion (experiments/LOG.md). A fact whose measurements
are unlike every model of the calibration is undetermined and says so (flag `unlike_pool`); one of a group that the
calibration itself was measured on, in the same full model, is flagged `in_sample`. Tests and sentence name only what
the calibration reads. Over 300 lines, because both ways of judging share sentences, flags and the model's health.

**Provisional**: thresholds, not error rates. A fact is *intact* if the outputs still give it; *suppressed* if they
lost it and at least one restoration test brings it back (a block may sit anywhere and each test is blind somewhere, so
the strongest test decides: an OR, not an average); *deleted* if they lost it, every test that spoke looks like a model
that never saw it, and a test of each direction spoke (patching its states, and bringing it back inside); *collapsed* if
the model is too broken for the absence of an answer to say anything; *undetermined* otherwise.

Each test's recoverability is first measured against its own null: with q the quantile (1 - `null_share` / number of
tests, Bonferroni) of what the test says of held-out retrained models, the evidence is max(0, (x - q) / (1 - q)). A
noisy test has a high q and must say much to be heard; 1 stays 1. With fewer than two retrained models q is 0.

**Without retrained models** (grade B) there are scores, but nothing measured tells deletion from suppression: sham
facts are no null of what a test says of a model that never knew. A fact that the outputs lost is then *undetermined*,
flagged `no_retrained`; intact and collapsed rest on outputs alone and may be said.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from jaxtyping import Float
from torch import Tensor

from mech_unlearn.core import Fact, Label, Measurement, Verdict
from mech_unlearn.verdict.calibration import Calibration
from mech_unlearn.verdict.features import READS, matrix, measurements
from mech_unlearn.verdict.result import Result
from mech_unlearn.verdict.verdicts import Verdicts

BRINGING_BACK = ("uds", "uds_subject", "writeback", "sae", "relearn", "int8", "int4")
"""Tests whose recoverability can show that a fact is still there."""
INSIDE = ("writeback", "sae", "relearn", "int8", "int4")
"""Those that bring it back in the model itself."""
CALIBRATED = ("output", *READS.values())
"""The tests that a calibrated verdict reads."""
_SCORE = {test: name for name, test in READS.items()}
"""Test -> the name of its score in a verdict, where that is not the test's own."""
SPOKEN = {
    "output": "the outputs",
    "uds": "patching its answer states into the full model",
    "uds_subject": "patching its subject state into the full model",
    "writeback": "writing the full model's states of the prompt into it",
    "sae": "writing the entity's profile back",
    "logit_lens": "reading its states out at each layer",
    "probe": "a probe of its states",
    "relearn": "relearning other facts",
    "int8": "rounding to 8 bits",
    "int4": "rounding to 4 bits",
}

BLIND = "no test could patch its states, or none tried to bring it back in the model itself"
NOT_TESTABLE = (
    "Undetermined: not testable, because the full model does not know it well enough, or retrained models guess it."
)
NOT_TESTABLE_B = "Undetermined: not testable, because the full model does not tell it from sham facts well enough."
NO_RETRAINED = "without retrained models nothing measured tells deletion from suppression."


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Where the labels part. Provisional; see `describe`."""

    output_lost: float = 0.5
    """The outputs lost a fact if kappa of the margin is below this ..."""
    recall_lost: float = 0.5
    """... or if recall over the phrasings is below this, where the full model's is not."""
    suppressed: float = 0.5
    """Suppressed from this evidence on, in the strongest test (0 = retrained, 1 = full)."""
    deleted: float = 0.3
    """Deleted only if no test's evidence exceeds this."""
    null_share: float = 0.05
    """Share of facts of a held-out retrained model that may show any evidence, over all tests together."""
    collapsed_recall: float = 0.5
    """Collapsed if recall of other facts falls below this share of the full model's ..."""
    collapsed_kl: float = 1.0
    """... or if the model drifts this many nats per token from the full one on generic text."""

    def describe(self) -> str:
        """One line that goes with every table of verdicts."""
        values = ", ".join(f"{f.name} {getattr(self, f.name):g}" for f in fields(self))
        return (
            f"Provisional, uncalibrated verdicts ({values}); thresholds were set by principle and checked on the "
            "biographies testbed (full, retrained, last-layer ascent) only. No error rate is claimed."
        )


@dataclass(frozen=True, kw_only=True)
class Health:
    """Whether the audited model still works. None where it was not measured."""

    neighbor_recall: Measurement | None = None
    full_neighbor_recall: Measurement | None = None
    general_kl: Measurement | None = None

    @property
    def lost(self) -> float | None:
        """Recall of other facts lost against the full model."""
        if self.neighbor_recall is None or self.full_neighbor_recall is None:
            return None
        return self.full_neighbor_recall.value - self.neighbor_recall.value

    def broken(self, thresholds: Thresholds) -> str | None:
        """What is broken, in words, or None."""
        if self.neighbor_recall is not None and self.full_neighbor_recall is not None:
            bound = thresholds.collapsed_recall * self.full_neighbor_recall.value
            if self.neighbor_recall.value < bound:
                return f"other facts are recalled {self.neighbor_recall.value:.2f} of the time (bound {bound:.2f})"
        if self.general_kl is not None and not self.general_kl.value < thresholds.collapsed_kl:
            return f"it drifted {self.general_kl.value:.2f} nats per token on generic text"
        return None


def judge(
    results: Mapping[str, Result],
    health: Health | None = None,
    thresholds: Thresholds | None = None,
    *,
    held_back: bool = False,
    calibration: Calibration | None = None,
    full: str | None = None,
) -> Verdicts:
    """One verdict per fact from the results of `restoration.audit` on one model.

    Args:
        thresholds: what decides where there is no calibration.
        calibration: p-values in place of thresholds; see the head of this file.
        held_back: the audited model's weights are the full model's, and an intervention on its activations, logits or
            prompts alone keeps the answers back. Nothing is deleted then, whatever its states look like.
        full: `Model.hash()` of the full model, by which facts that the calibration was measured on are known and
            flagged `in_sample`; without it none is.

    Raises:
        KeyError: the results lack the test `output`, without which nothing can be said.
        ValueError: results on different facts, or a calibration and no retrained models, or without a test or the
            health that the calibration reads.
    """
    if "output" not in results:
        raise KeyError(f"a verdict needs the test 'output'; the results hold {sorted(results)}")
    bounds, facts = thresholds or Thresholds(), results["output"].facts
    for name, result in results.items():
        if [f.id for f in result.facts] != [f.id for f in facts]:
            raise ValueError(f"test {name!r} was run on other facts than 'output'")
    if calibration is not None:
        verdicts = _by_calibration(calibration, results, health or Health())
        seen = calibration.in_sample(full, [fact.group or fact.subject for fact in facts]) or [False] * len(facts)
        verdicts = tuple(v.with_flags("in_sample") if ours else v for v, ours in zip(verdicts, seen, strict=True))
    else:
        broken = (health or Health()).broken(bounds)
        weights = evidence(results, bounds)
        verdicts = tuple(_judge(i, fact, results, weights, broken, bounds) for i, fact in enumerate(facts))
    if not held_back:
        return Verdicts(verdicts)
    return Verdicts(_only_held_back(verdict, _lost(results, i, bounds)) for i, verdict in enumerate(verdicts))


def _lost(results: Mapping[str, Result], i: int, bounds: Thresholds) -> bool:
    """Whether the outputs lost a fact."""
    output = results["output"]
    assert output.kappa is not None
    known = output.columns["recall_F"][i].item() >= bounds.recall_lost
    forgot = known and output.columns["recall"][i].item() < bounds.recall_lost
    return output.kappa[i].item() < bounds.output_lost or forgot


def _by_calibration(calibration: Calibration, results: Mapping[str, Result], health: Health) -> tuple[Verdict, ...]:
    """A label where all truths but one are ruled out."""
    if results["output"].grade != "A":
        raise ValueError(
            "a calibrated verdict rests on retrained models, and these results were made without: give some, or judge "
            "without a calibration"
        )
    if health.lost is None or health.general_kl is None:
        raise ValueError(
            "a calibrated verdict reads the model's health, which was not measured: give facts about other subjects "
            "and texts, or judge without a calibration"
        )
    if missing := [name for name in CALIBRATED if name not in results]:
        raise ValueError(
            f"a calibrated verdict reads the test {missing[0]!r}, which was not run; run {', '.join(CALIBRATED)}, or "
            "judge without a calibration"
        )
    output = results["output"]
    assert output.kappa is not None
    drift = health.general_kl.value
    rows = measurements(results, health.lost, float("inf") if drift != drift else drift)
    testable = output.columns["testable"].bool().tolist()
    # What cannot be tested is no evidence about the facts of its group either.
    read = [row if ok else {**row, **dict.fromkeys(READS)} for row, ok in zip(rows, testable, strict=True)]
    groups = [fact.group or fact.subject for fact in output.facts]
    said = calibration.judge(matrix(read, groups, calibration.spread, calibration.left_out))
    verdicts = []
    for i, (fact, row) in enumerate(zip(output.facts, rows, strict=True)):
        values, left = {truth: float(p[i]) for truth, p in said.p.items()}, said.left[i]
        flags = tuple(dict.fromkeys(flag for name in results for flag in results[name].flags_of(i)))
        measured = {name: value for name in READS if (value := row[name]) is not None}
        spoke = {READS[name]: value for name, value in measured.items() if name not in calibration.left_out}
        outputs = _outputs(output, i)
        if "not_testable" in flags:
            label, tests, sentence = "undetermined", ("output",), NOT_TESTABLE
        elif said.unlike[i]:
            label, tests, flags = "undetermined", ("output",), (*flags, "unlike_pool")
            sentence = "Undetermined: its measurements are unlike those of every model that the calibration knows."
        elif said.blind[i] and left == ("deleted",):
            label, tests = "undetermined", tuple(spoke) or ("output",)
            sentence = f"Undetermined: the outputs lost it ({outputs}), but {BLIND}."
        else:
            label = said.labels[i]
            tests, sentence = _explained(label, left, spoke, values, outputs)
        if not left:
            flags = (*flags, "novel")
        scores = {
            "output": _number(output.kappa[i].item()),
            **{name: measured.get(name) for name in READS},
        }
        verdicts.append(
            Verdict(
                fact_id=fact.id, label=label, sentence=sentence, tests=tests, scores=scores, p_values=values,
                grade=output.grade, flags=flags,
            )
        )  # fmt: skip
    return tuple(verdicts)


def _explained(
    label: Label, left: Sequence[Label], spoke: Mapping[str, float], p: Mapping[str, float], outputs: str
) -> tuple[tuple[str, ...], str]:
    """(The tests that decided, one sentence)."""
    ruled_out = ", ".join(f"{truth} (p = {value:.3f})" for truth, value in p.items() if truth not in left)
    best = max(spoke, key=lambda name: spoke[name]) if spoke else None
    most = f"{SPOKEN[best]} recovers {spoke[best]:.2f} of the gap between retrained and full" if best else ""
    if label == "undetermined":
        what = f"{' and '.join(left)} cannot be told apart" if left else "none of the known truths fits"
        return tuple(spoke) or ("output",), f"Undetermined: {what} ({outputs}{'; ' + most if most else ''})."
    if label == "suppressed":
        return (best or "output",), f"Suppressed: the outputs lost it ({outputs}), but {most}; ruled out: {ruled_out}."
    if label == "deleted":
        read = f", and of what the calibration reads at the most {most}" if most else ""
        return tuple(spoke) or ("output",), f"Deleted: the outputs lost it ({outputs}){read}; ruled out: {ruled_out}."
    head = "the outputs still give it" if label == "intact" else "the model is too broken for a missing answer to count"
    return ("output",), f"{label.capitalize()}: {head} ({outputs}); ruled out: {ruled_out}."


def _only_held_back(verdict: Verdict, lost: bool) -> Verdict:
    """A lost answer is suppressed where the weights are those of the full model."""
    flagged = verdict.with_flags("intervention")
    if not lost or verdict.label not in ("deleted", "undetermined") or "not_testable" in verdict.flags:
        return flagged
    sentence = (
        "Suppressed: the weights are those of the full model, and only an intervention that can be taken off keeps the "
        "answer back."
    )
    flags = tuple(flag for flag in flagged.flags if flag != "no_retrained")
    return replace(flagged, label="suppressed", sentence=sentence, flags=flags)


def evidence(results: Mapping[str, Result], thresholds: Thresholds) -> dict[str, Float[Tensor, " fact"]]:
    """Test -> recoverability beyond what the test says of retrained models, in [0, 1]; NaN where it did not speak."""
    speaking = [name for name in BRINGING_BACK if name in results]
    testable = results["output"].columns["testable"].bool()
    out = {}
    for name in speaking:
        null = results[name].null[:, testable]
        null = null[~null.isnan()]
        level = 1 - thresholds.null_share / len(speaking)
        q = null.quantile(level).item() if len(null) else 0.0
        out[name] = ((results[name].recoverability - q) / max(1 - q, 1e-3)).clamp(0, 1)
    return out


def _judge(
    i: int,
    fact: Fact,
    results: Mapping[str, Result],
    weights: Mapping[str, Float[Tensor, " fact"]],
    broken: str | None,
    bounds: Thresholds,
) -> Verdict:
    output = results["output"]
    assert output.kappa is not None
    scores = {name: _number(weights[name][i].item()) for name in weights}
    spoke = {name: value for name, value in scores.items() if value is not None}
    lost = _lost(results, i, bounds)
    flags = tuple(dict.fromkeys(flag for name in results for flag in results[name].flags_of(i)))
    outputs, untestable, retrained = _outputs(output, i), "not_testable" in flags, output.grade == "A"
    label, tests, sentence = _by_outputs(outputs, lost, broken, untestable, retrained) or _by_tests(
        outputs, spoke, _blind(i, results, spoke), bounds
    )
    unsaid = lost and not (retrained or untestable or broken)
    p_values = {
        name: value
        for name in spoke
        if (p := results[name].p_null) is not None and (value := _number(p[i].item())) is not None
    }
    return Verdict(
        fact_id=fact.id,
        label=label,
        sentence=sentence,
        tests=tests,
        scores={"output": _number(output.kappa[i].item()), **{_SCORE.get(test, test): x for test, x in scores.items()}},
        p_values=p_values,
        grade=output.grade if spoke else "C",
        flags=(*flags, *(("health_fail",) if broken else ()), *(("no_retrained",) if unsaid else ())),
    )


def _blind(i: int, results: Mapping[str, Result], spoke: Mapping[str, float]) -> str | None:
    """Why the tests that spoke cannot show a deletion, in words, or None.

    Patching sees a block behind the patched layer and writing profiles, relearning or rounding one before it, so that
    a deletion needs one of each. States that cost the full model more than three times what retrained states cost are
    broken rather than empty, and say nothing about what they hold.
    """
    if not any(n in spoke and "raw_ratio_above_3" not in results[n].flags_of(i) for n in ("uds", "uds_subject")):
        return "no patching test could say what its states still hold"
    if not any(name in spoke for name in INSIDE):
        return "no test tried to bring it back in the model itself"
    return None


def _outputs(output: Result, i: int) -> str:
    """Recall and margin of a fact in words, the latter from what stands for a model that never knew it."""
    assert output.kappa is not None
    never = "retrained" if output.grade == "A" else "sham facts"
    recall, kappa = output.columns["recall"][i].item(), output.kappa[i].item()
    return f"recall {recall:.2f}, margin {kappa:.2f} of the way from {never} to full"


def _by_outputs(
    outputs: str, lost: bool, broken: str | None, untestable: bool, retrained: bool
) -> tuple[Label, tuple[str, ...], str] | None:
    """(label, the tests that decided, a sentence) where no restoration test has a say, else None: what rests on outputs
    alone, and whatever they lost where no retrained model was given."""
    if broken:
        return "collapsed", ("output",), f"Collapsed: {broken}, so a missing answer says nothing."
    if untestable:
        return "undetermined", ("output",), NOT_TESTABLE if retrained else NOT_TESTABLE_B
    if not lost:
        return "intact", ("output",), f"Intact: the outputs still give it ({outputs})."
    if not retrained:
        return "undetermined", ("output",), f"Lost in the outputs ({outputs}); no verdict: {NO_RETRAINED}"
    return None


def _by_tests(
    outputs: str, spoke: Mapping[str, float], blind: str | None, bounds: Thresholds
) -> tuple[Label, tuple[str, ...], str]:
    """(label, the tests that decided, a sentence) of a fact that the outputs lost, against retrained models."""
    if not spoke:
        return "undetermined", ("output",), f"Undetermined: the outputs lost it ({outputs}); no restoration test spoke."
    best = max(spoke, key=lambda name: spoke[name])
    value = f"{SPOKEN[best]} recovers {spoke[best]:.2f} of the gap between retrained and full"
    if spoke[best] >= bounds.suppressed:
        over = tuple(name for name in spoke if spoke[name] >= bounds.suppressed)
        return "suppressed", over, f"Suppressed: the outputs lost it ({outputs}), but {value}."
    if spoke[best] <= bounds.deleted and blind:
        return "undetermined", tuple(spoke), f"Undetermined: the outputs lost it ({outputs}), but {blind}."
    if spoke[best] <= bounds.deleted:
        return "deleted", tuple(spoke), f"Deleted: the outputs lost it ({outputs}), and at the most {value}."
    return "undetermined", (best,), f"Undetermined: the outputs lost it ({outputs}), and {value}, between the bounds."


def _number(x: float) -> float | None:
    return None if x != x else x


def lost_without_verdict(verdicts: Sequence[Verdict]) -> float:
    """Share of the testable facts that the outputs lost and that got no verdict for want of retrained models."""
    counted = [v for v in verdicts if "not_testable" not in v.flags]
    return sum("no_retrained" in v.flags for v in counted) / max(1, len(counted))
