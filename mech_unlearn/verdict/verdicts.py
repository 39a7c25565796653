"""The verdicts on one model's facts, as they show themselves."""

from collections import Counter
from typing import Any

from mech_unlearn.attribution import as_table
from mech_unlearn.core import LABELS, Verdict


class Verdicts(tuple[Verdict, ...]):
    """One verdict per fact, in the facts' order."""

    def shares(self, testable_only: bool = True) -> dict[str, float]:
        """Share of each label, by default over the testable facts; all zero if there is none."""
        counted = [v for v in self if not (testable_only and "not_testable" in v.flags)]
        return {label: sum(v.label == label for v in counted) / max(1, len(counted)) for label in LABELS}

    def to_frame(self) -> Any:
        """A pandas frame with one row per fact: label, sentence, the tests that decided, scores, p-values, flags."""
        import pandas as pd

        return pd.DataFrame([v.to_json() for v in self]).set_index("fact_id")

    def __repr__(self) -> str:
        counts = Counter(v.label for v in self)
        told = ", ".join(f"{label} {counts[label]}" for label in LABELS if counts[label])
        return f"Verdicts({len(self)} facts: {told})"

    def _repr_html_(self) -> str:
        """Label, sentence and flags of each fact, for Jupyter."""
        rows = [(v.fact_id, v.label, v.sentence, ", ".join(v.flags)) for v in self]
        return as_table(("fact", "verdict", "why", "flags"), rows, repr(self))
