"""Edits that are broken: refused when made, read or put in force, in one line, and the model is left as it was."""

import json
import os
import stat
import struct
from random import Random

import pytest
import torch

from mech_unlearn.core import Site
from mech_unlearn.edit.edit import Edit, LowRank, Shift
from mech_unlearn.edit.interventions import KINDS, Prefix
from mech_unlearn.model.load import load
from tests.damage import altered, assert_result_or_one_line, damaged
from tests.edit.test_edit import IDS, W_OUT, random_edit
from tests.edit.test_interventions import every_kind, put
from tests.tiny import tiny_hf, tiny_tokenizer

W_IN = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def model():
    return load(tiny_hf("llama"), tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The bytes of an edit that holds a delta of each form and an intervention of each kind."""
    path = tmp_path_factory.mktemp("edits") / "whole.safetensors"
    deltas = {W_OUT: torch.ones(4, 3), W_IN: LowRank(torch.ones(4, 2), torch.ones(2, 3))}
    assert {type(one) for one in every_kind()} == set(KINDS.values())
    Edit(name="all", base="b", deltas=deltas, interventions=tuple(every_kind()), recipe={"lr": 0.1}).save(path)
    assert len(Edit.load(path).interventions) == len(every_kind())
    return path.read_bytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_edit_with_a_number_that_is_none_is_refused_when_it_is_made_by_the_name_of_what_holds_it(value):
    bad, good = torch.tensor([[1.0, value]]), torch.ones(1, 1)
    for delta in (bad, LowRank(bad, torch.ones(2, 3)), LowRank(good, bad)):
        with pytest.raises(ValueError, match=rf"edit 'e': the delta of {W_OUT} holds NaN or infinite values; fit it"):
            Edit(name="e", base="b", deltas={W_IN: good, W_OUT: delta})
    with pytest.raises(ValueError, match="edit 'e': vectors of its shift holds NaN"):
        Edit(name="e", base="b", interventions=(Shift(Site(0, "resid_post"), ((7,),), bad),))


def test_a_file_with_a_number_that_is_none_is_refused_by_name(tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "e.safetensors"
    Edit(name="e", base="b", deltas={W_OUT: torch.ones(2, 2)}).save(path)
    header = json.loads(path.read_bytes()[8 : 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]])["__metadata__"]
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("inf")
    save_file(tensors, path, metadata=header)
    with pytest.raises(ValueError, match=rf"e\.safetensors' cannot be read: .*{W_OUT} holds NaN or infinite"):
        Edit.load(path)


def test_a_delta_that_the_dtype_of_the_weight_cannot_hold_is_refused_and_undone():
    half = load(tiny_hf("llama").half(), tokenizer=tiny_tokenizer())
    before = {name: weight.clone() for name, weight in half.held.items()}
    huge = Edit(name="huge", base=half.hash(), deltas={W_OUT: torch.full(half.held[W_OUT].shape, 1e6)})
    with pytest.raises(ValueError, match=rf"{W_OUT} with its delta, in torch.float16, holds"), huge.on(half):
        pass
    assert all(torch.equal(half.held[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("names", [(W_OUT, W_OUT), (W_OUT, W_IN), (W_OUT, W_OUT, W_OUT)])
def test_edits_left_in_the_wrong_order_are_refused_and_the_model_is_as_it_was(model, names):
    before, logits = model.hash(), model.logits(IDS)
    on = [random_edit(model, name, seed=seed).on(model) for seed, name in enumerate(names)]
    for one in on:
        one.__enter__()
    for one in on[:-1]:
        with pytest.raises(RuntimeError, match="left before an edit put on later; leave the last one first"):
            one.__exit__(None, None, None)
    on[-1].__exit__(None, None, None)
    assert model.hash() == before and torch.equal(model.logits(IDS), logits) and not model.in_force.saved


@pytest.mark.parametrize("first", range(len(every_kind())))
def test_interventions_left_in_the_wrong_order_are_refused_and_nothing_of_them_is_in_force(model, first):
    prefix = Prefix(subjects=((5, 6),), prefixes=((4,),), otherwise=(7, 8))
    logits, before = model.logits(IDS), model.in_force.forward_replaced
    on = [put(model, one).on(model) for one in (every_kind()[first], prefix, prefix)]
    for one in on:
        one.__enter__()
    model.logits(IDS)
    for one in on[:-1]:
        with pytest.raises(RuntimeError, match="leave the last one first"):
            one.__exit__(None, None, None)
    on[-1].__exit__(None, None, None)
    assert torch.equal(model.logits(IDS), logits) and model.in_force.nothing() and not before


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_what_an_edit_writes_is_as_open_as_the_umask_says(model, tmp_path, umask):
    before = os.umask(umask)
    try:
        random_edit(model).save(tmp_path / "e.safetensors")
        random_edit(model).export(model, tmp_path / "model")
    finally:
        os.umask(before)
    written = (tmp_path / "e.safetensors", *(tmp_path / "model").iterdir())
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o666 & ~umask}
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o777 & ~umask


def test_edits_left_in_order_are_not_refused(model):
    before = model.hash()
    with random_edit(model).on(model), random_edit(model, seed=1).on(model), random_edit(model, W_IN).on(model):
        assert model.hash() != before
    assert model.hash() == before


def test_a_file_damaged_anywhere_gives_an_edit_or_one_line_that_names_it(saved, tmp_path):
    random, path = Random(0), tmp_path / "edit.safetensors"
    for _ in range(300):
        path.write_bytes(damaged(saved, random))
        assert_result_or_one_line(lambda: Edit.load(path), path)


@pytest.mark.slow
def test_a_header_with_other_values_gives_an_edit_that_can_be_saved_or_one_line_that_names_it(saved, tmp_path):
    random, path = Random(1), tmp_path / "edit.safetensors"
    length = struct.unpack("<Q", saved[:8])[0]
    header = json.loads(saved[8 : 8 + length])
    told = header["__metadata__"]
    told |= {key: json.loads(told[key]) for key in ("interventions", "recipe")}
    refused = 0
    for _ in range(500):
        other = altered(told, random)
        other = other if isinstance(other, dict) else {}
        other = {key: x if isinstance(x, str) else json.dumps(x) for key, x in other.items()}
        written = json.dumps(header | {"__metadata__": other}).encode()
        path.write_bytes(struct.pack("<Q", len(written)) + written + saved[8 + length :])
        edit = assert_result_or_one_line(lambda: Edit.load(path), path)
        refused += edit is None
        if edit is not None:
            edit.save(tmp_path / "again.safetensors")
            assert repr(Edit.load(tmp_path / "again.safetensors")) == repr(edit)
    assert 100 < refused < 500
