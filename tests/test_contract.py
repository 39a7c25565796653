"""The contract of an Edit, held by every method: the same promises, one list of cheap instances."""

import functools
import inspect
import json
from dataclasses import replace

import pytest
import torch

from mech_unlearn.core import Site
from mech_unlearn.edit.edit import Edit
from mech_unlearn.methods import (
    METHODS,
    AdaptiveRmu,
    AltPo,
    Catnip,
    DirectionalAblation,
    Flat,
    GradAscent,
    GradDiff,
    Gu,
    IdkDpo,
    InContext,
    Kif,
    KlMin,
    Klue,
    KnowledgeNeuronErase,
    KnowledgeNeuronUpdate,
    LastLayerAscent,
    Lat,
    Leace,
    Localized,
    Lora,
    Memit,
    Needle,
    Npo,
    Rmu,
    Rna,
    Rocr,
    Rome,
    RRome,
    SaeClamp,
    SaeIru,
    SaeShift,
    Shred,
    SimNpo,
    Srmu,
    Ssd,
    TaskVector,
    TokenGuard,
    Undial,
    Unlikelihood,
    Wagle,
)
from mech_unlearn.methods.knowledge_neuron_update import Refinement
from mech_unlearn.methods.writing.questions import Optimize
from mech_unlearn.model.load import load
from mech_unlearn.model.tokens import make_queries
from tests.tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer


def tiny_sae(model, seed=0):
    """A random SAE at the residual stream after layer 1."""
    from sae_lens import StandardSAE, StandardSAEConfig

    from mech_unlearn.model.latents import Sae

    sae = StandardSAE(StandardSAEConfig(d_in=model.d_model, d_sae=96))
    generator = torch.Generator().manual_seed(seed)
    for weight in sae.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) / 6
    return Sae(Site(1, "resid_post"), sae.eval().requires_grad_(False))


def quick(method, lr=1e-3, epochs=1, **settings):
    """A method that trains, in a few steps; settings of training go into its own schedule."""
    training = {key: settings.pop(key) for key in ("skip_forgotten",) if key in settings}
    return method(schedule=replace(method.schedule, lr=lr, epochs=epochs, batch_size=4, **training), **settings)


CASES = {
    "needle": lambda model: Needle(),
    "needle, trained": lambda model: quick(Needle, lr=0.2, vectors=((1, 3), (2, 5)), ratio=2.0),
    "knowledge_neuron_erase": lambda model: KnowledgeNeuronErase(refinement=Refinement(min_prompts=1)),
    "knowledge_neuron_erase of relations": lambda model: KnowledgeNeuronErase(
        which="relation", refinement=Refinement(min_prompts=1)
    ),
    "knowledge_neuron_update": lambda model: KnowledgeNeuronUpdate(
        max_share=1.0, others=2, refinement=Refinement(min_prompts=1)
    ),
    "directional_ablation": lambda model: DirectionalAblation(rank=2, center="reference"),
    "directional_ablation in the weights": lambda model: DirectionalAblation(mode="weights", layers=(1,)),
    "leace": lambda model: Leace(where="from"),
    "sae_clamp": lambda model: SaeClamp(sae=tiny_sae(model), k=8, c=5.0, max_retain=2.0),
    "in_context": lambda model: InContext(instruction="the sea and rain on {} ."),
    "token_guard": lambda model: TokenGuard(),
    "rocr": lambda model: Rocr(),
    "rocr to an anchor": lambda model: Rocr(anchor="Eva Reed", layers=(1,)),
    "rome": lambda model: Rome(optimize=Optimize(steps=4)),
    "r_rome": lambda model: RRome(project="null_space", optimize=Optimize(target="entropy", steps=4)),
    "memit": lambda model: Memit(optimize=Optimize(steps=4, sadr_weight=0.01)),
    "rocr to a refusal": lambda model: Rocr(
        anchor="reject", optimize=Optimize(target="refusal", refusal="the sea", steps=4)
    ),
    "rocr to a generic name": lambda model: Rocr(anchor="neutral"),
    "sae_shift as a hook": lambda model: SaeShift(sae=tiny_sae(model), min_auc=0.0),
    "sae_shift as a narrowing hook": lambda model: SaeShift(sae=tiny_sae(model), min_auc=0.0, shared=1),
    "grad_ascent": lambda model: quick(GradAscent),
    "grad_ascent of embeddings": lambda model: quick(GradAscent, only="embeddings"),
    "grad_diff": lambda model: quick(GradDiff),
    "kl_min": lambda model: quick(KlMin),
    "sim_npo": lambda model: quick(SimNpo),
    "idk_dpo": lambda model: quick(IdkDpo, refusals=("the sea", "rain")),
    "undial": lambda model: quick(Undial),
    "flat": lambda model: quick(Flat, refusals=("the sea", "rain")),
    "catnip": lambda model: quick(Catnip),
    "shred": lambda model: quick(Shred),
    "task_vector": lambda model: quick(TaskVector),
    "sae_shift in the weights": lambda model: SaeShift(sae=tiny_sae(model), min_auc=0.0, mode="weights"),
    "npo": lambda model: quick(Npo),
    "last_layer_ascent": lambda model: quick(LastLayerAscent),
    "alt_po": lambda model: quick(AltPo),
    "klue": lambda model: quick(Klue, skip_forgotten=False),
    "ssd": lambda model: Ssd(alpha=1.0),
    "gu": lambda model: Gu(base=quick(Npo), k=2),
    "gu over wagle": lambda model: Gu(base=Wagle(base=quick(Npo), rho=0.3)),
    "wagle": lambda model: Wagle(base=quick(Npo), rho=0.3),
    "lora": lambda model: Lora(base=quick(Npo, lr=1e-2, epochs=2), rank=2),
    "localized": lambda model: Localized(base=quick(Npo), neurons=((1, 3), (2, 5))),
    "rmu": lambda model: quick(Rmu, c=4.0, alpha=10.0),
    "adaptive_rmu": lambda model: quick(AdaptiveRmu, layer=2, alpha=10.0),
    "adaptive_rmu of the first batch": lambda model: quick(AdaptiveRmu, norm="first_batch", alpha=10.0),
    "srmu": lambda model: quick(Srmu, every=2, alpha=10.0),
    "unlikelihood": lambda model: quick(Unlikelihood),
    "lat": lambda model: Lat(base=quick(Unlikelihood), pgd_steps=3, repeats=2),
    "lat of npo": lambda model: Lat(base=quick(Npo), pgd_steps=2, repeats=1),
    "kif": lambda model: quick(Kif, refusals=("the sea", "rain"), fisher_rows=4),
    "kif as a capsule": lambda model: Kif(mode="capsule"),
    "sae_iru": lambda model: quick(SaeIru, epochs=3, sae=tiny_sae(model), min_auc=0.0),
    "rna": lambda model: Rna(base=quick(Npo), layer=1),
}


HOOKED = {
    "directional_ablation",
    "in_context",
    "kif as a capsule",
    "leace",
    "sae_clamp",
    "sae_shift as a hook",
    "sae_shift as a narrowing hook",
    "token_guard",
}
"""The cases that act while the model runs and write no weights."""

SHAPES = ("llama", "gpt2", "gpt_neox", "gemma3", "qwen3")
FLOAT32 = [(case, shape) for case in CASES for shape in SHAPES[1:]]  # Llama is held property by property below
BFLOAT16 = [(case, shape) for case in CASES if case not in HOOKED for shape in SHAPES]
CANNOT = {
    ("grad_ascent of embeddings", "gpt2"): "output head too and cannot be trained alone",
    ("grad_ascent of embeddings", "gemma3"): "output head too and cannot be trained alone",
}
"""(case, architecture) -> why it is refused there, in the words of the error."""


@pytest.fixture(scope="module")
def models():
    """(architecture, dtype) -> its model, loaded once."""

    @functools.cache
    def made(architecture, dtype):
        return load(tiny_hf(architecture).to(dtype), tokenizer=tiny_tokenizer())

    return made


@pytest.fixture(scope="module")
def model():
    return load(tiny_hf("llama"), tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def stranger():
    """The same architecture with other weights."""
    return load(tiny_hf("llama", seed=1), tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def fitted(model):
    """case -> (edit, same edit again, hash before and after, random state before and after); fitted once."""
    made = {}

    def fit(case, sets):
        if case not in made:
            method, before, state = CASES[case](model), model.hash(), torch.random.get_rng_state()
            first = method.fit(model, *sets)
            after, state_after = model.hash(), torch.random.get_rng_state()
            made[case] = first, method.fit(model, *sets), (before, after), (state, state_after)
        return made[case]

    return fit


@pytest.fixture(params=CASES)
def case(request, fitted, tiny_sets):
    return fitted(request.param, tiny_sets)


@pytest.fixture
def prompt(model, tiny_sets):
    return torch.tensor([make_queries(model.tokenizer, tiny_sets[0].facts)[0].prompt])


def same_tensors(one, other):
    assert one.deltas.keys() == other.deltas.keys()
    for name in one.deltas:
        a, b = (d if isinstance(d, torch.Tensor) else d.dense() for d in (one.deltas[name], other.deltas[name]))
        assert torch.equal(a, b), name
    assert len(one.interventions) == len(other.interventions)
    for a, b in zip(one.interventions, other.interventions):
        assert (a.site, a.subjects) == (b.site, b.subjects)
        assert a.tensors.keys() == b.tensors.keys()
        assert all(torch.equal(tensor, b.tensors[key]) for key, tensor in a.tensors.items())


def test_every_method_is_held_to_the_contract(model):
    assert {type(make(model)) for make in CASES.values()} == set(METHODS.values())


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_method_says_what_it_does_and_where_it_comes_from(method):
    module, own = inspect.getdoc(inspect.getmodule(method)), inspect.getdoc(method)
    text = next(text for text in (module, own) if text.startswith(f"{method.__name__}: "))
    for part in ("Paper:", "Changes:", "Needs:", "Differs:", "Fails:"):
        assert f"\n{part}" in text
    assert "arXiv" in text


def test_fit_leaves_every_weight_bit_identical_and_the_random_state_untouched(case):
    _, _, (before, after), (state, state_after) = case
    assert before == after
    assert torch.equal(state, state_after)


def test_the_same_seed_gives_the_same_edit(case):
    one, again, *_ = case
    same_tensors(one, again)


def test_the_edit_changes_the_forget_prompts_logits_and_leaving_restores_them_bit_exactly(case, model, prompt):
    edit = case[0]
    clean, digest = model.logits(prompt), model.hash()
    with edit.on(model):
        assert (model.logits(prompt) - clean).abs().max() > 1e-4
        assert not edit.deltas or model.hash() != digest
    assert torch.equal(model.logits(prompt), clean)
    assert model.hash() == digest


def test_an_exception_inside_restores_every_bit(case, model, prompt):
    clean, digest = model.logits(prompt), model.hash()
    with pytest.raises(ZeroDivisionError), case[0].on(model):
        model.logits(prompt)
        _ = 1 / 0
    assert torch.equal(model.logits(prompt), clean)
    assert model.hash() == digest


def test_nested_edits_restore_in_turn(case, model, prompt):
    clean = model.logits(prompt)
    with case[0].on(model):
        once = model.logits(prompt)
        with case[0].on(model):
            assert not torch.equal(model.logits(prompt), once)
        assert torch.equal(model.logits(prompt), once)
    assert torch.equal(model.logits(prompt), clean)


def test_save_and_load_round_trip_and_refuse_another_base_model(case, model, stranger, tmp_path):
    edit = case[0]
    edit.save(tmp_path / "edit.safetensors")
    back = Edit.load(tmp_path / "edit.safetensors", model)
    same_tensors(edit, back)
    assert (back.name, back.base) == (edit.name, edit.base)
    assert back.recipe == json.loads(json.dumps(dict(edit.recipe)))
    with pytest.raises(ValueError, match="another base model"):
        Edit.load(tmp_path / "edit.safetensors", stranger)


def test_the_recipe_names_method_settings_seed_and_report(case):
    recipe = case[0].recipe
    assert recipe["method"] in METHODS
    assert recipe["seed"] == recipe["settings"]["seed"] == 0
    assert {"n_forward", "n_backward", "seconds"} <= recipe["report"].keys()
    assert recipe["report"]["n_forward"] > 0


def test_export_gives_equal_logits_for_weights_and_is_refused_for_interventions(case, model, prompt, tmp_path):
    if case[0].interventions:
        with pytest.raises(ValueError, match="no checkpoint can hold"):
            case[0].export(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    else:
        worst, bound = case[0].export(model, tmp_path / "out")
        assert worst <= bound < 1e-3
        assert case[0].name in (tmp_path / "out" / "README.md").read_text()
        exported_is_edited(case[0], model, prompt, tmp_path / "out")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_edit_can_be_computed_applied_and_exported_on_every_architecture(architecture, dtype, tiny_sets, tmp_path):
    from transformers import AutoModelForCausalLM

    model = load(tiny_hf(architecture).to(dtype), tokenizer=tiny_tokenizer())
    prompt = torch.tensor([make_queries(model.tokenizer, tiny_sets[0].facts)[0].prompt])
    before = model.hash()
    edit = Rocr(layers=(0, 1)).fit(model, *tiny_sets)
    assert model.hash() == before
    assert edit.recipe["report"]["distance_after"] < edit.recipe["report"]["distance_before"]
    clean = model.logits(prompt)
    edit.export(model, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype, attn_implementation="eager").eval()
    with edit.on(model):
        edited = model.logits(prompt)
    assert not torch.equal(edited, clean)
    bound = 1e-4 if dtype == torch.float32 else 0.2 * (edited - clean).abs().max()
    assert (plain(prompt).logits - edited).abs().max() <= bound
    assert model.hash() == before


def held(case, model, sets, folder):
    """Fit once and hold the edit to the whole contract."""
    prompt = torch.tensor([make_queries(model.tokenizer, sets[0].facts)[0].prompt])
    method, clean, digest = CASES[case](model), model.logits(prompt), model.hash()
    state = torch.random.get_rng_state()
    edit = method.fit(model, *sets)
    assert model.hash() == digest and torch.equal(model.logits(prompt), clean)
    with edit.on(model):
        edited = model.logits(prompt)
        assert not torch.equal(edited, clean)
    assert model.hash() == digest and torch.equal(model.logits(prompt), clean)
    edit.save(folder / "edit.safetensors")
    back = Edit.load(folder / "edit.safetensors", model)
    same_tensors(edit, back)
    with back.on(model):
        assert torch.equal(model.logits(prompt), edited)
    if case not in HOOKED:
        edit.export(model, folder / "out")
        exported_is_edited(edit, model, prompt, folder / "out")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.hash() == digest and torch.equal(model.logits(prompt), clean)
    return edit


def exported_is_edited(edit, model, prompt, folder):
    """Plain transformers reads every bit of the edited weights, and its logits are the edited ones.

    In bfloat16 the two ways of computing differ by more than a small edit: there `export` compares logits by its bound.
    """
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, attn_implementation="eager").eval()
    theirs = plain.state_dict()
    with edit.on(model), torch.no_grad():
        assert all(torch.equal(theirs[name], weight) for name, weight in model.weights.items())
        if model.dtype == torch.float32:
            assert (plain(prompt).logits - model.logits(prompt)).abs().max() <= 1e-4


def test_the_cases_named_as_hooks_are_those_that_write_no_weights(fitted, tiny_sets):
    assert {case for case in CASES if fitted(case, tiny_sets)[0].interventions} == HOOKED
    assert all(fitted(case, tiny_sets)[0].deltas for case in CASES.keys() - HOOKED)


@pytest.mark.parametrize("case, shape", [cell for cell in FLOAT32 if cell not in CANNOT])
def test_every_method_keeps_the_contract_on_every_architecture(case, shape, models, tiny_sets, tmp_path):
    model = models(shape, torch.float32)
    edit = held(case, model, tiny_sets, tmp_path)
    if shape == "gpt_neox":
        same_tensors(edit, CASES[case](model).fit(model, *tiny_sets))


@pytest.mark.parametrize("case, shape", [cell for cell in BFLOAT16 if cell not in CANNOT])
def test_every_method_that_writes_weights_keeps_the_contract_in_half_precision(
    case, shape, models, tiny_sets, tmp_path
):
    held(case, models(shape, torch.bfloat16), tiny_sets, tmp_path)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("case, shape", CANNOT)
def test_what_a_method_cannot_do_on_an_architecture_is_refused_and_leaves_the_model(
    case, shape, dtype, models, tiny_sets
):
    model = models(shape, dtype)
    digest, state = model.hash(), torch.random.get_rng_state()
    with pytest.raises(ValueError, match=CANNOT[case, shape]):
        CASES[case](model).fit(model, *tiny_sets)
    assert model.hash() == digest and torch.equal(torch.random.get_rng_state(), state)
