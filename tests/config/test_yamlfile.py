from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from vitprune_fast.config.run import PlanConfig, RunConfig
from vitprune_fast.config.yamlfile import from_yaml, to_yaml
from vitprune_fast.errors import InvalidInput
from vitprune_fast.recipes.presets import PRESETS, preset


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
        pytest.param("seed: 2024-13-45", "is not YAML: month must be in 1", id="date"),
        pytest.param("seed: " + "9" * 5000, "is not YAML: Exceeds the limit", id="digits"),
        pytest.param("seed: 0x" + "f" * 5000, "an integer of more than 64 bits", id="hexadecimal"),
        pytest.param("plan: {macs: 1" + "0" * 400 + "}", "more than 64 bits", id="no-float"),
        pytest.param("seed: !!bool perhaps", "is not YAML: 'perhaps'", id="tag"),
        pytest.param("seed: !!timestamp x", "is not YAML", id="no-date"),
        pytest.param("a: &" + "a" * 9999 + " 1\nb: *" + "b" * 9999, "is not YAML", id="long-name"),
        pytest.param("seed: " + "a" * 99999, "config.seed must be an integer, got 'a", id="text"),
        pytest.param("seed: [" + "1," * 9999 + "]", "must be an integer, got [1, 1", id="numbers"),
        pytest.param("s" * 999 + ": 1", "config has no field 'sss", id="long-field"),
        pytest.param("plan: {allocation: " + "b" * 9999 + "}", "one of global", id="long-choice"),
    ],
)
def test_yaml_refuses(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidInput, match=re.escape(sentence)) as caught:
        from_yaml(path, preset("digits"))
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)


def test_yaml_may_use_aliases(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("plan: {macs: &half 0.5}\ndistill: {alpha: *half}\n", encoding="utf-8")
    assert from_yaml(path, preset("digits")).distill.alpha == 0.5


def test_yaml_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot read"):
        from_yaml(tmp_path / "none.yaml", preset("digits"))


def test_budgets_are_half_of_the_macs_or_what_is_given() -> None:
    assert PlanConfig().budget() == {"macs": 0.5}
    assert PlanConfig(params=0.4).budget() == {"params": 0.4}
    both = PlanConfig(macs=0.5, keep={"head": 0.5})
    assert both.budget() == {"macs": 0.5, "keep": {"head": 0.5}}
