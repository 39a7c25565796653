"""Interventions: each kind acts where it says and nowhere else, and comes back from a file as it was."""

import json

import pytest
import torch

from mech_unlearn.core import Site
from mech_unlearn.edit.attach import extended
from mech_unlearn.edit.edit import Edit, clone, compose
from mech_unlearn.edit.interventions import KINDS, Affine, Ban, Clamp, Prefix, Shift, kind_of
from mech_unlearn.model.capture import capture
from mech_unlearn.model.load import load
from mech_unlearn.model.scores import greedy
from mech_unlearn.model.sweep import record
from mech_unlearn.model.tokens import pad
from tests.tiny import tiny_hf, tiny_tokenizer

SITE = Site(1, "resid_post")
SUBJECT = (9, 10)
IDS = torch.tensor([[2, 5, 9, 10, 6, 7], [2, 5, 6, 7, 8, 11]])


@pytest.fixture(scope="module")
def model():
    return load(tiny_hf("llama"), tokenizer=tiny_tokenizer())


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def affine(where="last", **settings):
    subjects = () if where == "all" else (SUBJECT,)
    direction = torch.nn.functional.normalize(some(1, 32), dim=1)
    center = some(32, seed=1)
    return Affine(
        site=SITE, subjects=subjects, left=direction.T, right=direction, center=center, where=where, **settings
    )


def clamp(**settings):
    return Clamp(
        site=SITE, encoder=some(3, 32), bias=some(3, seed=1), threshold=torch.zeros(3), decoder=some(3, 32, seed=2),
        value=-torch.ones(3), **settings,
    )  # fmt: skip


def every_kind():
    return (
        Shift(SITE, (SUBJECT,), some(1, 32)),
        Shift(SITE, (SUBJECT,), some(1, 32), some(1, 32, seed=1), torch.eye(32)[:2]),
        affine("from"),
        affine("all", skip_first=True),
        clamp(),
        clamp(top=2, rest=some(5, 32, seed=4), rest_bias=some(5, seed=5)),
        Ban(subjects=(SUBJECT, (6,)), tokens=((4, 5), (7,)), penalty=50.0),
        Prefix(subjects=(SUBJECT,), prefixes=((4, 4, 8),), otherwise=(7,), bos=2),
    )


def put(model, *interventions):
    return Edit(name="x", base=model.hash(), interventions=interventions)


def test_every_kind_comes_back_from_a_file_and_does_the_same(model, tmp_path):
    assert {kind_of(i) for i in every_kind()} == set(KINDS)
    for i, one in enumerate(every_kind()):
        put(model, one).save(tmp_path / f"{i}.safetensors")
        (back,) = Edit.load(tmp_path / f"{i}.safetensors", model).interventions
        assert type(back) is type(one)
        assert back.settings == one.settings
        assert (back.site, back.subjects) == (one.site, one.subjects)
        assert back.tensors.keys() == one.tensors.keys()
        with put(model, one).on(model):
            wanted = model.logits(IDS)
        with put(model, back).on(model):
            assert torch.equal(model.logits(IDS), wanted)
        assert not torch.equal(model.logits(IDS), wanted)


def test_a_file_of_the_format_before_is_still_read(model, tmp_path):
    from safetensors.torch import save_file

    header = {"format": "mech_unlearn.edit/2", "name": "old", "base": model.hash(), "recipe": "{}"}
    header["interventions"] = json.dumps([{"layer": 1, "kind": "resid_post", "subjects": [list(SUBJECT)]}])
    save_file({"shift/0/vectors": some(1, 32)}, tmp_path / "old.safetensors", metadata=header)
    (back,) = Edit.load(tmp_path / "old.safetensors", model).interventions
    assert isinstance(back, Shift) and back.site == SITE and back.subjects == (SUBJECT,)
    assert torch.equal(back.vectors, some(1, 32)) and back.centers is None


def test_a_kind_that_is_not_known_is_refused(model, tmp_path):
    from safetensors.torch import save_file

    header = {"format": "mech_unlearn.edit/3", "name": "n", "base": model.hash(), "recipe": "{}"}
    header["interventions"] = json.dumps([{"type": "teleport"}])
    save_file({"intervention/0/x": torch.ones(1)}, tmp_path / "n.safetensors", metadata=header)
    with pytest.raises(ValueError, match="'teleport' are not known here; there are shift"):
        Edit.load(tmp_path / "n.safetensors", model)


@pytest.mark.parametrize(
    ("where", "changed"),
    [("last", [(0, 3)]), ("from", [(0, 3), (0, 4), (0, 5)]), ("all", [(r, p) for r in (0, 1) for p in range(1, 6)])],
)
def test_an_affine_map_acts_at_its_positions_and_only_there(where, changed):
    x = some(2, 6, 32, seed=3)
    one = affine(where, skip_first=True)
    moved = one(x, IDS)
    assert (moved != x).any(-1).nonzero().tolist() == [list(at) for at in changed]
    direction, center = one.right[0], one.center
    for row, pos in changed:  # the component along the direction is the center's, the rest stays
        torch.testing.assert_close(moved[row, pos] @ direction, center @ direction, atol=1e-5, rtol=1e-5)
        rest = x[row, pos] - (x[row, pos] @ direction) * direction
        torch.testing.assert_close(moved[row, pos] - (moved[row, pos] @ direction) * direction, rest, atol=1e-5, rtol=0)


def test_a_clamp_sets_active_latents_and_keeps_the_rest_of_the_state():
    one, x = clamp(), some(2, 6, 32, seed=3)
    moved = one(x, IDS)
    for row in range(2):
        for pos in range(6):
            wanted = x[row, pos].clone()
            for j in range(3):
                a = max((x[row, pos] @ one.encoder[j] + one.bias[j]).item(), 0.0)
                if a > 0 and pos > 0:
                    wanted += (-1 - a) * one.decoder[j]
            torch.testing.assert_close(moved[row, pos], wanted, atol=1e-4, rtol=1e-5)
    assert torch.equal(moved[:, 0], x[:, 0])
    assert not torch.equal(clamp(skip_first=False)(x, IDS)[:, 0], x[:, 0])


def test_ids_are_those_the_layers_see_so_a_shift_finds_its_subject_behind_a_prefix(model):
    shift, prefix = Shift(SITE, (SUBJECT,), 5 * some(1, 32)), Prefix(subjects=(SUBJECT,), prefixes=((4, 8),), bos=2)
    whole = torch.tensor([[2, 4, 8, 5, 9, 10, 6, 7]])
    with put(model, shift).on(model):
        wanted = model.logits(whole)[:, 2:]
    for edit in (put(model, shift, prefix), put(model, prefix, shift)):
        with edit.on(model):
            torch.testing.assert_close(model.logits(IDS[:1]), wanted)
    with put(model, shift).on(model), put(model, prefix).on(model):
        torch.testing.assert_close(model.logits(IDS[:1]), wanted)


@pytest.mark.parametrize("one", every_kind()[-2:], ids=("ban", "prefix"))
def test_one_that_no_forward_pass_reached_is_refused_and_the_model_is_as_before(model, one):
    clean = model.logits(IDS)
    with pytest.raises(RuntimeError, match="never fired"), put(model, one).on(model):
        pass
    assert not model.in_force.interventions and "forward" not in model.hf.__dict__
    assert torch.equal(model.logits(IDS), clean)
    with pytest.raises(ZeroDivisionError), put(model, one).on(model):
        _ = 1 / 0
    assert torch.equal(model.logits(IDS), clean)


def test_a_clone_carries_every_kind(model):
    with compose(*(put(model, one) for one in every_kind())).on(model):
        wanted = model.logits(IDS)
        with clone(model) as other:
            torch.testing.assert_close(other.logits(IDS), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ("left", "right"))
def test_a_prefix_stands_behind_bos_and_next_to_the_prompt_whatever_the_padding(side):
    ids, mask, _ = pad([(2, 5, 9, 10), (2, 9, 10, 6, 7)], 0, side)
    out = extended((4, 8), ids, mask, torch.arange(5).expand(2, -1), bos=2)
    short = [2, 4, 8, 5, 9, 10]
    assert out["input_ids"].tolist() == [[0, *short] if side == "left" else [*short, 0], [2, 4, 8, 9, 10, 6, 7]]
    assert out["attention_mask"].tolist() == [[0] + [1] * 6 if side == "left" else [1] * 6 + [0], [1] * 7]
    assert out["position_ids"].tolist() == [list(range(7))] * 2
    assert extended((4,), torch.tensor([[5, 6]]), bos=2)["input_ids"].tolist() == [[4, 5, 6]]
    assert extended((4,), torch.tensor([[2]]), bos=2)["input_ids"].tolist() == [[2, 4]]


def test_whoever_addresses_positions_is_refused_while_a_prefix_is_in_force_and_works_afterwards(model):
    prefix = put(model, Prefix(subjects=(SUBJECT,), prefixes=((4, 8),), bos=2))
    with pytest.raises(RuntimeError, match="never fired"), prefix.on(model):  # nothing ran: all was refused before
        with pytest.raises(ValueError, match="in-context edit is in force"):
            capture(model, [(2, 5, 6)], [SITE])
        with pytest.raises(ValueError, match="interventions is in force"):
            record(model, IDS)
    with prefix.on(model), pytest.raises(ValueError, match="other positions"), model.hooks((SITE, lambda x: None)):
        model.logits(IDS)
    with prefix.on(model), pytest.raises(ValueError, match="use_cache"):
        model.hf(input_ids=IDS, use_cache=True)
    capture(model, [(2, 5, 6)], [SITE])
    record(model, IDS)


@pytest.mark.parametrize("one", every_kind(), ids=lambda one: type(one).__name__)
@torch.no_grad()
def test_a_cache_is_refused_by_every_kind_and_a_single_pass_needs_no_argument(model, one):
    ids = IDS[:1, :4]
    cache = model.hf(input_ids=ids, use_cache=True).past_key_values
    with put(model, one).on(model):
        for cached in ({"use_cache": True}, {"past_key_values": cache}):
            with pytest.raises(ValueError, match=f"whole rows of token ids, without {next(iter(cached))}"):
                model.hf(input_ids=ids, **cached)
        with pytest.raises(ValueError, match="model.scores.greedy"):
            model.hf.generate(ids, max_new_tokens=4, do_sample=False)
        torch.testing.assert_close(model.hf(input_ids=ids).logits, model.logits(ids))
    assert model.hf(input_ids=ids, use_cache=True).past_key_values.get_seq_length() == 4


@pytest.mark.parametrize("one", every_kind()[:-2], ids=lambda one: type(one).__name__)
def test_without_a_cache_transformers_generates_what_greedy_says(model, one):
    ids = IDS[:1, :4]
    with put(model, one).on(model):
        said = model.hf.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)[0, 4:].tolist()
        assert said == list(greedy(model, [ids[0].tolist()], 4)[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ban(subjects=(SUBJECT,), tokens=((1,),), penalty=float("inf")), "penalty inf"),
        (lambda: Prefix(subjects=(SUBJECT,), prefixes=((),)), "none empty"),
        (lambda: clamp(top=2), "together"),
        (lambda: Affine(site=SITE, left=torch.ones(4, 1), right=torch.ones(1, 4), center=torch.ones(4)), "0 subjects"),
    ],
)
def test_what_does_not_fit_together_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
