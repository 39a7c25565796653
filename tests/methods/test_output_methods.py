"""The output-space methods on a model with planted facts: what each forgets, keeps, reads and refuses."""

import random
from dataclasses import replace

import pytest
import torch

from mech_unlearn.core import ForgetSet, RetainSet, Site
from mech_unlearn.edit.edit import Edit, Shift
from mech_unlearn.methods.experimental.catnip import Catnip
from mech_unlearn.methods.experimental.shred import Shred
from mech_unlearn.methods.flat import Flat
from mech_unlearn.methods.grad_ascent import GradAscent
from mech_unlearn.methods.grad_diff import GradDiff
from mech_unlearn.methods.idk_dpo import IdkDpo
from mech_unlearn.methods.kl_min import KlMin
from mech_unlearn.methods.npo import Npo
from mech_unlearn.methods.sim_npo import SimNpo
from mech_unlearn.methods.task_vector import TaskVector
from mech_unlearn.methods.undial import Undial
from mech_unlearn.model.load import load
from mech_unlearn.training.objective import Objective
from mech_unlearn.training.rows import REFUSALS, BatchScores, answer_rows, nll, refusal_rows, score_rows
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.training import train
from tests.planted import FORGOTTEN, fresh_planted_model, planted_facts
from tests.tiny import tiny_facts, tiny_hf, tiny_tokenizer

CPU = torch.device("cpu")
FAST = Schedule(lr=3e-3, epochs=4, batch_size=4, weight_decay=0.0)
SAY = ("the sea", "rain")
WITHOUT_RETAIN = {
    "grad_ascent": GradAscent(schedule=FAST),
    "grad_ascent of embeddings": GradAscent(only="embeddings", schedule=replace(FAST, lr=0.1)),
    "flat": Flat(schedule=FAST, refusals=SAY),
    "flat by kl": Flat(schedule=FAST, refusals=SAY, divergence="kl"),
    "flat by js": Flat(schedule=FAST, refusals=SAY, divergence="js"),
    "flat by pearson": Flat(schedule=FAST, refusals=SAY, divergence="pearson"),
    "catnip": Catnip(schedule=FAST),
    "shred": Shred(schedule=FAST),
    "undial": Undial(schedule=FAST),
    "task_vector": TaskVector(schedule=FAST),
}
WITH_RETAIN = {
    "grad_diff": GradDiff(schedule=FAST),
    "grad_diff 1:1": GradDiff(schedule=replace(FAST, retain_sampling="1:1")),
    "kl_min": KlMin(schedule=FAST, retain_weight=10.0),
    "sim_npo": SimNpo(schedule=FAST, forget_weight=1.0),
    "idk_dpo": IdkDpo(schedule=FAST, refusals=SAY),
    "undial with retain": Undial(schedule=FAST, retain_weight=1.0),
}
METHODS = WITHOUT_RETAIN | WITH_RETAIN
PLAIN = [name for name in METHODS if " by " not in name]
"""All but variants of one loss."""


def sets():
    facts = planted_facts()
    return ForgetSet(facts=facts[:FORGOTTEN]), RetainSet(neighbors=facts[FORGOTTEN:])


@pytest.fixture(scope="module")
def model():
    return fresh_planted_model()


@pytest.fixture(scope="module")
def fitted(model):
    """name -> its edit, and what fitting did to the model's hash and to the random state; fitted once."""
    made = {}

    def fit(name):
        if name not in made:
            before, state = model.hash(), torch.random.get_rng_state()
            edit = METHODS[name].fit(model, *sets())
            made[name] = edit, before == model.hash(), torch.equal(torch.random.get_rng_state(), state)
        return made[name]

    return fit


def answered(model, facts, rows=None) -> BatchScores:
    return score_rows(model.hf, answer_rows(model.tokenizer, facts) if rows is None else rows, 0, CPU)


@pytest.mark.thorough
@pytest.mark.parametrize("name", METHODS)
def test_each_method_lowers_the_forgotten_answers_and_says_so_in_its_report(model, fitted, name):
    edit, _, _ = fitted(name)
    facts = sets()[0].facts
    before = answered(model, facts)
    with edit.on(model):
        after = answered(model, facts)
    assert before.exact.all()
    assert after.logprob.mean() < before.logprob.mean() - 0.5
    report = edit.recipe["report"]
    assert report["forget_recall"] == pytest.approx(after.exact.float().mean().item())
    assert {"n_forward", "n_backward", "seconds", "epochs", "final_losses"} <= report.keys()
    assert report["epochs"] == FAST.epochs and report["seconds"] > 0


@pytest.mark.parametrize("name", WITH_RETAIN)
def test_a_retain_term_keeps_the_neighbours_that_ascent_alone_takes_along(model, fitted, name):
    kept = sets()[1].facts
    with fitted(name)[0].on(model):
        held = answered(model, kept)
    with fitted("grad_ascent")[0].on(model):
        lost = answered(model, kept)
    assert held.exact.all()
    assert held.logprob.mean() > lost.logprob.mean() + 0.5


@pytest.mark.parametrize("name", METHODS)
def test_fitting_leaves_the_model_bit_identical_and_the_callers_random_state_untouched(fitted, name):
    _, same, untouched = fitted(name)
    assert same and untouched


@pytest.mark.thorough
@pytest.mark.parametrize("name", PLAIN)
def test_the_same_seed_gives_the_same_edit(model, fitted, name):
    edit, again = fitted(name)[0], METHODS[name].fit(model, *sets())
    assert edit.deltas.keys() == again.deltas.keys()
    assert all(torch.equal(edit.deltas[key], again.deltas[key]) for key in edit.deltas)


@pytest.mark.parametrize("name", ("grad_ascent", "idk_dpo"))
def test_another_seed_gives_another_edit(model, fitted, name):
    edit, other = fitted(name)[0], replace(METHODS[name], seed=1).fit(model, *sets())
    assert any(not torch.equal(edit.deltas[key], other.deltas[key]) for key in edit.deltas)


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in PLAIN if name in WITHOUT_RETAIN])
def test_a_method_without_a_retain_term_does_not_read_the_retain_set(model, fitted, name):
    bare = METHODS[name].fit(model, sets()[0], RetainSet())
    edit = fitted(name)[0]
    assert all(torch.equal(edit.deltas[key], bare.deltas[key]) for key in edit.deltas)


@pytest.mark.parametrize("name", WITH_RETAIN)
def test_a_retain_term_with_nothing_to_retain_is_refused(model, name):
    with pytest.raises(ValueError, match="retain_weight=0"):
        METHODS[name].fit(model, sets()[0], RetainSet())


def test_training_only_the_embeddings_leaves_all_else_bit_identical(model, fitted):
    assert set(fitted("grad_ascent of embeddings")[0].deltas) == {"model.embed_tokens.weight"}
    assert set(fitted("grad_ascent")[0].deltas) > {"model.embed_tokens.weight"}


@pytest.mark.parametrize("architecture", ("gpt2", "gemma2"))
def test_embeddings_that_are_the_output_head_too_cannot_be_trained_alone(architecture, tiny_sets):
    tied = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="output head"):
        GradAscent(schedule=Schedule(lr=1e-05, epochs=1), only="embeddings").fit(tied, *tiny_sets)


@pytest.mark.parametrize("architecture", ("gpt_neox", "qwen3", "olmo2"))
def test_embeddings_are_found_by_name_on_other_architectures(architecture, tiny_sets):
    untied = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    (name,) = (
        GradAscent(schedule=Schedule(lr=1e-3, epochs=1, batch_size=4), only="embeddings").fit(untied, *tiny_sets).deltas
    )
    assert name.split(".")[-2] == ("embed_in" if architecture == "gpt_neox" else "embed_tokens")


def test_a_preferred_refusal_becomes_likelier_than_the_answer(model, fitted):
    facts = sets()[0].facts
    refusals = refusal_rows(model.tokenizer, facts, SAY, random.Random(0))
    with fitted("idk_dpo")[0].on(model):
        assert (answered(model, facts, refusals).logprob > answered(model, facts).logprob).float().mean() > 0.9
    assert (answered(model, facts, refusals).logprob < answered(model, facts).logprob).all()


@pytest.mark.parametrize("method", (IdkDpo(schedule=FAST, refusals=("!",)), Flat(schedule=FAST, refusals=("!",))))
def test_refusals_the_tokenizer_cannot_write_are_refused_before_training(model, method):
    with pytest.raises(ValueError, match="refusals="):
        method.fit(model, *sets())


@pytest.mark.slow
def test_kl_keeps_what_the_model_believes_where_nll_teaches_what_the_retain_set_says(model):
    forget, retain = sets()
    longer = replace(FAST, epochs=12)
    wrong = tuple(replace(f, object=f.distractors[0], distractors=(f.object,)) for f in retain.facts)
    for method, believed in ((KlMin(schedule=longer), retain.facts), (GradDiff(schedule=longer), wrong)):
        with method.fit(model, forget, RetainSet(neighbors=wrong)).on(model):
            assert answered(model, believed).exact.float().mean() > 0.8


def test_grad_diff_without_a_retain_term_is_gradient_ascent_and_so_is_kl_min(model, fitted):
    ascent = fitted("grad_ascent")[0].deltas
    for method in (GradDiff(schedule=FAST, retain_weight=0.0), KlMin(schedule=FAST, retain_weight=0.0)):
        deltas = method.fit(model, *sets()).deltas
        assert all(torch.equal(deltas[key], ascent[key]) for key in ascent)


def test_a_task_vector_is_minus_its_scale_times_what_memorising_changes(model, fitted):
    rates = FAST
    learned, report = train(model, *sets(), Objective(lambda _: nll, retain_weight=0.0), rates, trainable="", seed=0)
    edit = TaskVector(schedule=FAST, scale=0.5).fit(model, *sets())
    assert edit.deltas.keys() == learned.keys()
    assert all(torch.equal(edit.deltas[key], -0.5 * learned[key]) for key in learned)
    assert edit.recipe["report"]["memorised_recall"] == report["forget_recall"]


def test_cyclic_sampling_goes_through_all_retain_rows_and_one_to_one_through_as_many_as_are_forgotten(tiny_model):
    """Only the embeddings of words that occur in a batch get a gradient: the names trained on are the rows seen."""
    names = ["Cara Moss", "Dan Park", "Eva Reed", "Finn Stone", "Gina Vale", "Hugo West"]
    forget = ForgetSet(facts=tiny_facts(["Anna Lee"], ("born",)))
    retain = RetainSet(neighbors=tiny_facts(names, ("born",)))

    def touched(sampling):
        method = GradDiff(
            schedule=Schedule(lr=1e-3, epochs=12, batch_size=2, weight_decay=0.0, clip=1e9, retain_sampling=sampling)
        )
        delta = method.fit(tiny_model, forget, retain).deltas["model.embed_tokens.weight"].abs().sum(1)
        ids = [tiny_model.tokenizer.convert_tokens_to_ids(name.split()[0]) for name in names]
        return int((delta[ids] > 0).sum())

    assert touched("cyclic") == len(names)
    assert 1 <= touched("1:1") <= 2  # the forget set has two rows, so two retain rows were drawn


def test_forward_passes_are_counted_with_those_of_the_untrained_model_and_the_refusals(model, fitted):
    def passes(name):
        report = fitted(name)[0].recipe["report"]
        return (report["n_forward"] - 2) / report["steps"], report["n_backward"] / report["steps"]

    assert passes("grad_ascent") == (1, 1)
    assert passes("grad_diff") == (2, 2)
    assert passes("kl_min") == (3, 2)
    assert passes("shred") == passes("undial") == (2, 1)
    assert passes("idk_dpo") == (2, 2)  # answers and refusals share a batch
    assert set(fitted("kl_min")[0].recipe["report"]["final_losses"]) == {"forget_nll", "forget_loss", "retain_kl"}


def test_training_under_an_edit_of_activations_is_refused(model):
    shift = Edit(
        name="shift", base=model.hash(), interventions=(Shift(Site(1, "resid_post"), ((5,),), torch.zeros(1, 64)),)
    )
    with shift.on(model):
        model.logits(torch.tensor([[2, 5]]))
        with pytest.raises(ValueError, match="in force"):
            Npo(schedule=Schedule(lr=1e-3, epochs=1, batch_size=4)).fit(model, *sets())


@pytest.mark.parametrize(
    ("method", "message"),
    (
        (SimNpo(beta=0.0), "beta must be positive"),
        (IdkDpo(beta=-1.0), "beta must be positive"),
        (Catnip(beta=0.0), "beta must be positive"),
        (Catnip(kappa=-1.0), "kappa must not be negative"),
        (Undial(strength=0.0), "strength must be positive"),
        (Shred(share=0.0), "share must be"),
        (Shred(share=1.5), "share must be"),
        (Shred(top=1), "top must be"),
        (TaskVector(scale=0.0), "scale must be positive"),
        (GradDiff(trainable="no such"), "nothing would be trained"),
        (Flat(schedule=replace(FAST, retain_sampling="entity"), refusals=("the sea",)), "has no effect: no retained"),
    ),
)
def test_settings_that_cannot_work_are_refused(model, method, message):
    with pytest.raises(ValueError, match=message):
        method.fit(model, *sets())


def test_refusals_follow_the_prompts_of_the_facts_in_their_order():
    facts, tokenizer = tiny_facts(["Anna Lee", "Ben Hill"]), tiny_tokenizer()
    rows = refusal_rows(tokenizer, facts, ("the sea .", "rain"), random.Random(0))
    true = answer_rows(tokenizer, facts)
    assert [(ids[:start], start) for ids, start in rows] == [(ids[:start], start) for ids, start in true]
    assert {tokenizer.decode(list(ids[start:])) for ids, start in rows} == {"the sea.", "rain"}
    assert rows == refusal_rows(tokenizer, facts, ("the sea .", "rain"), random.Random(0))
    assert len(refusal_rows(tokenizer, facts, REFUSALS, random.Random(0))) == len(true)


def test_a_refusal_the_tokenizer_cannot_write_is_refused():
    facts, tokenizer = tiny_facts(["Anna Lee"]), tiny_tokenizer()
    for bad in ("rain 7", "!", " "):
        with pytest.raises(ValueError, match="refusals="):
            refusal_rows(tokenizer, facts, (bad,), random.Random(0))
    with pytest.raises(ValueError, match="refusals is empty"):
        refusal_rows(tokenizer, facts, (), random.Random(0))
