"""The state of a training run: the states it hands on, the noise, what is counted, and rows in place of the facts'."""

import dataclasses

import pytest
import torch

from mech_unlearn.model.load import load
from mech_unlearn.training.around import PLAIN
from mech_unlearn.training.objective import Noise, Objective
from mech_unlearn.training.rows import answer_rows, collate, nll
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.state_losses import held
from mech_unlearn.training.training import _trainee, train
from tests.tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer

CPU = torch.device("cpu")
ROWS = [((2, 5, 6, 7, 8), 3), ((2, 9, 10), 2), (tuple(range(2, 20)), 9)]
SCHEDULE = Schedule(lr=1e-3, epochs=1, batch_size=2, weight_decay=0.0, clip=1.0)


def started(model, objective, noise=None, rows=ROWS):
    return _trainee(model, rows, rows, objective, "", dataclasses.replace(PLAIN, noise=noise))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_are_those_after_the_layer_at_every_real_token_but_the_first_and_no_pad(architecture):
    model = load(tiny_hf(architecture), tokenizer=tiny_tokenizer())
    run = started(model, Objective(lambda _: nll, 1.0, teacher=True, layer=2))
    scores = run.forward(ROWS, [2, 0], teacher=True)
    states = scores.states
    assert states.ids.tolist() == [*ROWS[2][0][1:], *ROWS[0][0][1:]]
    assert states.at.tolist() == [0] * 17 + [1] * 4
    assert states.answer.tolist() == [False] * 8 + [True] * 9 + [False] * 2 + [True] * 2
    for row, (ids, _) in enumerate((ROWS[2], ROWS[0])):
        seen = []
        with model.hooks(("blocks.2.hook_resid_post", seen.append)):
            model.logits(torch.tensor([ids]))
        torch.testing.assert_close(states.now[states.at == row], seen[0][0, 1:], atol=1e-4, rtol=1e-4)
    assert torch.equal(states.now.detach(), states.before) and states.now.requires_grad


def test_a_forward_pass_ends_after_the_layer_where_no_logits_are_read(tiny_model):
    for logits, deepest in ((True, 3), (False, 1)):
        run = started(tiny_model, Objective(lambda _: held, 1.0, teacher=True, layer=1, logits=logits))
        ran = []
        for layer in range(4):
            run.block(layer).register_forward_pre_hook(lambda *_, layer=layer, ran=ran: ran.append(layer))
        run.forward(ROWS, [0, 1], teacher=False)
        assert max(ran) == deepest
    assert run.forward(ROWS, [0], teacher=False).states.now.requires_grad


def noise_on(model, nu, seed=0, layer=1, rows=(0, 1, 2)):
    """(What the noise adds, the clean states) at the real tokens of some rows."""
    run = started(model, Objective(lambda _: nll, 1.0, retain=held, layer=layer), Noise(layer, nu, seed))
    clean = run.forward(ROWS, list(rows), teacher=True).states.before
    noisy = run.forward(ROWS, list(rows), teacher=True, noise=run.noise).states.before
    return noisy - clean, clean


def test_noise_has_the_stated_share_of_the_mean_square_and_no_pad_changes_that(tiny_model):
    shares = []
    for seed in range(20):
        added, clean = noise_on(tiny_model, 0.04, seed)
        shares.append((added.square().mean() / clean.square().mean()).item())
    assert sum(shares) / 20 == pytest.approx(0.04, rel=0.05)
    # a batch with long rows holds many pads; counted in, they would change the variance of a short row's noise
    run = started(tiny_model, Objective(lambda _: nll, 1.0, retain=held, layer=1), Noise(1, 1.0, 0))
    seen = []
    run.frozen.model.layers[1].register_forward_hook(
        lambda _, __, out: seen.append(out[0] if type(out) is tuple else out)
    )
    batch = collate(ROWS, [0, 1, 2], 0, CPU)
    run.forward(ROWS, [0, 1, 2], teacher=True)
    ordinary = batch.mask.bool() & (torch.arange(batch.mask.shape[1]) > 0)
    real, every = seen[0][ordinary].square().mean(), seen[0].square().mean()
    drawn = torch.randn(seen[0].shape, generator=torch.Generator().manual_seed(0))
    added = run.forward(ROWS, [0, 1, 2], teacher=True, noise=run.noise).states.before - seen[0][ordinary]
    torch.testing.assert_close(added, (drawn * real.sqrt())[ordinary], atol=1e-3, rtol=1e-3)
    assert abs(every / real - 1) > 0.005


def test_noise_comes_from_its_seed_and_none_is_none(tiny_model):
    one, again, other, none = (
        noise_on(tiny_model, nu, seed)[0] for nu, seed in ((0.1, 0), (0.1, 0), (0.1, 1), (0.0, 0))
    )
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert none.abs().max() == 0


def test_the_model_in_training_never_gets_noise(tiny_model):
    run = started(tiny_model, Objective(lambda _: nll, 1.0, retain="kl"), Noise(1, 0.5, 0))
    clean = run.forward(ROWS, [0, 1], teacher=False).logprob
    torch.testing.assert_close(run.forward(ROWS, [0, 1], teacher=True, noise=run.noise).logprob, clean)
    assert run.retain_loss([0, 1]).item() > 1e-4


@pytest.mark.parametrize(
    ("objective", "noise", "message"),
    (
        (Objective(lambda _: held, 1.0, layer=4, logits=False), None, "reads layer 4; the model has layers 0..3"),
        (Objective(lambda _: nll, 1.0, retain="kl"), Noise(7, 0.1, 0), "noise at layer 7"),
        (Objective(lambda _: nll, 0.0, retain="kl"), Noise(1, 0.1, 0), "give the base a retain_weight"),
        (Objective(lambda _: held, 1.0, retain=held, layer=1, logits=False), Noise(2, 0.1, 0), "has no effect"),
    ),
)
def test_what_would_have_no_effect_is_refused(tiny_model, objective, noise, message):
    with pytest.raises(ValueError, match=message):
        started(tiny_model, objective, noise)


def test_given_rows_are_trained_in_place_of_the_facts_and_recall_is_still_the_facts(tiny_model, tiny_sets):
    seen = []

    def loss(scores):
        seen.extend(scores.states.ids.tolist())
        return scores.states.now.square().mean()

    given = [((2, 9, 10, 11), 3)] * 3
    objective = Objective(lambda _: loss, 1.0, rows=given, layer=1, logits=False)
    for some, wanted in ((objective, {9, 10, 11}), (dataclasses.replace(objective, rows=()), None)):
        seen.clear()
        _, report = train(tiny_model, *tiny_sets, some, SCHEDULE, trainable="", seed=0)
        rows = answer_rows(tiny_model.tokenizer, tiny_sets[0].facts)
        assert set(seen) == (wanted or {token for ids, _ in rows for token in ids[1:]})
        assert report["steps"] == (2 if wanted else len(rows) // 2)
        assert report["forget_recall"] in {i / len(rows) for i in range(len(rows) + 1)}
