"""The ConceptVectors file: what is in it is read, what is no entry is refused, its vectors are those of one model."""

import json

import pytest
import torch

from mech_unlearn.benchmarks.conceptvectors.bench import fits, load
from mech_unlearn.benchmarks.conceptvectors.data import load_concepts
from mech_unlearn.edit.edit import clone
from mech_unlearn.locate.neurons.concept_causal import intrinsic, noisy
from mech_unlearn.locate.neurons.value_vectors import project, text_mask, token_strings, value_vectors
from mech_unlearn.model.load import load as load_model
from tests.paths import SHARED_DATA
from tests.tiny import tiny_tokenizer

DATA = SHARED_DATA
DEV = DATA / "conceptvectors" / "llama2-7b_concepts_dev.json"
GOOD = {
    "id": 3,
    "Concept": "Cities",
    "Layer": 2,
    "Dim": 17,
    "QA": [" Where is Anna born?\n", "Where is Rome?"],
    "text_completion": [{"First_half": "Paris is", "Second_half": "on the sea"}],
    "wikipedia_content": "Paris and Rome and Oslo .",
    "unrelated_QA": ["Who works for Acme?"],
}


def write(path, rows):
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return path


def entry(tmp_path, **changes):
    return load_concepts(write(tmp_path / "one.json", [GOOD | changes]))[0]


def test_an_entry_is_read_with_stripped_questions_and_pairs_of_halves(tmp_path):
    found = entry(tmp_path)
    assert (found.concept, found.layer, found.dim, found.id) == ("Cities", 2, 17, 3)
    assert found.qa == ("Where is Anna born?", "Where is Rome?") and found.unrelated_qa == ("Who works for Acme?",)
    assert found.completions == (("Paris is", "on the sea"),) and found.text == GOOD["wikipedia_content"]
    nameless = {key: value for key, value in GOOD.items() if key != "id"}
    assert load_concepts(write(tmp_path / "two.json", [nameless]))[0].id is None


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ([1], "expected a JSON object"),
        ({k: v for k, v in GOOD.items() if k != "Dim"}, "missing field 'Dim'"),
        (GOOD | {"Layer": "2"}, "'Layer' must be int, found str"),
        (GOOD | {"Layer": True}, "'Layer' must be int, found bool"),
        (GOOD | {"Dim": -1}, "'Dim' must be 0 or more"),
        (GOOD | {"Concept": " "}, "'Concept' is empty"),
        (GOOD | {"wikipedia_content": ""}, "'wikipedia_content' is empty"),
        (GOOD | {"QA": []}, "'QA' must be a list of questions"),
        (GOOD | {"unrelated_QA": [4]}, "'unrelated_QA' must be a list of questions"),
        (GOOD | {"text_completion": ["half"]}, "'First_half' and 'Second_half'"),
        (GOOD | {"text_completion": [{"First_half": "a"}]}, "'First_half' and 'Second_half'"),
        (GOOD | {"id": "x"}, "'id' must be int"),
        (GOOD, "stands twice"),
    ],
)
def test_a_bad_entry_is_refused_with_its_number_and_reason(tmp_path, bad, reason):
    with pytest.raises(ValueError) as error:
        load_concepts(write(tmp_path / "f.json", [GOOD, bad]))
    assert "f.json: entry 2" in str(error.value) and reason in str(error.value)


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "does not exist"), ("{", "not JSON"), ("[]", "list of one"), ("{}", "list of one")]
)
def test_a_file_that_holds_no_list_is_refused(tmp_path, content, reason):
    path = tmp_path / "f.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=reason):
        load_concepts(path)


def plant(model, layer, dim, text):
    """Let a value vector promote the words of a text and the next one demote them, in place."""
    mask = text_mask(model.tokenizer, text)
    direction = torch.eye(model.d_model)[0]
    with torch.no_grad():
        model.held["lm_head.weight"][mask] += 9 * direction
        model.held[model.w_out(layer)[0]][:, dim] = direction
        model.held[model.w_out(layer)[0]][:, dim + 1] = -direction
    return mask


def test_what_an_entry_names_is_a_vector_whose_top_tokens_stand_in_its_text(tmp_path, tiny_model):
    one = entry(tmp_path)
    mask = plant(tiny_model, 2, 17, one.text)
    found, other = (project(tiny_model, one.layer, [dim], top=3) for dim in (17, 18))
    assert set(token_strings(tiny_model.tokenizer, found.ids[0].tolist())) == {"Paris", "Rome", "Oslo"}
    assert mask[found.ids[0].long()].all() and mask.sum() == 3 and not mask[other.ids[0].long()].any()


def test_an_entry_in_two_models_measures_how_the_vector_moved(tmp_path, tiny_model):
    one = entry(tmp_path)
    plant(tiny_model, 2, 17, one.text)
    noise = -2 * value_vectors(tiny_model, 2)[17].clone()
    with clone(tiny_model) as other, noisy(other, 2, 17, noise).on(other):
        change = intrinsic(tiny_model, other, one.layer, one.dim, text=one.text, top=3)
    assert change.cosine == pytest.approx(-1) and change.jaccard == 0
    assert (change.text_ratio, change.text_kept) == (0, 0)


@pytest.mark.parametrize("changes", [{"Layer": 4}, {"Dim": 64}])
def test_a_model_without_the_vector_is_refused_by_layer_and_dim(tmp_path, tiny_model, changes):
    one = entry(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"layer {one.layer}, dim {one.dim}; .* layers 0..3 and dims 0..63"):
        fits(tiny_model, load(tmp_path / "one.json", None))


@pytest.mark.skipif(not DEV.is_file(), reason=f"no {DEV}: set MECH_UNLEARN_DATA to the folder that holds it")
def test_the_dev_file_of_llama_2_is_read_and_its_vectors_lie_in_a_model_of_that_shape_only(tiny_model):
    from transformers import AutoModelForCausalLM, LlamaConfig

    entries = load_concepts(DEV)
    assert len(entries) == 10 and (entries[0].concept, entries[0].layer, entries[0].dim) == ("Poland", 23, 743)
    assert all(len(e.qa) == 10 and len(e.unrelated_qa) == 50 and 18 <= e.layer <= 25 for e in entries)
    with pytest.raises(ValueError, match="'Poland' is layer 23, dim 743"):
        fits(tiny_model, load(DEV, None))
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=8,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model = load_model(hf, tokenizer=tiny_tokenizer())
    fits(model, load(DEV, None))
    for one in entries:
        found, stored = project(model, one.layer, [one.dim], top=5), value_vectors(model, one.layer, [one.dim])[0]
        assert stored.shape == (8,) and len(token_strings(model.tokenizer, found.ids[0].tolist())) == 5
        torch.testing.assert_close(stored, model.held[f"model.layers.{one.layer}.mlp.down_proj.weight"][:, one.dim])
