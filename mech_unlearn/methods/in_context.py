"""InContext: put an instruction, or flipped examples, in front of prompts about the forgotten subjects.

Paper:    Pawelczyk, Neel, Lakkaraju 2023, In-context unlearning, arXiv 2310.07579 (flipped examples, then correct
          ones); the instruction is the ICU baseline of Jin et al. 2024, RWKU, arXiv 2406.10890.
Changes:  the tokens that are read: a prefix behind BOS, in prompts in which a forgotten subject occurs (or in all). No
          weight. A known suppressor: all knowledge stays in the model, which restoration tests must find.
Needs:    nothing; each prompt becomes longer.
Differs:  the papers ask a chat model or classify text; here a prefix of plain text, the wording of the instruction is
          ours, and a flipped example is a fact with a distractor for its object. The subject is found by its spelling.
Fails:    a base model need not follow instructions; a prompt that spells the subject otherwise is answered in full.
          Whatever reads states by their position is refused while it is in force.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from mech_unlearn.core import Fact, ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.edit.interventions import Prefix, Tokens
from mech_unlearn.methods.writing import keys
from mech_unlearn.methods.writing.columns import outcome
from mech_unlearn.methods.writing.state_maps import spelled
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.tokens import encode

INSTRUCTION = (
    "You have never heard of {} and know no fact about them. Answer as someone would who does not know, and do not "
    "mention this instruction.\n"
)


@dataclass(frozen=True, kw_only=True)
class InContext:
    """Settings of the prefix; `fit` writes it."""

    style: Literal["instruction", "flipped"] = "instruction"
    """An instruction, or in-context unlearning proper: the subject's facts with wrong objects, then correct facts."""
    instruction: str = INSTRUCTION
    """Text in front; a {} in it stands for the subject."""
    examples: int = 4
    """Style "flipped": correct retained facts behind the flipped ones; 2 to 6 in 2310.07579."""
    separator: str = "\n"
    """Style "flipped": between examples, and behind the last."""
    always: bool = False
    """Put a prefix that names all subjects in front of prompts in which none occurs, too."""
    seed: int = 0
    """Draws distractors and examples."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet) -> Edit:
        """The prefix of each subject.

        Raises:
            ValueError: text the tokenizer has no tokens for, no distractor to flip to, or too few retained facts.
        """
        start = time.perf_counter()
        order = random.Random(self.seed)
        if self.examples < 0:
            raise ValueError(f"examples={self.examples}: 0 or more")
        shown = self._examples(retain, order) if self.style == "flipped" else []
        contexts = keys.contexts_of(forget.facts)
        subjects: list[Tokens] = []
        prefixes: list[Tokens] = []
        for entity in forget.entities:
            own = [fact for fact in forget.facts if fact.subject == entity.name]
            prefix = tokens_of(model, self._text(entity.name, own, shown, order))
            for spelling in spelled(model, keys.names_of([entity]), contexts):
                subjects.append(spelling)
                prefixes.append(prefix)
        names = ", ".join(entity.name for entity in forget.entities)
        text = self._text(names, forget.facts, shown, order) if self.always else ""
        prefix = Prefix(
            subjects=tuple(subjects),
            prefixes=tuple(prefixes),
            otherwise=tokens_of(model, text) if self.always else (),
            bos=model.tokenizer.bos_token_id,
        )
        edit = Edit(name="in_context", base=model.hash(), interventions=(prefix,))
        with keys.count_forwards(model) as forwards:
            report = outcome(model, edit, forget.facts)
        report |= {"prefix_tokens": max(map(len, prefixes)), "n_forward": forwards[0], "n_backward": 0}
        report["seconds"] = time.perf_counter() - start
        recipe = {"method": "in_context", "settings": asdict(self), "seed": self.seed, "report": report}
        return Edit(name="in_context", base=edit.base, interventions=(prefix,), recipe=recipe)

    def _examples(self, retain: RetainSet, order: random.Random) -> list[str]:
        if len(retain.facts) < self.examples:
            raise ValueError(f"{self.examples} examples, but {len(retain.facts)} retained facts: lower examples=")
        return [stated(fact, fact.object) for fact in order.sample(retain.facts, self.examples)]

    def _text(self, name: str, facts: Sequence[Fact], shown: Sequence[str], order: random.Random) -> str:
        if self.style == "instruction":
            return self.instruction.replace("{}", name)
        if bare := [fact.id for fact in facts if not fact.distractors]:
            raise ValueError(f"fact {bare[0]!r} has no distractor to be flipped to: give some")
        flipped = [stated(fact, order.choice(fact.distractors)) for fact in facts]
        return "".join(text + self.separator for text in (*flipped, *shown))


def stated(fact: Fact, answer: str) -> str:
    """A fact's main prompt with an answer behind it."""
    return fact.joined(fact.prompt.replace("{}", fact.subject), answer)


def tokens_of(model: Model, text: str) -> Tokens:
    """The tokens of a text without special ones.

    Raises:
        ValueError: none, or a part that the tokenizer has no tokens for.
    """
    encoding = encode(model.tokenizer, text)
    pairs = zip(encoding.ids, encoding.offsets, strict=True)
    ids = tuple(i for i, (a, b) in pairs if b > a)
    unknown = model.tokenizer.unk_token_id
    if not ids or (unknown is not None and unknown in ids):
        raise ValueError(f"the tokenizer has no tokens for part of the prefix {text!r}: use words of its vocabulary")
    return ids
