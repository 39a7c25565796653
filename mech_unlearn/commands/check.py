"""The verb `check`, and what the command `facts check` does with files: what does this model know?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mech_unlearn.attribution import as_table
from mech_unlearn.commands.facts import require_new_file
from mech_unlearn.commands.inputs import open_model
from mech_unlearn.commands.options import CheckOptions
from mech_unlearn.core import Fact, Measurement
from mech_unlearn.data.checking import Finding, findings
from mech_unlearn.data.jsonl import load_facts, save_facts

KNOWS = 0.5
"""Share of a fact's phrasings that have to be answered right for the model to count as knowing it."""
SHOWN = 10
"""Facts that one finding names."""
HEADER = ("fact", "subject", "right answer", "recall", "held-out", "p", "margin", "testable", "says")


@dataclass(frozen=True, kw_only=True)
class Known:
    """What a model says of one fact."""

    fact: Fact
    right: dict[str, bool]
    """Phrasing -> whether greedy decoding gives the object; those that methods may see."""
    heldout: dict[str, bool]
    """The same of held-out phrasings."""
    probability: float
    """Of the object behind the main prompt: geometric mean over its tokens."""
    margin: float
    """log p(object) - log mean p(distractor), mean log-probability per token, nats, mean over phrasings; without
    distractors log p(object)."""
    testable: bool | None
    """Whether an audit without retrained models could test it; None with fewer than two distractors."""
    says: str
    """The model's own answer to the main prompt, as many tokens as the object has."""

    @property
    def recall(self) -> float:
        return sum(self.right.values()) / len(self.right)

    @property
    def knows(self) -> bool:
        return self.recall >= KNOWS

    def cells(self) -> tuple[str, ...]:
        def share(answers: dict[str, bool]) -> str:
            return f"{sum(answers.values())}/{len(answers)}" if answers else "–"

        testable = {True: "yes", False: "no", None: "–"}[self.testable]
        numbers = (share(self.right), share(self.heldout), f"{self.probability:.2f}", f"{self.margin:.2f}", testable)
        return (self.fact.id, self.fact.subject, self.fact.object, *numbers, self.says)

    def to_json(self) -> dict[str, Any]:
        own = {key: value for key, value in vars(self).items() if key != "fact"}
        triple = {key: getattr(self.fact, key) for key in ("id", "subject", "relation", "object")}
        return triple | own | {"recall": self.recall, "knows": self.knows}


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """What a model knows of some facts, and what is odd about them."""

    model: str
    rows: tuple[Known, ...]
    findings: tuple[Finding, ...]
    recall: Measurement
    heldout: Measurement | None
    """Recall in held-out phrasings; None where no fact has one."""

    @property
    def known(self) -> tuple[Fact, ...]:
        """The facts that it answers right in at least half of their phrasings."""
        return tuple(row.fact for row in self.rows if row.knows)

    @property
    def summary(self) -> str:
        told = f"{self.model}: {len(self.known)} of {len(self.rows)} facts known"
        told += f"; recall {self.recall}, n = {self.recall.n} phrasings"
        held = f", held-out phrasings {self.heldout}, n = {self.heldout.n}" if self.heldout else ""
        testable = [row.testable for row in self.rows if row.testable is not None]
        without = f"; {sum(testable)} of {len(testable)} testable without retrained models" if testable else ""
        return told + held + without

    def lines(self) -> list[str]:
        """The table and what is odd, for the terminal; what models and users wrote is shown by one line a fact."""
        cells = [HEADER, *(row.cells() for row in self.rows)]
        cells = [[" ".join(cell.split()) for cell in row] for row in cells]
        widths = [max(len(row[i]) for row in cells) for i in range(len(HEADER))]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        return [*table, self.summary, *(f"{one.oddity}: {one.told} ({_some(one.facts)})" for one in self.findings)]

    def __repr__(self) -> str:
        return f"Knowledge({self.summary}; {len(self.findings)} findings)"

    def _repr_html_(self) -> str:
        """A row per fact, for Jupyter."""
        odd = "; ".join(f"{one.oddity}: {one.told} ({_some(one.facts)})" for one in self.findings)
        return as_table(HEADER, [row.cells() for row in self.rows], f"{self.summary}. {odd}")

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "known": len(self.known),
            "recall": self.recall.to_json(),
            "heldout": self.heldout and self.heldout.to_json(),
            "facts": [row.to_json() for row in self.rows],
            "findings": [{**vars(one), "facts": list(one.facts)} for one in self.findings],
        }


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:SHOWN]) + (f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else "")


def check(model: Any, facts: Sequence[Fact], retain: Sequence[Fact] = (), *, seed: int = 0) -> Knowledge:
    """What a model knows of facts, phrasing by phrasing, and what is odd about the facts themselves.

    Args:
        model: as `load` gives it.
        retain: facts to be kept, which the others are compared with; they are not asked.
        seed: of the intervals, and of the false facts that stand in for retrained models.

    Raises:
        ValueError: no facts, or a prompt or an answer that the tokenizer has no tokens for.
    """
    from mech_unlearn.metrics import mean_ci
    from mech_unlearn.model.scores import greedy, per_fact, score
    from mech_unlearn.model.tokens import make_queries

    if not facts:
        raise ValueError("no facts to check: give at least one")
    queries, held = (make_queries(model.tokenizer, facts, which) for which in ("templates", "heldout"))
    scores, unseen = score(model, queries), score(model, held)
    margins = per_fact(scores, queries, facts).margin.tolist()
    right, heldout = ({fact.id: {} for fact in facts} for _ in range(2))
    for found, asked, exact in ((right, queries, scores.exact), (heldout, held, unseen.exact)):
        for query, hit in zip(asked, exact.tolist(), strict=True):
            found[query.fact.id][query.template] = hit
    first = {query.fact.id: i for i, query in reversed(list(enumerate(queries)))}
    main = [first[fact.id] for fact in facts]
    longest = max(len(queries[i].answers[0]) for i in main)
    said = greedy(model, [queries[i].prompt for i in main], longest)
    testable = _testable(model, facts, seed)
    rows = tuple(
        Known(
            fact=fact,
            right=right[fact.id],
            heldout=heldout[fact.id],
            probability=scores.logprob[i, 0].exp().item(),
            margin=margin,
            testable=testable.get(fact.id),
            says=model.tokenizer.decode(list(answer[: len(queries[i].answers[0])])).strip(),
        )
        for fact, i, margin, answer in zip(facts, main, margins, said, strict=True)
    )
    unit = "share of phrasings answered right, greedy"
    asked_of = [query.fact.subject for query in held]
    return Knowledge(
        model=model.name,
        rows=rows,
        findings=findings(facts, retain),
        recall=mean_ci(scores.exact.float(), unit, [query.fact.subject for query in queries], seed),
        heldout=mean_ci(unseen.exact.float(), unit, asked_of, seed) if held else None,
    )


def _testable(model: Any, facts: Sequence[Fact], seed: int) -> dict[str, bool]:
    """Whether an audit without retrained models could test each fact that has two distractors."""
    from mech_unlearn.restoration import Case
    from mech_unlearn.restoration.outputs import output

    some = tuple(fact for fact in facts if len(fact.distractors) > 1)
    if not some:
        return {}
    levels = output.prepare(Case(full=model, facts=some, seed=seed))
    return {fact.id: bool(ok) for fact, ok in zip(some, levels.testable.tolist(), strict=True)}


def run_check(options: CheckOptions) -> Knowledge:
    """Check a facts file on a model and, where a file is named, write the facts that it knows.

    Raises:
        ValueError: bad input, no known fact to write, or a file that is there already; then nothing is written.
    """
    require_new_file(options.known)
    facts, kept = load_facts(options.facts), load_facts(options.retain) if options.retain else ()
    model = open_model(options.model, options.device, options.dtype)
    found = check(model, facts, kept, seed=options.seed)
    if options.known is not None:
        if not found.known:
            raise ValueError(
                f"{options.model!r} knows none of these facts, so that {str(options.known)!r} would be empty"
            )
        save_facts(found.known, Path(options.known))
    return found
