"""A model that cannot be saved is refused before the work whose result would be saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import vitprune_fast as vp
from vitprune_fast import files
from vitprune_fast.cli.main import main
from vitprune_fast.run import actions, checks, training
from vitprune_fast.structure.families import timm_vit

MODEL = ("--model", "vit_tiny_patch16_224", "--model-args", "img_size=8", "patch_size=4")
SIZES = ("in_chans=1", "embed_dim=24", "num_heads=3", "depth=1", "num_classes=10")


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("prune", "--plan", "plan.json"), id="prune"),
        pytest.param(("distill", "--data", "digits", "--teacher", "self"), id="distill"),
        pytest.param(("run", "--data", "digits", "--train-dense"), id="run"),
    ],
)
def test_verbs_that_save_ask_first(
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("worked before it asked")

    monkeypatch.chdir(tmp_path)
    files.write_json(Path("plan.json"), {})
    # nothing may be named besides the constructor itself
    monkeypatch.setattr(timm_vit, "FAMILY", replace(timm_vit.FAMILY, swaps=()))
    for home, name in ((vp.Plan, "load"), (checks, "prune_and_prove"), (actions, "train")):
        monkeypatch.setattr(home, name, work)
    monkeypatch.setattr(training, "teach", work)
    verb, *rest = words
    assert main([verb, *MODEL, *SIZES, *rest, "--out", "out"]) != 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"{verb}: VisionTransformer must be what its constructor makes, got ValueError" in said
    assert not Path("out", "model.safetensors").exists()
