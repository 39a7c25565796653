"""What the shipped worlds are for: removals reach their bars, and the demo's verdicts are the truth."""

import json

import pytest

from mech_unlearn.commands.demo import Study, run_demo
from mech_unlearn.commands.options import DemoOptions
from mech_unlearn.edit.edit import clone
from mech_unlearn.locate.lenses.probe_auc import probe_auc
from mech_unlearn.methods import SaeShift
from mech_unlearn.methods.writing import keys
from mech_unlearn.metrics import recall
from mech_unlearn.run import open_run
from mech_unlearn.testbed import WORLDS, open_world

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=WORLDS)
def bench(request, tmp_path_factory):
    run = open_run(tmp_path_factory.mktemp("bench") / "run", {})
    return Study(open_world(request.param), run, seed=0, log=lambda _: None)


@pytest.mark.parametrize("name", ["rocr", "sae_shift"])
def test_what_was_removed_falls_to_chance_on_trained_and_held_out_phrasings_and_neighbours_stay(bench, name):
    facts, retain = bench.world.forget.facts, bench.world.retain
    guess = sum(bench.world.chance[fact.relation] for fact in facts) / len(facts)
    edit = bench.methods[name].fit(bench.full, bench.world.forget, retain)
    assert edit.recipe["report"]["seconds"] <= len(bench.world.forget.entities)
    assert recall(bench.full, facts).value > 0.97
    with clone(bench.full) as model, edit.on(model):
        assert recall(model, facts).value <= guess + 0.05
        assert recall(model, facts, "heldout").value <= guess + 0.05
        assert recall(model, retain.neighbors, "prompt").value >= 0.97


def test_shifted_states_cannot_be_told_from_those_of_unknown_people_and_before_they_could(bench):
    """As an intervention. A fresh probe, on people and contexts it has not seen; no reference takes part."""
    forget, retain = bench.world.forget, bench.world.retain
    edit = SaeShift(sae=bench.sae, mode="hook", shared=8).fit(bench.full, forget, retain)
    used = set(edit.recipe["report"]["references"].values())
    strangers = [entity.name for entity in retain.unknown if entity.name not in used]
    names = [entity.name for entity in forget.entities]
    seen = keys.contexts_of(forget.facts)
    unseen = tuple(dict.fromkeys(form for fact in forget.facts for form in fact.heldout))
    fresh = range(len(seen), len(seen) + len(unseen))

    def auc(model):
        states = [keys.name_states(model, group, (*seen, *unseen), bench.sae.site) for group in (names, strangers)]
        return probe_auc(*states, heldout=fresh)

    guess = sum(bench.world.chance[fact.relation] for fact in forget.facts) / len(forget.facts)
    before = auc(bench.full)
    with clone(bench.full) as model, edit.on(model):
        after = auc(model)
        trained, held = recall(model, forget.facts), recall(model, forget.facts, "heldout")
        kept = recall(model, retain.neighbors, "prompt")
    print(f"{bench.world.name}: {len(names)} names, {len(strangers)} strangers, AUC {before:.3f} -> {after:.3f}")
    print(f"trained {trained}, held-out {held}, neighbours {kept}")
    assert before > 0.95
    assert after <= 0.60
    assert max(trained.value, held.value) <= guess + 0.05
    assert kept.value >= 0.97


@pytest.mark.parametrize("world", WORLDS)
def test_the_demos_verdicts_are_the_truth(world, tmp_path):
    summary = run_demo(DemoOptions(world=world, out=tmp_path / "run"))
    shares = {row["name"]: row["verdicts"] for row in summary["rows"]}
    # a calibrated verdict rules out up to alpha = .05 of each truth by design, and leaves some facts undetermined
    bar = 0.9 if world == "biographies" else 0.95
    assert shares["retrained"]["deleted"] >= bar
    assert shares["last_layer_ascent"]["suppressed"] >= 0.95
    assert shares["last_layer_ascent"]["deleted"] == shares["retrained"]["intact"] == 0
    assert shares["full"]["deleted"] == 0
    assert summary["peak_rss_mib"] <= 4096
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
