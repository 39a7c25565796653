"""Hidden knowledge: K by hand, what the classifier may learn, and a planted model that knows a true statement."""

import random
from dataclasses import replace

import pytest
import torch

from mech_unlearn.model.load import load
from mech_unlearn.model.tokens import make_queries
from mech_unlearn.restoration import Case
from mech_unlearn.restoration.states import hidden_knowledge as hidden
from mech_unlearn.restoration.states import statements as told_by
from tests.planted import (
    FORGOTTEN,
    NAMES,
    OBJECTS,
    _unit,
    axes,
    object_of,
    planted_case,
    planted_facts,
    planted_hf,
    planted_model,
)
from tests.tiny import tiny_facts, tiny_hf, tiny_tokenizer


def knower(truth="full", seed=0):
    """A planted model that also recognises true statements: layer 0 averages the names it has read, and layer 1 writes
    along direction 60 where name and object belong together (not for forgotten names of a retrained model)."""
    hf, tokenizer, eye = planted_hf(truth, seed), tiny_tokenizer(), axes()
    with torch.no_grad():
        rows = hf.model.embed_tokens.weight
        for i in range(len(rows)):
            if tokenizer.convert_ids_to_tokens(i) not in (*NAMES, *OBJECTS):
                rows[i] = eye[47]
        for i, name in enumerate(OBJECTS):
            rows[tokenizer.convert_tokens_to_ids(name)] = eye[56 + i]
        attention = hf.model.layers[0].self_attn
        attention.q_proj.weight.zero_()
        attention.v_proj.weight.zero_()
        for e in range(8):
            attention.v_proj.weight[e, e] = 1.0
            attention.o_proj.weight[48 + e, e] = 1.0
            if truth != "retrained" or e >= FORGOTTEN:
                _unit(hf.model.layers[1].mlp, e, eye[48 + e], 3.0 / 64 * eye[60])
                hf.model.layers[1].mlp.up_proj.weight[e] = eye[56 + object_of(e)]
    return load(hf, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def known():
    case = planted_case(sae=None, full=knower(), retrained=tuple(knower("retrained", k) for k in (1, 2, 3)))
    return case, hidden.prepare(case)


def spoken(result):
    """Recoverability of the facts that the test says something about: retrained models may guess one of four."""
    heard = result.recoverability[~result.recoverability.isnan()]
    assert len(heard) >= FORGOTTEN - 1
    return heard


def test_k_counts_pairs_and_halves_ties():
    assert told_by.ranked(torch.tensor([2.0]), torch.tensor([1.0, 2.0, 3.0, 0.0])) == pytest.approx(2.5 / 4)
    assert told_by.ranked(torch.tensor([1.0, 3.0]), torch.tensor([2.0])) == 0.5
    assert told_by.ranked(torch.tensor([]), torch.tensor([2.0])) != told_by.ranked(
        torch.tensor([]), torch.tensor([2.0])
    )


def test_the_gold_indicator_has_k_one_a_constant_one_half_and_random_scores_one_half():
    told = told_by.statements(
        make_queries(tiny_tokenizer(), tiny_facts([f"{n} Lee" for n in ("Anna", "Ben", "Cara", "Dan")]))
    )
    assert (told_by.k_of(told, told.right.float()) == 1).all()
    assert (told_by.k_of(told, torch.zeros(len(told.rows))) == 0.5).all()
    values = torch.rand(200, len(told.rows), generator=torch.Generator().manual_seed(0))
    assert torch.stack([told_by.k_of(told, v).mean() for v in values]).mean().item() == pytest.approx(0.5, abs=0.03)


def test_the_classifier_finds_a_planted_truth_and_relabelled_rows_teach_it_nothing():
    generator = torch.Generator().manual_seed(0)
    right = (torch.arange(400) % 4 == 0).long()
    x = torch.randn(400, 10, generator=generator)
    x[:, 0] += 4.0 * right
    test, weight = x[200:], torch.ones(200)
    good = told_by.classify(x[:200], right[:200], weight, test)
    assert told_by.ranked(good[right[200:] == 1], good[right[200:] == 0]) > 0.97
    mixed = right[:200][torch.randperm(200, generator=generator)]
    bad = told_by.classify(x[:200], mixed, weight, test)
    assert abs(told_by.ranked(bad[right[200:] == 1], bad[right[200:] == 0]) - 0.5) < 0.4
    assert (told_by.classify(x[:200], torch.ones(200, dtype=torch.long), weight, test) == 0).all()


def test_how_often_an_answer_is_true_cannot_be_learnt():
    told = told_by.statements(
        make_queries(tiny_tokenizer(), tiny_facts(["Anna Lee", "Ben Hill", "Cara Moss", "Anna Park"]))
    )
    weight = told_by.even_weights(told, torch.ones(len(told.rows), dtype=torch.bool))
    answers = [row[len(told.queries[q].prompt) :] for row, q in zip(told.rows, told.owner.tolist(), strict=True)]
    for answer in set(answers):
        mine = torch.tensor([a == answer for a in answers])
        true, wrong = (weight[mine & (told.right == r)].sum().item() for r in (1, 0))
        assert true == pytest.approx(wrong)
    none = told_by.even_weights(told, told.right == 1)
    assert (none == 0).all()


def test_full_ranks_inside_at_least_as_well_as_outside_and_its_kept_facts_too(known):
    case, ready = known
    full = hidden.audit(case, ready, case.full, "full")
    assert (full.score_raw >= full.columns["K_ext"] - 0.02).all() and (full.columns["K_kept"] > 0.9).all()
    assert (spoken(full) == 1).all() and (full.columns["hidden"] <= 0.6).all()


def test_a_late_block_hides_the_answer_from_the_outputs_and_not_from_the_classifier(known):
    case, ready = known
    late, full = (hidden.audit(case, ready, model, "x") for model in (knower("late"), case.full))
    assert (late.columns["K_ext"] <= 0.5).all() and (late.score_raw == 1).all()
    assert (spoken(late) == 1).all() and late.columns["hidden"].mean() > full.columns["hidden"].mean() + 0.3


def test_a_retrained_model_ranks_by_chance_inside_and_outside(known):
    case, ready = known
    retrained = hidden.audit(case, ready, case.retrained[0], "R")
    assert retrained.score_raw.mean() < 0.75 and retrained.recoverability.nanmean() < 0.35
    assert retrained.null.shape == (3, 4) and len(retrained.score_retrained) == 2


@pytest.mark.slow
def test_a_random_model_cannot_tell_true_statements_and_choosing_a_layer_does_not_make_it_seem_so():
    models = [load(tiny_hf("llama", layers=8, seed=s), tokenizer=tiny_tokenizer()) for s in (0, 1)]
    names = [f"{a} {b}" for a in NAMES for b in ("Lee", "Hill", "Moss", "Park", "Reed", "Stone", "Vale", "West")]
    people = tiny_facts(random.Random(0).sample(names, len(names)))  # so that no name goes with an object
    case = Case(full=models[0], retrained=(models[1],), facts=people[:4], others=people[4:])
    ready = hidden.prepare(case)
    result = hidden.audit(case, ready, models[0], "full")
    assert abs(ready.full.kept - 0.5) < 0.15 and abs(ready.never[0].kept - 0.5) < 0.15
    assert result.recoverability.isnan().all() and all("kept_at_chance" in flags for flags in result.flags)


def test_an_audited_model_that_cannot_tell_true_statements_any_more_is_not_judged(known):
    case, ready = known
    found = hidden.audit(case, ready, planted_model(), "knows, and recognises no statement")
    assert ready.full.kept > 0.9 and (found.columns["K_kept"] < hidden.MIN_KEPT).all()
    assert found.recoverability.isnan().all() and all("kept_at_chance" in flags for flags in found.flags)


def test_forgotten_answers_never_reach_the_classifier(known):
    case, ready = known
    gone = {fact.subject for fact in case.facts}
    assert not {query.fact.subject for query in ready.kept.queries} & gone
    rows = list(zip(ready.kept.owner.tolist(), ready.heldout.tolist(), strict=True))
    fit, one, two = ({ready.kept.queries[q].fact.subject for q, h in rows if h == part} for part in range(3))
    assert fit and one and two and not fit & one and not fit & two and not one & two


def test_sampled_answers_join_the_wrong_ones_and_never_repeat_a_candidate():
    case = planted_case(sae=None, full=knower())
    queries = make_queries(case.full.tokenizer, case.facts, "prompt")
    more = told_by.sampled(case, case.full, queries, 30)
    for old, new in zip(queries, more, strict=True):
        assert new.answers[: len(old.answers)] == old.answers and len(set(new.answers)) == len(new.answers)
    assert any(len(new.answers) > len(old.answers) for old, new in zip(queries, more, strict=True))
    assert told_by.sampled(case, case.full, queries, 30)[0].answers == more[0].answers


def test_an_answer_known_as_tokens_only_is_verified_like_one_that_is_written_out():
    model = load(tiny_hf("llama"), tokenizer=tiny_tokenizer())
    plain = tiny_facts(["Anna Lee", "Ben Hill"])
    written = make_queries(model.tokenizer, [replace(f, distractors=(*f.distractors, "Rivers")) for f in plain])
    drawn = [
        replace(query, answers=(*query.answers, (model.tokenizer.convert_tokens_to_ids("Rivers"),)))
        for query in make_queries(model.tokenizer, plain)
    ]
    want, got = (hidden._p_true(model, told_by.statements(queries)) for queries in (written, drawn))
    assert want is not None and got is not None and len(want) == 5 * len(drawn)
    torch.testing.assert_close(got, want)


def test_with_sampled_answers_full_and_a_late_block_are_still_placed():
    case = planted_case(sae=None, full=knower(), retrained=(knower("retrained", 1), knower("retrained", 2)))
    ready = hidden.prepare(case, samples=5)
    for model in (case.full, knower("late")):
        found = hidden.audit(case, ready, model, "x")
        assert (found.score_raw > 0.9).all() and (found.recoverability.nan_to_num(nan=1.0) > 0.9).all()
        assert not found.recoverability.isnan().all() and found.columns["K_ext"].isfinite().all()


def test_without_retrained_models_sham_facts_give_the_level():
    case = planted_case(sae=None, full=knower(), retrained=())
    late = hidden.audit(case, hidden.prepare(case), knower("late"), "late")
    assert late.grade == "B" and (spoken(late) == 1).all()


def test_bad_input_is_refused_and_models_are_left_alone(known):
    for few in ((), planted_facts()[FORGOTTEN:-1]):
        with pytest.raises(ValueError, match="four other subjects"):
            hidden.prepare(planted_case(sae=None, others=few))
    with pytest.raises(ValueError, match="samples"):
        hidden.prepare(planted_case(sae=None), samples=-1)
    case, ready = known
    late, state = knower("late"), torch.get_rng_state()
    before = late.hash()
    a, b = (hidden.audit(case, ready, late, "late").score_raw for _ in range(2))
    assert torch.equal(a, b) and late.hash() == before and torch.equal(state, torch.get_rng_state())
