"""Relearning: what is taught and what is scored, nothing at rate zero, recovery of what was only smothered."""

import pytest
import torch

from mech_unlearn.core import Entity
from mech_unlearn.model.load import load
from mech_unlearn.model.tokens import encode
from mech_unlearn.restoration import Relearn
from mech_unlearn.restoration.engine.lessons import fold_of, lesson_loss, lessons
from mech_unlearn.restoration.engine.levels import make_query_set
from mech_unlearn.restoration.engine.normalise import relation_mean
from mech_unlearn.restoration.weights import relearn
from tests.planted import UNKNOWN, planted_case, planted_facts, planted_hf, planted_model
from tests.tiny import tiny_facts, tiny_hf, tiny_tokenizer


def test_folds_by_entity_keep_a_subject_together_and_folds_by_fact_do_not():
    facts = tiny_facts(["Anna Lee", "Ben Hill", "Cara Moss", "Dan Park"])
    by_entity = fold_of(facts, Relearn(), 0)
    assert all(len({f for f, fact in zip(by_entity, facts) if fact.subject == s.subject}) == 1 for s in facts)
    by_fact = fold_of(facts, Relearn(split="fact"), 0)
    assert all(len({f for f, fact in zip(by_fact, facts) if fact.subject == s.subject}) == 2 for s in facts)
    assert sum(by_entity) == sum(by_fact) == len(facts) // 2


def test_one_subject_cannot_be_split_by_entity():
    with pytest.raises(ValueError, match="split='fact'"):
        fold_of(tiny_facts(["Anna Lee"]), Relearn(), 0)


def test_lessons_use_no_phrasing_that_is_scored():
    case = planted_case(sae=None)
    scored = {query.prompt for query in make_query_set(case, "test").queries}
    taught = {row[:length] for row, length in lessons(case, case.facts)}
    assert taught and not taught & scored


def test_lesson_loss_is_the_mean_cross_entropy_of_answer_tokens_which_alone_are_unembedded(tiny_model, monkeypatch):
    ids = torch.tensor([[1, 5, 6, 7, 0], [1, 5, 6, 7, 8]])
    table, shapes = tiny_model.logits(ids).log_softmax(-1), []
    want = -(table[0, 2, 7] + table[1, 1, 6] + table[1, 2, 7] + table[1, 3, 8]) / 4
    plain = torch.nn.functional.linear

    def watched(x, weight, bias=None):
        if len(weight) == table.shape[-1]:
            shapes.append(tuple(x.shape[:-1]))
        return plain(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    torch.testing.assert_close(lesson_loss(tiny_model, ids, [3, 2], [4, 5]), want)
    with tiny_model.hooks(("unembed.hook_out", lambda x: x * 2)):  # whole rows where something acts on the logits
        assert lesson_loss(tiny_model, ids, [3, 2], [4, 5]) != want
    assert shapes == [(1, 4), (2, 5)]


def test_area_over_log_steps_of_a_line():
    steps = (1, 2, 4, 8)
    line = torch.tensor([0.0, 1.0, 2.0, 3.0])[:, None]
    assert relearn.log_step_area(line, steps).item() == pytest.approx(1.5)


def test_at_learning_rate_zero_nothing_moves():
    case = planted_case(sae=None, relearn=Relearn(steps=(1, 2), lr_times_width=0.0))
    ready = relearn.prepare(case)
    result = relearn.audit(case, ready, planted_model("late"), "late")
    assert (result.curves["rho"] == 0).all() and (result.recoverability == 0).all()


def test_what_a_shared_write_smothered_comes_back_untaught_and_what_was_never_there_does_not():
    facts, retrained = planted_facts(), tuple(planted_model("retrained", k, 8) for k in (1, 2))
    settings = Relearn(steps=(1,), lr_times_width=0.64)
    case = planted_case(sae=None, facts=facts, others=(), retrained=retrained, relearn=settings, seed=2)
    ready, smothered = relearn.prepare(case), planted_model("shared", forgotten=8)
    taught = {fact.object for fact, fold in zip(facts, ready.folds) if fold == 0}
    assert taught == {fact.object for fact, fold in zip(facts, ready.folds) if fold == 1}
    weights, state = {name: w.clone() for name, w in smothered.held.items()}, torch.get_rng_state()
    result = relearn.audit(case, ready, smothered, "shared")
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(w, smothered.held[name]) for name, w in weights.items())
    assert result.recoverability.mean() > 0.2
    assert relearn.audit(case, ready, retrained[0], "R").recoverability.mean() < 0.1


def test_low_rank_factors_bring_back_what_was_smothered_and_not_what_was_never_there():
    facts, retrained = planted_facts(), tuple(planted_model("retrained", k, 8) for k in (1, 2))
    settings = Relearn(steps=(8,), lr_times_width=0.0064)
    case = planted_case(sae=None, facts=facts, others=(), retrained=retrained, relearn=settings, seed=2)
    ready = relearn.prepare(case, rank=16)
    result = relearn.audit(case, ready, planted_model("shared", forgotten=8), "shared")
    assert result.test == "relearn_lora" and result.flags_of(0) == ()
    assert result.recoverability.mean() > 0.2
    assert relearn.audit(case, ready, retrained[0], "R").recoverability.mean() < 0.1


def test_the_same_seed_gives_the_same_curve_and_another_seed_another_one():
    case = planted_case(sae=None)
    query_set, rows = make_query_set(case, "test"), lessons(case, case.facts[:2])
    first, again, other = (
        relearn.relearn_curve(case, query_set, planted_model("late"), rows, seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_model_with_a_joint_qkv_matrix_is_taught_as_the_plain_model_is_attention_included():
    hf = tiny_hf("gpt_neox", layers=2)
    model = load(hf, tokenizer=tiny_tokenizer())
    case = planted_case(sae=None, relearn=Relearn(steps=(3,), lr_times_width=0.32))
    query_set, rows = make_query_set(case, "test"), lessons(case, case.facts[:1])[:1]
    plain = model.plain_copy()
    optimiser = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.0)
    ids, start = torch.tensor([rows[0][0]]), rows[0][1]
    for _ in range(3):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(plain(ids).logits[0, start - 1 : -1], ids[0, start:]).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimiser.step()
    found = relearn.relearn_curve(case, query_set, model, rows, 0)
    wanted = query_set.margins(load(plain, tokenizer=tiny_tokenizer()))
    torch.testing.assert_close(found[0], wanted, atol=1e-3, rtol=0)
    assert (wanted - query_set.margins(model)).abs().max() > 0.1


@pytest.mark.slow
def test_the_direct_set_is_the_scored_facts_and_the_others_name_no_forgotten_subject():
    case = planted_case(sae=None, texts=("Rivers run to Rome", "rain falls on hills", "Anna was in the sea"))
    case = planted_case(sae=None, texts=case.texts, unknown=tuple(Entity(name=n) for n in UNKNOWN))
    tokenizer = case.full.tokenizer
    mine = {tokenizer.convert_tokens_to_ids(fact.subject) for fact in case.facts}
    rest, direct = (relearn.prepare(case, teach=t) for t in ("rest", "direct"))
    assert rest.lessons[0] == direct.lessons[1] and rest.lessons[1] == direct.lessons[0]
    unrelated = relearn.unrelated_lessons(case)
    assert [tokenizer.decode(row[1:]) for row, _ in unrelated] == ["rain falls on hills"]
    for rows in (unrelated, relearn.benign_lessons(case), relearn.syntax_lessons(case)):
        assert rows and not any(mine & set(row) for row, _ in rows)
    scored = {query.template for query in make_query_set(case, "test").queries}
    strangers = {tokenizer.convert_tokens_to_ids(name) for name in UNKNOWN}
    assert all(strangers & set(row) for row, _ in relearn.syntax_lessons(case)) and scored


def test_an_unrelated_text_longer_than_the_models_positions_is_taught_in_pieces():
    text = " ".join(["rain falls on the hills and the sea"] * 20)
    case = planted_case(sae=None, texts=(text, "Anna was in the sea", "the sea"), relearn=Relearn(steps=(1,)))
    rows = relearn.unrelated_lessons(case)
    assert {length for _, length in rows} == {1} and max(len(row) for row, _ in rows) == 64
    taught = [token for row, _ in rows for token in row[1:]]  # each piece begins with the BOS
    whole = [token for t in (text, "the sea") for token in encode(case.full.tokenizer, t).ids[1:]]
    assert sorted(taught) == sorted(whole)
    relearn.prepare(case, teach="unrelated")


def test_directly_taught_facts_come_back_in_any_model_and_do_not_count():
    case = planted_case(sae=None, relearn=Relearn(steps=(2, 8), lr_times_width=0.64))
    ready = relearn.prepare(case, teach="direct")
    found = relearn.audit(case, ready, case.retrained[0], "R")
    assert found.test == "relearn_direct" and (found.score_raw > found.columns["before"] + 0.3).all()
    assert found.recoverability.mean() < 0.25


@pytest.mark.thorough
@pytest.mark.parametrize("teach", ("benign", "unrelated", "syntax"))
def test_sets_without_the_answers_give_a_retrained_model_nothing(teach):
    texts, unknown = ("rain falls on hills", "the sea and the hills"), tuple(Entity(name=n) for n in UNKNOWN)
    case = planted_case(sae=None, texts=texts, unknown=unknown, relearn=Relearn(steps=(1, 2)))
    ready = relearn.prepare(case, teach=teach)
    assert len(ready.lessons) == 1
    assert relearn.audit(case, ready, case.retrained[0], "R").recoverability.mean() < 0.1


def test_a_set_that_cannot_be_made_is_refused():
    for teach, missing in (("benign", "others"), ("unrelated", "texts"), ("syntax", "unknown")):
        with pytest.raises(ValueError, match=missing):
            relearn.prepare(planted_case(sae=None, others=()), teach=teach)


def test_savings_of_a_worked_example():
    curve = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [2.0, 2.0, 0.0]])
    never = torch.tensor([[[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 2.0, 0.0]]])
    got = relearn.savings(curve, never, torch.ones(3), (1, 2, 4))
    assert got[:2].tolist() == [0.5, 0.0] and got[2].isnan()


def half(truth, seed=0, dtype=torch.bfloat16):
    return load(planted_hf(truth, seed).to(dtype), tokenizer=tiny_tokenizer())


def fold_by_fold(case, ready, model):
    """Each fact's curve, from one training per fold."""
    out = torch.zeros(len(case.relearn.steps), 1 if case.retrained else 2, len(case.facts))
    for fold, rows in enumerate(ready.lessons):
        mine = [f == fold for f in ready.folds]
        part = ready.levels.query_set.part(mine)
        out[..., torch.tensor(mine)] = relearn.relearn_curve(case, part, model, rows, case.seed + fold)
    return out


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_a_model_in_half_precision_relearns_as_a_float32_model_of_the_same_weights(dtype):
    case = planted_case(sae=None, relearn=Relearn(steps=(1, 4), lr_times_width=0.002))
    query_set, rows = make_query_set(case, "test"), lessons(case, case.facts[:2])
    model = half("shared", dtype=dtype)
    wide = load(planted_hf("shared").to(dtype).float(), tokenizer=tiny_tokenizer())
    got, want = (relearn.relearn_curve(case, query_set, m, rows, 0) for m in (model, wide))
    assert torch.equal(got, want) and model.dtype == dtype
    assert (want[-1] - query_set.margins(wide)).abs().max() > 1e-5


def test_in_bfloat16_too_nothing_moves_at_learning_rate_zero():
    settings = Relearn(steps=(1,), lr_times_width=0.0)
    retrained = (half("retrained", 1), half("retrained", 2))
    case = planted_case(sae=None, full=half("full"), retrained=retrained, relearn=settings)
    result = relearn.audit(case, relearn.prepare(case), half("shared"), "shared")
    torch.testing.assert_close(result.score_raw, result.columns["before"], atol=1e-4, rtol=0)
    torch.testing.assert_close(result.recoverability, torch.zeros(4), atol=1e-4, rtol=0)


def test_a_fact_is_scored_where_its_own_fold_was_not_taught_and_the_cost_counts_each_fold_once():
    case = planted_case(sae=None, relearn=Relearn(steps=(1, 2), lr_times_width=0.64))
    ready, model = relearn.prepare(case), planted_model("late")
    for fold, rows in enumerate(ready.lessons):
        mine = [fact for fact, f in zip(case.facts, ready.folds) if f == fold]
        assert rows and not set(rows) & set(lessons(case, mine))
    result = relearn.audit(case, ready, model, "late")
    assert torch.equal(result.curves["margin"], fold_by_fold(case, ready, model)[:, 0])
    queries = len(ready.levels.query_set.queries)
    assert result.cost_fe == (2 * 2 * case.relearn.batch * 3 + (2 + 1) * queries) / len(case.facts)


def test_without_retrained_models_direct_teaching_says_nothing_and_others_are_compared_with_taught_shams():
    case = planted_case(sae=None, retrained=(), relearn=Relearn(steps=(2, 8), lr_times_width=0.64))
    model = planted_model("retrained", 5)
    direct = relearn.audit(case, relearn.prepare(case, teach="direct"), model, "R")
    assert direct.score_raw.mean() > direct.columns["before"].mean() + 0.3
    assert direct.recoverability.isnan().all() and direct.columns["savings"].isnan().all()
    assert all(direct.flags_of(i) == ("needs_retrained",) for i in range(4))
    ready = relearn.prepare(case)
    rest, curve = relearn.audit(case, ready, model, "R"), fold_by_fold(case, ready, model)
    shams = relation_mean(curve[:, 1], case.facts)
    assert torch.equal(rest.curves["margin_R"], shams) and not torch.equal(shams[0], shams[1])
    assert torch.equal(rest.score_retrained, shams[-1:]) and rest.flags_of(0) == ()
    half_way = (ready.levels.full + ready.levels.base([])) / 2
    want = relearn.savings(curve[:, 0], shams[None], half_way, (2, 8))
    torch.testing.assert_close(rest.columns["savings"], want, equal_nan=True)
