"""InContext: the logits are those of the prompt behind its prefix; other prompts are read as they are."""

import pytest
import torch

from mech_unlearn.core import ForgetSet, RetainSet, Site
from mech_unlearn.methods import InContext
from mech_unlearn.methods.in_context import tokens_of
from mech_unlearn.metrics.recall import recall
from mech_unlearn.model.load import load
from mech_unlearn.model.readout import readout
from mech_unlearn.model.scores import greedy, score
from mech_unlearn.model.tokens import make_queries, pad
from tests.tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer

TEXT = "the sea and rain on {} ."


def prefix_of(model, name, text=TEXT):
    return tokens_of(model, text.replace("{}", name))


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prompt_about_a_forgotten_subject_is_answered_behind_the_prefix(architecture, dtype, tiny_sets):
    model = load(tiny_hf(architecture).to(dtype), tokenizer=tiny_tokenizer())
    edit = InContext(instruction=TEXT).fit(model, *tiny_sets)
    for query in make_queries(model.tokenizer, tiny_sets[0].facts, "prompt"):
        longer = (query.prompt[0], *prefix_of(model, query.fact.subject), *query.prompt[1:])
        wanted = model.logits(torch.tensor([longer]))[:, -len(query.prompt) :]
        clean = model.logits(torch.tensor([query.prompt]))
        with edit.on(model):
            assert torch.equal(model.logits(torch.tensor([query.prompt])), wanted)
        assert not torch.equal(clean, wanted)
    other = torch.tensor([make_queries(model.tokenizer, tiny_sets[1].facts, "prompt")[0].prompt])
    clean = model.logits(other)
    with edit.on(model):
        assert torch.equal(model.logits(other), clean)


@pytest.mark.thorough
@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("architecture", ("gpt2", "llama", "gemma2"))
def test_a_padded_batch_of_both_kinds_of_prompts_gives_what_each_gives_alone(architecture, side, tiny_sets):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    edit = InContext(instruction=TEXT).fit(model, *tiny_sets)
    facts = (*tiny_sets[0].facts[:3], *tiny_sets[1].facts[:2])
    rows = [query.prompt for query in make_queries(model.tokenizer, facts)]
    ids, mask, shifts = pad(rows, 0, side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with edit.on(model), torch.no_grad():
        alone = [model.logits(torch.tensor([row]))[0] for row in rows]
        together = model.hf(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        if side == "right":
            real = mask.bool()  # without positions, those of pads differ
            torch.testing.assert_close(model.logits(ids, mask)[real], together[real], atol=1e-4, rtol=1e-4)
    assert together.shape[:2] == ids.shape
    for row, own, at in zip(together, alone, shifts.tolist(), strict=True):
        torch.testing.assert_close(row[at : at + len(own)], own, atol=1e-4, rtol=1e-4)


def test_always_puts_a_prefix_with_all_names_in_front_of_other_prompts_too(tiny_model, tiny_sets):
    edit = InContext(instruction=TEXT, always=True).fit(tiny_model, *tiny_sets)
    (query, *_) = make_queries(tiny_model.tokenizer, tiny_sets[1].facts, "prompt")
    longer = (query.prompt[0], *prefix_of(tiny_model, "Anna Lee, Ben Hill"), *query.prompt[1:])
    with edit.on(tiny_model):
        found = tiny_model.logits(torch.tensor([query.prompt]))
        states = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
        read = readout(tiny_model, states)
    assert torch.equal(found, tiny_model.logits(torch.tensor([longer]))[:, -len(query.prompt) :])
    assert torch.equal(read, readout(tiny_model, states))  # states are read as they are


def test_a_tokenizer_without_bos_gets_the_prefix_in_front_of_everything(tiny_sets):
    model = load(tiny_hf("llama"), tokenizer=tiny_tokenizer(bos=False))
    edit = InContext(instruction=TEXT).fit(model, *tiny_sets)
    (query, *_) = make_queries(model.tokenizer, tiny_sets[0].facts, "prompt")
    longer = torch.tensor([(*prefix_of(model, query.fact.subject), *query.prompt)])
    with edit.on(model):
        found = model.logits(torch.tensor([query.prompt]))
    assert torch.equal(found, model.logits(longer)[:, -len(query.prompt) :])


def test_scores_recall_and_greedy_answers_are_those_behind_the_prefix_and_writes_are_refused(tiny_model, tiny_sets):
    edit = InContext(instruction=TEXT).fit(tiny_model, *tiny_sets)
    queries = make_queries(tiny_model.tokenizer, tiny_sets[0].facts, "prompt")
    prompts = [(q.prompt[0], *prefix_of(tiny_model, q.fact.subject), *q.prompt[1:]) for q in queries]
    with edit.on(tiny_model):
        scores, said = score(tiny_model, queries), greedy(tiny_model, [q.prompt for q in queries], 3)
        assert recall(tiny_model, tiny_sets[0].facts, "prompt").value == scores.exact.float().mean()
        with pytest.raises(ValueError, match="other positions"):
            score(tiny_model, queries, {Site(0, "resid_pre"): lambda x, batch: x})
    assert said == greedy(tiny_model, prompts, 3)
    for i, (query, prompt) in enumerate(zip(queries, prompts, strict=True)):
        table = tiny_model.logits(torch.tensor([prompt]))[0, -1].log_softmax(-1)
        torch.testing.assert_close(scores.logprob[i], table[[a[0] for a in query.answers]], atol=1e-5, rtol=1e-5)


def test_flipped_examples_state_wrong_objects_then_right_ones_of_others(tiny_model, tiny_sets):
    edit = InContext(style="flipped", examples=2, separator=" . ").fit(tiny_model, *tiny_sets)
    (prefix,) = edit.interventions
    texts = {tiny_model.tokenizer.decode(tokens) for tokens in prefix.prefixes}
    assert len(texts) == 2
    for name in ("Anna Lee", "Ben Hill"):
        (text,) = (text for text in texts if text.startswith(name))
        sentences = [part.strip() for part in text.split(".") if part.strip()]
        own = [f for f in tiny_sets[0].facts if f.subject == name]
        for fact, sentence in zip(own, sentences, strict=False):
            start = fact.prompt.replace("{}", name)
            assert sentence.startswith(start) and sentence.removeprefix(start).strip() in fact.distractors
        right = {f"{f.prompt.replace('{}', f.subject)} {f.object}" for f in tiny_sets[1].facts}
        assert len(sentences) == 4 and set(sentences[2:]) <= right


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"instruction": "Zürich {}"}, "words of its vocabulary"),
        ({"instruction": "the sea " * 40}, "64"),
        ({"style": "flipped", "examples": 99}, "lower examples"),
        ({"examples": -1}, "0 or more"),
    ],
)
def test_bad_settings_are_refused(tiny_model, tiny_sets, settings, message):
    with pytest.raises(ValueError, match=message):
        InContext(**settings).fit(tiny_model, *tiny_sets)
    bare = type(tiny_sets[0].facts[0])(**{**vars(tiny_sets[0].facts[0]), "distractors": ()})
    with pytest.raises(ValueError, match="no distractor to be flipped to"):
        InContext(style="flipped", examples=0).fit(tiny_model, ForgetSet(facts=(bare,)), RetainSet())
