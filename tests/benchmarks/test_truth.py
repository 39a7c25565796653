"""A bench on models whose truth is known: the benchmark's number falls alike, the verdict tells the two apart."""

# ruff: noqa: F811 - fixtures are imported, and asked for by name

import json

import pytest

from tests.checkpoints import table_of


@pytest.mark.slow
@pytest.mark.parametrize(("unlearned", "label"), [("late", "suppressed"), ("gone", "deleted")])
def test_the_benchmark_sees_both_as_forgotten_and_the_verdict_tells_suppressed_from_deleted(
    call,
    planted_checkpoints,
    tmp_path,
    unlearned,
    label,
):
    words = ["bench", "rwku", "--data", planted_checkpoints / "probes.json", "--set", "layout={question}", "--json"]
    words += [
        "--full",
        planted_checkpoints / "full",
        "--unlearned",
        planted_checkpoints / unlearned,
        "--out",
        tmp_path / "run",
    ]
    words += [word for k in (1, 2, 3) for word in ("--retrained", planted_checkpoints / f"retrained_{k}")]
    status, out, err = call(*words)
    assert status == 0, err
    found = json.loads(out)
    table, verdicts = table_of(found), {row["name"]: row for row in found["restoration"]}
    said = table["Form prompt: probability"]
    assert said["unlearned"]["value"] < 0.5 * said["full"]["value"], said
    assert verdicts[f"verdict {label}"]["unlearned"]["value"] == 1
    assert verdicts["verdict intact"]["full"]["value"] == 1
    assert verdicts["verdict deleted"]["retrained_1"]["value"] == 1
    assert verdicts["UDS"]["full"]["value"] == pytest.approx(0, abs=0.05)
