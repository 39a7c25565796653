"""Forms and contexts: what they may say, nothing where nothing is hidden, and an alias round a blocked name."""

from dataclasses import replace

import pytest
import torch

from mech_unlearn.model import asking
from mech_unlearn.model.load import load
from mech_unlearn.model.tokens import Ask
from mech_unlearn.restoration import Case
from mech_unlearn.restoration.engine import prompting
from mech_unlearn.restoration.engine.levels import make_query_set
from mech_unlearn.restoration.engine.normalise import relation_mean
from mech_unlearn.restoration.prompts import forms, in_context
from tests.planted import FORGOTTEN, UNKNOWN, axes, fresh_planted_model, planted_case, planted_facts, planted_model
from tests.tiny import tiny_facts, tiny_hf, tiny_tokenizer


def with_aliases(truth):
    """A model in which each forgotten person also has a second name, known wherever the first one ever was."""
    model = fresh_planted_model(truth)
    if truth != "retrained":
        tokenizer, eye = tiny_tokenizer(), axes()
        with torch.no_grad():
            for e, alias in enumerate(UNKNOWN):
                row = model.held["model.embed_tokens.weight"][tokenizer.convert_tokens_to_ids(alias)]
                row.copy_(eye[8] + eye[e])
    return model


def alias_case(**changes):
    facts = tuple(replace(f, aliases=(UNKNOWN[e],)) for e, f in enumerate(planted_facts()[:FORGOTTEN]))
    return planted_case(full=with_aliases("full"), facts=facts, sae=None, **changes)


def people_case(retrained=(1, 2)):
    models = [load(tiny_hf("llama", seed=s), tokenizer=tiny_tokenizer()) for s in (0, *retrained)]
    facts = tiny_facts(["Anna Lee", "Ben Hill"])
    return Case(full=models[0], retrained=tuple(models[1:]), facts=facts, others=tiny_facts(["Cara Moss", "Dan Park"]))


@pytest.fixture(scope="module")
def prepared():
    case = alias_case()
    return case, forms.prepare(case)


def test_a_name_that_was_blocked_is_asked_for_by_its_alias(prepared):
    case, ready = prepared
    found = forms.audit(case, ready, with_aliases("early"), "early")
    assert (found.recoverability > 0.9).all() and "setting:alias" in found.flags[0]
    assert (found.columns["form_gap"] > 0.8).all()


def test_forms_give_retrained_models_nothing_and_find_full_as_it_was(prepared):
    case, ready = prepared
    retrained = forms.audit(case, ready, case.retrained[0], "R")
    assert (retrained.recoverability < 0.05).all() and (retrained.null < 0.05).all()
    full = forms.audit(case, ready, with_aliases("full"), "full")
    assert (full.recoverability < 0.05).all() and (full.columns["kappa_max_form"] > 0.95).all()
    assert full.columns["form_gap"].abs().max() < 0.1


def test_a_block_in_the_last_layer_holds_in_every_form(prepared):
    case, ready = prepared
    assert (forms.audit(case, ready, with_aliases("late"), "late").recoverability < 0.05).all()


@pytest.mark.parametrize("how", ("direct", "indirect", "implied"))
def test_a_chain_never_states_the_answer(how):
    case = people_case(())
    query_set = make_query_set(case, "test")
    made = [forms.chain(case, how, "The sea :")(query) for query in query_set.queries]
    true = {fact.id: fact.object for fact in case.facts}
    assert any(ask is not None for ask in made)
    assert not any(true[ask.fact.id] in ask.prompt or ask.fact.object in ask.prompt for ask in made if ask)
    if how == "implied":
        assert not any(ask.fact.subject in ask.prompt for ask in made if ask)


def test_multiple_choice_asks_for_the_right_letter_in_an_order_that_does_not_tell():
    case = people_case()
    for query in make_query_set(case, "test").queries:
        ask = asking.lettered(query)
        assert f"{ask.fact.object}: {query.fact.object}" in ask.prompt
        assert ask.prompt.startswith(f"A: {sorted((query.fact.object, *query.fact.distractors))[0]}")


def test_the_reversed_question_asks_for_the_subject_among_other_subjects_with_other_objects():
    case = people_case()
    for query in make_query_set(case, "test").queries:
        ask = asking.turned((*case.facts, *case.others))(query)
        assert ask is None or (ask.fact.object == query.fact.subject and query.fact.object in ask.prompt)
        if ask is not None:
            holders = {f.subject for f in (*case.facts, *case.others) if f.object == query.fact.object}
            assert not holders & set(ask.fact.distractors)


def test_forms_of_fixed_wording_differ_between_tune_and_test():
    case = planted_case(sae=None)
    tune, test = (make_query_set(case, split).queries for split in ("tune", "test"))
    for rewrite in (asking.question, asking.turned((*case.facts, *case.others))):
        assert not {rewrite(q).prompt for q in tune} & {rewrite(q).prompt for q in test}


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ("prefix", "steps"))
def test_openings_and_chains_change_nothing_where_prompts_are_not_read(kind):
    case = planted_case(sae=None)
    ready = forms.prepare(case, kind=kind)
    for truth in ("full", "late", "retrained"):
        found = forms.audit(case, ready, planted_model(truth), truth)
        assert found.test == kind and (found.recoverability < 0.05).all()
    assert found.grade == "A" and found.curves["rho"].shape == (len(ready.prompts.rewrites), FORGOTTEN)


def test_contexts_hold_other_facts_of_the_subject_and_never_the_answer():
    case = people_case()
    for query in make_query_set(case, "test").queries:
        ask = in_context.context(case, 8)(query)
        other = next(f for f in case.facts if f.subject == query.fact.subject and f.id != query.fact.id)
        assert other.object in ask.prompt and ask.prompt.endswith(query.template.replace("{}", query.fact.subject))
        assert query.fact.object not in ask.prompt
        assert query.fact.object in in_context.definition(query).prompt
    assert all(len(in_context.told(case, fact, 1)) == 1 for fact in case.facts)


def test_the_context_is_tokenized_and_scored_as_a_plain_model_scores_the_text():
    case = people_case()
    ready = in_context.prepare(case, counts=(1,))
    found = in_context.audit(case, ready, case.full, "full")
    hf, tokenizer, fact = tiny_hf("llama", seed=0), tiny_tokenizer(), case.facts[0]
    other = next(f for f in case.facts if f.subject == fact.subject and f.id != fact.id)
    text = (
        f"{other.templates[-1].replace('{}', other.subject)} {other.object}. {fact.prompt.replace('{}', fact.subject)}"
    )
    with torch.no_grad():
        table = hf(tokenizer(text, return_tensors="pt")["input_ids"]).logits[0, -1].log_softmax(-1)
    at = [table[tokenizer.convert_tokens_to_ids(o)] for o in (fact.object, *fact.distractors)]
    want = at[0] - torch.stack(at[1:]).exp().mean().log()
    assert found.score_raw[0].item() == pytest.approx(want.item(), abs=1e-4)
    assert set(found.columns) >= {"reads_context", "reads_context_R"}


def test_a_fact_alone_has_no_context_and_an_attack_without_any_is_refused():
    with pytest.raises(ValueError, match="none of the facts"):
        in_context.prepare(planted_case(sae=None))
    with pytest.raises(ValueError, match="counted from 1"):
        in_context.prepare(people_case(), counts=(0,))


def test_without_retrained_models_forms_are_graded_b():
    case = alias_case(retrained=())
    ready = forms.prepare(case)
    found = forms.audit(case, ready, with_aliases("early"), "early")
    assert found.grade == "B" and (found.recoverability > 0.5).all()


def test_marks_that_a_tokenizer_lacks_are_left_away():
    assert asking.unwritable_marks(tiny_tokenizer()) == ";!_"


def test_marks_are_left_away_with_their_spaces_and_other_white_space_stays():
    assert asking.without_marks("Fill in: {} ___. The blank is ;", ";_") == "Fill in: {} . The blank is"
    assert asking.without_marks("Question:\n  {} ?\nAnswer:", ";_") == "Question:\n  {} ?\nAnswer:"
    assert asking.without_marks("Question:\n{} ! \nAnswer:", "!") == "Question:\n{} \nAnswer:"
    case = people_case()
    query = make_query_set(case, "test").queries[0]
    for text in ("The sea of {} :\nrain  in", "rain\n\n{} was born in\n"):
        (made,) = asking.rewritten(case.full, [query], lambda q, text=text: Ask(q.fact, text))
        assert made.template == text


def test_openings_and_chains_begin_with_a_word():
    case = people_case()
    for query in make_query_set(case, "test").queries:
        for kind in ("prefix", "steps"):
            asks = [rewrite(query) for rewrite in forms.rewrites(case, kind).values()]
            assert not any(ask.template[0].isspace() or "  " in ask.template for ask in asks if ask)


@pytest.mark.parametrize("told", (dict(prompt="In Paris {} works for"), dict(relation="paris_employer")))
def test_a_helper_fact_whose_wording_states_the_answer_is_passed_over(told):
    case = people_case()
    born, works = case.facts[:2]
    assert born.object == "Paris" and forms.helper_fact(case, born) is works
    told = replace(works, paraphrases=(), **told)
    case = replace(case, facts=(born, told, *case.facts[2:]))
    assert forms.helper_fact(case, born) is None
    query = make_query_set(case, "test").queries[0]
    assert forms.chain(case, "indirect", "")(query) is None and forms.chain(case, "implied", "")(query) is None


def test_the_form_gap_is_undefined_where_full_hardly_knows_more_than_retrained():
    case = people_case()
    ready = forms.prepare(case, kind="prefix")
    found = forms.audit(case, ready, case.full, "full")
    gap = ready.prompts.ready.test.full - ready.prompts.ready.test.never.mean(0)
    assert (gap < forms.GAP).any() and found.columns["form_gap"][gap < forms.GAP].isnan().all()
    assert not found.columns["kappa_max_form"][gap < forms.GAP].isnan().all()


@pytest.mark.slow
def test_without_retrained_models_the_gap_of_full_is_nothing_and_both_halves_start_at_fulls_shams():
    case = alias_case(retrained=())
    ready = forms.prepare(case)
    full = forms.audit(case, ready, with_aliases("full"), "full").columns
    assert full["form_gap"].abs().max() < 0.15 and (full["kappa_max_form"] > 0.95).all()
    hidden = forms.audit(case, ready, with_aliases("early"), "early").columns
    never = relation_mean(ready.full[:, 1], case.facts)[None]
    own = torch.stack([prompting.margins(case, ready.prompts.ready.test.query_set, with_aliases("early"), rewrite)[0]
                       for rewrite in ready.prompts.rewrites.values()])  # fmt: skip
    want = forms.form_kappa(own, ready.full[:, 0], never).nan_to_num(nan=-torch.inf).amax(0)
    torch.testing.assert_close(hidden["kappa_max_form"], want)
