"""The nouns of the package: frozen, final, and free of any model.

A `Fact` is a triple with the prompts that ask for it. A `ForgetSet` and a `RetainSet` say what is to go
and what is to stay. A `Site` names a place in a model. `Attribution`, `Measurement` and `Verdict` are what
locating, measuring and judging give back. A little over 300 lines, so that all nouns stand in one file.
"""

import html
import random
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, get_args

SiteKind = Literal[
    "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_pre", "mlp_post", "q", "k", "v", "z"
]
"""`q`, `k`, `v` and `z` have an axis of heads: [row, pos, head, d_head]; `k` and `v` have key-value heads."""
Label = Literal["deleted", "suppressed", "intact", "collapsed", "undetermined"]
LABELS: tuple[str, ...] = get_args(Label)
WORTH: Mapping[str, str] = {
    "calibrated": "error rates measured on single-block suppressors, with retrained models given; for the calibration "
    "that ships, on the biographies world only. Two blocks at once pass for a deletion there.",
    "provisional": "thresholds, no error rate.",
}
"""What a verdict of each kind is worth, for pages and model cards."""


@dataclass(frozen=True, kw_only=True)
class Entity:
    """Something that has a name: a person, a city, a work.

    Raises:
        ValueError: a name or an alias that is empty, or begins or ends with white space.
    """

    name: str
    aliases: tuple[str, ...] = ()
    kind: str | None = None
    """Type of the entity, for example `person`; entities are only compared within a type."""

    def __post_init__(self) -> None:
        for name in (self.name, *self.aliases):
            _check_name(name, "name")


DEEPEST = 64
"""Levels of lists and objects that an extra key of a fact may nest."""


def _frozen(value: Any, left: int = DEEPEST) -> Any:
    if not left:
        raise ValueError(f"an extra key nests deeper than {DEEPEST} levels")
    if isinstance(value, str):
        _check_text(value, "extra key")
    if isinstance(value, Mapping):
        return {_frozen(key, left): _frozen(item, left - 1) for key, item in value.items()}
    return tuple(_frozen(item, left - 1) for item in value) if isinstance(value, list | tuple) else value


def _check_text(text: str, where: str) -> None:
    """JSON's escapes can spell half a character, which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} must be text without lone surrogates, found {text!r}") from None


def _check_name(name: Any, where: str) -> None:
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{where} must be a non-empty string, got {name!r}")
    _check_text(name, where)
    if name != name.strip():
        raise ValueError(f"{where} begins or ends with white space: {name!r}; strip it")


SPACELESS = ("CJK", "HIRAGANA", "KATAKANA", "IDEOGRAPHIC", "FULLWIDTH", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
"""First words of the Unicode names of characters of scripts that are written without spaces."""


def _joiner(text: str) -> str:
    return "" if unicodedata.name(text[-1], "").startswith(SPACELESS) else " "


def _check_template(template: str, where: str) -> None:
    _check_text(template, where)
    if template.count("{}") != 1:
        raise ValueError(
            f"{where} {template!r} must hold exactly one {{}} for the subject, found {template.count('{}')}"
        )
    if template != template.strip(" \t"):
        raise ValueError(f"{where} begins or ends with a space: {template!r}; strip it, a space follows by itself")


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One (subject, relation, object) triple and the prompts after which the object follows.

    Raises:
        ValueError: a field that is empty or has white space around it, an object equal to the subject, a prompt without
            exactly one `{}`, or a held-out phrasing that methods may see.
    """

    id: str
    subject: str
    relation: str
    object: str
    prompt: str
    """The main phrasing; `{}` stands for the subject and the object follows after the joiner."""
    paraphrases: tuple[str, ...] = ()
    """Further phrasings that a method may see."""
    heldout: tuple[str, ...] = ()
    """Phrasings that no method, selection or attack may see; they only test."""
    distractors: tuple[str, ...] = ()
    """Wrong objects of the same type."""
    aliases: tuple[str, ...] = ()
    """Other names of the subject."""
    kind: str | None = None
    """Type of the subject, for example `person`."""
    group: str | None = None
    """What is forgotten together; the subject when not given."""
    joiner: str | None = None
    """What stands between a prompt and the object: a space or nothing. None is chosen by the main phrasing: nothing
    where it ends in a script that is written without spaces (`SPACELESS`)."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Unknown keys of the facts file, kept as they came; lists as tuples."""

    def __post_init__(self) -> None:
        for name in ("id", "subject", "relation", "object"):
            _check_name(getattr(self, name), f"field {name!r}")
        for name in ("aliases", "distractors"):
            for value in getattr(self, name):
                _check_name(value, f"field {name!r}")
        for name in ("kind", "group"):
            if (value := getattr(self, name)) is not None:
                _check_name(value, f"field {name!r}")
        if self.joiner not in (None, "", " "):
            raise ValueError(f"field 'joiner' must be a space or empty, got {self.joiner!r}")
        if self.object == self.subject:
            raise ValueError(f"object equals subject: {self.object!r}")
        if self.object in self.distractors:
            raise ValueError(f"object {self.object!r} stands among its own distractors")
        _check_template(self.prompt, "prompt")
        for template in self.paraphrases:
            _check_template(template, "paraphrase")
        for template in self.heldout:
            _check_template(template, "heldout phrasing")
            if template in self.templates:
                raise ValueError(f"heldout phrasing {template!r} stands among those that a method may see")
        if own := [key for key in self.extra if key in _FIELDS]:
            raise ValueError(f"extra key {own[0]!r} is the name of a field")
        object.__setattr__(self, "extra", MappingProxyType(_frozen(self.extra)))
        if self.joiner is None:
            object.__setattr__(self, "joiner", _joiner(self.prompt.replace("{}", self.subject)))

    def __reduce__(self) -> tuple[Any, ...]:  # the read-only view of `extra` cannot be pickled
        return partial(type(self), **{**vars(self), "extra": dict(self.extra)}), ()

    def joined(self, prompt: str, answer: str | None = None) -> str:
        """A prompt and an answer as one text: the object, or another answer; nothing joins them behind white space."""
        between = "" if prompt.endswith((" ", "\n")) else self.joiner
        return f"{prompt}{between}{self.object if answer is None else answer}"

    def stated(self, template: str) -> str:
        """The fact as a text, in a phrasing."""
        return self.joined(template.replace("{}", self.subject))

    @property
    def templates(self) -> tuple[str, ...]:
        """The phrasings a method may see: the main prompt first."""
        return (self.prompt, *self.paraphrases)

    @property
    def entity(self) -> Entity:
        return Entity(name=self.subject, aliases=self.aliases, kind=self.kind)


def _entities(facts: Sequence[Fact]) -> tuple[Entity, ...]:
    return tuple({fact.subject: fact.entity for fact in facts}.values())


@dataclass(frozen=True, kw_only=True)
class ForgetSet:
    """The facts that are to be removed."""

    facts: tuple[Fact, ...]

    def __post_init__(self) -> None:
        if not self.facts:
            raise ValueError("the forget set is empty: give at least one fact")

    @property
    def entities(self) -> tuple[Entity, ...]:
        """The subjects, each once, in order of first appearance."""
        return _entities(self.facts)


@dataclass(frozen=True, kw_only=True)
class RetainSet:
    """What must stay. The three kinds of facts are kept apart and never averaged together."""

    neighbors: tuple[Fact, ...] = ()
    """Facts of the same relations about other subjects."""
    same_subject: tuple[Fact, ...] = ()
    """Other facts about the forgotten subjects that are not to be forgotten."""
    general: tuple[Fact, ...] = ()
    """Facts that have nothing to do with the forget set."""
    texts: tuple[str, ...] = ()
    """Running text for KL terms and key statistics; plain strings, no subject slot."""
    unknown: tuple[Entity, ...] = ()
    """Entities of the same type that the model knows nothing about: the reference for *unknown*."""

    @property
    def facts(self) -> tuple[Fact, ...]:
        return (*self.neighbors, *self.same_subject, *self.general)

    @property
    def entities(self) -> tuple[Entity, ...]:
        return _entities(self.facts)

    def split(self, share: float, seed: int) -> "tuple[RetainSet, RetainSet]":
        """(What a method is fitted on, what it does not see): a share of the neighbours' subjects, with all their
        facts, and of the texts, drawn by the seed.

        At least one of each is held back, and one left, where there are two; none where there is one, and none at
        share 0. Other facts of the forgotten subjects, general facts and unknown entities stay.

        Raises:
            ValueError: a share outside of [0, 1).
        """
        if not 0 <= share < 1:
            raise ValueError(f"unseen={share}: choose a share in [0, 1)")
        subjects = _drawn([entity.name for entity in _entities(self.neighbors)], share, seed)
        texts = _drawn(list(dict.fromkeys(self.texts)), share, seed)
        seen = replace(
            self,
            neighbors=tuple(fact for fact in self.neighbors if fact.subject not in subjects),
            texts=tuple(text for text in self.texts if text not in texts),
        )
        unseen = RetainSet(
            neighbors=tuple(fact for fact in self.neighbors if fact.subject in subjects),
            texts=tuple(text for text in self.texts if text in texts),
        )
        return seen, unseen


def _drawn(items: Sequence[str], share: float, seed: int) -> set[str]:
    """A share of the items, one at least and all but one at most; none at share 0."""
    count = min(max(1, round(share * len(items))), len(items) - 1) if share else 0
    return set(random.Random(seed).sample(items, max(0, count)))


def require_disjoint(forget: ForgetSet, retain: RetainSet) -> None:
    """Refuse facts that are to be forgotten and kept; another fact about the same subject is none.

    Raises:
        ValueError: two facts of one subject, relation and object, or with one answer to one prompt; the message lists
            all of those to be forgotten.
    """
    kept = {said for fact in retain.facts for said in _said(fact)}
    if both := [repr(fact.id) for fact in forget.facts if not kept.isdisjoint(_said(fact))]:
        raise ValueError(f"facts to be forgotten and kept: {', '.join(both)}; take them out of one of the two sets")


def _said(fact: Fact) -> set[tuple[str, ...]]:
    """What a fact says, as a triple and as answers to its prompts."""
    asked = {(template.replace("{}", fact.subject), fact.object) for template in fact.templates}
    return {(fact.subject, fact.relation, fact.object), *asked}


@dataclass(frozen=True, order=True)
class Site:
    """A place in the model. The only object that spells a hook name."""

    layer: int
    kind: SiteKind

    def __post_init__(self) -> None:
        if self.kind not in get_args(SiteKind):
            raise ValueError(f"unknown kind of site {self.kind!r}; choose from {', '.join(get_args(SiteKind))}")

    @property
    def hook(self) -> str:
        """TransformerLens alias of the site."""
        part = {"mlp_pre": "mlp.hook_pre", "mlp_post": "mlp.hook_post"} | {kind: f"attn.hook_{kind}" for kind in "qkvz"}
        return f"blocks.{self.layer}.{part.get(self.kind, f'hook_{self.kind}')}"

    def __str__(self) -> str:
        return f"L{self.layer} {self.kind}"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A number with its 95 % interval, the count it rests on and its unit."""

    value: float
    ci: tuple[float, float]
    n: int
    unit: str

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "ci": list(self.ci), "n": self.n, "unit": self.unit}

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.ci[0]:.2f}, {self.ci[1]:.2f}]"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the restoration tests say about one fact in one model."""

    fact_id: str
    label: Label
    sentence: str
    tests: tuple[str, ...]
    """The tests whose score decided."""
    scores: Mapping[str, float | None]
    grade: Literal["A", "B", "C"]
    """A: against retrained models; B: against sham facts, which give scores and no verdict on deletion or suppression;
    C: outputs only."""
    p_values: Mapping[str, float] = field(default_factory=dict)
    flags: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Verdict({self.fact_id!r}, {self.label}, grade {self.grade})"

    def _repr_html_(self) -> str:
        """The sentence, for Jupyter; what models and users wrote is escaped."""
        return f"<p><b>{html.escape(self.fact_id)}</b>: {html.escape(self.sentence)}</p>"

    def with_flags(self, *flags: str) -> "Verdict":
        return replace(self, flags=tuple(dict.fromkeys((*self.flags, *flags))))

    def to_json(self) -> dict[str, Any]:
        return {
            "fact_id": self.fact_id,
            "label": self.label,
            "sentence": self.sentence,
            "tests": list(self.tests),
            "scores": dict(self.scores),
            "p_values": dict(self.p_values),
            "grade": self.grade,
            "flags": list(self.flags),
        }


_LISTS = ("aliases", "paraphrases", "heldout", "distractors")


_STRINGS = dict.fromkeys(("id", "subject", "relation", "object", "prompt"), False) | {
    "kind": True,
    "group": True,
    "joiner": True,
}


_FIELDS = tuple(f.name for f in fields(Fact) if f.name != "extra")


def fact_to_json(fact: Fact) -> dict[str, Any]:
    """The line of a fact; `fact_from_json` gives an equal one back. Fields at their default are left out."""
    row = {name: getattr(fact, name) for name in _FIELDS}
    if fact.joiner == _joiner(fact.prompt.replace("{}", fact.subject)):
        del row["joiner"]
    row = {key: list(value) if isinstance(value, tuple) else value for key, value in row.items()}
    return {key: value for key, value in row.items() if value not in (None, [])} | dict(fact.extra)


def worth() -> str:
    """What verdicts are worth, in one paragraph."""
    return "What a verdict is worth: " + " ".join(f"{kind}: {what}" for kind, what in WORTH.items())
