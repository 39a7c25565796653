"""The tuned lens starts as the logit lens, comes closer to the output on held-out text, and stays tied to its model."""

from random import Random

import pytest
import torch

from mech_unlearn.core import Site
from mech_unlearn.edit.edit import Edit, Shift
from mech_unlearn.locate.lenses.logit_lens import logit_lens_per_fact
from mech_unlearn.locate.lenses.tuned_lens import TunedLens, train_tuned_lens, tuned_lens, tuned_lens_per_fact
from mech_unlearn.model.load import load
from mech_unlearn.model.readout import read_out
from mech_unlearn.testbed import open_world
from tests.damage import assert_result_or_one_line, damaged
from tests.tiny import ARCHITECTURES, tiny_facts, tiny_hf, tiny_tokenizer

FACTS = tiny_facts(["Anna Lee", "Ben Hill"])
TEXTS = tuple(f"{a} {b} in {c} ." for a in ("rain falls", "The rivers run") for b in ("on hills", "to the sea")
              for c in ("Paris", "Rome", "Oslo", "Bern"))  # fmt: skip


@pytest.fixture(scope="module")
def world():
    return open_world("biographies")


@pytest.fixture(scope="module")
def full(world):
    return load(world.full)


@pytest.fixture(scope="module")
def lens(full, world):
    return train_tuned_lens(full, world.retain.texts, steps=60, batch=256)


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_at_step_zero_it_is_the_logit_lens_and_a_few_steps_bring_it_closer(architecture):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    start = train_tuned_lens(model, TEXTS, steps=0)
    assert torch.equal(start.heldout.values[0], start.heldout.values[1])
    torch.testing.assert_close(
        tuned_lens_per_fact(model, FACTS, lens=start).values, logit_lens_per_fact(model, FACTS).values
    )
    trained = train_tuned_lens(model, TEXTS, steps=15, batch=64)
    assert (trained.heldout.values[1, :-1] < trained.heldout.values[0, :-1]).all()
    assert trained.heldout.values[:, -1].abs().max() < 1e-5
    assert all(weight.grad is None for weight in model.held.values())


def test_in_a_trained_world_held_out_kl_is_below_the_logit_lens_at_every_layer_but_the_last(lens, full):
    logit, tuned = lens.heldout.values
    assert (tuned[:-1] < 0.8 * logit[:-1]).all() and tuned[-1].abs() < 1e-5
    assert (lens.heldout.low <= lens.heldout.values).all() and (lens.heldout.values <= lens.heldout.high).all()
    assert lens.heldout.n > 300 and lens.weight.shape == (6, 128, 128)


def test_held_out_kl_is_that_of_a_slow_reference(full, world, lens):
    generator = torch.Generator().manual_seed(0)
    unique = list(dict.fromkeys(world.retain.texts))
    order = torch.randperm(len(unique), generator=generator).tolist()
    terms = []
    for i in order[: round(0.2 * len(unique))]:
        ids = full.tokenizer(unique[i], return_tensors="pt").input_ids
        kept: list[torch.Tensor] = []
        with torch.no_grad(), full.hooks((Site(2, "resid_post"), lambda x, kept=kept: kept.append(x[0]))):
            p = full.logits(ids)[0].log_softmax(-1)
        h = kept[0] + kept[0] @ lens.weight[2].T + lens.bias[2]
        q = read_out(full, h).log_softmax(-1)
        plain = [j for j, t in enumerate(ids[0].tolist()) if t not in full.tokenizer.all_special_ids]
        terms.append((p.exp() * (p - q)).sum(-1)[plain])
    assert lens.heldout.values[1, 2].item() == pytest.approx(torch.cat(terms).mean().item(), rel=1e-4)


def test_answers_of_known_facts_appear_and_the_last_layer_is_the_logit_lens(lens, full, world):
    facts = world.forget.facts[:12]
    found = tuned_lens(full, facts, lens=lens)
    plain = logit_lens_per_fact(full, facts).values
    assert found.axes == ("layer",) and found.n == 12 and "nats" in found.unit
    torch.testing.assert_close(found.values[-1], plain[:, -1].mean())
    assert found.values[-1] > -1.0 > found.values[0]
    assert (tuned_lens_per_fact(full, facts, lens=lens).values[:, :-1] - plain[:, :-1]).abs().max() > 0.5
    retrained = load(world.retrained[0])
    with pytest.raises(ValueError, match="trained on another model"):
        tuned_lens(retrained, facts, lens=lens)
    unknown = tuned_lens(retrained, facts, lens=lens, transfer=True)
    assert (unknown.values < found.values[-1] - 1.0).all()


def test_training_is_deterministic_by_seed_and_leaves_model_and_random_state_alone(tiny_model):
    before, state = tiny_model.hash(), torch.get_rng_state()
    one, two = (train_tuned_lens(tiny_model, TEXTS, steps=4, batch=16, seed=3) for _ in range(2))
    other = train_tuned_lens(tiny_model, TEXTS, steps=4, batch=16, seed=4)
    assert torch.equal(one.weight, two.weight) and not torch.equal(one.weight, other.weight)
    assert tiny_model.hash() == before == one.base and torch.equal(torch.get_rng_state(), state)
    apart = train_tuned_lens(tiny_model, TEXTS, steps=4, batch=16, seed=3, max_rows=16)
    torch.testing.assert_close(apart.weight, one.weight, atol=1e-5, rtol=1e-4)


def test_a_saved_lens_is_the_same_and_is_refused_for_other_weights(tiny_model, tmp_path):
    lens = train_tuned_lens(tiny_model, TEXTS, steps=3, batch=16)
    lens.save(tmp_path / "lens.safetensors")
    again = TunedLens.load(tmp_path / "lens.safetensors", tiny_model)
    assert torch.equal(again.weight, lens.weight) and torch.equal(again.bias, lens.bias) and again.base == lens.base
    torch.testing.assert_close(again.heldout.values, lens.heldout.values)
    with pytest.raises(ValueError, match="another model"):
        TunedLens.load(tmp_path / "lens.safetensors", load(tiny_hf("llama", seed=1), tokenizer=tiny_tokenizer()))
    Edit(name="e", base="x", deltas={"w": torch.ones(2)}).save(tmp_path / "edit.safetensors")
    with pytest.raises(ValueError, match="not a tuned lens"):
        TunedLens.load(tmp_path / "edit.safetensors")
    with pytest.raises(ValueError, match="cannot be read"):
        TunedLens.load(tmp_path / "none.safetensors")


def test_a_damaged_lens_is_read_or_refused_by_name_in_one_line(tiny_model, tmp_path):
    path, random = tmp_path / "lens.safetensors", Random(0)
    train_tuned_lens(tiny_model, TEXTS, steps=1).save(path)
    whole, refused = path.read_bytes(), 0
    for _ in range(200):
        path.write_bytes(damaged(whole, random))
        refused += assert_result_or_one_line(lambda: TunedLens.load(path), path) is None
    assert refused > 50


def test_bad_input_is_refused(tiny_model):
    for texts, settings, match in (
        (("one text .",) * 3, {}, "1 different texts"),
        (TEXTS, {"heldout": 1.0}, "heldout=1.0"),
        (TEXTS, {"steps": -1}, "steps=-1"),
    ):
        with pytest.raises(ValueError, match=match):
            train_tuned_lens(tiny_model, texts, **settings)
    for facts, settings, match in (([], {"texts": TEXTS}, "no facts"), (FACTS, {}, "give a trained lens, or texts")):
        with pytest.raises(ValueError, match=match):
            tuned_lens(tiny_model, facts, **settings)
    small = train_tuned_lens(load(tiny_hf("llama", layers=2), tokenizer=tiny_tokenizer()), TEXTS, steps=0)
    with pytest.raises(ValueError, match="layers, d_model"):
        tuned_lens(tiny_model, FACTS, lens=small, transfer=True)
    shift = Shift(Site(3, "resid_post"), ((5,),), torch.ones(1, 32))
    with (
        pytest.raises(ValueError, match="interventions"),
        Edit(name="shift", base=tiny_model.hash(), interventions=(shift,)).on(tiny_model),
    ):
        train_tuned_lens(tiny_model, TEXTS)
