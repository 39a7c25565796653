"""CounterFact: facts with a false object each, phrasings, and prompts about other subjects of the same relation.

Rows have `case_id`, `requested_rewrite` (`prompt` with one `{}`, `subject`, `relation_id`, `target_true` and
`target_new`, each of `str` and `id`), `paraphrase_prompts` (with unrelated text in front), `neighborhood_prompts`
(other subjects, for which `target_true` is true), `attribute_prompts` (other subjects, for which `target_new` is true)
and `generation_prompts`. Source: Meng et al. 2022, arXiv 2202.05262 (MIT).

`target_true` is the object to forget and `target_new` its first distractor. Paraphrases are held out, as they are for
testing. The data do not say whom a neighborhood or attribute prompt is about: it is matched with the phrasings of its
relation that the file itself holds, the longest first; a prompt that matches none, or whose rest is no name, is left
out.
"""

import os
import re
from collections.abc import Iterable, Sequence

from pydantic import Field

from mech_unlearn.core import Fact
from mech_unlearn.data.sets import DISTRACTORS, Found, choose_subjects, divide, why, with_distractors
from mech_unlearn.data.source import LeftOut, Loaded, Record, Text, read_rows
from mech_unlearn.data.subjects import slot

LABELS = {
    "P17": "country",
    "P19": "place of birth",
    "P20": "place of death",
    "P27": "country of citizenship",
    "P30": "continent",
    "P36": "capital",
    "P37": "official language",
    "P39": "position held",
    "P101": "field of work",
    "P103": "native language",
    "P106": "occupation",
    "P108": "employer",
    "P127": "owner",
    "P131": "administrative territorial entity",
    "P136": "genre",
    "P138": "namesake",
    "P140": "religion",
    "P159": "headquarters location",
    "P176": "manufacturer",
    "P178": "developer",
    "P190": "twinned administrative body",
    "P264": "record label",
    "P276": "location",
    "P364": "original language of film or TV show",
    "P407": "language of work or name",
    "P413": "position played on team",
    "P449": "original broadcaster",
    "P463": "membership",
    "P495": "country of origin",
    "P641": "sport",
    "P740": "location of formation",
    "P937": "work location",
    "P1303": "instrument",
    "P1412": "language spoken, written or signed",
}
"""What Wikidata calls the relations (CC0); a relation that is not among them keeps its id."""


class TargetObject(Record):
    """An object."""

    str: Text
    id: Text | None = None


class RequestedRewrite(Record):
    """The fact of a case."""

    prompt: Text
    subject: Text
    relation_id: Text
    target_true: TargetObject
    target_new: TargetObject


class CounterFactRow(Record):
    """One case, under the names the dataset uses."""

    case_id: int
    requested_rewrite: RequestedRewrite
    paraphrase_prompts: list[str] = Field(default_factory=list)
    neighborhood_prompts: list[str] = Field(default_factory=list)
    attribute_prompts: list[str] = Field(default_factory=list)
    generation_prompts: list[str] = Field(default_factory=list)


def load_counterfact(
    source: str | os.PathLike = "azhx/counterfact",
    *,
    name: str | None = None,
    split: str = "train",
    relations: Sequence[str] | None = None,
    subjects: int | Sequence[str] = 20,
    attributes: bool = True,
    distractors: int = DISTRACTORS,
    seed: int = 0,
) -> Loaded:
    """CounterFact's cases as facts to forget and facts to keep.

    The cases that are not forgotten become neighbors or general by their relation. The neighborhood and attribute
    prompts of the forgotten cases become neighbors, one fact per prompt; those of the other cases are not read.

    Args:
        source: the file (`counterfact.json`), a folder that holds `name`, or a hub dataset of the same rows.
        relations: what is forgotten about the subjects, as ids (`P103`) or the names in `LABELS`; None for all.
        subjects: names, or how many to draw.
        attributes: also use attribute prompts.
        distractors: wrong objects per fact: the false object, then others drawn from the relation's.

    Raises:
        ValueError: a source or row that cannot be read (file, row, field), a `case_id` that stands twice, an unknown
            relation or subject, or no fact left to forget.
    """
    rows = read_rows(source, name, CounterFactRow, split=split)
    seen: dict[int, int] = {}
    found: list[Found] = []
    left_out: list[LeftOut] = []
    for number, row in enumerate(rows):
        if seen.setdefault(row.case_id, number) != number:
            raise ValueError(f"{source}, row {number}: case_id {row.case_id} stands in row {seen[row.case_id]} too")
        try:
            heldout, lost = _heldout(row, number)
            found.append(Found(_fact(row, heldout), "counterfact", number))
            left_out += lost
        except ValueError as error:
            left_out.append(LeftOut("counterfact", number, row.requested_rewrite.prompt, why(error)))
    gone = None if relations is None else [LABELS.get(relation, relation) for relation in relations]
    chosen = choose_subjects(found, subjects, gone, seed)
    known = _known_phrasings(rows)
    for item in list(found):
        if item.fact.subject in chosen and (gone is None or item.fact.relation in gone):
            more, lost = _others(rows[item.row], item.row, known, attributes)
            found += more
            left_out += lost
    return divide(with_distractors(found, distractors, seed), chosen, gone, left_out)


def _heldout(row: CounterFactRow, number: int) -> tuple[tuple[str, ...], list[LeftOut]]:
    """(Paraphrases with their subject's slot, those without one.)"""
    kept, lost = [], []
    for text in row.paraphrase_prompts:
        try:
            if "{}" in text:
                raise ValueError("it holds '{}'")
            template = slot(text, row.requested_rewrite.subject).rstrip()
            if template == row.requested_rewrite.prompt:
                raise ValueError("it is the prompt itself")
            kept.append(template)
        except ValueError as error:
            lost.append(LeftOut("counterfact", number, text, f"held-out phrasing: {error}"))
    return tuple(dict.fromkeys(kept)), lost


def _fact(row: CounterFactRow, heldout: tuple[str, ...]) -> Fact:
    rewrite = row.requested_rewrite
    true, new = rewrite.target_true, rewrite.target_new
    return Fact(
        id=f"case{row.case_id}",
        subject=rewrite.subject,
        relation=LABELS.get(rewrite.relation_id, rewrite.relation_id),
        object=true.str,
        prompt=rewrite.prompt,
        heldout=heldout,
        distractors=() if new.str == true.str else (new.str,),
        group=rewrite.subject,
        extra={
            "relation_id": rewrite.relation_id,
            "target_true": true.model_dump(),
            "target_new": new.model_dump(),
            "generation_prompts": tuple(row.generation_prompts),
        },
    )


def _known_phrasings(rows: Iterable[CounterFactRow]) -> dict[str, tuple[str, ...]]:
    """The templates of each relation, by id, the longest first: prompts, and paraphrases without what stands before
    their last sentence."""
    known: dict[str, dict[str, None]] = {}
    for row in rows:
        rewrite = row.requested_rewrite
        templates = known.setdefault(rewrite.relation_id, {})
        texts = [re.split(r"(?<=[.!?])\s+", text.replace(rewrite.subject, "{}"))[-1] for text in row.paraphrase_prompts]
        for template in (rewrite.prompt, *map(str.strip, texts)):
            if template.count("{}") == 1 and template != "{}":
                templates[template] = None
    return {relation: tuple(sorted(found, key=len, reverse=True)) for relation, found in known.items()}


def subject_of(prompt: str, templates: Sequence[str]) -> tuple[str, str]:
    """(Subject, template) of a prompt: what stands in the place of `{}` of the first template that matches.

    Raises:
        ValueError: none matches, or what stands there begins or ends with a word in lower case.
    """
    text = prompt.rstrip()
    for template in templates:
        before, after = template.split("{}")
        subject = text[len(before) : len(text) - len(after)]
        if not (subject.strip() == subject != "" and text == f"{before}{subject}{after}"):
            continue
        if any(word.lower() == word != word.upper() for word in (subject.split()[0], subject.split()[-1])):
            raise ValueError("what stands in the subject's place does not look like a name")
        return subject, template
    raise ValueError("no phrasing of its relation in the file shows who the subject is")


def _others(
    row: CounterFactRow, number: int, known: dict[str, tuple[str, ...]], attributes: bool
) -> tuple[list[Found], list[LeftOut]]:
    """The neighbors that a case brings, and the prompts that became none."""
    rewrite = row.requested_rewrite
    true, new = rewrite.target_true.str, rewrite.target_new.str
    kinds = [("neighborhood", row.neighborhood_prompts, true, new)]
    if attributes:
        kinds.append(("attribute", row.attribute_prompts, new, true))
    found, lost = [], []
    for kind, prompts, answer, wrong in kinds:
        for i, prompt in enumerate(prompts):
            try:
                subject, template = subject_of(prompt, known[rewrite.relation_id])
                fact = Fact(
                    id=f"case{row.case_id}/{kind}{i}",
                    subject=subject,
                    relation=LABELS.get(rewrite.relation_id, rewrite.relation_id),
                    object=answer,
                    prompt=template,
                    distractors=() if wrong == answer else (wrong,),
                    group=subject,
                    extra={"relation_id": rewrite.relation_id, "prompt_kind": kind, "case_id": row.case_id},
                )
                found.append(Found(fact, "counterfact", number, may_go=False))
            except ValueError as error:
                lost.append(LeftOut("counterfact", number, prompt, f"{kind} prompt: {why(error)}"))
    return found, lost
