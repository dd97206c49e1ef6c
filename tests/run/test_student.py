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
from vitprune_fast.config.model import StudentConfig
from vitprune_fast.config.run import RunConfig
from vitprune_fast.errors import InvalidInput
from vitprune_fast.recipes.standard import judged, opened
from vitprune_fast.recipes.start import run
from vitprune_fast.run import steps as do

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
    weights: list[bytes] = []
    # the best of two epochs may be the student as it was
    taught = replace(TINY, student=SMALLER, distill=replace(TINY.distill, keep="last"))
    for name, seed in (("run", 0), ("again", 0), ("other", 1)):
        config = replace(taught, out=tmp_path / name, seed=seed)
        summary = run(config, recipe=RECIPE)
        weights.append((config.out / "student" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]

    model: Any = vp.load(tmp_path / "run" / "student")
    with torch.no_grad():
        assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    cost, row = vp.cost(model), summary["fresh"]
    assert (cost.params, cost.macs) == (row["params"], row["macs"])
    assert row["macs"] == summary["after"]["macs"] < summary["before"]["macs"]
    assert (tmp_path / "other" / "model" / "model.safetensors").read_bytes() != weights[2]
    assert {check["stage"] for check in summary["checks"]} >= {"student", "distill"}
    assert "starts from random weights (seed 1)" in summary["assumptions"]["student"]
    assert "budget" not in summary["assumptions"]
    record = json.loads((tmp_path / "run" / "stages" / "student.json").read_text())
    assert record["facts"]["cost"] == {"params": cost.params, "macs": cost.macs}


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
