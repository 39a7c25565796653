"""Pools: what is made for which group, what a cell must hold to count, and what a folder may be continued with."""

import re

import pytest
import torch

from mech_unlearn.model.load import load
from mech_unlearn.testbed.families import CONTROLS, FAMILIES
from mech_unlearn.testbed.making import ATTENTION, EMBEDDINGS, HEAD, layers, mlp, mlp_out
from mech_unlearn.testbed.pools import _path, output_audit, read_pool
from mech_unlearn.verdict.features import RECOVERY
from tests.tiny import ARCHITECTURES, tiny_hf, tiny_tokenizer


def random_model(architecture):
    return load(tiny_hf(architecture), tokenizer=tiny_tokenizer())


def rows(output):
    return {"rows": [{"output": output}, {"output": output}], "neighbor_recall": 0.9, "general_kl": 0.0}


def test_a_suppressor_that_suppresses_nothing_and_an_intact_model_that_lost_its_answers_fail_the_audit():
    assert all(output_audit("suppressed", rows(0.1)).values())
    assert not all(output_audit("suppressed", rows(0.9)).values())
    assert not all(output_audit("suppressed", {**rows(0.1), "rows": []}).values())
    assert all(output_audit("intact", rows(0.95)).values()) and not all(output_audit("intact", rows(0.5)).values())
    broken = rows(0.0) | {"general_kl": 1.5}
    assert all(output_audit("collapsed", broken).values()) and not all(output_audit("collapsed", rows(0.0)).values())
    assert output_audit("deleted", rows(0.1)) == output_audit("mixture", rows(0.1)) == {}


def test_names_that_differ_in_letters_no_file_name_keeps_have_files_of_their_own(tmp_path):
    names = ["José Ruiz", "Jos Ruiz", "李明", "王芳", "jos ruiz"]
    paths = {_path(tmp_path, "head", name) for name in names}
    assert len(paths) == len(names)
    assert all(re.fullmatch(r"[a-z0-9_]+[.]json", path.name) for path in paths)


def test_cells_that_failed_an_audit_are_left_out_of_a_pool():
    row = dict.fromkeys(RECOVERY, 0.1)
    cell = {"kind": "deleted", "family": "retrained", "cluster": "c", "group": "g", "base": "r", "rows": [row],
            "checks": {"fine": True}}  # fmt: skip
    bad = {**cell, "checks": {"fine": True, "not": False}, "cluster": "d"}
    assert read_pool([cell, bad]).cluster == ("c",)
    assert read_pool([cell, bad], audited=False).cluster == ("c", "d")
    assert read_pool([cell]).base == ("r",)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_parts_that_families_change_are_found_by_their_role_in_every_architecture(architecture):
    model = random_model(architecture)
    last, out, first = (part.names(model) for part in (layers(-1), mlp_out(-1), mlp(0)))
    assert set(out) < set(last) and len(out) == 1
    assert first and all(".0." in name for name in first) and not any("attn" in name for name in first)
    assert {n for n in model.held if f".{model.n_layers - 1}." in n} == set(last)
    if not ATTENTION.lacks(model):
        paths = ATTENTION.names(model)
        assert paths and not set(paths) & set(mlp(model.n_layers - 1).names(model))
    for part, table in ((HEAD, model.hf.get_output_embeddings()), (EMBEDDINGS, model.hf.get_input_embeddings())):
        if not part.lacks(model):
            (name,) = part.names(model)
            assert torch.equal(model.held[name], table.weight)
    pattern = layers(-1).pattern(model)
    assert [n for n in model.held if re.search(pattern, n)] == last


def test_a_model_with_one_matrix_for_both_embeddings_is_spared_the_families_that_need_two():
    models = {name: random_model(name) for name in ARCHITECTURES}
    tied = {name: model for name, model in models.items() if model.hf.config.tie_word_embeddings}
    assert tied
    for model in tied.values():
        lacking = {name for name, family in (FAMILIES | CONTROLS).items() if family.lacks(model)}
        assert lacking >= {"head", "embeddings", "retrained, head", "another full, head"}
        assert not lacking & {"last layer", "first mlp", "retrained", "full, noise"}
