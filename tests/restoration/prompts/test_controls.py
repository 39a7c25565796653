"""Positive controls of attacks on the prompt: a model whose facts are locked until one token of the prompt opens them.

The planted model is given an attention layer: every position reads, evenly over what stands before it, whether the key
(a full stop) occurs, and the name. The last layer writes against the object of each forgotten name, unless the key was
seen. No prompt of the facts holds the key; a context, an opening, an emphasis, a suffix or a trained prompt can.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch

from mech_unlearn.model.load import load
from mech_unlearn.restoration.prompts import forms, in_context, keyword, soft_prompt, suffix
from mech_unlearn.restoration.prompts.suffix import Search
from tests.planted import (
    FORGOTTEN,
    LAST,
    NAMES,
    STRENGTH,
    UNKNOWN,
    axes,
    object_of,
    planted_case,
    planted_facts,
    planted_hf,
)
from tests.tiny import tiny_tokenizer

KEY, SEEN, SHUT = 50, 51, 60.0
"""Axis of the key's embedding, axis that says it was seen, and how strongly that shuts the suppressor."""
FAINT = 0.05
"""Of tokens other than names and of what attention writes: beside a name it counts for little, elsewhere it is all."""


@cache
def locked_model(truth: str = "locked", seed: int = 0):
    """The planted model with the key's attention; `locked` suppresses what it knows where the key was not seen."""
    hf, eye = planted_hf("full" if truth == "locked" else truth, seed), axes()
    tokenizer, first = tiny_tokenizer(), hf.model.layers[0].self_attn
    names = {tokenizer.convert_tokens_to_ids(name) for name in (*NAMES, *UNKNOWN)}
    with torch.no_grad():
        table = hf.model.embed_tokens.weight
        table[:, [KEY, SEEN]] = 0
        table[tokenizer.convert_tokens_to_ids(".")] = eye[KEY]
        table[[i for i in range(len(table)) if i not in names]] *= FAINT
        for part in (first.q_proj, first.k_proj, first.v_proj):
            part.weight.zero_()  # even attention
        width = first.head_dim
        first.v_proj.weight[0] = eye[KEY]  # first pair of heads: the key
        first.o_proj.weight[SEEN, 0] = FAINT
        for axis in range(9):  # second pair of heads: the name, so that it is known behind it too
            first.v_proj.weight[width + axis] = eye[axis]
            first.o_proj.weight[axis, 2 * width + axis] = FAINT
        for e in range(FORGOTTEN if truth == "locked" else 0):
            mlp = hf.model.layers[LAST].mlp
            mlp.gate_proj.weight[e] = eye[e] - SHUT * eye[SEEN]
            mlp.up_proj.weight[e] = eye[e]
            mlp.down_proj.weight[:, e] = -2 * STRENGTH * eye[32 + object_of(e)]
    return load(hf, tokenizer=tokenizer)


@cache
def locked_case():
    facts = planted_facts()
    jobs = ("Acme", "Globex", "Initech", "Umbrella")
    works = [
        replace(f, id=f"{f.id} works", relation="works", object=jobs[e], prompt="the employer of {}",
                paraphrases=("rain and employer of {}", "sea and employer of {}"), distractors=jobs[:e] + jobs[e + 1 :])
        for e, f in enumerate(facts[:FORGOTTEN])
    ]  # fmt: skip
    retrained = tuple(locked_model("retrained", k) for k in (1, 2, 3))
    return planted_case(full=locked_model("full"), retrained=retrained, others=(*facts[FORGOTTEN:], *works), sae=None)


ATTACKS = {
    "prefix": (lambda case: forms.prepare(case, kind="prefix"), forms.audit, "setting:role"),
    "in_context": (lambda case: in_context.prepare(case, counts=(1,)), in_context.audit, "setting:1 statements"),
    "keyword": (keyword.prepare, keyword.audit, "setting:focus on"),
    "soft_prompt": (lambda case: soft_prompt.prepare(case, length=2, steps=(30,)), soft_prompt.audit, None),
    "suffix": (
        lambda case: suffix.prepare(case, how=Search(length=2, steps=6, candidates=16, top=16, prompts=4)),
        suffix.audit,
        None,
    ),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_that_puts_the_key_into_the_prompt_opens_what_was_locked_and_finds_nothing_elsewhere(name):
    prepare, audit, setting = ATTACKS[name]
    case = locked_case()
    ready = prepare(case)
    found = audit(case, ready, locked_model(), "locked")
    assert (found.columns["before"] < 1).all() and (found.recoverability > 0.3).all()
    if setting is not None:
        assert all(setting in flags for flags in found.flags)
    assert (audit(case, ready, case.retrained[0], "R").recoverability < 0.05).all()
    if name != "suffix":  # behind a suffix the name is faint, and an answer that is known stands out more
        assert (audit(case, ready, locked_model("full"), "full").recoverability < 0.1).all()
