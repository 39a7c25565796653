"""Each loss against its equation written out token by token; masks, padding, and the limits of its gradient.

Over 300 lines because every loss stands beside its slow twin and its limits.
"""

import math

import pytest
import torch

from mech_unlearn.methods.npo import npo_loss
from mech_unlearn.training.losses import (
    catnip_loss,
    dpo_loss,
    flat_loss,
    gradient_ascent_loss,
    kl_loss,
    least_likely,
    mean_probs,
    shred_loss,
    simnpo_loss,
    undial_loss,
)
from mech_unlearn.training.rows import TrainBatch, batch_scores, predicting

VOCAB = 9
ROWS = [((5, 6, 7, 8), 2), ((5, 6, 7), 2), ((3, 4, 1, 2, 8, 6), 1)]
SHRED = dict(share=0.5, top=4, margin=1.0, anchor=True)
LOSSES = {
    "ascent": lambda s, before: gradient_ascent_loss(s.logprob, s.tokens),
    "npo": lambda s, before: npo_loss(s.logprob, before.logprob, 0.5),
    "simnpo": lambda s, before: simnpo_loss(s.logprob, s.tokens, 2.5, 0.3),
    "dpo": lambda s, before: dpo_loss(s.logprob[:2], before.logprob[:2], s.logprob[1:], before.logprob[1:], 0.3),
    "kl": lambda s, before: kl_loss(before.each.logits, s.each.logits, s.each.at),
    "undial": lambda s, before: undial_loss(before.each.logits, s.each.logits, s.each.wanted, s.each.at, 3.0),
    "flat": lambda s, before: flat_loss(*probs(s)[[0, 0]][:, None], "tv") + flat_loss(*probs(s)[:2, None], "js"),
    "catnip": lambda s, before: catnip_loss(s.each.logits, s.each.wanted, s.each.at, 0.4, 1.5),
    "shred": lambda s, before: shred_loss(before.each.logits, s.each.logits, s.each.wanted, s.each.at, **SHRED),
}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2


def probs(scores):
    return mean_probs(scores.each.logits, scores.each.wanted, scores.each.at)


def lay_out(tables, side="right", extra=0, junk=0):
    """(logits, batch) of `ROWS` with the logits of each row placed beside any amount of padding, which holds `junk`."""
    width = max(len(ids) for ids, _ in ROWS) + extra
    ids = torch.full((len(ROWS), width), junk)
    mask, answer = torch.zeros(len(ROWS), width).long(), torch.zeros(len(ROWS), width).bool()
    logits = noise(len(ROWS), width, VOCAB, seed=99) * 50
    for i, (row, start) in enumerate(ROWS):
        at = width - len(row) if side == "left" else 0
        ids[i, at : at + len(row)] = torch.tensor(row)
        mask[i, at : at + len(row)] = 1
        answer[i, at + start : at + len(row)] = True
        logits[i, at : at + len(row)] = tables[i]
    return logits.requires_grad_(), TrainBatch(ids, mask, answer, torch.arange(len(ROWS)))


def tables(seed):
    return [noise(len(ids), VOCAB, seed=seed + i) for i, (ids, _) in enumerate(ROWS)]


def loss_of(name, **layout):
    """(loss, logits with gradients, batch)"""
    logits, batch = lay_out(tables(0), **layout)
    before, _ = lay_out(tables(50), **layout)
    scores, old = (batch_scores(x[predicting(batch)], batch) for x in (logits, before.detach()))
    loss = LOSSES[name](scores, old)
    loss.backward()
    return loss.detach(), logits.grad, batch


def slow(i, seed=0):
    """[(log-probabilities over the vocabulary as a list, answer token)] of row i, by plain Python."""
    out = []
    ids, start = ROWS[i]
    for t in range(start, len(ids)):
        z = tables(seed)[i][t - 1].tolist()
        top = max(z)
        total = top + math.log(sum(math.exp(v - top) for v in z))
        out.append(([v - total for v in z], ids[t]))
    return out


def sums(seed=0):
    return [sum(logp[x] for logp, x in slow(i, seed)) for i in range(3)]


def means(seed=0):
    return [s / len(slow(i)) for i, s in enumerate(sums(seed))]


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def of_rows(each):
    """Mean over tokens, then over rows, of each(row, position in the answer)."""
    return sum(sum(each(i, t) for t in range(len(slow(i)))) / len(slow(i)) for i in range(3)) / 3


def test_gradient_ascent_is_the_mean_log_probability_per_token():
    assert loss_of("ascent")[0].item() == pytest.approx(sum(means()) / 3, abs=1e-5)


def test_simnpo_follows_its_equation():
    wanted = sum(-(2 / 2.5) * log_sigmoid(2.5 * (-m - 0.3)) for m in means()) / 3
    assert loss_of("simnpo")[0].item() == pytest.approx(wanted, abs=1e-5)


def test_dpo_compares_sums_of_log_probabilities_with_those_of_before():
    gains = [now - old for now, old in zip(sums(0), sums(50), strict=True)]
    wanted = sum(-(2 / 0.3) * log_sigmoid(0.3 * (gains[i] - gains[i + 1])) for i in (0, 1)) / 2
    assert loss_of("dpo")[0].item() == pytest.approx(wanted, abs=1e-4)


def test_kl_runs_from_the_untrained_to_the_trained_model():
    def each(i, t):
        old, new = slow(i, 50)[t][0], slow(i, 0)[t][0]
        return sum(math.exp(a) * (a - b) for a, b in zip(old, new, strict=True))

    assert loss_of("kl")[0].item() == pytest.approx(of_rows(each), abs=1e-4)


def test_undial_is_the_cross_entropy_to_a_target_with_the_answers_logit_lowered():
    def each(i, t):
        old, x = slow(i, 50)[t]
        lowered = [math.exp(v - 3.0 * (v_id == x)) for v_id, v in enumerate(old)]
        return -sum(w / sum(lowered) * b for w, b in zip(lowered, slow(i, 0)[t][0], strict=True))

    assert loss_of("undial")[0].item() == pytest.approx(of_rows(each), abs=1e-4)


def conjugates():
    """divergence -> (g, f*) as the paper lists them."""
    return {
        "tv": (lambda v: math.tanh(v) / 2, lambda u: u),
        "kl": (lambda v: v, lambda u: math.exp(u - 1)),
        "js": (lambda v: math.log(2) - math.log(1 + math.exp(-v)), lambda u: -math.log(2 - math.exp(u))),
        "pearson": (lambda v: v, lambda u: u * u / 4 + u),
    }


@pytest.mark.parametrize("divergence", conjugates())
def test_flat_is_built_from_g_and_the_conjugate_of_each_divergence(divergence):
    g, conjugate = conjugates()[divergence]
    template, forget = [0.1, 0.7], [0.9, 0.2]
    wanted = sum(-g(e) + conjugate(g(f)) for e, f in zip(template, forget, strict=True)) / 2
    got = flat_loss(torch.tensor(template), torch.tensor(forget), divergence)
    assert got.item() == pytest.approx(wanted, abs=1e-6)


def test_flat_takes_the_mean_probability_over_answer_tokens_only():
    logits, batch = lay_out(tables(0), extra=7)
    wanted = [sum(math.exp(logp[x]) for logp, x in slow(i)) / len(slow(i)) for i in range(3)]
    torch.testing.assert_close(
        probs(batch_scores(logits[predicting(batch)], batch)), torch.tensor(wanted), atol=1e-5, rtol=1e-5
    )


def test_catnip_weighs_each_token_by_confidence_and_compares_it_with_its_strongest_rival():
    total = 0.0
    for i in range(3):
        for logp, x in slow(i):
            rival = max(v for token, v in enumerate(logp) if token != x)
            weight = math.exp(logp[x]) ** 1.5
            total += weight * math.log(1 + (math.exp(logp[x]) / math.exp(rival)) ** 0.4)
    assert loss_of("catnip")[0].item() == pytest.approx(2 / 0.4 * total / 3, abs=1e-4)


def test_shred_is_the_top_k_kl_to_a_target_in_which_the_least_likely_tokens_are_demoted():
    def each(i, t):
        order = sorted(range(len(slow(i))), key=lambda s: slow(i, 50)[s][0][slow(i, 50)[s][1]])
        demoted = order.index(t) < math.ceil(0.5 * len(order))
        (old, x), new = slow(i, 50)[t], slow(i, 0)[t][0]
        ranked = sorted(range(VOCAB), key=lambda v: -old[v])
        kept = [x, *(v for v in ranked if v != x)][:4] if demoted else ranked[:4]
        z = {v: old[v] for v in kept}
        if demoted:
            z[x] = min(old[x], min(old[v] for v in kept if v != x) - 1.0)
        target = {v: math.exp(z[v]) / sum(map(math.exp, z.values())) for v in kept}
        found = {v: math.exp(new[v]) / sum(math.exp(new[u]) for u in kept) for v in kept}
        return sum(target[v] * math.log(target[v] / found[v]) for v in kept)

    assert loss_of("shred")[0].item() == pytest.approx(of_rows(each), abs=1e-4)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("layout", (dict(extra=5), dict(side="left"), dict(side="left", extra=3), dict(junk=-100)))
def test_padding_on_either_side_and_ignored_labels_change_nothing(name, layout):
    """-100 stands where no answer token does: were it looked up, the loss or its gradient would differ or fail."""
    assert loss_of(name, **layout)[0].item() == pytest.approx(loss_of(name)[0].item(), abs=1e-5)
    _, grad, batch = loss_of(name, **layout)
    predicts = torch.cat([batch.answer[:, 1:], torch.zeros(len(ROWS), 1).bool()], 1)
    assert not grad[~predicts].any()
    assert torch.isfinite(grad).all()


def test_a_kl_over_all_positions_depends_on_padding_and_ours_does_not():
    def everywhere(**layout):
        now, old = (lay_out(tables(seed), **layout)[0].log_softmax(-1) for seed in (0, 50))
        return (old.exp() * (old - now)).sum(-1).mean().item()

    def ours(**layout):
        return loss_of("kl", **layout)[0].item()

    assert abs(everywhere(extra=20) - everywhere()) > 0.1
    assert ours(extra=20) == pytest.approx(ours(), abs=1e-5)


def gradient(loss, logprob):
    logprob = logprob.clone().requires_grad_()
    loss(logprob).backward()
    return logprob.grad


def test_npo_and_dpo_start_with_the_gradient_of_ascent_on_the_sum():
    reference, other = torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -5.0])
    ascent = torch.full((2,), 0.5)
    torch.testing.assert_close(gradient(lambda x: npo_loss(x, reference, 0.1), reference), ascent)
    torch.testing.assert_close(gradient(lambda x: dpo_loss(other, other, x, reference, 0.1), reference), ascent)
    torch.testing.assert_close(gradient(lambda x: dpo_loss(x, other, reference, reference, 0.1), other), -ascent)


def test_npo_far_from_its_reference_becomes_ascent_only_as_beta_vanishes():
    far, reference = torch.tensor([-9.0, -6.0]), torch.zeros(2)
    torch.testing.assert_close(
        gradient(lambda x: npo_loss(x, reference, 1e-5), far), torch.full((2,), 0.5), atol=1e-4, rtol=0
    )
    assert (gradient(lambda x: npo_loss(x, reference, 1.0), far) < 0.01).all()


def test_simnpos_gradient_fades_with_the_nll_per_token_and_becomes_ascent_as_beta_vanishes():
    likely = torch.tensor([-0.1, -2.0, -8.0])
    tokens = torch.tensor([1, 2, 2])

    def weights(beta):
        return 3 * tokens * gradient(lambda x: simnpo_loss(x, tokens, beta, 0.0), likely)

    torch.testing.assert_close(weights(1e-5), torch.ones(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(weights(2.0), 2 * torch.sigmoid(2.0 * likely / tokens))
    assert weights(2.0)[0] > weights(2.0)[1] > weights(2.0)[2]


def test_undial_is_at_rest_where_the_answers_logit_is_lowered_and_kl_where_nothing_changed():
    before, wanted, at = noise(4, VOCAB), torch.tensor([1, 2, 3, 4]), torch.tensor([0, 0, 1, 1])
    done = before.clone()
    done[torch.arange(4), wanted] -= 3.0
    assert gradient(lambda x: undial_loss(before, x, wanted, at, 3.0), done).abs().max() < 1e-6
    pulled = gradient(lambda x: undial_loss(before, x, wanted, at, 3.0), before)
    assert (pulled[torch.arange(4), wanted] > 0).all()
    assert kl_loss(before, before, at) == 0
    assert gradient(lambda x: kl_loss(before, x, at), before).abs().max() < 1e-6


def with_probability(p, rival):
    """Logits of one token each: the answer (token 0) has probability p, the strongest other (token 1) `rival`."""
    rest = (1 - p - rival) / (VOCAB - 2)
    return torch.tensor([[p, rival, *[rest] * (VOCAB - 2)]]).log()


def test_catnip_hardly_notices_filler_tokens_without_confidence():
    sure = [with_probability(0.9, 0.05), with_probability(0.8, 0.1), with_probability(0.7, 0.2)]

    def norm(fillers, kappa):
        logits = torch.cat([*sure, *[with_probability(1e-3, 0.5)] * fillers])
        wanted = torch.zeros(len(logits), dtype=torch.long)
        return gradient(lambda x: catnip_loss(x, wanted, torch.zeros_like(wanted), 0.1, kappa), logits).norm()

    assert abs(norm(40, 1.0) / norm(0, 1.0) - 1) < 0.05
    assert abs(norm(40, 0.0) / norm(0, 0.0) - 1) > 0.2


def test_catnip_becomes_weighted_ascent_as_beta_vanishes_and_fades_with_confidence():
    logits = torch.cat([with_probability(0.9, 0.05), with_probability(0.3, 0.4)])
    wanted, at = torch.zeros(2, dtype=torch.long), torch.arange(2)
    got = gradient(lambda x: catnip_loss(x, wanted, at, 1e-5, 1.0), logits)
    confidence = torch.tensor([0.9, 0.3])
    ascent = gradient(lambda x: (confidence * x.log_softmax(1)[:, 0]).mean(), logits)
    torch.testing.assert_close(got, ascent, atol=1e-4, rtol=0)
    faint = torch.cat([with_probability(1e-4, 0.5)] * 2)  # all answers of a batch are gone: nothing pushes on
    assert gradient(lambda x: catnip_loss(x, wanted, at, 1.0, 1.0), faint).norm() < 1e-3


def test_shred_demotes_the_least_likely_tokens_and_only_anchors_the_others():
    before, at = noise(6, VOCAB), torch.tensor([0, 0, 0, 1, 1, 1])
    wanted = before.argsort(1)[:, -2]
    logprob = before.log_softmax(1)[torch.arange(6), wanted]
    chosen = least_likely(logprob, at, 0.3)
    assert all(
        chosen[at == row].tolist() == (logprob[at == row] == logprob[at == row].min()).tolist() for row in (0, 1)
    )
    assert least_likely(logprob, at, 1.0).all()

    def pull(now, anchor):
        settings = dict(share=0.3, top=5, margin=1.0, anchor=anchor)
        return gradient(lambda x: shred_loss(before, x, wanted, at, **settings), now)

    start = pull(before, True)
    assert start[~chosen].abs().max() < 1e-6  # an anchor is at rest where the model starts
    assert (start[chosen, wanted[chosen]] > 0).all()
    moved = before + noise(6, VOCAB, seed=5)
    assert pull(moved, True)[~chosen].abs().max() > 0.01
    assert not pull(moved, False)[~chosen].any()  # without anchors they are no part of the loss


def test_shred_pushes_an_answer_down_that_is_not_among_the_likeliest_tokens():
    before = torch.arange(VOCAB).float()[None]
    grad = gradient(
        lambda x: shred_loss(
            before, x, torch.tensor([0]), torch.tensor([0]), share=1.0, top=3, margin=1.0, anchor=True
        ),
        before + 20 * (torch.arange(VOCAB) == 0),
    )
    assert grad[0, 0] > 0.5
