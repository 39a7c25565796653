"""Checkpoints: an interrupted run that goes on gives the same bits, and a checkpoint of another run is refused."""

import json
from dataclasses import dataclass, field, replace
from random import Random

import pytest
import torch
from safetensors.torch import save_file

from mech_unlearn.core import ForgetSet
from mech_unlearn.files import read_tensors
from mech_unlearn.methods import Gu, Klue, Lora, Npo, Srmu, Wagle
from mech_unlearn.training import checkpoint as files
from mech_unlearn.training.around import Around
from mech_unlearn.training.objective import Noise, Objective
from mech_unlearn.training.schedule import Schedule
from mech_unlearn.training.training import trained_edit
from tests.damage import altered
from tests.tiny import tiny_facts

FAST = Schedule(lr=3e-3, epochs=3, batch_size=3)


@dataclass(frozen=True, kw_only=True)
class Skipping:
    """Gradient ascent that leaves out what is forgotten, kept apart so that skipping can be tested by itself."""

    schedule: Schedule = Schedule(
        lr=3e-3, epochs=6, batch_size=3, weight_decay=0.0, skip_forgotten=True, retain_sampling="entity"
    )
    seed: int = 0
    extra: dict = field(default_factory=dict)

    def fit(self, model, forget, retain, around=Around()):  # noqa: B008 - frozen
        objective = Objective(lambda _: lambda now: now.logprob.mean(), retain_weight=1.0)
        return trained_edit("skipping", self, model, forget, retain, objective, around=around)


METHODS = {
    "npo": Npo(schedule=FAST),
    "npo by entity": Npo(schedule=replace(FAST, retain_sampling="entity")),
    "npo one to one": Npo(schedule=replace(FAST, retain_sampling="1:1")),
    "gu over wagle": Gu(base=Wagle(base=Npo(schedule=FAST), rho=0.3), k=2),
    "lora": Lora(base=Npo(schedule=FAST), rank=2),
    "klue": Klue(schedule=replace(FAST, weight_decay=0.0, skip_forgotten=True)),
    "skipping": Skipping(),
    "srmu": Srmu(schedule=FAST, every=2, ema=0.5, alpha=1.0),
    "a last layer without gradient": Npo(schedule=FAST, trainable=r"layers\.[013]\."),
}


@pytest.fixture(scope="module")
def learned():
    """(Model that answers its facts, sets): rows to skip need answers that are there."""
    from mech_unlearn.core import RetainSet
    from mech_unlearn.methods import TaskVector
    from mech_unlearn.model.load import load
    from tests.tiny import tiny_hf, tiny_tokenizer

    forget = ForgetSet(facts=tiny_facts(["Anna Lee", "Ben Hill"]))
    retain = RetainSet(neighbors=tiny_facts(["Cara Moss", "Dan Park", "Eva Reed"]), texts=("Rivers run to the sea .",))
    model = load(tiny_hf("llama"), tokenizer=tiny_tokenizer())
    known = ForgetSet(facts=(*forget.facts, *retain.facts))
    edit = TaskVector(schedule=Schedule(lr=3e-3, epochs=12, batch_size=8, weight_decay=0.0), scale=1.0).fit(
        model, known, retain
    )
    with torch.no_grad():
        for name, delta in edit.deltas.items():
            model.held[name].sub_(delta)
    return model, (forget, retain)


class Cut(Exception):
    """Stands for a power cut."""


def interrupted(monkeypatch, fit, after):
    """Run `fit` until the state has been written `after` times, then cut it within the step that follows."""
    written, step = [0], torch.optim.AdamW.step
    save = files.Saver.save

    def counting(self, *args):
        save(self, *args)
        written[0] += 1

    def cut(self, *args, **kw):
        if written[0] >= after:
            raise Cut
        return step(self, *args, **kw)

    with monkeypatch.context() as patch:
        patch.setattr(files.Saver, "save", counting)
        patch.setattr(torch.optim.AdamW, "step", cut)
        with pytest.raises(Cut):
            fit()


def equal(one, other):
    assert one.deltas.keys() == other.deltas.keys() and one.deltas
    for name in one.deltas:
        a, b = (d if isinstance(d, torch.Tensor) else torch.cat([d.left, d.right.T]) for d in (
            one.deltas[name], other.deltas[name]))  # fmt: skip
        assert torch.equal(a, b), name
    mine, theirs = ({k: v for k, v in e.recipe["report"].items() if k != "seconds"} for e in (one, other))
    assert mine == theirs


@pytest.mark.thorough
@pytest.mark.parametrize("after", (2, 4))
@pytest.mark.parametrize("name", METHODS)
def test_a_run_cut_in_the_middle_goes_on_to_the_same_bits(learned, tmp_path, monkeypatch, name, after):
    model, sets = learned
    method, path = METHODS[name], tmp_path / "deep" / "checkpoint.safetensors"
    whole = method.fit(model, *sets)
    around = Around(checkpoint=path, checkpoint_seconds=0.0)
    interrupted(monkeypatch, lambda: method.fit(model, *sets, around=around), after)
    assert path.is_file() and not path.with_name("checkpoint.safetensors.partial").exists()
    torch.manual_seed(after)  # the caller's random state has no say
    steps = []
    take = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (steps.append(1), take(self, *a, **k))[1])
    equal(method.fit(model, *sets, around=around), whole)
    assert len(steps) == whole.recipe["report"]["steps"] - after
    assert not path.exists()


def test_skipping_leaves_rows_out_so_that_resuming_it_means_something(learned):
    model, sets = learned
    report = Skipping().fit(model, *sets).recipe["report"]
    rows = sum(len(fact.templates) for fact in sets[0].facts)
    assert report["stopped"] == "forgotten" or report["steps"] < 6 * -(-rows // 3)


def test_the_noise_goes_on_where_it_was(learned, tmp_path, monkeypatch):
    model, sets = learned
    method = Npo(schedule=FAST)
    noisy = Around(retain="kl", noise=Noise(1, 0.05, 0))
    whole = method.fit(model, *sets, around=noisy)
    saved = replace(noisy, checkpoint=tmp_path / "c.safetensors", checkpoint_seconds=0.0)
    interrupted(monkeypatch, lambda: method.fit(model, *sets, around=saved), 3)
    equal(method.fit(model, *sets, around=saved), whole)


def test_a_weight_that_has_had_no_gradient_is_restored_too(learned, tmp_path, monkeypatch):
    """Losses on states end the pass after their layer: what lies above has no gradient and no moments."""
    from mech_unlearn.training.rows import BatchScores

    model, sets = learned

    @dataclass(frozen=True, kw_only=True)
    class Low(Skipping):
        schedule: Schedule = replace(Skipping.schedule, skip_forgotten=False, retain_sampling="cyclic")

        def fit(self, model, forget, retain, around=Around()):  # noqa: B008 - frozen
            def loss(now: BatchScores):
                return now.states.now.square().mean()

            objective = Objective(lambda _: loss, retain_weight=0.0, layer=1, logits=False)
            return trained_edit("low", self, model, forget, retain, objective, around=around)

    whole = Low().fit(model, *sets)
    around = Around(checkpoint=tmp_path / "c.safetensors", checkpoint_seconds=0.0)
    interrupted(monkeypatch, lambda: Low().fit(model, *sets, around=around), 3)
    equal(Low().fit(model, *sets, around=around), whole)


def test_a_checkpoint_of_something_else_is_refused_by_name_and_says_what_differs(learned, tmp_path, monkeypatch):
    model, sets = learned
    path = tmp_path / "c.safetensors"
    around = Around(checkpoint=path, checkpoint_seconds=0.0)
    interrupted(monkeypatch, lambda: Npo(schedule=FAST).fit(model, *sets, around=around), 2)
    for method, forget, differs in (
        (Npo(schedule=Schedule(lr=1e-4, epochs=3, batch_size=3)), sets[0], "settings differ"),
        (Gu(base=Npo(schedule=FAST)), sets[0], "settings differ"),
        (Npo(schedule=FAST), ForgetSet(facts=sets[0].facts[:2]), "data set differ"),
    ):
        with pytest.raises(ValueError, match=f"c.safetensors.*{differs}"):
            method.fit(model, forget, sets[1], around=around)
    assert path.exists()
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="cannot be read"):
        Npo(schedule=FAST).fit(model, *sets, around=around)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_gone_on_from_or_refused_by_name_in_one_line(learned, tmp_path, monkeypatch):
    model, sets = learned
    path, random = tmp_path / "c.safetensors", Random(0)
    around = Around(checkpoint=path, checkpoint_seconds=0.0)
    method = Npo(schedule=FAST, trainable=r"layers\.0\.mlp\.down")
    interrupted(monkeypatch, lambda: method.fit(model, *sets, around=around), 2)
    header, tensors = read_tensors(path, "checkpoint")
    state, refused = json.loads(header["state"]), 0
    for _ in range(60):
        save_file(tensors, path, metadata=header | {"state": json.dumps(altered(state, random))})
        try:
            method.fit(model, *sets, around=around)
        except ValueError as error:
            refused += 1
            assert "checkpoint" in str(error) and "\n" not in str(error), error
    assert refused > 20
    save_file({}, path, metadata=header)
    with pytest.raises(ValueError, match="no weight 'model.layers.0.mlp.down_proj.weight'"):
        method.fit(model, *sets, around=around)


def test_a_planted_link_is_not_followed(learned, tmp_path, monkeypatch):
    model, sets = learned
    target, path = tmp_path / "precious", tmp_path / "c.safetensors"
    target.write_text("mine")
    (tmp_path / "c.safetensors.partial").symlink_to(target)
    around = Around(checkpoint=path, checkpoint_seconds=0.0)
    interrupted(monkeypatch, lambda: Npo(schedule=FAST).fit(model, *sets, around=around), 2)
    assert target.read_text() == "mine" and path.exists()


def test_nothing_is_written_before_its_time(learned, tmp_path):
    model, sets = learned
    around = Around(checkpoint=tmp_path / "new" / "c.safetensors", checkpoint_seconds=3600.0)
    equal(Npo(schedule=FAST).fit(model, *sets, around=around), Npo(schedule=FAST).fit(model, *sets))
    assert not (tmp_path / "new").exists()
