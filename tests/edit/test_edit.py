"""Edit itself: deltas and interventions act where they say and nowhere else, and every mistake is refused."""

import pytest
import torch

from mech_unlearn.core import Site
from mech_unlearn.edit.edit import Edit, LowRank, Shift, clone, compose
from mech_unlearn.model.load import load
from mech_unlearn.model.tokens import encode
from tests.tiny import tiny_hf, tiny_tokenizer


@pytest.fixture(scope="module")
def model():
    return load(tiny_hf("llama"), tokenizer=tiny_tokenizer())


def ids_of(model, text):
    return torch.tensor([encode(model.tokenizer, text).ids])


IDS = torch.tensor([[2, 5, 6, 7, 8]])
W_OUT = "model.layers.1.mlp.down_proj.weight"


def random_edit(model, name=W_OUT, seed=0, scale=0.1):
    shape = model.held[name].shape
    delta = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return Edit(name="random", base=model.hash(), deltas={name: delta})


def shift_edit(model, subject, vector, layer=1):
    ids = encode(model.tokenizer, subject).ids[1:]
    return Edit(
        name="shift",
        base=model.hash(),
        interventions=(Shift(Site(layer, "resid_post"), (tuple(ids),), vector[None]),),
    )


def states(model, ids, layer=1):
    seen = []
    with model.hooks((Site(layer, "resid_post"), lambda x: seen.append(x.clone()))):
        model.logits(ids)
    return seen[0]


def test_a_low_rank_delta_equals_its_dense_form(model):
    generator = torch.Generator().manual_seed(0)
    factors = LowRank(torch.randn(32, 3, generator=generator), torch.randn(3, 64, generator=generator))
    low = Edit(name="low", base=model.hash(), deltas={W_OUT: factors})
    dense = Edit(name="dense", base=model.hash(), deltas={W_OUT: factors.dense()})
    assert torch.linalg.matrix_rank(factors.dense()) == 3
    with low.on(model):
        a = model.logits(IDS)
    with dense.on(model):
        assert torch.equal(model.logits(IDS), a)


def test_restoring_is_bit_exact_where_subtracting_the_delta_would_not_be(model):
    edit = random_edit(model, scale=10.0)
    before = model.held[W_OUT].detach().clone()
    assert not torch.equal((before + edit.deltas[W_OUT]) - edit.deltas[W_OUT], before)
    with edit.on(model):
        assert not torch.equal(model.held[W_OUT], before)
    assert torch.equal(model.held[W_OUT], before)


def test_a_shift_acts_at_the_last_token_of_every_occurrence_and_only_there(model):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    ids = ids_of(model, "Anna Lee was born in Lee and Anna Lee works")
    ends = [i for i in range(1, ids.shape[1]) if ids[0, i - 1 : i + 1].tolist() == encode_pair(model)]
    assert len(ends) == 2
    clean = states(model, ids)
    with shift_edit(model, "Anna Lee", vector).on(model):
        moved = states(model, ids)
    difference = (moved - clean)[0]
    torch.testing.assert_close(difference[ends], vector.expand(2, -1))
    others = [i for i in range(ids.shape[1]) if i not in ends]
    assert not difference[others].any()


def encode_pair(model):
    return list(encode(model.tokenizer, "Anna Lee").ids[1:])


def test_a_shift_leaves_a_prompt_without_the_subject_bit_identical(model):
    ids = ids_of(model, "Ben Hill was born in")
    clean = model.logits(ids)
    with shift_edit(model, "Anna Lee", torch.ones(32)).on(model):
        assert torch.equal(model.logits(ids), clean)


def test_a_shift_finds_its_subject_in_a_padded_batch(model):
    vector = torch.ones(32)
    alone = ids_of(model, "Anna Lee")
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), alone, torch.zeros(1, 3, dtype=torch.long)], 1)
    with shift_edit(model, "Anna Lee", vector).on(model):
        moved = states(model, padded)
    difference = (moved - states(model, padded))[0]
    assert difference.any(-1).nonzero().flatten().tolist() == [2 + alone.shape[1] - 1]


def test_a_shift_of_a_subject_longer_than_the_prompt_does_nothing(model):
    with shift_edit(model, "Anna Lee", torch.ones(32)).on(model):
        edited = model.logits(IDS[:, :1])
    assert torch.equal(edited, model.logits(IDS[:, :1]))


def test_composing_adds_deltas_and_keeps_interventions(model):
    one, two = random_edit(model, seed=0), random_edit(model, seed=1)
    other = random_edit(model, "model.layers.2.mlp.down_proj.weight", seed=2)
    shift = shift_edit(model, "Anna Lee", torch.ones(32))
    both = compose(one, two, other, shift)
    torch.testing.assert_close(both.deltas[W_OUT], one.deltas[W_OUT] + two.deltas[W_OUT])
    assert both.deltas.keys() == {*one.deltas, *other.deltas}
    assert both.interventions == shift.interventions
    ids = ids_of(model, "Anna Lee was")
    with both.on(model):
        together = model.logits(ids)
    with one.on(model), two.on(model), other.on(model), shift.on(model):
        torch.testing.assert_close(model.logits(ids), together, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="one base model"):
        compose(one, Edit(name="other", base="else"))


def test_unknown_names_and_wrong_shapes_are_refused_before_anything_is_written(model):
    digest = model.hash()
    delta = torch.ones(model.held[W_OUT].shape)
    typo = Edit(name="typo", base=digest, deltas={W_OUT: delta, "model.layers.1.mlp.down_prj.weight": delta})
    with pytest.raises(KeyError, match="down_proj"), typo.on(model):
        pass
    transposed = Edit(name="transposed", base=digest, deltas={W_OUT: delta.T})
    with pytest.raises(ValueError, match=r"\(32, 64\).*\(64, 32\)"), transposed.on(model):
        pass
    with pytest.raises(KeyError, match="layers 0..3"), shift_edit(model, "Anna Lee", torch.ones(32), layer=9).on(model):
        pass
    assert model.hash() == digest


def test_a_hook_that_never_fired_is_refused(model):
    with (
        pytest.raises(RuntimeError, match="never fired.*blocks.1.hook_out"),
        shift_edit(model, "Anna Lee", torch.ones(32)).on(model),
    ):
        pass
    assert not model.in_force.interventions


def test_a_write_that_lands_in_a_copy_is_refused_and_undone():
    model = load(tiny_hf("llama"), tokenizer=tiny_tokenizer())
    edit = random_edit(model)
    module = model.hf.get_submodule("model.layers.1.mlp.down_proj")
    module = getattr(module, "original_component", module)
    module.weight = torch.nn.Parameter(module.weight.detach().clone())
    held = model.held[W_OUT].detach().clone()
    with pytest.raises(RuntimeError, match="copy, not the live weight"), edit.on(model):
        pass
    assert torch.equal(model.held[W_OUT], held)


def test_a_folded_model_is_refused():
    model = load(tiny_hf("llama"), tokenizer=tiny_tokenizer())
    edit = random_edit(model)
    object.__setattr__(model.bridge, "_weights_processed", True)
    with pytest.raises(RuntimeError, match="folded"), edit.on(model):
        pass


@pytest.mark.parametrize("part", ("weight", "bias"))
def test_a_delta_of_a_joint_qkv_matrix_really_acts_and_is_undone(part):
    model = load(tiny_hf("gpt_neox"), tokenizer=tiny_tokenizer())
    name = f"gpt_neox.layers.1.attention.query_key_value.{part}"
    plain = model.plain_copy()
    clean = model.logits(IDS)
    edit = random_edit(model, name, scale=0.5)
    with torch.no_grad():
        dict(plain.named_parameters())[name].add_(edit.deltas[name])
    with edit.on(model):
        edited = model.logits(IDS)
    assert (edited - clean).abs().max() > 1e-2
    torch.testing.assert_close(edited, plain(IDS).logits, atol=1e-5, rtol=1e-4)
    assert torch.equal(model.logits(IDS), clean)


def test_a_bfloat16_model_takes_float32_deltas_and_restores_bit_exactly():
    model = load(tiny_hf("llama").to(torch.bfloat16), tokenizer=tiny_tokenizer())
    digest, before = model.hash(), model.held[W_OUT].detach().clone()
    edit = random_edit(model)
    with edit.on(model):
        assert torch.equal(model.held[W_OUT], (before.float() + edit.deltas[W_OUT]).bfloat16())
    assert model.hash() == digest


def test_a_clone_carries_the_edit_in_force_and_can_be_trained_without_harm(model):
    digest = model.hash()
    edit = compose(random_edit(model), shift_edit(model, "Anna Lee", torch.ones(32)))
    ids = ids_of(model, "Anna Lee was")
    with edit.on(model):
        edited = model.logits(ids)
        with clone(model) as other:
            torch.testing.assert_close(other.logits(ids), edited)
            with torch.no_grad():
                other.held[W_OUT].zero_()
            assert not torch.equal(other.logits(ids), edited)
        assert torch.equal(model.logits(ids), edited)
    assert model.hash() == digest


def test_export_refuses_a_folder_with_something_in_it_and_touches_nothing(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        random_edit(model).export(model, tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_a_failed_export_leaves_no_half_written_files(model, tmp_path, monkeypatch):
    edit = random_edit(model)

    def broken(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(model.tokenizer, "save_pretrained", broken, raising=False)
    with pytest.raises(OSError, match="disk full"):
        edit.export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert model.hash() == edit.base


def test_an_exported_folder_holds_the_edited_weights_and_a_card(model, tmp_path):
    edit = random_edit(model)
    edit.export(model, tmp_path / "out", {"verdict": "suppressed"})
    with edit.on(model):
        digest = model.hash()
    assert load(tmp_path / "out").hash() == digest
    card = (tmp_path / "out" / "README.md").read_text()
    assert edit.base in card and '"verdict": "suppressed"' in card
    assert "Verdict: suppressed. What a verdict is worth: calibrated: " in card and "biographies world only" in card
    edit.export(model, tmp_path / "bare")
    assert "Verdict" not in (tmp_path / "bare" / "README.md").read_text()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_an_export_whose_file_differs_in_one_bit_is_refused_and_removed(dtype, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    model = load(tiny_hf("llama").to(dtype), tokenizer=tiny_tokenizer())
    edit, write = random_edit(model), type(model.tokenizer).save_pretrained

    def altering(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors[W_OUT].view(torch.uint8).flatten()[0] ^= 1  # the lowest bit of the first entry
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return write(model.tokenizer, folder)

    monkeypatch.setattr(model.tokenizer, "save_pretrained", altering, raising=False)
    with pytest.raises(RuntimeError, match=rf"other weights: {W_OUT}"):
        edit.export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    edit.export(model, tmp_path / "out")


def test_loading_refuses_what_is_not_an_edit(model, tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "text").write_text("not safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="cannot be read"):
        Edit.load(tmp_path / "text")
    with pytest.raises(ValueError, match="not an edit"):
        Edit.load(tmp_path / "other")
    with pytest.raises(ValueError, match="cannot be read"):
        Edit.load(tmp_path / "absent")


def test_a_shift_that_narrows_keeps_deviations_along_its_directions_and_survives_a_file(tiny_model, tmp_path):
    state, center = torch.tensor([3.0, 4.0, 5.0]), torch.tensor([1.0, 1.0, 1.0])
    kept = torch.tensor([[1.0, 0.0, 0.0]])
    shift = Shift(Site(0, "resid_post"), ((7,),), torch.tensor([[0.0, 0.0, 10.0]]), center[None], kept)
    moved = shift(state.expand(1, 2, 3), torch.tensor([[7, 8]]))
    assert moved[0].tolist() == [[3.0, 1.0, 11.0], [3.0, 4.0, 5.0]]
    wide = Shift(Site(0, "resid_post"), ((7,),), torch.ones(1, 32), torch.ones(1, 32), torch.eye(32)[:2])
    Edit(name="narrow", base=tiny_model.hash(), interventions=(wide,)).save(tmp_path / "e.safetensors")
    (back,) = Edit.load(tmp_path / "e.safetensors", tiny_model).interventions
    assert back.subjects == wide.subjects
    assert all(torch.equal(back.tensors[key], wide.tensors[key]) for key in ("vectors", "centers", "kept"))
    with pytest.raises(ValueError, match="centers and kept directions together"):
        Shift(Site(0, "resid_post"), ((7,),), torch.ones(1, 3), torch.ones(1, 3))
