"""Taking a latent out costs what a full encode and decode without it costs, nothing else; planted ones are found."""

import pytest
import torch

from mech_unlearn.core import Site
from mech_unlearn.edit.edit import Edit, Shift
from mech_unlearn.locate.latents.ablate_latents import ablate, active_codes, decoder_rows
from mech_unlearn.locate.latents.latent_effects import direct_effect, latent_ablation
from mech_unlearn.model.latents import Sae, load_sae
from mech_unlearn.model.load import load
from mech_unlearn.model.scores import score
from mech_unlearn.model.tokens import make_queries
from mech_unlearn.testbed import open_world
from tests.planted import FORGOTTEN, planted_facts, planted_model, planted_sae
from tests.tiny import ARCHITECTURES, tiny_facts, tiny_hf, tiny_tokenizer

FACTS = tiny_facts(("Anna Lee", "Ben Hill", "Cara Moss"))


def random_sae(kind="standard", d_in=32, place="resid_post", **config):
    """An SAE with random weights; decoder rows of different lengths."""
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    shape = dict(d_in=d_in, d_sae=48, dtype="float32", device="cpu")
    made = StandardSAE(StandardSAEConfig(**shape, **config)) if kind == "standard" else None
    made = made or TopKSAE(TopKSAEConfig(k=6, **shape, **config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        made.W_enc.copy_(torch.randn(d_in, 48, generator=generator) / 4)
        made.W_dec.copy_(torch.randn(48, d_in, generator=generator) * torch.linspace(0.2, 2, 48)[:, None])
        made.b_dec.copy_(torch.randn(d_in, generator=generator))
    return Sae(Site(1, place), made.eval().requires_grad_(False))


def without(sae, h, latents):
    """A full encode and two full decodes: the reference for every ablation."""
    acts = sae.encode(h)
    kept = acts.clone()
    kept[..., list(latents)] = 0
    return h - sae.decode(acts) + sae.decode(kept)


def answer_logprob(model, query, site, change, where):
    """Mean log-probability of the answer's tokens with a plain hook at the subject's last token, or everywhere."""

    def write(x):
        out = x.clone()
        places = [query.span[1] - 1] if where == "subject" else range(1, x.shape[1])  # position 0 is BOS
        for p in places:
            out[0, p] = change(x[0, p])
        return out

    ids = torch.tensor([query.full])
    with torch.no_grad(), model.hooks((site, write)):
        table = model.logits(ids[:, :-1])[0].log_softmax(-1)
    start = len(query.prompt)
    return torch.stack([table[t - 1, ids[0, t]] for t in range(start, ids.shape[1])]).mean().item()


SAES = {
    "standard": lambda: random_sae(),
    "topk": lambda: random_sae("topk"),
    "topk, norms": lambda: random_sae("topk", rescale_acts_by_decoder_norm=True),
}


@pytest.fixture(scope="module")
def model():
    return load(tiny_hf("llama"), tokenizer=tiny_tokenizer())


@pytest.mark.thorough
@pytest.mark.parametrize("where", ["subject", "all"])
@pytest.mark.parametrize("name", SAES)
def test_ablation_is_that_of_a_plain_hook_with_full_encode_and_decode(model, name, where):
    sae = SAES[name]()
    found = direct_effect(model, sae, FACTS, where=where, draws=0)
    queries = make_queries(model.tokenizer, FACTS, "prompt", distractors=False)
    clean = [answer_logprob(model, q, sae.site, lambda h: h, where) for q in queries]
    latents = found.ablation.labels["latent"]
    for j in latents[::9]:
        changed = [answer_logprob(model, q, sae.site, lambda h, j=j: without(sae, h, [j]), where) for q in queries]
        expected = [a - b for a, b in zip(changed, clean, strict=True)]
        assert found.per_fact.values[:, latents.index(j)].tolist() == pytest.approx(expected, abs=2e-5)
    chosen = latents[:5]
    scored = score(model, queries, {sae.site: ablate(model, sae, chosen, where)}).logprob[:, 0]
    both = [answer_logprob(model, q, sae.site, lambda h: without(sae, h, chosen), where) for q in queries]
    assert scored.tolist() == pytest.approx(both, abs=2e-5)
    assert direct_effect(model, sae, FACTS, latents[:2], where=where, draws=0).ablation.values.tolist() == (
        pytest.approx(found.ablation.values[:2].tolist(), abs=1e-6)
    )


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_direct_effect_is_that_of_writing_the_contribution_into_the_last_layer(architecture):
    model, sae = load(tiny_hf(architecture), tokenizer=tiny_tokenizer()), random_sae("topk")
    found = direct_effect(model, sae, FACTS[:2], draws=0)
    queries = make_queries(model.tokenizer, FACTS[:2], "prompt", distractors=False)
    last = Site(model.n_layers - 1, "resid_post")
    for j in found.logit.labels["latent"][::5]:
        logits, logprobs = [], []
        for query in queries:
            ids, seen = torch.tensor([query.prompt]), []
            with torch.no_grad(), model.hooks((sae.site, lambda x, s=seen, q=query: s.append(x[0, q.span[1] - 1]))):
                plain = model.logits(ids)[0, -1]
            added = sae.encode(seen[0])[j] * sae.w_dec[j]
            with (
                torch.no_grad(),
                model.hooks((last, lambda x, a=added: torch.cat([x[:, :-1], x[:, -1:] + a.to(x)], 1))),
            ):
                changed = model.logits(ids)[0, -1]
            token = query.answers[0][0]
            logits.append((changed - plain)[token].item())
            logprobs.append((changed.log_softmax(-1) - plain.log_softmax(-1))[token].item())
        column = found.logit.labels["latent"].index(j)
        assert found.logit.values[column].item() == pytest.approx(sum(logits) / 2, abs=2e-4)
        assert found.logprob.values[column].item() == pytest.approx(sum(logprobs) / 2, abs=2e-4)


def test_the_latents_that_carry_planted_facts_are_needed_and_others_are_not():
    facts = planted_facts()[:FORGOTTEN]
    found = direct_effect(planted_model(), planted_sae(), facts)
    latents = found.ablation.labels["latent"]
    assert latents == (0, 1, 2, 3, 8)  # each name's own axis, and the axis of persons
    for i in range(FORGOTTEN):
        effect = found.per_fact.values[i]
        assert effect[i] < -1.0 and effect[4].abs() < 0.3
        assert (effect[[j for j in range(4) if j != i]] == 0).all()  # not active: nothing to take out
    assert found.active.values.tolist() == [0.25] * 4 + [1.0]
    assert (found.control.values[:4].abs() < 0.1).all()  # instead of the name's axis, as much of the person's
    assert found.control.values[4] < -0.5  # the only other latent is the name's own
    assert (found.logit.values < 0).all()  # the layers above write the answer; here only the final norm shrinks it
    objects = direct_effect(planted_model(), planted_sae(layer=3), facts)
    assert set(objects.logit.labels["latent"]) & {32, 33, 34, 35}
    written = [j for j in objects.logit.labels["latent"] if j >= 32]
    chosen = direct_effect(planted_model(), planted_sae(layer=3), facts, written)
    assert (chosen.logit.values > 0).all() and (chosen.logprob.values > 0).all()


def test_taking_out_several_costs_those_only_and_none_costs_nothing(model):
    sae, x = random_sae("topk", rescale_acts_by_decoder_norm=True), torch.randn(7, 32)
    chosen = [3, 8, 20, 41]
    rows = decoder_rows(sae, chosen)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(x - sae.encode(x)[:, chosen] @ rows, without(sae, x, chosen), atol=1e-5, rtol=1e-5)
    queries = make_queries(model.tokenizer, FACTS, "prompt", distractors=False)
    active = torch.cat([codes.latent for codes in active_codes(model, sae, queries, "subject")]).unique().tolist()
    silent = [j for j in range(48) if j not in active]
    plain, same = (score(model, queries, w).logprob for w in ({}, {sae.site: ablate(model, sae, silent)}))
    assert torch.equal(plain, same)


def test_the_control_takes_away_as_much_of_another_active_latent(model, monkeypatch):
    from mech_unlearn.locate.latents import ablate_latents

    seen = []
    real = ablate_latents.without

    def watch(model, site, queries, pairs, directions):
        seen.append((pairs, directions))
        return real(model, site, queries, pairs, directions)

    monkeypatch.setattr(ablate_latents, "without", watch)
    sae = random_sae("topk")
    found = direct_effect(model, sae, FACTS, draws=2, seed=4)
    rows = decoder_rows(sae, range(48))
    units = rows / rows.norm(dim=1, keepdim=True)
    assert len(seen) == 2 and not torch.equal(seen[0][1], seen[1][1])
    for pairs, directions in seen:
        for pair, direction in zip(pairs, directions, strict=True):
            torch.testing.assert_close(direction.norm(), rows[pair.latent].norm())
            nearest = int((units @ direction).argmax())
            assert nearest != pair.latent and nearest in pair.others
    again = direct_effect(model, sae, FACTS, draws=2, seed=4)
    assert torch.equal(again.control.values, found.control.values)
    few = direct_effect(model, sae, FACTS, found.ablation.labels["latent"])
    assert few.control.values.isnan().all()  # all active latents were named: none is left for a control


def test_phrasings_are_averaged_and_edits_in_force_are_seen(model):
    sae = random_sae("topk")
    tokens = tuple(model.tokenizer("Anna Lee", add_special_tokens=False)["input_ids"])
    edit = Edit(
        name="shift", base=model.hash(), interventions=(Shift(Site(0, "resid_post"), (tokens,), 9 * torch.ones(1, 32)),)
    )
    fact = FACTS[:1]
    both = direct_effect(model, sae, fact, which="templates", draws=0)
    assert both.per_fact.values.shape[0] == 1 and "2 prompts" in both.ablation.note
    with edit.on(model):
        shifted = direct_effect(model, sae, fact, draws=0)
        query = make_queries(model.tokenizer, fact, "prompt", distractors=False)[0]
        j = shifted.ablation.labels["latent"][0]
        clean = answer_logprob(model, query, sae.site, lambda h: h, "subject")
        changed = answer_logprob(model, query, sae.site, lambda h: without(sae, h, [j]), "subject")
    assert shifted.per_fact.values[0, 0].item() == pytest.approx(changed - clean, abs=2e-5)
    assert shifted.ablation.labels != direct_effect(model, sae, fact, draws=0).ablation.labels


def test_an_sae_inside_the_mlp_has_a_total_effect_but_no_direct_one(model):
    sae = random_sae("topk", d_in=64, place="mlp_post")
    found = direct_effect(model, sae, FACTS, draws=1)
    assert found.logit is None and found.logprob is None and found.ablation.values.isfinite().all()


def test_what_cannot_be_taken_out_exactly_is_refused(model):
    sae = random_sae()
    calls = {
        "normalize_activations='layer_norm'": lambda: direct_effect(
            model, random_sae(normalize_activations="layer_norm"), FACTS
        ),
        "constant_norm_rescale": lambda: ablate(model, random_sae(normalize_activations="constant_norm_rescale"), [0]),
        "latents \\[48\\]: name some of 0..47": lambda: direct_effect(model, sae, FACTS, [0, 48]),
        "each once": lambda: ablate(model, sae, [1, 1]),
        "where='last'": lambda: direct_effect(model, sae, FACTS, where="last"),
        "no facts": lambda: direct_effect(model, sae, ()),
        "reads 64 dimensions": lambda: direct_effect(model, planted_sae(), FACTS),
    }
    for reason, call in calls.items():
        with pytest.raises(ValueError, match=reason):
            call()


def test_on_the_shipped_sae_a_latent_alone_costs_little_and_all_active_ones_a_lot():
    world = open_world("biographies")
    full = load(world.full)
    sae, facts = load_sae(world.sae, full), world.forget.facts[:18]
    result = latent_ablation(full, facts, sae=sae, draws=1)
    assert result.axes == ("latent",) and result.n == 18 and "random control" in result.note
    queries = make_queries(full.tokenizer, facts, "prompt", distractors=False)
    plain = score(full, queries).logprob[:, 0]
    gone = score(full, queries, {sae.site: ablate(full, sae, result.labels["latent"])}).logprob[:, 0] - plain
    assert gone.mean() < -2.0 < 10 * result.values.min()
