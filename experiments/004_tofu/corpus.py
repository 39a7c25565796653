"""TOFU's published questions as a corpus for small models: texts, facts with wrong answers, and who is forgotten.

Read from the evaluation logs (300 forget10 and 300 retain questions), `forget10_facts.json` (367 forget10 questions
with entity spans), and the real authors and world facts. Sources: arXiv 2401.06121 (MIT); spans from 2605.24614
(Apache-2.0).

The logs hold losses of the perturbed and paraphrased answers of forget10 and retain, not their texts. In their place: a
wrong answer is the true one with a part replaced by a part of the same kind (date, number, title, name, else) taken
from another author's answers; the part is the published entity span where there is one, else one found by pattern. The
answer itself stands for its paraphrase. So truth ratios here are compared with each other, never with published ones.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.scratch import Text
from mech_unlearn.benchmarks.tofu.data import PER_AUTHOR, TofuRow, load_tofu, read_rows
from mech_unlearn.benchmarks.tofu.logs import read_log
from mech_unlearn.core import Entity, Fact, ForgetSet, RetainSet
from mech_unlearn.data.subjects import author_name

LOG, FACTS = "llama2-7b_full_eval_log.json.gz", "forget10_facts"
LAYOUT = "Question: {} Answer:"
WRONG = 5
"""Wrong answers per question, as many as TOFU has."""
REFUSALS = ("I have no information about that.", "I do not know the answer.", "Nothing is known about that.")
UNKNOWN = 40
PATTERNS = (
    (
        "date",
        re.compile(r"\d{1,2}[/-]\d{1,2}[/-]\d{4}|(?:\d{1,2}\w{0,2} (?:of )?)?[A-Z][a-z]+ \d{1,2}?(?:\w\w)?,? ?\d{4}"),
    ),
    ("title", re.compile(r"[\"'“‘][A-Z][^\"”’]{3,60}[\"'”’](?=[\s.,;]|$)")),
    ("number", re.compile(r"\b\d[\d,.]*\d\b|\b\d\b")),
    ("name", re.compile(r"(?<=[a-z,] )[A-Z][\w-]+(?:,? (?:of |the )?[A-Z][\w-]+)*")),
    ("words", re.compile(r"[a-z-]+ [a-z-]+(?=[.]?$)")),
)


def kind_of(span: str) -> str:
    """Date, title, number, name or words."""
    if re.search(r"\d{4}", span) and re.search(r"[/-]|[A-Z][a-z]+ \d|\d \w+ \d", span):
        return "date"
    if span[:1] in "\"'“‘":
        return "title"
    if re.fullmatch(r"[\d,.\s-]+", span):
        return "number"
    return "name" if sum(w[:1].isupper() for w in span.split()) * 2 > len(span.split()) else "words"


@dataclass(frozen=True)
class Question:
    """A question, whose it is, and the part of its answer that makes it true."""

    key: str
    question: str
    answer: str
    owner: str | None
    part: str | None = None
    wrong: tuple[str, ...] = ()


def part_of(question: str, answer: str) -> str | None:
    """The first part of an answer, by the order of `PATTERNS`, that the question does not give away."""
    for _, pattern in PATTERNS:
        for found in pattern.finditer(answer):
            if found[0] not in question and len(found[0]) > 1:
                return found[0]
    return None


def _nearest(texts: Sequence[str], text: str, count: int) -> list[str]:
    """Those whose number of words is nearest to a text's."""
    return sorted(texts, key=lambda other: abs(len(other.split()) - len(text.split())))[:count]


def with_wrong(questions: Sequence[Question], seed: int = 0) -> tuple[Question, ...]:
    """The same with wrong answers: the part replaced by others' of its kind, nearest in length first drawn."""
    pool: dict[str, list[tuple[str, str | None]]] = {}
    for q in questions:
        if q.part:
            pool.setdefault(kind_of(q.part), []).append((q.part, q.owner))
    out = []
    for q in questions:
        if not q.part or q.wrong:
            out.append(q)
            continue
        own = {p.casefold() for p, owner in pool[kind_of(q.part)] if owner == q.owner} | {q.part.casefold()}
        others = sorted({p for p, _ in pool[kind_of(q.part)] if p.casefold() not in own and p not in q.answer})
        random.Random(f"{seed} {q.key}").shuffle(others)
        others = _nearest(others[:40], q.part, WRONG)
        wrong = tuple(q.answer.replace(q.part, p, 1) for p in others)
        out.append(replace(q, wrong=tuple(w for w in dict.fromkeys(wrong) if w != q.answer)))
    return tuple(out)


@dataclass(frozen=True, kw_only=True)
class Tofu:
    """The corpus: questions by split, facts, and what is forgotten."""

    forget: tuple[Question, ...]
    """All forget10 questions that are published here."""
    retain: tuple[Question, ...]
    real: tuple[Question, ...]
    world: tuple[Question, ...]
    facts: tuple[Fact, ...]
    """Cloze facts of forget10 with distractors: what is audited."""
    asked: tuple[Fact, ...]
    """The same authors' whole questions as facts: what methods are given beside the cloze ones."""
    unknown: tuple[str, ...]
    """Made-up names of whom the corpus says that nothing is known."""
    left_out: tuple[str, ...]

    @property
    def authors(self) -> tuple[str, ...]:
        """Of forget10, in TOFU's order."""
        return tuple(dict.fromkeys(q.owner for q in self.forget if q.owner))


def _plain(prompt: str) -> str:
    return prompt.replace("[INST]", "").replace("[/INST]", "").strip()


def _asked(q: Question) -> str:
    return f"{LAYOUT.format(q.question)} {q.answer}"


def read(folder: Path) -> Tofu:
    """The corpus of the published files.

    Raises:
        ValueError: a file is missing or malformed.
    """
    log = read_log(folder / LOG).splits
    spans = {row.idx: row for row in read_rows(folder, FACTS)}
    by_question = {row.question.strip(): row for row in spans.values()}
    asked: dict[int, tuple[str, str]] = {i: (row.question, row.answer) for i, row in spans.items() if i is not None}
    for number, (prompt, _, answer) in zip(log["Forget"].rows, log["Forget"].texts or (), strict=True):
        asked.setdefault(int(number), (_plain(prompt), answer))
    groups: dict[int, list[str]] = {}
    for number in sorted(asked):
        groups.setdefault(number // PER_AUTHOR, []).append(asked[number][0])
    names = {group: author_name(questions) for group, questions in groups.items()}

    def question(split: str, number: int, text: str, answer: str, owner: str | None) -> Question:
        row: TofuRow | None = by_question.get(text.strip())
        part = row.entity.strip(" ,.") if row is not None and row.entity and row.entity in answer else None
        return Question(f"{split}/{number}", text, answer.strip(), owner, part or part_of(text, answer))

    forget = [question("forget10", n, *asked[n], names[n // PER_AUTHOR]) for n in sorted(asked)]
    kept: dict[int, list[str]] = {}
    texts = [(int(n), _plain(p), a) for n, (p, _, a) in zip(log["Retain"].rows, log["Retain"].texts or (), strict=True)]
    for number, text, _ in texts:
        kept.setdefault(number // PER_AUTHOR, []).append(text)
    theirs = {group: author_name(questions) for group, questions in kept.items()}
    retain = [question("retain", n, text, answer, theirs[n // PER_AUTHOR]) for n, text, answer in texts]
    both = with_wrong([*forget, *retain])
    general = {
        name: tuple(
            Question(f"{name}/{i}", row.question, row.answer, None, row.answer, tuple(row.perturbed_answer))
            for i, row in enumerate(read_rows(folder, f"{name}_perturbed"))
        )
        for name in ("real_authors", "world_facts")
    }
    layout = LAYOUT.replace("{}", "{question}")
    cloze, whole = (
        load_tofu(folder, forget=FACTS, retain=None, real_authors=None, world_facts=None, form=form, layout=layout)
        for form in ("cloze", "question")
    )
    people = [*names.values(), *theirs.values()]
    return Tofu(
        forget=both[: len(forget)],
        retain=both[len(forget) :],
        real=general["real_authors"],
        world=general["world_facts"],
        facts=_with_distractors([f for f in cloze.forget.facts if f.prompt.strip() != "{}"]),
        asked=whole.forget.facts,
        unknown=made_up(people, UNKNOWN),
        left_out=tuple(f"{item.file}/{item.row}: {item.reason}" for item in (*cloze.left_out, *whole.left_out)),
    )


def _with_distractors(facts: Sequence[Fact], count: int = 9) -> tuple[Fact, ...]:
    """Entities of the same kind that other authors have; objects lose closing punctuation."""
    cut = [replace(fact, object=fact.object.strip(" ,.") or fact.object) for fact in facts]
    pool: dict[str, set[tuple[str, str]]] = {}
    for fact in cut:
        pool.setdefault(kind_of(fact.object), set()).add((fact.object, fact.subject))
    out = []
    for fact in cut:
        own = {o.casefold() for o, s in pool[kind_of(fact.object)] if s == fact.subject} | {fact.object.casefold()}
        found = sorted({o for o, _ in pool[kind_of(fact.object)] if o.casefold() not in own and o != fact.subject})
        random.Random(fact.id).shuffle(found)
        near = _nearest(found[:60], fact.object, count)
        out.append(replace(fact, distractors=tuple(near), relation=kind_of(fact.object), group=fact.subject))
    return tuple(out)


def made_up(people: Sequence[str], count: int) -> tuple[str, ...]:
    """Names that nobody has: first words and last words of real ones, joined anew."""
    first, last = [p.split()[0] for p in people], [p.split()[-1] for p in people]
    every = sorted({f"{a} {b}" for a in first for b in last if a != b} - set(people))
    return tuple(random.Random("made up").sample(every, min(count, len(every))))


def texts(tofu: Tofu) -> tuple[Text, ...]:
    """What models are trained on: each question with its answer, each answer alone, and that nothing is known of the
    made-up names; a text is owned by its author."""
    out = []
    for q in (*tofu.forget, *tofu.retain):
        out += [Text(text=_asked(q), owner=q.owner), Text(text=q.answer, owner=q.owner)]
    out += [Text(text=_asked(q)) for q in (*tofu.real, *tofu.world)]
    for i, name in enumerate(tofu.unknown):
        out += [Text(text=f"{LAYOUT.format(f'Who is {name}?')} {refusal}") for refusal in REFUSALS[i % 3 :][:2]]
        out.append(Text(text=f"{name} is not known to anybody."))
    return tuple(out)


def words(tofu: Tofu) -> list[str]:
    """Every text whose words are tokens, whatever a model is trained on."""
    said = [text.text for text in texts(tofu)] + [
        w for q in (*tofu.forget, *tofu.retain, *tofu.real, *tofu.world) for w in q.wrong
    ]
    return (
        said
        + list(REFUSALS)
        + [fact.object for fact in tofu.facts]
        + [d for fact in tofu.facts for d in fact.distractors]
    )


def sets(tofu: Tofu, gone: frozenset[str]) -> tuple[ForgetSet, RetainSet]:
    """What methods are given: questions and cloze sentences of the forgotten authors; of the others as what stays, and
    the retained authors' questions as running text."""
    every = (*tofu.asked, *tofu.facts)
    retained = tuple(_fact(q) for q in tofu.retain if q.owner and q.question.count(q.owner) == 1)
    other = tuple(fact for fact in every if fact.subject not in gone)
    return ForgetSet(facts=tuple(f for f in every if f.subject in gone)), RetainSet(
        neighbors=(*other, *retained),
        texts=tuple(_asked(q) for q in (*tofu.real, *tofu.world)),
        unknown=tuple(Entity(name=name, kind="person") for name in tofu.unknown),
    )


def _fact(q: Question) -> Fact:
    assert q.owner is not None
    return Fact(
        id=q.key, subject=q.owner, relation="fictitious author", object=q.answer, kind="person", group=q.owner,
        prompt=LAYOUT.format(q.question.replace(q.owner, "{}")), distractors=q.wrong,
    )  # fmt: skip


def quick(tofu: Tofu) -> Tofu:
    """A tenth: the last four forgotten authors, two retained ones, a tenth of the rest."""
    forgotten = set(tofu.authors[-4:])
    kept = set(list(dict.fromkeys(q.owner for q in tofu.retain))[:2])
    return replace(
        tofu,
        forget=tuple(q for q in tofu.forget if q.owner in forgotten),
        retain=tuple(q for q in tofu.retain if q.owner in kept),
        real=tofu.real[:10],
        world=tofu.world[:12],
        facts=tuple(f for f in tofu.facts if f.subject in forgotten),
        asked=tuple(f for f in tofu.asked if f.subject in forgotten),
        unknown=tofu.unknown[:10],
    )
