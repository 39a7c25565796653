"""A planted familiarity direction is found; without one nothing separates held-out entities."""

import pytest
import torch

from mech_unlearn.core import Entity, Site
from mech_unlearn.locate.latents.known_unknown import known_unknown, separation
from mech_unlearn.model.latents import Sae
from mech_unlearn.model.load import load
from tests.tiny import tiny_facts, tiny_hf, tiny_tokenizer

FIRST = ("Anna", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo")
LAST = ("Lee", "Hill", "Moss", "Park", "Reed", "Stone", "Vale", "West")
TEMPLATES = ("{} was born in", "The employer of {} is")
SITE = Site(0, "resid_post")


def people(lasts, kind="person"):
    return tuple(Entity(name=f"{first} {last}", kind=kind) for first in FIRST for last in lasts)


KNOWN, UNKNOWN = people(LAST[:4]), people(LAST[4:])


@pytest.fixture(scope="module")
def model():
    """A model whose residual stream at the names has dimension 0 above zero for known ones and below for the others."""
    hf = tiny_hf("llama")
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        for block in hf.model.layers:
            block.self_attn.o_proj.weight[0] = 0
            block.mlp.down_proj.weight[0] = 0
        table = hf.model.embed_tokens.weight
        table[:, 0] = 0.0
        for words, sign in ((LAST[:4], 1.0), (LAST[4:], -1.0)):
            table[tokenizer.convert_tokens_to_ids(list(words)), 0] = sign
    return load(hf, tokenizer=tokenizer)


class _Axes:
    """Latents that are the positive and the negative part of each dimension; the last fires on everything."""

    class cfg:
        d_sae = 65

    def encode(self, x):
        return torch.cat([x.relu(), (-x).relu(), torch.ones_like(x[..., :1])], -1)


SAE = Sae(SITE, _Axes())


def test_the_planted_latents_are_found_and_separate_entities_that_were_not_used(model):
    found = separation(model, SAE, KNOWN, UNKNOWN, TEMPLATES)
    assert found.known.values[0] == 1.0 and found.unknown.values[32] == 1.0
    assert 0 in found.top_known(5) and 32 in found.top_unknown(5)
    assert found.known.values[64] == found.unknown.values[64] == 0.0
    torch.testing.assert_close(found.known.values, -found.unknown.values)
    assert found.auc.values[:2].tolist() == [1.0, 1.0] and found.auc.n == 32
    assert set(found.heldout[0]) < {e.name for e in KNOWN} and len(found.heldout[0]) == 16
    assert not set(found.heldout[0]) & set(found.heldout[1])


def test_entities_that_differ_in_nothing_but_their_label_are_not_separated(model):
    mixed = people(LAST)
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(len(mixed), generator=generator).tolist()
    known, unknown = [mixed[i] for i in order[:32]], [mixed[i] for i in order[32:]]
    found = separation(model, SAE, known, unknown, TEMPLATES)
    assert (found.auc.low < 0.5).all() and (found.auc.values < 0.8).all()


def test_scores_are_the_smallest_over_entity_types(model):
    # Cities are labelled the other way round: what fires on known people fires on unknown cities.
    cities = (people(LAST[4:], "city"), people(LAST[:4], "city"))
    found = separation(model, SAE, (*KNOWN, *cities[0]), (*UNKNOWN, *cities[1]), TEMPLATES)
    assert found.known.values[0] == -1.0 and found.unknown.values[0] == -1.0
    with pytest.raises(ValueError, match="0 unknown entities of kind 'city'"):
        separation(model, SAE, (*KNOWN, *cities[0]), UNKNOWN, TEMPLATES)
    with pytest.raises(ValueError, match="1 known entities of kind 'person'"):
        separation(model, SAE, KNOWN[:1], UNKNOWN, TEMPLATES)


def test_latents_that_fire_on_any_text_are_left_out_when_there_is_enough_text(model):
    texts = ("Rivers run to the sea and rain falls on hills .",) * 120
    found = separation(model, SAE, KNOWN, UNKNOWN, TEMPLATES, texts=texts)
    assert found.background is not None and found.background[64] == 1.0 and found.known.values[64].isnan()
    assert 64 not in found.top_known(65) and found.known.values[0] == 1.0
    named = tuple(f"Rivers run to {e.name} and the sea and rain falls on hills ." for e in KNOWN) * 4
    among = separation(model, SAE, KNOWN, UNKNOWN, TEMPLATES, texts=named)
    assert among.background[0] == 0.0 and among.background[64] == 1.0 and 0 in among.top_known(65)
    few = separation(model, SAE, KNOWN, UNKNOWN, TEMPLATES, texts=texts[:2])
    assert few.background is None and "filter off" in few.known.note and not few.known.values.isnan().any()
    with pytest.raises(ValueError, match="every latent fires"):
        separation(model, SAE, KNOWN, UNKNOWN, TEMPLATES, texts=texts, max_background=0.0)


def test_the_locator_gives_one_row_per_layer_with_intervals(model):
    facts = tiny_facts([e.name for e in KNOWN[:12]])
    saes = [Sae(Site(layer, "resid_post"), _Axes()) for layer in (2, 0)]
    result = known_unknown(model, facts, UNKNOWN[:12], saes)
    assert result.axes == ("layer", "measure") and result.labels["layer"] == (0, 2) and result.n == 24
    assert result.values[:, 0].tolist() == [1.0, 1.0] and (result.low <= result.high).all()
    assert "held-out entities" in result.note
    for bad, reason in (([], "no SAE"), ([saes[0], saes[0]], "several SAEs for one layer")):
        with pytest.raises(ValueError, match=reason):
            known_unknown(model, facts, UNKNOWN[:12], bad)
    state = torch.get_rng_state()
    again = known_unknown(model, facts, UNKNOWN[:12], saes)
    assert torch.equal(again.values, result.values) and torch.equal(torch.get_rng_state(), state)
