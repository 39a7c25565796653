"""What loads: each architecture gives the logits and greedy text of plain transformers, or one line says why not.

docs/architectures.md is this table; a row that is no longer so fails here.
"""

import copy

import pytest
import torch

from mech_unlearn.core import Site
from mech_unlearn.model.load import load
from mech_unlearn.model.scores import greedy
from mech_unlearn.model.sweep import Patch, put, record, sweep
from tests.paths import ROOT
from tests.tiny import tiny_tokenizer
from tests.zoo import CONFIGS, VOCABULARY, zoo_hf

IDS = torch.randint(4, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
REFUSED = {
    "cohere": "is another model within transformer-lens: logits differ by",
    "cohere2": "is another model within transformer-lens: logits differ by",
    "bert": "reads what follows a token",
} | dict.fromkeys(("biogpt", "ctrl", "helium", "persimmon", "phimoe", "xlnet"), "transformer-lens has no adapter for")
ACCEPTED = [kind for kind in CONFIGS if kind not in REFUSED]


def listed():
    """Name -> cells of its row in docs/architectures.md."""
    lines = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {row[0].strip("`"): row[1:] for row in rows}


def mlps(model):
    """Which layers have one MLP output matrix, in a word."""
    one = 0
    for layer in range(model.n_layers):
        try:
            model.w_out(layer)
            one += 1
        except KeyError as error:
            why = "mixture of experts" if "mixture of" in error.args[0] else "no MLP"
    return (
        "yes" if one == model.n_layers else f"no: {why}" if not one else f"in {one} of {model.n_layers} layers: {why}"
    )


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ACCEPTED)
@torch.no_grad()
def test_a_loaded_model_has_the_logits_and_the_greedy_text_of_plain_transformers(kind):
    hf = zoo_hf(kind)
    plain = copy.deepcopy(hf)
    model = load(hf, tokenizer=tiny_tokenizer())
    theirs = plain(input_ids=IDS, use_cache=False).logits
    assert (model.logits(IDS) - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    for row, ours in zip(IDS, greedy(model, IDS.tolist(), 8), strict=True):
        said = plain.generate(row[None], max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=3)[0, 20:]
        assert list(ours) == [token for token in said.tolist() if token != 3]
    assert listed()[kind] == [type(hf).__name__, "yes", "yes" if model.keeps_prefix else "no", mlps(model)]


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ACCEPTED)
@torch.no_grad()
def test_a_state_written_over_gives_the_logits_of_a_hook_with_prefix_cache_or_without(kind):
    model, site = load(zoo_hf(kind), tokenizer=tiny_tokenizer()), Site(0, "resid_post")
    values = torch.randn(2, model.d_model, generator=torch.Generator().manual_seed(1))
    write = put(torch.tensor([7, 7]), values)
    last = Site(model.n_layers - 1, "resid_post")
    seen = []
    with model.hooks((site, lambda x: write(x, 0)), (last, lambda x: seen.append(x[:, -1]))):
        model.logits(IDS)
    for cache in (True, False):
        (swept,) = sweep(record(model, IDS, cache=cache), [Patch(torch.tensor([0, 1]), ((site, write),), 7)], [19])
        assert (swept[:, 0] - seen[0]).abs().max() <= 1e-4 * seen[0].abs().max()


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_load_is_refused_in_one_line_that_names_the_architecture(kind):
    hf = zoo_hf(kind)
    with pytest.raises(ValueError, match=REFUSED[kind]) as error:
        load(hf, tokenizer=tiny_tokenizer())
    assert type(hf).__name__ in str(error.value) and "\n" not in str(error.value)
    name, loads, *rest = listed()[kind]
    assert name == type(hf).__name__ and loads.startswith("no") and rest == ["", ""]


def test_the_page_lists_what_is_tested_here_and_the_readme_counts_it():
    assert list(listed()) == list(CONFIGS) and len(CONFIGS) >= 60
    assert f"{len(ACCEPTED)} architectures" in (ROOT / "README.md").read_text(encoding="utf-8")
