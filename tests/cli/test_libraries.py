"""Every verb takes a folder with a model of transformers or torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import vitprune_fast as vp
from vitprune_fast.cli.main import main

# an even number of heads, for which torch has one operation for all of an attention
SIZES = {"layers": 2, "heads": 2, "width": 32, "hidden": 64, "image": 16, "patch": 8, "classes": 10}


def of_transformers() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=SIZES["width"],
        num_hidden_layers=SIZES["layers"],
        num_attention_heads=SIZES["heads"],
        intermediate_size=SIZES["hidden"],
        image_size=SIZES["image"],
        patch_size=SIZES["patch"],
        num_labels=SIZES["classes"],
    )
    return transformers.ViTForImageClassification(config)


def of_torchvision() -> Any:
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=SIZES["image"],
        patch_size=SIZES["patch"],
        num_layers=SIZES["layers"],
        num_heads=SIZES["heads"],
        hidden_dim=SIZES["width"],
        mlp_dim=SIZES["hidden"],
        num_classes=SIZES["classes"],
    )


@pytest.mark.parametrize("build", [of_transformers, of_torchvision])
def test_verbs(build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vp.save(build(), "dense")

    def verb(*words: str) -> None:
        assert main([*words]) == 0, words

    data = ("--data", "digits")
    verb("describe", "--model", "dense")
    verb("score", "--model", "dense", *data, "--out", "scores.safetensors", "--score-samples", "64")
    scores = ("--scores", "scores.safetensors")
    verb("plan", "--model", "dense", *scores, "--macs", "0.6", "--out", "plan.json")
    verb("prune", "--model", "dense", "--plan", "plan.json", "--out", "small")
    verb("prune", "--model", "dense", "--plan", "plan.json", "--out", "swept", *data)
    verb("eval", "--model", "swept", *data)
    verb("bench", "--model", "swept")
    teacher = ("--teacher", "dense", "--epochs", "1", "--out", "taught")
    verb("distill", "--model", "swept", *data, *teacher)
    costs = [vp.cost(vp.load(name)).macs for name in ("dense", "small", "taught")]
    assert costs[1] == costs[2] <= 0.6 * costs[0]
