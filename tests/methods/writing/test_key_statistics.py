"""Key statistics: those of a slow sum, in one pass that ends at the deepest layer, kept on disk without mistakes."""

import dataclasses
import os

import pytest
import torch

from mech_unlearn.core import Site
from mech_unlearn.edit.edit import Edit, Shift
from mech_unlearn.methods.writing import key_statistics, keys, protect
from mech_unlearn.methods.writing.key_statistics import second_moments
from mech_unlearn.model.load import load
from tests.tiny import tiny_hf, tiny_tokenizer

ROWS = [(2, 5, 6), (2, 7, 8, 9), (2, 9, 5), (2, 11, 12)]


def slow(model, rows, layer, last=False):
    """Mean of k k^T, token by token; the first token of a row counts only as its last."""
    seen = []
    with model.hooks((Site(layer, "mlp_post"), lambda x: seen.append(x[0].double()))):
        for row in rows:
            model.logits(torch.tensor([row]))
    every = [k for x in seen for k in (x[-1:] if last else x[1:])]
    return sum(torch.outer(k, k) for k in every) / len(every)


@pytest.mark.parametrize("last", (False, True))
def test_the_moments_of_all_layers_are_those_of_a_sum_token_by_token(last):
    model = load(tiny_hf("llama").double(), tokenizer=tiny_tokenizer())  # so that shapes of passes do not show
    found = second_moments(model, ROWS, [0, 2], "last" if last else "ordinary")
    assert found.keys() == {0, 2}
    for layer, moment in found.items():
        expected = slow(model, ROWS, layer, last)
        assert moment.dtype == torch.float64 and torch.equal(moment, moment.T)
        assert (moment - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("tokens", (5, 2 * key_statistics.CHUNK + 7))
@pytest.mark.parametrize("width", (6, 8, 61))
def test_products_in_blocks_and_chunks_are_the_whole_product_for_widths_that_do_not_divide(tokens, width):
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = torch.zeros(width, width, dtype=torch.float64)
    key_statistics.add_products(total, x)
    torch.testing.assert_close(total.triu(), (x.T @ x).triu())


def test_one_pass_serves_all_layers_and_ends_at_the_deepest(tiny_model):
    ran = []
    block = tiny_model.hf.get_submodule("model.layers.2").register_forward_hook(lambda *_: ran.append(2))
    with keys.count_forwards(tiny_model) as forwards:
        second_moments(tiny_model, [row for row in ROWS if len(row) == 3], [0, 1])
    block.remove()
    assert forwards[0] == 1 and ran == []


def test_what_is_on_disk_is_read_back_bit_for_bit_without_a_forward_pass(tiny_model, tmp_path):
    made = second_moments(tiny_model, ROWS, [0, 1], cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 and not list(tmp_path.glob("*.partial"))
    with keys.count_forwards(tiny_model) as forwards:
        back = second_moments(tiny_model, ROWS, [0, 1], cache_dir=tmp_path)
        assert forwards[0] == 0
        both = second_moments(tiny_model, ROWS, [1, 2], cache_dir=tmp_path)
        assert forwards[0] > 0
    assert all(torch.equal(made[layer], back[layer]) for layer in made)
    assert torch.equal(both[1], made[1]) and len(list(tmp_path.iterdir())) == 3


def test_other_texts_positions_weights_or_interventions_are_never_served_from_disk(tiny_model, tmp_path):
    """The official caches are keyed by the model's path and go stale when two models share one."""
    first = second_moments(tiny_model, ROWS, [1], cache_dir=tmp_path)[1]
    weight = tiny_model.w_out(0)[0]
    edit = Edit(name="other", base="", deltas={weight: torch.ones_like(tiny_model.held[weight])})
    shift = Edit(name="s", base="", interventions=(Shift(Site(0, "resid_post"), ((5,),), torch.ones(1, 32)),))
    found = [
        second_moments(tiny_model, ROWS[:3], [1], cache_dir=tmp_path)[1],
        second_moments(tiny_model, ROWS, [1], "last", cache_dir=tmp_path)[1],
    ]
    for change in (edit, shift):
        with change.on(tiny_model):
            found.append(second_moments(tiny_model, ROWS, [1], cache_dir=tmp_path)[1])
            torch.testing.assert_close(found[-1], slow(tiny_model, ROWS, 1), rtol=1e-5, atol=1e-6)
    assert all((moment - first).norm() > 1e-3 * first.norm() for moment in found)
    other = load(tiny_hf("llama", seed=1), tokenizer=tiny_tokenizer())
    object.__setattr__(other, "name", tiny_model.name)
    assert not torch.equal(second_moments(other, ROWS, [1], cache_dir=tmp_path)[1], first)


def test_a_damaged_or_stale_file_is_named_and_computed_anew(tiny_model, tmp_path):
    made = second_moments(tiny_model, ROWS, [0, 1], cache_dir=tmp_path)
    one, two = sorted(tmp_path.iterdir())
    sound = one.read_bytes()
    flipped = sound[:-3] + bytes([sound[-3] ^ 1]) + sound[-2:]
    for content in (sound[:100], flipped, two.read_bytes()):  # cut off, one bit wrong, another layer's
        one.write_bytes(content)
        with pytest.warns(UserWarning, match=f"{one.name}.*damaged or stale"):
            again = second_moments(tiny_model, ROWS, [0], cache_dir=tmp_path)
        assert torch.equal(again[0], made[0])
        assert torch.equal(second_moments(tiny_model, ROWS, [0], cache_dir=tmp_path)[0], made[0])  # no warning


def test_a_cache_folder_that_cannot_be_made_is_refused_before_work_starts(tiny_model, tmp_path):
    (tmp_path / "file").write_text("")
    with (
        keys.count_forwards(tiny_model) as forwards,
        pytest.raises(ValueError, match="cache_dir .*file.* cannot be written"),
    ):
        second_moments(tiny_model, ROWS, [0], cache_dir=os.fspath(tmp_path / "file"))
    assert forwards[0] == 0
    with pytest.raises(ValueError, match="no text to take key statistics from"):
        second_moments(tiny_model, [], [0])


def test_bases_from_disk_are_those_computed_and_know_their_energy(tiny_model, tiny_sets, tmp_path):
    given = (tiny_model, tiny_sets[1], ("{} was",), (0, 1), protect.KEY_SOURCES)
    plain = protect.protected_bases(*given, 0.1)
    made = protect.protected_bases(*given, 0.1, tmp_path)
    with keys.count_forwards(tiny_model) as forwards:
        back = protect.protected_bases(*given, 0.1, tmp_path)
        wider = protect.protected_bases(*given, 0.3, tmp_path)
    assert forwards[0] == 0
    for layer in plain:
        assert torch.equal(plain[layer], made[layer]) and torch.equal(made[layer], back[layer])
        assert wider[layer].shape[1] > plain[layer].shape[1]


def test_damping_makes_a_moment_of_few_tokens_invertible(tiny_model):
    moment = second_moments(tiny_model, ROWS[:1], [0])[0]
    key = torch.ones(len(moment), 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="no inverse"):
        keys.solve_moment(moment - 1e-9 * torch.eye(len(moment), dtype=torch.float64), key)
    damped = key_statistics.damped(moment, 0.01)
    assert torch.trace(damped) == pytest.approx(1.01 * torch.trace(moment).item())
    torch.testing.assert_close(damped @ keys.solve_moment(damped, key), key)


def test_retained_names_weigh_as_much_as_all_other_tokens(tiny_model, tiny_sets):
    retain = tiny_sets[1]
    both = protect.protected_moments(tiny_model, retain, ("{} was",), (1,), protect.KEY_SOURCES)[1]
    with pytest.warns(UserWarning, match="4 protected keys"):
        names = protect.protected_moments(tiny_model, retain, ("{} was",), (1,), ("entities",))[1]
    rest = protect.protected_moments(tiny_model, retain, ("{} was",), (1,), ("prompts", "texts"))[1]
    torch.testing.assert_close(both, (names + rest) / 2)
    with pytest.raises(ValueError, match="leaves no keys"):
        protect.protected_moments(tiny_model, dataclasses.replace(retain), ("{}",), (1,), ())
