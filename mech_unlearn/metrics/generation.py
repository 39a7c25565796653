"""Greedy text after prompts: the base of every generation-based metric."""

from collections.abc import Sequence

from mech_unlearn.model.bridge import Model
from mech_unlearn.model.scores import greedy
from mech_unlearn.model.tokens import encode_all


def continuations(
    model: Model, prompts: Sequence[str], max_new_tokens: int, stops: Sequence[str] = ()
) -> tuple[str, ...]:
    """The greedy continuation of each prompt as text, cut before the first of the `stops`; special tokens left away.

    Activation interventions in force stay in force.

    Raises:
        ValueError: no prompt, a prompt without a token, fewer than one new token, or prompt and continuation longer
            than the model's positions.
    """
    if not prompts or max_new_tokens < 1:
        raise ValueError(f"{len(prompts)} prompts and {max_new_tokens} new tokens: give at least one of each")
    known = encode_all(model.tokenizer, prompts)
    ids = [known[prompt].ids for prompt in prompts]
    if not all(ids):
        raise ValueError(f"prompt {[bool(row) for row in ids].index(False)} holds no token; nothing can follow it")
    texts = (model.tokenizer.decode(list(row), skip_special_tokens=True) for row in greedy(model, ids, max_new_tokens))
    return tuple(cut(text, stops) for text in texts)


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first occurrence of any of the `stops`."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]
