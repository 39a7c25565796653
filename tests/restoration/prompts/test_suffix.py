"""Suffixes: losses and gradients against plain autograd, a search that never gets worse, scored on untaught facts."""

import pytest
import torch

from mech_unlearn.model.load import load
from mech_unlearn.restoration import Case
from mech_unlearn.restoration.engine.lessons import lessons
from mech_unlearn.restoration.prompts import suffix
from mech_unlearn.restoration.prompts.suffix import Search
from tests.planted import planted_case, planted_model
from tests.tiny import tiny_facts, tiny_hf, tiny_tokenizer

SMALL = Search(length=3, steps=4, candidates=8, top=16, prompts=4)


def people_case(architecture="llama", retrained=(1, 2)):
    models = [load(tiny_hf(architecture, seed=s), tokenizer=tiny_tokenizer()) for s in (0, *retrained)]
    return Case(full=models[0], retrained=tuple(models[1:]), facts=tiny_facts(["Anna Lee", "Ben Hill", "Cara Moss"]))


def plain_loss(hf, rows, tokens):
    total = 0
    for ids, start in rows:
        text = [*ids[:start], *tokens, *ids[start:]]
        table = hf(torch.tensor([text])).logits[0].log_softmax(-1)
        first = start + len(tokens)
        total = total - sum(table[t - 1, text[t]] for t in range(first, len(text))) / (len(text) - first) / len(rows)
    return total


@pytest.mark.parametrize("architecture", ("gpt2", "gemma2"))
def test_losses_and_gradients_are_those_of_a_plain_model(architecture):
    case = people_case(architecture, ())
    rows, tokens = lessons(case, case.facts)[:3], (40, 41, 42)
    hf = tiny_hf(architecture)
    assert suffix.suffix_losses(case.full, rows, [tokens])[0].item() == pytest.approx(
        plain_loss(hf, rows, tokens).item(), abs=1e-4
    )
    vocabulary = suffix.vocabulary_embeddings(case.full)
    found = suffix.gradient(case.full, rows, tokens, vocabulary)
    # finite difference along one-hot mixtures: move place 1 a little from its own token towards another one
    inputs, step = hf.get_input_embeddings()(torch.arange(60)).detach(), 1e-3  # scaled, where the module scales

    def mixed(toward):
        def hook(module, args, out):
            out = out.clone()
            out[0, place] = out[0, place] + step * toward
            return out

        total = 0.0
        for row in rows:
            place = row[1] + 1
            handle = hf.get_input_embeddings().register_forward_hook(hook)
            total += plain_loss(hf, [row], tokens).item() / len(rows)
            handle.remove()
        return total

    with torch.no_grad():
        change = (mixed(inputs[50] - inputs[41]) - mixed(inputs[41] * 0)) / step
    want = found[1, 50] - found[1, 41]
    assert change == pytest.approx(want.item(), rel=0.1, abs=2e-3)


def test_the_search_lowers_the_loss_holds_no_special_token_and_keeps_its_seed():
    case = people_case(retrained=())
    rows = lessons(case, case.facts)[:4]
    weights, state = {name: w.clone() for name, w in case.full.held.items()}, torch.get_rng_state()
    found = suffix.search(case.full, rows, SMALL, 0)
    begun = suffix.random_suffix(case.full, SMALL, 0)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(w, case.full.held[name]) for name, w in weights.items())
    before, after = suffix.suffix_losses(case.full, rows, [begun, found]).tolist()
    assert after < before and len(found) == 3
    assert not set(found) & set(case.full.tokenizer.all_special_ids)
    assert suffix.search(case.full, rows, SMALL, 0) == found != suffix.search(case.full, rows, SMALL, 1)


def test_the_suffix_stands_between_prompt_and_answer():
    assert suffix.suffixed(((2, 5, 6, 7), 3), (8, 9)) == ((2, 5, 6, 8, 9, 7), 5)


@pytest.mark.slow
def test_models_without_attention_give_nothing_behind_a_suffix():
    case = planted_case(sae=None)
    ready = suffix.prepare(case, how=SMALL)
    for truth in ("full", "late", "early"):
        assert (suffix.audit(case, ready, planted_model(truth), truth).recoverability < 0.1).all()
    retrained = suffix.audit(case, ready, case.retrained[0], "R")
    assert (retrained.recoverability < 0.1).all() and set(retrained.columns) == {
        "before",
        "random_suffix",
        "wrong_suffix",
    }


def test_without_retrained_models_the_grade_is_b_and_settings_must_be_positive():
    case = planted_case(sae=None, retrained=())
    assert suffix.audit(case, suffix.prepare(case, how=SMALL), planted_model("late"), "late").grade == "B"
    with pytest.raises(ValueError, match="positive"):
        Search(steps=0)


def test_losses_do_not_depend_on_the_size_of_a_batch():
    case = people_case(retrained=())
    rows, suffixes = lessons(case, case.facts), [(40, 41, 42), (43, 44, 45), (5, 6, 7)]
    whole, single = (suffix.suffix_losses(case.full, rows, suffixes, max_tokens=n) for n in (8192, 1))
    torch.testing.assert_close(single, whole)


def test_the_vocabulary_is_read_off_the_embedding_without_running_a_layer():
    case = people_case("gemma2", retrained=())
    first_layer = case.full.hooks(("blocks.0.hook_resid_pre", lambda x: None))
    with pytest.raises(RuntimeError, match="never fired"), first_layer:
        table = suffix.vocabulary_embeddings(case.full)
    seen = []
    with case.full.hooks(("hook_embed", lambda x: seen.append(x))):
        case.full.logits(torch.arange(50)[None])
    torch.testing.assert_close(table[:50], seen[0][0])


@pytest.mark.slow
def test_a_fact_is_scored_behind_the_suffix_that_was_searched_on_other_facts():
    case = people_case()
    ready = suffix.prepare(case, how=SMALL)
    found = suffix.audit(case, ready, case.full, "full")
    for fold, rows in enumerate(ready.lessons):
        mine = [fact for fact, f in zip(case.facts, ready.folds) if f == fold]
        assert rows and not set(rows) & set(lessons(case, mine))
        chosen = suffix.search(case.full, rows, SMALL, case.seed + fold)
        which = [f == fold for f in ready.folds]
        want = suffix.margins(ready.levels.query_set.part(which), case.full, chosen)[0]
        assert torch.equal(found.score_raw[torch.tensor(which)], want)
