"""DUSK: what a document alone said has to go, what other documents say too has to stay.

Paper: Jeung et al. 2025, arXiv 2505.15209: verbatim memorization of the forgotten document, and knowledge on three
    strata: unique to the forgotten document, shared, unique to the retained ones.
Needs: greedy text; the questions and answers of each stratum, solved examples, passages of the forgotten document.
Differs: four of its seven numbers. Privacy is `muse/privacy.py`, downstream ability metrics/harness.py; retain
    deviation is left out: its formula was not to be found. Both kinds of score are MUSE's (muse/scores.py), as in the
    released code.
Fails: as ROUGE does on other words for the same; read each stratum against the retrained model
    (`scores[name].minus(retrained[name])`), which differs from the full one on the first stratum only.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from mech_unlearn.benchmarks.muse.scores import knowmem_rouge_l_f1, verbmem_rouge_l_f1
from mech_unlearn.metrics.intervals import RowScores
from mech_unlearn.model.bridge import Model

NAMES = ("knowmem_unique_forget", "knowmem_shared", "knowmem_unique_retain", "verbmem_forget")


@dataclass(frozen=True, kw_only=True)
class Stratum:
    """Pairs of texts of one kind: (question, answer), or (beginning, continuation) of passages.

    Raises:
        ValueError: no pairs, or another number of clusters.
    """

    pairs: tuple[tuple[str, str], ...]
    clusters: tuple[Hashable, ...] | None = None
    """Whom each pair is about."""

    def __post_init__(self) -> None:
        if not self.pairs:
            raise ValueError("a stratum of DUSK needs at least one pair of texts")
        if self.clusters is not None and len(self.clusters) != len(self.pairs):
            raise ValueError(f"{len(self.pairs)} pairs of texts but {len(self.clusters)} clusters")


def dusk(
    model: Model,
    unique_forget: Stratum,
    shared: Stratum,
    unique_retain: Stratum,
    verbatim: Stratum,
    examples: Sequence[tuple[str, str]],
) -> dict[str, RowScores]:
    """KnowMem on the three strata and VerbMem on the forgotten document, by `NAMES`; all from generated text.

    Args:
        verbatim: beginnings of the forgotten document's passages, and how they go on.
        examples: solved (question, answer) pairs put before each question.

    Raises:
        ValueError: as `muse.knowmem_rouge_l_f1`.
    """
    out = {}
    for name, stratum in zip(NAMES, (unique_forget, shared, unique_retain)):
        questions, answers = zip(*stratum.pairs, strict=True)
        out[name] = knowmem_rouge_l_f1(model, questions, answers, examples, clusters=stratum.clusters)
    begin, rest = zip(*verbatim.pairs, strict=True)
    return out | {NAMES[3]: verbmem_rouge_l_f1(model, begin, rest, clusters=verbatim.clusters)}
