"""The suffix sweep against one forward pass with plain hooks per patch, on six architectures."""

import pytest
import torch

from mech_unlearn.core import Site
from mech_unlearn.edit.edit import Edit, Shift
from mech_unlearn.model.load import load
from mech_unlearn.model.sweep import Patch, put, record, sweep
from tests.tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer

LENGTH = 9
KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_post", "q", "k", "v", "z")


def _ids(rows=3, seed=0):
    return torch.randint(4, 40, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def _kinds(architecture):
    return [
        kind for kind in KINDS if (architecture, kind) != ("gpt_neox", "resid_mid")
    ]  # attention and MLP in parallel


def _draw(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _patches(model, architecture, rec):
    """One patch per kind, layer and first position; values are random, two rows each."""
    rows = torch.tensor([2, 0])
    patches = []
    for number, kind in enumerate(_kinds(architecture)):
        for layer in (0, model.n_layers - 1):
            for first in (0, 4):
                shape = rec.state(Site(layer, kind)).shape[2:]
                at = torch.tensor([[first, 6], [first, 7]])
                write = put(at, _draw((2, 2, *shape), 100 * number + layer))
                patches.append(Patch(rows, ((Site(layer, kind), write),), first))
    return patches


def _plain(model, ids, patch):
    """The final residual stream of a patch's rows from one whole forward pass."""
    kept = []
    writes = [(site, lambda x, write=write: write(x, 0)) for site, write in patch.writes]
    last = Site(model.n_layers - 1, "resid_post")
    with model.hooks(*writes), model.hooks((last, lambda x: kept.append(x))):
        model.logits(ids[patch.rows])
    return kept[0]


def _recorded(model, architecture, ids, **settings):
    keep = [Site(layer, kind) for layer in range(model.n_layers) for kind in _kinds(architecture)]
    return record(model, ids, keep=[s for s in keep if s.kind not in ("resid_pre", "resid_post")], **settings)


@pytest.mark.thorough
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_patch_of_a_sweep_equals_its_own_forward_pass(architecture, cache):
    model, ids = load(tiny_hf(architecture), tokenizer=tiny_tokenizer()), _ids()
    rec = _recorded(model, architecture, ids, cache=cache)
    patches = _patches(model, architecture, rec)
    with torch.no_grad():
        found = sweep(rec, patches, [7, 8])
        changed = 0
        for patch, states in zip(patches, found, strict=True):
            expected = _plain(model, ids, patch)[:, [7, 8]]
            torch.testing.assert_close(states, expected, atol=2e-5, rtol=1e-5)
            changed += int((states - rec.resid[-1][patch.rows][:, [7, 8]]).abs().max() > 1e-3)
    assert changed == len(patches)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_of_a_sweep_are_those_of_plain_forward_passes(architecture):
    model, ids = load(tiny_hf(architecture), tokenizer=tiny_tokenizer()), _ids()
    rec = record(model, ids, keep=[Site(1, "mlp_post"), Site(2, "z")])
    leaves = [_draw((3, *rec.state(site).shape[2:]), i) for i, site in enumerate(rec.kept)]
    at = torch.full((3,), 5)

    def patches():
        sites = zip(rec.kept, (leaf.requires_grad_() for leaf in leaves), strict=True)
        return [Patch(torch.arange(3), ((site, put(at, leaf)),), 5) for site, leaf in sites]

    swept = torch.autograd.grad(sum(x.square().sum() for x in sweep(rec, patches(), [8])), leaves)
    plain = torch.autograd.grad(sum(_plain(model, ids, p)[:, [8]].square().sum() for p in patches()), leaves)
    for ours, theirs in zip(swept, plain, strict=True):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


def test_one_head_or_one_neuron_can_be_written_alone(tiny_model):
    ids = _ids()
    z, neurons = Site(1, "z"), Site(2, "mlp_post")
    rec = record(tiny_model, ids, keep=[z, neurons])
    rows, at = torch.arange(3), torch.tensor([4, 5, 6])
    head = put(at, torch.zeros(3, rec.state(z).shape[-1]), torch.tensor([1, 0, 1]))
    neuron = put(at, torch.full((3,), 5.0), torch.tensor([7, 8, 9]))
    patches = [Patch(rows, ((z, head),), 4), Patch(rows, ((neurons, neuron),), 4)]
    with torch.no_grad():
        for patch, states in zip(patches, sweep(rec, patches, [8]), strict=True):
            torch.testing.assert_close(states, _plain(tiny_model, ids, patch)[:, [8]], atol=2e-5, rtol=1e-5)
    written = head(rec.state(z), 0)
    assert (written != rec.state(z)).any(-1).sum(-1).sum(-1).tolist() == [1, 1, 1]  # one head at one position each


def test_writes_in_several_layers_and_of_one_place_twice_all_count(tiny_model):
    ids = _ids()
    rec = record(tiny_model, ids)
    d = tiny_model.d_model
    rows, at = torch.arange(3), torch.tensor([3, 4, 5])
    writes = (
        (Site(0, "resid_post"), put(at, _draw((3, d), 0))),
        (Site(1, "mlp_out"), put(at + 1, _draw((3, d), 1))),
        (Site(1, "resid_post"), put(at + 2, _draw((3, d), 2))),
        (Site(1, "resid_post"), put(at, _draw((3, d), 3))),
        (Site(3, "attn_out"), put(at + 3, _draw((3, d), 4))),
    )
    later = Patch(rows, writes[1:], 3)
    with torch.no_grad():
        for patch in (Patch(rows, writes, 3), later):
            other = Patch(torch.tensor([1]), ((Site(2, "resid_pre"), put(torch.tensor([6]), _draw((1, d), 5))),), 6)
            states = sweep(rec, [other, patch], [8])[1]
            torch.testing.assert_close(states, _plain(tiny_model, ids, patch)[:, [8]], atol=2e-5, rtol=1e-5)


def test_patching_a_recorded_state_back_changes_nothing_and_the_order_of_patches_is_kept(tiny_model):
    ids = _ids()
    rec = record(tiny_model, ids)
    patches = []
    for layer in (3, 0, 2):
        site = Site(layer, "resid_post")
        rows = torch.tensor([layer % 3])
        patches.append(Patch(rows, ((site, put(torch.tensor([5]), rec.state(site)[rows, 5])),), 5))
    with torch.no_grad():
        for patch, states in zip(patches, sweep(rec, patches, [8], max_tokens=1), strict=True):
            torch.testing.assert_close(states, rec.resid[-1][patch.rows][:, [8]], atol=2e-5, rtol=1e-5)


def test_a_noised_recording_is_left_from_its_own_states(tiny_model):
    ids = _ids()
    noise = torch.zeros(3, LENGTH, tiny_model.d_model)
    noise[:, 2:4] = _draw((3, 2, tiny_model.d_model), 0)
    clean = record(tiny_model, ids)
    noisy = record(tiny_model, ids, writes=[("hook_embed", lambda x: x + noise)])
    assert (noisy.resid[-1] - clean.resid[-1])[:, 2:].abs().max() > 1e-3
    every = Site(tiny_model.n_layers - 1, "resid_post")
    at = torch.arange(2, LENGTH).repeat(3, 1)
    restore = Patch(torch.arange(3), ((Site(0, "resid_pre"), put(at, clean.state(Site(0, "resid_pre"))[:, 2:])),), 2)
    with torch.no_grad():
        (states,) = sweep(noisy, [restore], [8])
    torch.testing.assert_close(states, clean.state(every)[:, [8]], atol=2e-5, rtol=1e-5)


def test_a_sliding_window_shorter_than_the_prompt_is_kept():
    model = load(tiny_hf("gemma2"), tokenizer=tiny_tokenizer())
    assert model.hf.config.sliding_window == 8
    ids = torch.randint(4, 40, (3, 24), generator=torch.Generator().manual_seed(0))
    site, at = Site(0, "resid_post"), torch.tensor([12, 13, 14])
    patch = Patch(torch.arange(3), ((site, put(at, _draw((3, model.d_model), 0))),), 12)
    with torch.no_grad():
        (states,) = sweep(record(model, ids), [patch], [23])
    torch.testing.assert_close(states, _plain(model, ids, patch)[:, [23]], atol=2e-5, rtol=1e-5)


def test_what_cannot_be_swept_is_refused(tiny_model):
    ids = _ids()
    rec = record(tiny_model, ids)
    site, at = Site(1, "resid_post"), torch.tensor([3])
    good = put(at, torch.zeros(1, tiny_model.d_model))
    rows = torch.tensor([0])
    with pytest.raises(ValueError, match="without a write"):
        sweep(rec, [Patch(rows, ())], [8])
    with pytest.raises(ValueError, match="begins at 4"):
        sweep(rec, [Patch(rows, ((site, good),), 4)], [3])
    with pytest.raises(ValueError, match="position 3, but the rows are run from position 4"):
        sweep(rec, [Patch(rows, ((site, good),), 4)], [8])
    with pytest.raises(KeyError, match="nearest"):
        sweep(rec, [Patch(rows, ((Site(9, "resid_post"), good),), 3)], [8])
    with pytest.raises(KeyError, match="was not recorded"):
        rec.state(Site(0, "mlp_post"))
    shift = Shift(site, ((5,),), torch.ones(1, tiny_model.d_model))
    edit = Edit(name="shift", base=tiny_model.hash(), interventions=(shift,))
    with edit.on(tiny_model):
        tiny_model.logits(ids)
        with pytest.raises(ValueError, match="interventions is in force"):
            record(tiny_model, ids)
