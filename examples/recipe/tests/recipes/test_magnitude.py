"""The recipe, done small by the command that a user types."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from tests.run.conftest import TINY, command
from vitprune_fast.cli.main import main
from vitprune_fast.config.run import RunConfig
from vitprune_fast.recipes.presets import preset


def test_its_settings_come_before_the_users() -> None:
    config: RunConfig = preset("digits", "magnitude")
    assert (config.recipe, config.score.criterion) == ("magnitude", "magnitude")


def test_the_smallest_weights_go(tmp_path: Path) -> None:
    words = command(replace(TINY, recipe="magnitude"), tmp_path / "run")
    assert main([*words, "--criterion", "magnitude"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["recipe"] == "magnitude" and summary["teachers"] == []
    assert summary["steps"][2:5] == ["score", "plan", "prune"]
    assert summary["after"]["macs"] <= 0.5 * summary["before"]["macs"]
