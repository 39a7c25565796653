"""UDS: closed forms, an independent reference with plain transformers hooks, and models of known truth."""

import pytest
import torch

from mech_unlearn.core import Entity
from mech_unlearn.model.load import load
from mech_unlearn.restoration import Case
from mech_unlearn.restoration.states import uds
from tests.planted import UNKNOWN, planted_case, planted_model
from tests.tiny import longer, plain_blocks, tiny_case, tiny_facts, tiny_hf, tiny_tokenizer


def plain_drops(full, source, ids, rows, answer):
    """D per layer with HF forward hooks on the decoder blocks, one example, no code of ours."""

    def first(out):
        return out[0] if isinstance(out, tuple) else out

    def logprob(hf):
        with torch.no_grad():
            logits = hf(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        return sum(logits[len(ids) - len(answer) + t, token].item() for t, token in enumerate(answer)) / len(answer)

    kept = {}
    handles = [
        b.register_forward_hook(lambda m, a, out, i=i: kept.__setitem__(i, first(out).clone()))
        for i, b in enumerate(plain_blocks(source))
    ]
    logprob(source)
    for handle in handles:
        handle.remove()
    baseline, out = logprob(full), []
    for i, block in enumerate(plain_blocks(full)):

        def patch(m, a, y, i=i):
            new = first(y).clone()
            new[0, rows] = kept[i][0, rows]
            return (new, *y[1:]) if isinstance(y, tuple) else new

        handle = block.register_forward_hook(patch)
        out.append(baseline - logprob(full))
        handle.remove()
    return torch.tensor(out)


def test_uds_of_a_worked_example():
    got = uds.uds_score(torch.tensor([[0.02], [0.10], [0.50], [1.0]]), torch.tensor([[0.03], [-0.05], [0.25], [1.4]]))
    assert got.uds.item() == pytest.approx(0.78125)
    assert got.layers[:, 0].tolist() == [False, True, True, True]
    assert got.raw.item() == pytest.approx((0.10 * -0.5 + 0.5 * 0.5 + 1.0 * 1.4) / 1.6)


def test_uds_is_undefined_where_the_retrained_model_lacks_nothing():
    assert uds.uds_score(torch.full((3, 1), 0.05), torch.ones(3, 1)).uds.isnan().all()


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", ("gpt2", "llama", "gemma2", "gpt_neox"))
@pytest.mark.parametrize("rows", ("answer", "subject"))
def test_drops_agree_with_plain_transformers_hooks(architecture, rows):
    facts = longer(tiny_facts(["Anna Lee", "Hugo Vale"]))
    full, source = (load(tiny_hf(architecture, seed=s), tokenizer=tiny_tokenizer()) for s in (0, 1))
    case = Case(full=full, retrained=(source,), facts=facts)
    ours = uds.prepare(case, rows=rows).drops[0]
    plain_full, plain_source = tiny_hf(architecture, seed=0), tiny_hf(architecture, seed=1)
    assert {len(query.answers[0]) for query in uds.prepare(case).queries} == {1, 2, 3}
    for i, query in enumerate(uds.prepare(case).queries):
        answer, ids = query.answers[0], [*query.prompt, *query.answers[0][:-1]]
        start = len(query.prompt) - 1
        where = [start + t for t in range(len(answer))] if rows == "answer" else [query.span[1] - 1]
        theirs = plain_drops(plain_full, plain_source, [*ids], where, answer)
        assert (ours[:, i] - theirs).abs().max() < 1e-5


def test_full_against_itself_is_zero_and_retrained_against_itself_is_one():
    case = tiny_case("llama", tiny_facts(["Anna Lee", "Ben Hill"]), seeds=(1,))
    for rows in ("answer", "subject"):
        levels = uds.prepare(case, rows=rows)
        same = uds.source_drop(case, levels, case.full)
        assert same.abs().max() <= 1e-5
        again = uds.source_drop(case, levels, case.retrained[0])
        score = uds.uds_score(levels.drops.mean(0), again)
        defined = ~score.uds.isnan()
        assert defined.any() and torch.equal(score.uds[defined], torch.ones(int(defined.sum())))


def test_layers_below_the_first_changed_one_drop_nothing():
    case = tiny_case("llama", tiny_facts(["Anna Lee", "Ben Hill"]), seeds=(1,))
    changed = load(tiny_hf("llama"), tokenizer=tiny_tokenizer())
    with torch.no_grad():
        changed.held["model.layers.2.mlp.down_proj.weight"].mul_(-1)
    levels = uds.prepare(case)
    drop = uds.source_drop(case, levels, changed)
    assert drop[:2].abs().max() < 5e-6 and drop[2:].abs().max() > 1e-3


def test_a_late_block_leaves_the_states_intact_and_an_early_block_fools_uds():
    case = planted_case(sae=None)
    levels = uds.prepare(case)
    late, early = (uds.audit(case, levels, planted_model(t), t) for t in ("late", "early"))
    assert (late.recoverability > 0.5).all()
    assert (early.recoverability < 0.1).all()
    assert (uds.audit(case, levels, case.full, "full").recoverability > 0.999).all()


def test_a_retrained_model_is_left_out_of_the_mean_when_it_is_audited():
    case = planted_case(sae=None)
    levels = uds.prepare(case)
    result = uds.audit(case, levels, case.retrained[0], "R")
    assert len(result.score_retrained) == 2 and (result.recoverability < 0.1).all()
    alone = Case(full=case.full, retrained=case.retrained[:1], facts=case.facts)
    with pytest.raises(ValueError, match="second one"):
        uds.audit(alone, uds.prepare(alone), alone.retrained[0], "R")


def test_against_its_own_ceiling_the_mean_held_out_retrained_model_recovers_nothing():
    """Clipping keeps every model below 1, so UDS of held-out retrained models is the mark, not 1."""
    case = tiny_case("llama", tiny_facts(["Anna Lee", "Ben Hill"]), seeds=(1, 2, 3))
    levels = uds.prepare(case)
    assert (
        uds.ceiling(levels.heldout) == pytest.approx(levels.heldout.nanmean().item())
        and uds.ceiling(levels.heldout) < 0.99
    )
    each = torch.stack([uds.audit(case, levels, model, "R").kappa for model in case.retrained])
    assert each.nanmean().item() == pytest.approx(0, abs=1e-5)
    assert torch.equal(levels.heldout.isnan(), each.isnan())


@pytest.mark.parametrize("unknown", (UNKNOWN, ()))
def test_without_retrained_models_unknown_or_other_subjects_stand_in(unknown):
    base = planted_case(sae=None)
    names = tuple(Entity(name=n) for n in unknown)
    case = Case(full=base.full, facts=base.facts, others=base.others, unknown=names)
    levels = uds.prepare(case)
    result = uds.audit(case, levels, planted_model("late"), "late")
    assert result.grade == "B" and (result.recoverability > 0.5).all()
    assert (uds.audit(case, levels, planted_model("early"), "early").recoverability < 0.25).all()
