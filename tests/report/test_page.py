"""The result table, the table by form and the page show what a run directory holds, also an older one."""

import json

import pytest

from mech_unlearn.core import LABELS, WORTH
from mech_unlearn.report.figures import draw_figures
from mech_unlearn.report.page import write_report
from mech_unlearn.report.tables import (
    COLUMNS,
    FORM_NAMES,
    cell_text,
    form_lines,
    form_table,
    print_table,
    table,
    verdict_cell,
)


def number(value, **more):
    return {"value": value, "ci": [value - 0.1, value + 0.1], "n": 8, "unit": "share", **more}


def asked(prompt, question):
    recall = {form: number(0.0, chance=0.0, left_out=0) for form in FORM_NAMES}
    recall |= {"prompt": number(prompt, chance=0.0, left_out=0), "question": number(question, chance=0.0, left_out=0)}
    recall["multiple_choice"] = number(0.25, chance=0.25, left_out=3)
    recall["reversed"] = {"value": None, "ci": [None, None], "n": 0, "unit": "share", "reason": "no other subjects"}
    return {"forms": recall, "worst_form": number(question, form="question")}


def row(name, **more):
    shares = dict.fromkeys(LABELS, 0.0) | {"suppressed": 1.0}
    return {"name": name, "truth": None, "verdicts": shares, **dict.fromkeys(COLUMNS), **more}


def test_the_worst_form_stands_in_the_result_table_with_its_name_and_interval():
    header, body = table([row("npo", **asked(0.02, 0.5))])
    cells = dict(zip(header, body[0], strict=True))
    assert cells["worst form"] == "question 0.50 [0.40, 0.60]" and cells["UDS"] == "–"
    assert cell_text(number(0.5, form="heldout"), interval=False) == "held-out 0.50"


def test_the_printed_table_names_the_worst_form(capsys):
    print_table([row("npo", **asked(0.02, 0.5))], "a note")
    words = capsys.readouterr().out.replace("│", " ").split()
    assert "0.50" in words and "question" in words and words[-2:] == ["a", "note"]


def test_the_table_by_form_gives_each_form_and_what_guessing_gives():
    header, body = form_table([row("npo", **asked(0.02, 0.5)), row("of an older run")])
    assert len(body) == 1
    cells = dict(zip(header, body[0], strict=True))
    assert cells["model"] == "npo" and cells["main phrasing"] == "0.02 [-0.08, 0.12]" and cells["reversed"] == "–"
    assert cells["multiple choice"] == "0.25 [0.15, 0.35] (chance 0.25)"
    assert cells["worst form, above chance"].startswith("question 0.50")


def test_lines_by_form_show_before_and_after_and_why_a_form_was_not_asked():
    lines = form_lines(asked(1.0, 0.75), asked(0.02, 0.5))
    assert lines[0] == "recall by form, greedy:"
    by_name = {line.split("  ")[1]: line for line in lines[1:-1]}
    assert "1.000 -> 0.020  (n = 8)" in by_name["main phrasing"] and "0.750 -> 0.500" in by_name["question"]
    assert "(n = 8, chance 0.25, 3 facts left out)" in by_name["multiple choice"]
    assert by_name["reversed"].endswith("not asked: no other subjects")
    assert lines[-1].split() == ["worst", "form", "question", "0.500", "[0.400,", "0.600],", "above", "chance"]


def test_the_page_has_the_forms_where_the_run_has_them_and_is_drawn_without_where_it_has_not(tmp_path):
    for name, text in (("provenance.json", "{}"), ("verdicts.json", "{}"), ("spec.yaml", "command: audit\n")):
        (tmp_path / name).write_text(text)
    title = "Is it still said when asked otherwise?"
    for more, held in ((asked(0.02, 0.5), True), ({}, False)):
        rows = [row("npo", **more)]
        if not more:
            rows[0].pop("worst_form")  # runs made before forms were reported lack the key
        summary = {"command": "audit", "world": None, "seconds": 1, "peak_rss_mib": 1, "rows": rows}
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        page = write_report(tmp_path).read_text()
        assert (title in page) == held and ("question 0.50 [0.40, 0.60]" in page) == held


def test_what_was_lost_without_retrained_models_stands_as_no_verdict_and_not_as_a_share_of_a_label(capsys):
    shares = dict.fromkeys(LABELS, 0.0) | {"undetermined": 0.75, "intact": 0.25}
    assert verdict_cell(row("m", verdicts=shares)) == "undetermined 75%, intact 25%"
    unsaid = row("m", verdicts=shares, no_verdict=0.5)
    assert verdict_cell(unsaid) == "lost in the outputs, no verdict 50%; undetermined 25%, intact 25%"
    print_table([unsaid], "")
    assert "no verdict" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    whole = row("m", verdicts=dict.fromkeys(LABELS, 0.0) | {"undetermined": 1.0}, no_verdict=1.0)
    assert verdict_cell(whole) == "lost in the outputs, no verdict 100%"


def test_a_row_judged_in_sample_is_marked_with_what_the_mark_means_and_no_other_is(tmp_path, capsys):
    for name, text in (("provenance.json", "{}"), ("verdicts.json", "{}"), ("spec.yaml", "command: audit\n")):
        (tmp_path / name).write_text(text)
    for seen in (True, False, None):
        rows = [row("npo", in_sample=seen)]
        assert verdict_cell(rows[0]).endswith("†") == bool(seen)
        print_table(rows, "a note")
        assert ("† in-sample" in capsys.readouterr().out) == bool(seen)
        summary = {"command": "audit", "world": None, "seconds": 1, "peak_rss_mib": 1, "rows": rows}
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        page = write_report(tmp_path).read_text()
        assert ("suppressed 100% †" in page) == ("† in-sample" in page) == bool(seen)


def test_the_page_says_what_its_kind_of_verdict_is_worth_and_both_where_an_older_run_does_not_say(tmp_path):
    for name, text in (("provenance.json", "{}"), ("verdicts.json", "{}"), ("spec.yaml", "command: audit\n")):
        (tmp_path / name).write_text(text)
    for judged, kinds in (("calibrated", {"calibrated"}), ("provisional", {"provisional"}), (None, set(WORTH))):
        rows = [row("npo", **({"judged": judged} if judged else {}))]
        summary = {"command": "audit", "world": None, "seconds": 1, "peak_rss_mib": 1, "rows": rows}
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        page = write_report(tmp_path).read_text()
        for kind, what in WORTH.items():
            assert (f">{kind}</span> {what}" in page) == (kind in kinds)


def finished(folder, rows):
    (folder / "figures").mkdir(parents=True)
    (folder / "cells").mkdir()
    for name, text in (("provenance.json", "{}"), ("verdicts.json", "{}"), ("spec.yaml", "command: audit\n")):
        (folder / name).write_text(text)
    summary = {"command": "audit", "world": None, "seconds": 1, "peak_rss_mib": 1, "rows": rows}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.mark.parametrize("name", ["figures/1_some.png", "summary.json", "verdicts.json", "spec.yaml", "captions.json"])
def test_a_page_holds_what_lies_in_the_folder_and_follows_no_link_out_of_it(tmp_path, name):
    folder, secret = finished(tmp_path / "run", [row("npo")]), tmp_path / "secret"
    secret.write_text((folder / name).read_text() if (folder / name).is_file() else "{}")
    assert write_report(folder).is_file()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(ValueError, match="leads out of"):
        write_report(folder)


def test_figures_are_drawn_of_the_cells_in_the_folder_and_of_no_others(tmp_path):
    folder = finished(tmp_path / "run", [row("../../other")])
    (tmp_path / "other.json").write_text('{"curves": {}}')
    with pytest.raises(ValueError, match="leads out of"):
        draw_figures(folder)


def test_a_damaged_run_is_named_in_one_line(tmp_path):
    folder = finished(tmp_path / "run", [row("npo")])
    (folder / "verdicts.json").write_text('{"full": [')
    with pytest.raises(ValueError, match=r"verdicts\.json: not JSON"):
        write_report(folder)
