"""Concept vectors: a planted one is found by words, text and coherence, is used, and no random one is."""

import zlib

import pytest
import torch

from mech_unlearn.core import Site
from mech_unlearn.edit.edit import Edit, Shift, clone
from mech_unlearn.locate.neurons.concept_causal import (
    EFFECTS,
    _effects,
    concept_causal,
    intrinsic,
    noise_effects,
    noisy,
)
from mech_unlearn.locate.neurons.concept_vectors import candidates, coherence, concept_vectors, find, prefilter
from mech_unlearn.locate.neurons.value_vectors import (
    STORED,
    Gains,
    project,
    text_mask,
    unembedding,
    value_vectors,
    word_tokens,
)
from mech_unlearn.model.load import load
from mech_unlearn.model.scores import per_fact, score
from mech_unlearn.model.tokens import make_queries
from tests.planted import NAMES, WRITER, fresh_planted_model, planted_facts, planted_model
from tests.tiny import ARCHITECTURES, tiny_facts, tiny_hf, tiny_tokenizer

CITIES = ("Paris", "Rome", "Oslo", "Bern")
FIRMS = ("Acme", "Globex", "Initech", "Umbrella")
LAYER, NEURON, CLUSTER = 2, 17, 12


def clustered():
    """A random Llama whose unembedding has eight clusters of tokens; the cities and eight others are one of them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer, generator = tiny_tokenizer(), torch.Generator().manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    cities = [tokenizer.convert_tokens_to_ids(city) for city in CITIES]
    firms = [tokenizer.convert_tokens_to_ids(firm) for firm in FIRMS]
    rest = torch.randperm(len(tokenizer), generator=generator).tolist()
    order = [*cities, *(i for i in rest if i > 3 and i not in (*cities, *firms)), *firms]
    with torch.no_grad():
        hf.lm_head.weight.normal_(generator=generator)
        for start in range(0, 8 * CLUSTER, CLUSTER):
            hf.lm_head.weight[order[start : start + CLUSTER]] += 0.8 * torch.randn(128, generator=generator)
    return load(hf, tokenizer=tokenizer), order[:CLUSTER]


def plant(model, tokens, scale=0.05):
    with torch.no_grad():
        model.held[f"model.layers.{LAYER}.mlp.down_proj.weight"][:, NEURON] = scale * unembedding(model)[tokens].sum(0)


@pytest.fixture(scope="module")
def planted():
    model, tokens = clustered()
    plant(model, tokens)
    return model, tokens


def plain_w_out(hf, architecture, layer):
    """[d_mlp, d_model], spelled out for each architecture."""
    if architecture == "gpt2":
        return hf.transformer.h[layer].mlp.c_proj.weight
    if architecture == "gpt_neox":
        return hf.gpt_neox.layers[layer].mlp.dense_4h_to_h.weight.T
    return hf.model.layers[layer].mlp.down_proj.weight.T


def plain_norms(hf, architecture, layer):
    """(final norm, norm behind the MLP or None) of a plain HF model."""
    if architecture == "gpt2":
        return hf.transformer.ln_f, None
    if architecture == "gpt_neox":
        return hf.gpt_neox.final_layer_norm, None
    behind = hf.model.layers[layer].post_feedforward_layernorm if architecture in ("gemma2", "olmo2") else None
    return hf.model.norm, behind


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_the_chunked_projection_equals_the_dense_one_with_and_without_gains(architecture):
    hf, layer = tiny_hf(architecture), 1
    final, behind = plain_norms(hf, architecture, layer)
    for norm in (final, behind):
        if norm is not None:
            norm.weight.copy_(torch.rand(32, generator=torch.Generator().manual_seed(9)) + 0.2)
    offset = 1 if architecture == "gemma2" else 0
    stored = plain_w_out(hf, architecture, layer).detach().clone()
    written = stored * (offset + behind.weight) if behind is not None else stored
    centre = written.mean(1, keepdim=True) if architecture in ("gpt2", "gpt_neox") else 0
    read = (written - centre) * (offset + final.weight)
    readout = hf.get_output_embeddings().weight.detach().clone()
    model = load(hf, tokenizer=tiny_tokenizer())
    for gains, vectors in ((STORED, stored), (Gains(), written), (Gains(final_norm=True), read)):
        logits = vectors @ readout.T
        for chunk in (1000, 7):
            found = project(model, layer, top=9, chunk=chunk, gains=gains)
            torch.testing.assert_close(found.logits, logits.topk(9).values, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(logits.gather(1, found.ids.long()), found.logits, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found.mean, logits.mean(1), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found.norm, stored.norm(dim=1))
    some = project(model, layer, [5, 2], top=9)
    assert some.neurons == (5, 2) and torch.equal(some.ids, project(model, layer, top=9).ids[[5, 2]])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_word_search_gives_the_logits_of_the_words_in_deviations_over_the_vocabulary(architecture):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    found = concept_vectors(model, words=CITIES)
    ids = [model.tokenizer.convert_tokens_to_ids(city) for city in CITIES]
    logits = value_vectors(model, 3) @ unembedding(model).T
    z = (logits - logits.mean(1, keepdim=True)) / logits.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(found.values[3], z[:, ids].mean(1), rtol=1e-3, atol=1e-3)
    half = 1.96 * z[:, ids].std(1) / 2
    assert found.low is not None and found.high is not None
    torch.testing.assert_close(found.high[3] - found.low[3], 2 * half, rtol=1e-3, atol=1e-3)
    assert (
        found.axes == ("layer", "neuron") and found.values.shape == (4, len(value_vectors(model, 0))) and found.n == 4
    )


def test_a_planted_vector_is_the_first_that_a_word_search_finds_and_only_for_its_words(planted):
    model, tokens = planted
    frame = find(model, CITIES, 5)
    assert list(frame.columns) == ["layer", "neuron", "score", "norm", "tokens"] and len(frame) == 5
    assert (frame.layer[0], frame.neuron[0]) == (LAYER, NEURON)
    assert frame.score.is_monotonic_decreasing and frame.score[0] > 2
    assert set(CITIES) <= set(frame.tokens[0].split(", ")[:CLUSTER])
    facts = concept_vectors(model, tiny_facts(["Anna Lee", "Ben Hill", "Cara Moss", "Dan Park"], ["born"]))
    assert torch.equal(facts.values, concept_vectors(model, words=CITIES).values)
    assert find(model, FIRMS, 1).neuron[0] != NEURON
    assert find(clustered()[0], CITIES, 1).score[0] < frame.score[0]


def test_a_planted_vector_is_coherent_and_random_vectors_are_not(planted):
    model, _ = planted
    found = concept_vectors(model, top=CLUSTER, drop=0.0)
    others = found.values.flatten()[[i for i in range(256) if i != LAYER * 64 + NEURON]]
    assert found.top(1)[0][0] == {"layer": LAYER, "neuron": NEURON}
    assert found.values[LAYER, NEURON] > 4
    assert others.mean().abs() < 0.5 and (others > 3).float().mean() < 0.05
    assert candidates(model, found, 1).neuron[0] == NEURON
    assert torch.equal(found.values, concept_vectors(model, top=CLUSTER, drop=0.0).values)


def test_against_random_token_sets_even_random_vectors_would_look_coherent():
    model = load(tiny_hf("llama"), tokenizer=tiny_tokenizer())
    readout = unembedding(model)
    unit = torch.nn.functional.normalize(readout - readout.mean(0), dim=1)
    generator = torch.Generator().manual_seed(0)
    sets = torch.stack([torch.randperm(len(readout), generator=generator)[:CLUSTER] for _ in range(200)])
    null, own = coherence(sets, unit), coherence(project(model, 1, top=CLUSTER).ids, unit)
    assert ((own - null.mean()) / null.std()).mean() > 3
    assert concept_vectors(model, top=CLUSTER, drop=0.0, layers=[1]).values.mean().abs() < 0.5


def test_coherence_is_the_mean_cosine_over_pairs():
    unit = torch.nn.functional.normalize(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    ids = torch.tensor([[0, 3, 7, 9], [1, 1, 1, 1]])
    pairs = [unit[a] @ unit[b] for a in ids[0] for b in ids[0] if a != b]
    torch.testing.assert_close(coherence(ids, unit), torch.tensor([sum(pairs) / 12, 1.0]))


def test_the_filter_drops_the_share_that_stands_out_least_and_every_zero_vector(planted):
    model = fresh_planted_model()
    found = project(planted[0], 1, top=9)
    strength = found.logits.mean(1) - found.mean
    kept = prefilter(found)
    assert int((~kept).sum()) == int(0.3 * 64) and strength[kept].min() >= strength[~kept].max()
    scores = concept_vectors(model, top=9, drop=0.0)
    assert not scores.values[WRITER, :8].isnan().any() and scores.values[WRITER, 8:].isnan().all()
    assert concept_vectors(model, words=["Paris"]).values[WRITER, 8:].isnan().all()


def test_a_text_score_is_the_share_of_its_tokens_times_their_purity(planted):
    model, _ = planted
    text, others = "Rivers run to Paris and Rome .", ("Paris is on the hills .", "rain falls")
    got = concept_vectors(model, text=text, others=others, top=40, drop=0.0).values[LAYER]
    words = [token.lower() for token in model.tokenizer.convert_ids_to_tokens(range(len(model.tokenizer)))]
    stop = {"to", "and", "is", "on", "the"}
    sets = [set(part.lower().replace(".", "").split()) - stop for part in (text, *others)]
    found = project(model, LAYER, top=40)
    for j in range(64):
        inside = [words[i] for i in found.ids[j].tolist() if words[i] in sets[0]]
        weight = {w: torch.tensor(1 + 3 / sum(w in s for s in sets)).log().item() for w in inside}
        total = sum(weight[w] for w in inside)
        shared = [sum(weight[w] for w in inside if w in s) / total if total else 0 for s in sets[1:]]
        assert got[j].item() == pytest.approx(len(inside) / 40 * (1 - max(shared)), abs=1e-5)
    alone = concept_vectors(model, text="Paris Rome Oslo Bern", top=CLUSTER)
    assert alone.top(1)[0] == ({"layer": LAYER, "neuron": NEURON}, pytest.approx(4 / CLUSTER))


def test_a_scorer_sees_the_top_tokens_of_the_kept_vectors_only(planted):
    model, _ = planted
    seen = []

    def cities(tokens):
        seen.append(tokens)
        return sum(token in CITIES for token in tokens)

    found = concept_vectors(model, scorer=cities, top=CLUSTER, layers=[LAYER], limit=10)
    assert len(seen) == 10 == int((~found.values.isnan()).sum()) and all(len(tokens) == CLUSTER for tokens in seen)
    assert found.top(1)[0] == ({"layer": LAYER, "neuron": NEURON}, 4.0)
    assert int((~concept_vectors(model, scorer=cities, top=CLUSTER, layers=[1]).values.isnan()).sum()) == 64 - 19


def byte_level():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=alphabet, special_tokens=["<e>"], show_progress=False
    )
    tokenizer.train_from_iterator(["Paris to Paris\nParis"] * 20 + ["to Rome"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>")


def test_a_word_counts_with_and_without_its_space_and_a_split_word_by_its_first_token():
    tokenizer = byte_level()
    tokens, split = word_tokens(tokenizer, ["Paris", "Rome", "Zed"])
    assert sorted(tokenizer.convert_ids_to_tokens(list(tokens["Paris"]))) == ["Paris", "ĠParis"]
    assert tokenizer.convert_ids_to_tokens(list(tokens["Rome"])) == ["ĠRome"]
    assert tokenizer.convert_ids_to_tokens(list(tokens["Zed"])) == ["Z"] and split == ("Zed",)


def test_a_split_word_is_announced_in_a_warning_and_in_the_note(tiny_model):
    with pytest.warns(UserWarning, match="first stands: Zed"):
        found = concept_vectors(tiny_model, words=["Zed", "Rome"])
    assert "of several tokens, for which the first stands: Zed" in found.note
    only = concept_vectors(tiny_model, words=["Z"])
    assert only.low is not None and only.low.isnan().all() and only.values.isfinite().all()


def test_a_text_counts_words_of_two_letters_without_stop_words_and_special_tokens():
    tokenizer = tiny_tokenizer()
    mask = text_mask(tokenizer, "The Rome 7 of <unk> rivers Paris q")
    assert {str(tokenizer.convert_ids_to_tokens(int(i))) for i in mask.nonzero()} >= {"Rome", "Paris"}
    assert not any(mask[tokenizer.convert_tokens_to_ids(w)] for w in ("The", "of", "<unk>", "q", "."))
    with pytest.raises(ValueError, match="no token of two letters"):
        text_mask(tokenizer, "of the")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (dict(facts=()), "no facts"),
        (dict(words=()), "at least one"),
        (dict(words=["Rome"], text="Rome"), "words and text were given"),
        (dict(words=["日"]), "no tokens for it"),
        (dict(others=["Rome"]), "goes with text"),
        (dict(limit=3), "with scorer"),
        (dict(layers=[4]), "0..3"),
        (dict(layers=[1, 1]), "each once"),
        (dict(top=157), "1..156"),
        (dict(top=1), "top >= 2"),
        (dict(top=5, drop=1.0), "drop=1.0"),
        (dict(top=5, chunk=0), "chunk=0"),
    ],
)
def test_a_bad_request_is_refused_with_its_reason(tiny_model, settings, reason):
    with pytest.raises(ValueError, match=reason):
        concept_vectors(tiny_model, **settings)


def test_layers_and_neurons_that_do_not_exist_and_interventions_are_refused(tiny_model):
    with pytest.raises(ValueError, match="layer 4 is not in"):
        project(tiny_model, 4, top=5)
    with pytest.raises(ValueError, match="neuron 64 is not in layer 1"):
        project(tiny_model, 1, [64], top=5)
    shift = Edit(name="s", base="", interventions=(Shift(Site(1, "resid_post"), ((9,),), torch.zeros(1, 32)),))
    with shift.on(tiny_model):
        tiny_model.logits(torch.tensor([[9]]))
        with pytest.raises(ValueError, match="do not show an activation intervention"):
            concept_vectors(tiny_model, words=["Rome"])


def test_noise_on_the_vector_of_a_fact_hurts_that_fact_and_neither_others_nor_do_random_vectors():
    facts, model = planted_facts(), fresh_planted_model()
    before, state = model.hash(), torch.get_rng_state()
    found = noise_effects(model, facts[:1], others=facts[1:], vectors=[(WRITER, 0), (WRITER, 5)])
    assert model.hash() == before and torch.equal(torch.get_rng_state(), state)
    value = {e: found.logprob.values[:, i].tolist() for i, e in enumerate(EFFECTS)}
    assert found.logprob.high is not None
    high = {e: found.logprob.high[:, i].tolist() for i, e in enumerate(EFFECTS)}
    assert value["target"][0] < -1 and high["target - control"][0] < 0 and high["target - other"][0] < 0
    assert high["(target - other) - control"][0] < 0
    assert abs(value["other"][0]) < 0.01 and abs(value["target, control"][0]) < 0.01
    assert abs(value["target"][1]) < 0.01 and value["other"][1] < -0.1
    assert found.recall.values[0, 0] < 0 and found.recall.values[1, 0] == 0
    assert found.ratio == pytest.approx((5.0, 5.0))


def test_the_effect_of_noise_is_that_of_writing_it_into_the_weights_by_hand():
    facts, model = planted_facts(), fresh_planted_model()
    found = concept_causal(model, facts[:2], others=facts[2:5], vectors=[(WRITER, 1)], std=0.1, samples=2, seed=4)
    generator = torch.Generator().manual_seed(zlib.crc32(f"4 {WRITER} 1".encode()))
    queries = make_queries(model.tokenizer, facts[:5], distractors=False)

    def ask(one):
        return per_fact(score(one, queries), queries, facts[:5]).logprob

    change = []
    for _ in range(2):
        noise = 0.1 * torch.randn(64, generator=generator)
        place = (2 + int(torch.randint(31, (1,), generator=generator))) % 32
        row = []
        for unit in (1, place):
            other = fresh_planted_model()
            with torch.no_grad():
                other.held[f"model.layers.{WRITER}.mlp.down_proj.weight"][:, unit] += noise
            row.append(ask(other) - ask(model))
        change.append(torch.stack(row))
    means = [part.mean((0, 2)) for part in torch.stack(change).split([2, 3], 2)]
    (a, b), (c, d) = (mean.tolist() for mean in means)
    wanted = torch.tensor([a, c, b, d, a - b, a - c, (a - c) - (b - d)])
    torch.testing.assert_close(found.values[0], wanted, rtol=1e-4, atol=1e-4)


def test_by_default_the_vectors_are_those_that_promote_the_objects():
    facts = planted_facts()
    found = concept_causal(planted_model(), facts[:1], others=facts[1:4], samples=1)
    assert set(found.labels["vector"][:2]) == {f"L{WRITER} neuron 0", f"L{WRITER} neuron 4"}  # both write Paris
    assert found.low is not None
    assert found.low[:, 0].isnan().all() and not found.low[:, 1].isnan().any()  # one group and one sample


def test_the_interval_covers_the_truth_where_samples_and_facts_both_vary():
    facts = tiny_facts([f"{a} {b}" for a in NAMES for b in ("Lee", "Hill", "Moss")], ["born"])
    generator = torch.Generator().manual_seed(1)
    hits = 0
    for seed in range(60):
        parts = [torch.randn(2, 12, 1, generator=generator) + torch.randn(2, 1, 24, generator=generator) for _ in "ab"]
        mean, low, high = _effects(parts[0], parts[1], facts, facts, seed)
        assert mean[4].item() == pytest.approx((parts[0][0] - parts[0][1]).mean().item(), abs=1e-5)
        hits += int(low[4] <= 0 <= high[4])
    assert hits >= 0.85 * 60


def test_facts_of_the_same_subjects_are_drawn_together_and_those_of_others_are_not():
    names = [f"{name} Lee" for name in NAMES]
    born, works = tiny_facts(names, ["born"]), tiny_facts(names, ["works"])
    change = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(0)).expand(2, 4, 8).contiguous()
    at = EFFECTS.index("target - other")
    _, low, high = _effects(change, change, born, works, 0)
    assert abs(low[at]) < 1e-6 and abs(high[at]) < 1e-6
    _, low, high = _effects(change, change, born, tiny_facts([f"{name} Hill" for name in NAMES], ["works"]), 0)
    assert low[at] < -0.1 and high[at] > 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_noise_lands_on_one_value_vector_and_leaves_no_trace(architecture):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    before, hashed = value_vectors(model, 1, gains=STORED).clone(), model.hash()
    noise = torch.randn(32, generator=torch.Generator().manual_seed(0))
    with noisy(model, 1, 9, noise).on(model):
        change = value_vectors(model, 1, gains=STORED) - before
    torch.testing.assert_close(change[9], noise)
    assert change.norm(dim=1).gt(0).sum() == 1
    assert model.hash() == hashed


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (dict(facts=()), "at least one of each"),
        (dict(others=()), "at least one of each"),
        (dict(others=planted_facts()[:3]), "'Anna' stands among"),
        (dict(std=0.1, ratio=5.0), "give one of them"),
        (dict(ratio=0.0), "must be positive"),
        (dict(samples=0), "must be positive"),
        (dict(vectors=[]), "no vectors"),
        (dict(vectors=[(9, 0)]), "layer 9 is not in"),
        (dict(vectors=[(WRITER, 99)]), "neuron 99"),
        (dict(vectors=[(WRITER, 20)]), "is zero"),
    ],
)
def test_noise_without_a_comparison_or_a_vector_is_refused(settings, reason):
    facts = planted_facts()
    settings = dict(facts=facts[:2], others=facts[2:], vectors=[(WRITER, 0)]) | settings
    with pytest.raises(ValueError, match=reason):
        noise_effects(planted_model(), settings.pop("facts"), **settings)


def test_intrinsic_measures_are_one_for_the_same_vector_and_have_their_closed_forms_after_noise(planted):
    model, _ = planted
    text = "Paris Rome Oslo Bern"
    same = intrinsic(model, model, LAYER, NEURON, text=text, top=CLUSTER)
    assert (same.cosine, same.distance, same.jaccard) == (pytest.approx(1), 0, 1)
    assert same.text_ratio == same.text_kept == 1
    old = value_vectors(model, LAYER, [NEURON])[0]
    ids = [model.tokenizer.convert_tokens_to_ids(w) for w in ("Paris", *FIRMS)]
    noise = 3 * unembedding(model)[ids].sum(0)
    with clone(model) as other, noisy(other, LAYER, NEURON, noise).on(other):
        moved = intrinsic(model, other, LAYER, NEURON, text=text, top=CLUSTER)
        tops = [set(project(m, LAYER, [NEURON], top=CLUSTER).ids[0].tolist()) for m in (model, other)]
    assert moved.distance == pytest.approx(noise.norm().item(), rel=1e-4)
    assert moved.cosine == pytest.approx(torch.cosine_similarity(old, old + noise, dim=0).item(), rel=1e-4)
    assert moved.jaccard == len(tops[0] & tops[1]) / len(tops[0] | tops[1]) < 1
    cities = {model.tokenizer.convert_tokens_to_ids(city) for city in CITIES}
    assert moved.text_ratio == len(tops[1] & cities) / 4 and moved.text_kept == len(tops[0] & tops[1] & cities) / 4
    assert intrinsic(model, model, 0, 0, top=9).text_ratio is None
    with pytest.raises(ValueError, match="do not compare"):
        intrinsic(model, planted_model(), LAYER, NEURON)
