"""SAEs explain what they were trained on, fit only where they belong, and come back from disk as they were."""

import json
from random import Random

import pytest
import torch

from mech_unlearn.core import Entity, Site
from mech_unlearn.model.capture import ordinary_positions
from mech_unlearn.model.latents import (
    Sae,
    entity_states,
    fvu,
    largest,
    load_sae,
    sae_still_valid,
    save_sae,
)
from mech_unlearn.model.load import load
from mech_unlearn.model.pieces import token_rows
from mech_unlearn.model.sae_training import train_sae
from mech_unlearn.model.tokens import encode
from tests.damage import altered, assert_result_or_one_line, damaged
from tests.tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer

SITE = Site(2, "resid_post")
TEXTS = (
    "Rivers run to the sea .",
    "rain falls on hills and the sea .",
    "The sea is in Oslo .",
    "Anna Lee was born in Rome .",
    "The employer of Ben Hill is Acme .",
    "Cara Moss works for Globex .",
)


@pytest.fixture(scope="module")
def model():
    return load(tiny_hf("llama"), tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def rows(model):
    return [encode(model.tokenizer, text).ids for text in TEXTS]


@pytest.fixture(scope="module")
def sae(model):
    return train_sae(model, TEXTS, SITE, d_sae=96, k=6, training_tokens=25_000, batch_size=256)


def test_training_explains_the_states_with_k_latents_and_an_untrained_sae_does_not(model, sae, rows):
    short = train_sae(model, TEXTS, SITE, d_sae=96, k=6, training_tokens=256, batch_size=256)
    assert fvu(model, sae, rows) < 0.2 < fvu(model, short, rows)
    states = torch.randn(3, 5, 32)
    acts = sae.encode(states)
    assert acts.shape == (3, 5, 96) and (acts >= 0).all() and (acts > 0).sum(-1).max() <= 6
    assert (sae.d_sae, sae.mean_l0, sae.w_dec.shape) == (96, 6.0, (96, 32))
    assert not any(weight.requires_grad for weight in sae.sae.parameters())
    torch.testing.assert_close(sae.decode(acts), acts @ sae.w_dec + sae.sae.b_dec, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_training_is_a_function_of_the_seed_and_leaves_the_model_and_the_random_state_alone(
    model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    state, weights = torch.get_rng_state(), model.hash()
    settings = dict(d_sae=32, k=4, training_tokens=2_000, batch_size=128)
    first, second = (train_sae(model, TEXTS, SITE, **settings).w_dec for _ in range(2))
    other = train_sae(model, TEXTS, SITE, **settings, seed=1).w_dec
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state) and model.hash() == weights
    assert not list(tmp_path.iterdir())
    # Texts that do not fit the buffer are captured pool by pool.
    small = train_sae(model, TEXTS, SITE, **settings, buffer_tokens=16, context=4).w_dec
    assert small.isfinite().all() and not torch.equal(small, first)


@pytest.fixture(scope="module")
def bare():
    """The same model with a tokenizer that puts nothing in front, as those of GPT-2, Pythia and Qwen."""
    return load(tiny_hf("llama"), tokenizer=tiny_tokenizer(bos=False))


@pytest.mark.parametrize("which", ["model", "bare"])
def test_fvu_has_its_closed_form_over_ordinary_tokens_and_never_judges_by_the_first(which, request, sae):
    model = request.getfixturevalue(which)
    rows = token_rows(model, TEXTS)
    assert (rows[0][0] == model.tokenizer.bos_token_id) == (which == "model")
    with torch.no_grad():
        parts = []
        with model.hooks((SITE, lambda x: parts.append(x[0, 1:]))):
            for row in rows:
                model.logits(torch.tensor([row]))
        h = torch.cat(parts).double()
        error = (h - sae.reconstruct(h.float()).double()).square().sum()
        expected = error / (h - h.mean(0)).square().sum()
    assert fvu(model, sae, rows) == pytest.approx(expected.item(), rel=1e-4)
    perfect = Sae(SITE, _Identity())
    assert fvu(model, perfect, rows) == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="states that vary"):
        fvu(model, sae, [(2,)])


def test_ordinary_positions_are_those_of_words_behind_the_first_token(model, bare):
    assert ordinary_positions(model, [(2, 9, 3, 8), (9, 8), (2,)]) == [(1, 3), (1,), ()]
    assert ordinary_positions(bare, [(9, 8, 7)]) == [(1, 2)]


class _Identity:
    """An SAE-like object that explains everything."""

    def encode(self, x):
        return x

    def decode(self, acts):
        return acts


def test_an_sae_of_a_centered_model_sees_centered_states_and_puts_the_mean_back():
    x = torch.randn(4, 32) + 3
    centered = Sae(SITE, _Identity(), centered=True)
    assert centered.encode(x).mean(-1).abs().max() < 1e-6
    torch.testing.assert_close(centered.reconstruct(x), x)


def test_an_sae_holds_on_its_own_model_and_is_flagged_on_another(model, sae, rows):
    assert sae_still_valid(model, model, sae, rows).valid
    other = load(tiny_hf("llama", seed=1), tokenizer=tiny_tokenizer())
    found = sae_still_valid(model, other, sae, rows)
    assert not found.valid and found.fvu_other > 1.5 * found.fvu_full == pytest.approx(1.5 * fvu(model, sae, rows))


def test_an_sae_comes_back_from_disk_and_sae_lens_can_read_it(model, sae, tmp_path):
    from sae_lens import SAE

    save_sae(sae, tmp_path / "sae")
    again = load_sae(tmp_path / "sae", model)
    x = torch.randn(5, 32)
    assert again.site == SITE and torch.equal(again.encode(x), sae.encode(x)) and torch.equal(again.w_dec, sae.w_dec)
    assert torch.equal(SAE.load_from_disk(tmp_path / "sae").encode(x), sae.encode(x))
    assert load_sae(tmp_path / "sae", model, SITE).site == SITE
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text())["metadata"]["model_hash"] == model.hash()


def test_an_sae_that_does_not_belong_is_refused_with_the_reason(model, sae, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "sae"
    save_sae(sae, folder)
    with pytest.raises(ValueError, match="was trained at L2 resid_post, not at L1 resid_post"):
        load_sae(folder, model, Site(1, "resid_post"))
    with pytest.raises(ValueError, match="2 layers"):
        load_sae(folder, load(tiny_hf("llama", layers=2), tokenizer=tiny_tokenizer()), Site(2, "resid_post"))
    with pytest.raises(ValueError, match="2 layers"):
        load_sae(folder, load(tiny_hf("llama", layers=2), tokenizer=tiny_tokenizer()))
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | {"metadata": {}}))
    with pytest.raises(ValueError, match="pass site="):
        load_sae(folder, model)
    assert load_sae(folder, model, Site(1, "mlp_out")).site == Site(1, "mlp_out")
    with pytest.raises(ValueError, match="reads 32 dimensions, L1 mlp_post of .* has 64"):
        load_sae(folder, model, Site(1, "mlp_post"))
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["W_enc"][0, 0] = float("inf")
    save_file(tensors, folder / "sae_weights.safetensors")
    with pytest.raises(ValueError, match="weight 'W_enc' holds NaN or infinite"):
        load_sae(folder, model, SITE)
    (folder / "cfg.json").unlink()
    with pytest.raises(ValueError, match="holds no cfg.json"):
        load_sae(folder, model)
    for absent in (tmp_path / "absent", "absent", "./a/b/c"):
        with pytest.raises(ValueError, match="no such folder"):
            load_sae(absent, model)


def test_a_damaged_folder_gives_an_sae_that_encodes_or_one_line_that_names_it(model, sae, tmp_path):
    random, folder, x = Random(0), tmp_path / "sae", torch.ones(1, 32)
    save_sae(sae, folder)
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    config, weights = folder / "cfg.json", folder / "sae_weights.safetensors"
    for number in range(300):
        for path, data in whole.items():
            path.write_bytes(data)
        if number % 3:
            config.write_text(json.dumps(altered(json.loads(whole[config]), random)))
        else:
            broken = random.choice((config, weights))
            broken.write_bytes(damaged(whole[broken], random))
        made = assert_result_or_one_line(lambda: load_sae(folder, model), folder)
        if made is not None:
            assert made.encode(x).shape == (1, made.d_sae) and made.reconstruct(x).shape == x.shape
            assert made.mean_l0 is None or made.mean_l0 >= 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_sae_is_trained_saved_and_found_again_on_every_architecture(architecture, tmp_path):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    for site in (Site(1, "resid_post"), Site(1, "mlp_out")):
        made = train_sae(model, TEXTS, site, d_sae=8, k=2, training_tokens=64, batch_size=64)
        save_sae(made, tmp_path / site.kind)
        assert made.site == load_sae(tmp_path / site.kind, model).site == site
    config = tmp_path / "mlp_out" / "cfg.json"
    config.write_text(config.read_text().replace("hook_mlp_out", "hook_resid_mid"))
    if architecture == "gpt_neox":  # attention and MLP side by side: nothing lies between them
        with pytest.raises(ValueError, match="which is no site of"):
            load_sae(tmp_path / "mlp_out", model)
    else:
        assert load_sae(tmp_path / "mlp_out", model).site == Site(1, "resid_mid")


def test_bad_training_settings_are_refused(model):
    with pytest.raises(ValueError, match="nothing to be trained on"):
        train_sae(model, [], SITE, d_sae=8, k=2)
    with pytest.raises(ValueError, match="choose 1 <= k <= d_sae"):
        train_sae(model, TEXTS, SITE, d_sae=8, k=9)
    with pytest.raises(ValueError, match="less than one batch"):
        train_sae(model, TEXTS, SITE, d_sae=8, k=2, training_tokens=10)
    with pytest.raises(KeyError, match="no hook"):
        train_sae(model, TEXTS, Site(7, "resid_post"), d_sae=8, k=2)


def test_entity_states_are_those_at_the_last_token_of_the_name_and_equal_contexts_count_once(model):
    people = [Entity(name="Anna Lee"), Entity(name="Hugo"), Entity(name="Annabel Stone")]
    templates = ["{} was born in", "The employer of {} is", "{} works for"]
    states = entity_states(model, people, templates, SITE)
    assert states.shape == (3, 2, 32)
    for i, person in enumerate(people):
        for j, context in enumerate(["", "The employer of "]):
            seen = []
            with torch.no_grad(), model.hooks((SITE, lambda x, s=seen: s.append(x[0, -1]))):
                model.logits(torch.tensor([encode(model.tokenizer, context + person.name).ids]))
            torch.testing.assert_close(states[i, j], seen[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="exactly one {}"):
        entity_states(model, people, ["born in"], SITE)
    with pytest.raises(ValueError, match="0 entities"):
        entity_states(model, [], templates, SITE)


@pytest.mark.parametrize(("width", "k"), [(1024, 5), (1024, 16), (1000, 5), (64, 3)])
def test_the_largest_values_are_found_block_by_block_as_by_a_search_of_the_whole_row(width, k):
    values = torch.randn(50, width, generator=torch.Generator().manual_seed(0))
    values[0, width // 2 : width // 2 + 32] = torch.arange(32.0) + 10  # all of them in one block
    found, at = largest(values, k)
    expected = values.topk(k, -1)
    assert torch.equal(found.sort(-1, descending=True).values, expected.values)
    assert torch.equal(at.sort(-1).values, expected.indices.sort(-1).values)
    assert torch.equal(values.gather(1, at), found)
