from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vitprune_fast.errors import InvalidInput
from vitprune_fast.recipes.config import PlanConfig, RunConfig
from vitprune_fast.recipes.presets import PRESETS, preset
from vitprune_fast.recipes.yamlfile import differences, from_yaml, to_yaml


@pytest.mark.parametrize("name", PRESETS)
def test_yaml_reads_back_what_was_written(name: str, tmp_path: Path) -> None:
    config = replace(preset(name), plan=PlanConfig(keep={"head": 0.5}), out=tmp_path / "a b")
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert from_yaml(path, RunConfig()) == config


def test_yaml_changes_only_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("seed: 3\ndistill: {lr: 1e-3}\nplan: {macs: 0.25}\n", encoding="utf-8")
    config = from_yaml(path, preset("digits"))
    assert (config.seed, config.distill.lr, config.plan.macs) == (3, 1e-3, 0.25)
    assert config.model == preset("digits").model
    assert config.distill == replace(preset("digits").distill, lr=1e-3)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        pytest.param("sead: 1", "config has no field 'sead'; did you mean seed", id="unknown"),
        pytest.param(
            "plan: {macs: half}", "config.plan.macs must be a number, got 'half'", id="kind"
        ),
        pytest.param("seed: true", "config.seed must be an integer, got True", id="bool-as-int"),
        pytest.param("plan: {allocation: best}", "must be one of global, uniform", id="choice"),
        pytest.param("score: {units: head}", "config.score.units must be a list", id="not-a-list"),
        pytest.param(
            "plan: 3", "config.plan must be a mapping of fields, got 3", id="not-a-mapping"
        ),
        pytest.param("- 1", "config must be a mapping of fields", id="list"),
        pytest.param("a: [", "is not YAML", id="broken"),
        pytest.param("a: !!python/object/apply:os.getcwd []", "is not YAML", id="code"),
    ],
)
def test_yaml_refuses(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidInput, match=sentence.replace("(", r"\(").replace(".", r"\.")):
        from_yaml(path, preset("digits"))


def test_yaml_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot read"):
        from_yaml(tmp_path / "none.yaml", preset("digits"))


def test_differences_name_the_leaf_and_both_values() -> None:
    before = {"plan": {"macs": 0.5, "keep": {}}, "seed": 0}
    after = {"plan": {"macs": 0.4, "keep": {}}, "seed": 0, "device": "cpu"}
    assert differences(before, after) == ["plan.macs: 0.5 -> 0.4", "device: absent -> cpu"]
    assert differences(before, before) == []


def test_two_budgets_are_refused() -> None:
    assert PlanConfig().budget() == {"macs": 0.5}
    assert PlanConfig(params=0.4).budget() == {"params": 0.4}
    with pytest.raises(InvalidInput, match="one budget, got macs and params"):
        PlanConfig(macs=0.5, params=0.4).budget()
