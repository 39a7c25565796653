"""Captured states are those of the model, wherever they are kept, however they are batched and resumed."""

import json

import pytest
import torch

from mech_unlearn.core import Site
from mech_unlearn.edit.edit import Edit, Shift
from mech_unlearn.model.capture import capture, stream
from mech_unlearn.model.load import load
from tests.tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer

ROWS = [(2, 9, 10, 11, 12), (2, 13, 14), (2, 15, 16, 17, 18), (2, 19), (2, 20, 21, 22)]
SITES = (Site(0, "resid_post"), Site(2, "resid_post"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_captured_residual_states_are_the_hidden_states_of_plain_transformers(architecture, tiny_folder):
    from transformers import AutoModelForCausalLM

    model = load(tiny_folder(architecture))
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder(architecture), attn_implementation="eager").eval()
    store = capture(model, ROWS, SITES)
    with torch.no_grad():
        hidden = [plain(torch.tensor([row]), output_hidden_states=True).hidden_states for row in ROWS]
    for site in SITES:
        expected = torch.cat([h[site.layer + 1][0] for h in hidden])
        torch.testing.assert_close(store[site], expected, atol=1e-5, rtol=1e-5)
    assert store.index.tolist() == [[i, p] for i, row in enumerate(ROWS) for p in range(len(row))]


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2", "qwen3", "olmo2"])
def test_sites_add_up_along_the_residual_stream(architecture):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    at = {kind: Site(1, kind) for kind in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")}
    store = capture(model, ROWS, list(at.values()))
    x = {kind: store[site] for kind, site in at.items()}
    torch.testing.assert_close(x["resid_pre"] + x["attn_out"], x["resid_mid"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x["resid_mid"] + x["mlp_out"], x["resid_post"], atol=1e-5, rtol=1e-5)


def test_in_a_parallel_block_attention_and_mlp_add_up_together():
    model = load(tiny_hf("gpt_neox"), tokenizer=tiny_tokenizer())
    kinds = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    pre, attn, mlp, post = (capture(model, ROWS, [Site(1, kind)])[Site(1, kind)] for kind in kinds)
    torch.testing.assert_close(pre + attn + mlp, post, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mlp_post_is_what_the_output_matrix_reads(architecture):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    name, transposed = model.w_out(1)
    seen = []
    paths = {path: key for key, path in model.hf_paths.items()}
    modules = {id(getattr(m, "original_component", m)): m for m in model.hf.modules()}
    module = modules[paths[name.removesuffix(".weight")]]
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    store = capture(model, ROWS[:1], [Site(1, "mlp_post"), Site(1, "resid_post")])
    handle.remove()
    torch.testing.assert_close(store[Site(1, "mlp_post")], seen[0][0])
    assert transposed == (architecture == "gpt2")


def test_last_explicit_and_all_positions_agree(tiny_model):
    everything = capture(tiny_model, ROWS, SITES)
    last = capture(tiny_model, ROWS, SITES, "last")
    one = capture(tiny_model, ROWS, SITES, [1] * len(ROWS))
    several = capture(tiny_model, ROWS, SITES, [[0, 1], [], [4], [1, 0], [2]])
    rows = {tuple(at): x for at, x in zip(everything.index.tolist(), everything[SITES[1]], strict=True)}
    for store in (last, one, several):
        for at, x in zip(store.index.tolist(), store[SITES[1]], strict=True):
            torch.testing.assert_close(x, rows[tuple(at)], atol=1e-6, rtol=1e-5)
    assert last.index.tolist() == [[i, len(row) - 1] for i, row in enumerate(ROWS)]
    assert several.index.tolist() == [[0, 0], [0, 1], [2, 4], [3, 1], [3, 0], [4, 2]]


def test_batching_changes_nothing_and_a_batch_holds_only_what_was_asked_for(tiny_model):
    whole, small = (capture(tiny_model, ROWS, SITES, max_tokens=n) for n in (8192, 1))
    torch.testing.assert_close(whole[SITES[0]], small[SITES[0]], atol=1e-6, rtol=1e-5)
    parts = list(stream(tiny_model, ROWS, SITES, "last", max_tokens=1))
    assert [len(part.index) for part in parts] == [1] * len(ROWS)
    assert all(x.untyped_storage().nbytes() == x.numel() * 4 for part in parts for x in part.at.values())


def test_layers_above_the_last_site_never_run_and_later_passes_are_whole_again(tiny_model):
    ran = []
    blocks = tiny_model.bridge.blocks
    handles = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(blocks)]
    before = tiny_model.logits(torch.tensor([ROWS[0]]))
    assert ran == [0, 1, 2, 3]
    ran.clear()
    capture(tiny_model, ROWS[:1], [Site(1, "resid_pre"), "blocks.1.hook_attn_out"])
    assert ran == [0]
    for handle in handles:
        handle.remove()
    assert torch.equal(before, tiny_model.logits(torch.tensor([ROWS[0]])))


def test_under_an_activation_edit_the_edited_states_are_captured_and_every_hook_still_fires(tiny_model):
    plain = capture(tiny_model, ROWS, SITES)[SITES[1]]
    shift = Shift(Site(3, "resid_post"), ((9, 10),), torch.ones(1, 32))
    early = Shift(Site(1, "resid_post"), ((9, 10),), torch.ones(1, 32))
    with Edit(name="x", base=tiny_model.hash(), interventions=(shift, early)).on(tiny_model):
        edited = capture(tiny_model, ROWS, SITES)[SITES[1]]
    assert (edited[2:5] - plain[2:5]).abs().max() > 0.01
    torch.testing.assert_close(edited[5:], plain[5:])


def test_a_folder_gives_the_same_states_shard_by_shard(tiny_model, tmp_path):
    held = capture(tiny_model, ROWS, SITES)
    store = capture(tiny_model, ROWS, SITES, folder=tmp_path / "a", shard_states=6)
    assert torch.equal(store.index, held.index)
    for site in SITES:
        torch.testing.assert_close(store[site], held[site], atol=1e-5, rtol=1e-4)  # other batches
    sizes = [len(part.index) for part in store.shards()]
    assert sizes == [8, 7, 4]
    torch.testing.assert_close(torch.cat([part.at[SITES[0]] for part in store.shards()]), store[SITES[0]])
    assert torch.equal(next(iter(held.shards())).at[SITES[0]], held[SITES[0]])
    assert not list((tmp_path / "a").glob("*.partial"))


def test_an_interrupted_capture_goes_on_after_its_last_finished_shard(tiny_model, tmp_path):
    whole = capture(tiny_model, ROWS, SITES, folder=tmp_path / "whole", shard_states=6)
    capture(tiny_model, ROWS, SITES, folder=tmp_path / "cut", shard_states=6)
    (tmp_path / "cut" / "000001.safetensors").unlink()
    kept = (tmp_path / "cut" / "000000.safetensors").stat().st_mtime_ns
    again = capture(tiny_model, ROWS, SITES, folder=tmp_path / "cut", shard_states=6)
    assert (tmp_path / "cut" / "000000.safetensors").stat().st_mtime_ns == kept
    torch.testing.assert_close(again[SITES[0]], whole[SITES[0]])


def test_a_folder_made_from_something_else_is_refused_and_says_what_differs(tiny_model, tmp_path):
    folder = tmp_path / "store"
    capture(tiny_model, ROWS, SITES, folder=folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["model"] == tiny_model.hash() and manifest["dtype"] == "torch.float32"
    assert manifest["sites"] == ["blocks.0.hook_out", "blocks.2.hook_out"]
    for other, what in [
        (lambda: capture(load(tiny_hf(seed=1), tokenizer=tiny_tokenizer()), ROWS, SITES, folder=folder), "model"),
        (lambda: capture(tiny_model, ROWS[:2], SITES, folder=folder), "data, shards"),
        (lambda: capture(tiny_model, ROWS, SITES, "last", folder=folder), "data"),
        (lambda: capture(tiny_model, ROWS, SITES[:1], folder=folder), "sites"),
        (lambda: capture(tiny_model, ROWS, SITES, folder=folder, dtype=torch.bfloat16), "dtype"),
    ]:
        with pytest.raises(ValueError, match=what):
            other()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        capture(tiny_model, ROWS, SITES, folder=tmp_path / "full")


def test_bad_requests_are_refused_before_anything_runs(tiny_model):
    for call, error, what in [
        (lambda: capture(tiny_model, ROWS, [Site(4, "resid_post")]), KeyError, "layers 0..3"),
        (lambda: capture(tiny_model, ROWS, ["blocks.0.hook_mlp_ouT"]), KeyError, "hook_mlp_out"),
        (lambda: capture(tiny_model, ROWS, []), ValueError, "no site"),
        (lambda: capture(tiny_model, [*ROWS, ()], SITES), ValueError, "prompt 5 is empty"),
        (lambda: capture(tiny_model, ROWS, SITES, [0, 0, 0, 2, 0]), ValueError, "prompt 3 has positions 0..1"),
        (lambda: capture(tiny_model, ROWS, SITES, [0]), ValueError, "5"),
        (lambda: capture(tiny_model, ROWS, SITES, "first"), ValueError, "choose 'all', 'ordinary', 'last'"),
        (lambda: capture(tiny_model, ROWS, SITES, [[]] * 5), ValueError, "no position"),
        (lambda: capture(tiny_model, ROWS, ["blocks.0.attn.hook_pattern"]), ValueError, "one state per position"),
    ]:
        with pytest.raises(error, match=what):
            call()
    with pytest.raises(KeyError, match="was not captured"):
        capture(tiny_model, ROWS, SITES)[Site(1, "mlp_out")]
