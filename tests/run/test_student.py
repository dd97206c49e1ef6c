"""A fresh student of timm, as a step of a recipe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vitprune_fast as vp
from tests.run.conftest import TINY
from vitprune_fast.config.model import ModelConfig, StudentConfig
from vitprune_fast.config.run import RunConfig
from vitprune_fast.data import open_data
from vitprune_fast.errors import InvalidInput
from vitprune_fast.recipes.standard import judged, opened
from vitprune_fast.recipes.start import run
from vitprune_fast.run import steps as do
from vitprune_fast.run.folder import read_metrics
from vitprune_fast.run.inputs import open_weights, student_config

SMALLER = StudentConfig(
    "vit_tiny_patch16_224", {"patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 3}
)


def steps(config: RunConfig) -> list[vp.Step]:
    made, _ = opened(config)
    dense = {"dense": "dense"}
    return [
        *made,
        vp.Step("student", do.student, dense, {"model": "student"}),
        vp.Step("distill", do.distill, {"student": "student", **dense}, {"model": "model"}),
        *judged({"before": "dense", "fresh": "student", "after": "model"})[:1],
    ]


RECIPE = vp.Recipe("fresh", steps)


def test_a_fresh_student_fits_the_data_and_is_taught(tmp_path: Path) -> None:
    # the best of two epochs may be the student as it was
    last = replace(TINY.distill, keep="last")
    config = replace(TINY, student=SMALLER, distill=last, out=tmp_path / "run")
    summary = run(config, recipe=RECIPE)
    model: Any = vp.load(config.out / "student")
    with torch.no_grad():
        assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    data = open_data("digits", image_size=(8, 8), channels=1)
    for seed in (0, 1):
        drawn: Any = open_weights(student_config(SMALLER, data), seed, purpose="student init")
        assert torch.equal(drawn.head.weight, model.head.weight) == (seed == 0)
    after: Any = vp.load(config.out / "model")
    assert not torch.equal(after.head.weight, model.head.weight)

    cost, row = vp.cost(model), summary["fresh"]
    assert (cost.params, cost.macs) == (row["params"], row["macs"])
    assert row["macs"] == summary["after"]["macs"] < summary["before"]["macs"]
    assert {check["stage"] for check in summary["checks"]} >= {"student", "distill"}
    assert "starts from random weights (seed 0)" in summary["assumptions"]["student"]
    assert "budget" not in summary["assumptions"]
    record = json.loads((tmp_path / "run" / "stages" / "student.json").read_text())
    assert record["facts"]["cost"] == {"params": cost.params, "macs": cost.macs}


def test_a_cait_teaches_a_deit_by_the_manifold_of_its_tokens(tmp_path: Path) -> None:
    """Hao et al. 2022, arXiv:2107.01378: without its class token, and with no heads to be cut."""
    args = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 24, "num_heads": 3}
    teacher = ModelConfig("cait_s24_224", {**args, "depth": 2})
    student = StudentConfig("deit_tiny_patch16_224", {**args, "embed_dim": 12, "depth": 1})
    schedule = replace(TINY.distill, epochs=1, loss=("soft", "manifold"))
    config = replace(TINY, model=teacher, student=student, distill=schedule, out=tmp_path / "run")
    summary = run(config, recipe=RECIPE)
    assert summary["after"]["macs"] < summary["before"]["macs"]
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    (epoch,) = (e for e in lines if (e["stage"], e["event"]) == ("distill", "epoch"))
    assert epoch["manifold"] > 0


@pytest.mark.parametrize(
    ("student", "recipe", "sentence"),
    [
        (StudentConfig(), RECIPE, "student must be a model of timm, got ''; give --student NAME"),
        (StudentConfig("deit"), RECIPE, "student must be a model of timm, got 'deit'"),
        (
            StudentConfig(SMALLER.name, {"patch_size": 4}),
            RECIPE,
            r"student must cost fewer MACs than the dense model, got [\d,]+ of .* [\d,]+; choose",
        ),
        (
            replace(SMALLER, args={**SMALLER.args, "num_classes": 9}),
            RECIPE,
            "the head must have 10 classes like digits, got 9",
        ),
        (SMALLER, "standard", "student must come with a recipe that teaches a fresh model"),
    ],
)
def test_a_student_that_cannot_be_taught_is_refused_before_any_work(
    student: StudentConfig, recipe: Any, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        run(replace(TINY, out=tmp_path / "run", student=student), recipe=recipe)
    assert not (tmp_path / "run" / "run.json").exists()
