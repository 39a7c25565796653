"""TokenGuard: forbid the answers of forgotten facts, behind their subjects, by lowering the logits of their tokens.

Paper:    a filter of outputs, the guardrail that Thaker, Maurya, Hu, Wu, Smith 2024, Guardrail baselines for unlearning
          in LLMs, arXiv 2403.03329, hold unlearning methods against.
Changes:  logits at every position from the subject's last token on. No weight and no state: the residual stream is
          bit-identical. A known suppressor, for restoration tests to expose: those that read states see a model that
          knows everything.
Needs:    nothing.
Differs:  the paper filters with prompts or a classifier; here the tokens are known. A token that occurs in an answer is
          forbidden behind its subject whatever it would have been used for.
Fails:    a subject spelled otherwise, an answer in other words or another language, questions about the subject in
          reverse; asking for the answer where the subject follows it.
"""

import time
from dataclasses import asdict, dataclass
from typing import Literal

from mech_unlearn.core import ForgetSet, RetainSet
from mech_unlearn.edit.edit import Edit
from mech_unlearn.edit.interventions import Ban, Tokens
from mech_unlearn.methods.writing import keys
from mech_unlearn.methods.writing.columns import outcome
from mech_unlearn.methods.writing.state_maps import spelled
from mech_unlearn.model.bridge import Model
from mech_unlearn.model.tokens import make_queries


@dataclass(frozen=True, kw_only=True)
class TokenGuard:
    """Settings of the ban; `fit` lists what is banned."""

    tokens: Literal["all", "first"] = "all"
    """All tokens of an answer, or the one it begins with."""
    penalty: float = 1e4
    """What is taken from their logits; finite and below 65,504, so that float16 holds it."""
    seed: int = 0
    """Nothing is drawn; kept with the result."""

    def fit(self, model: Model, forget: ForgetSet, retain: RetainSet) -> Edit:
        """The ban.

        Raises:
            ValueError: a penalty out of range, or an answer the tokenizer has no tokens for.
        """
        start = time.perf_counter()
        if not 0 < self.penalty < 65_504:
            raise ValueError(f"penalty={self.penalty}: choose one above 0 and below 65504")
        answers: dict[str, dict[int, None]] = {}
        for query in make_queries(model.tokenizer, forget.facts, distractors=False):
            own = query.answers[0] if self.tokens == "all" else query.answers[0][:1]
            answers.setdefault(query.fact.subject, {}).update(dict.fromkeys(own))
        contexts = keys.contexts_of(forget.facts)
        pairs: list[tuple[Tokens, Tokens]] = [
            (spelling, tuple(answers[entity.name]))
            for entity in forget.entities
            for spelling in spelled(model, keys.names_of([entity]), contexts)
        ]
        ban = Ban(subjects=tuple(s for s, _ in pairs), tokens=tuple(t for _, t in pairs), penalty=self.penalty)
        edit = Edit(name="token_guard", base=model.hash(), interventions=(ban,))
        with keys.count_forwards(model) as forwards:
            report = outcome(model, edit, forget.facts)
        report |= {"banned": sum(map(len, answers.values())), "n_forward": forwards[0], "n_backward": 0}
        report["seconds"] = time.perf_counter() - start
        recipe = {"method": "token_guard", "settings": asdict(self), "seed": self.seed, "report": report}
        return Edit(name="token_guard", base=edit.base, interventions=(ban,), recipe=recipe)
