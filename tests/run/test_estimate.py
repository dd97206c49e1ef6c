"""What a dry run says adds up, and nothing is done for it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import vitprune_fast as vp
from vitprune_fast.cli.main import main
from vitprune_fast.config.yamlfile import from_plain
from vitprune_fast.models.open import skeleton
from vitprune_fast.planning import cost
from vitprune_fast.recipes.by_name import named, names
from vitprune_fast.recipes.presets import preset
from vitprune_fast.run.estimate import (
    DataSizes,
    Machine,
    StepEstimate,
    estimate,
    kept_for_backward,
)
from vitprune_fast.run.step import Step

SIZES = DataSizes({"train": 100, "validation": 10, "test": 20}, range(10), 1, (8, 8), 1e5, "tiny")
# a billion multiply-accumulates a second
MACHINE = Machine("a device", 4e9, 0.5, 2, dict.fromkeys(("training", "evaluation"), 5.0), "here")


def found(recipe: str = "standard", **settings: Any) -> dict[str, StepEstimate]:
    """The estimates of the steps of a recipe on the digits' model, trained elsewhere."""
    config = from_plain({"train_dense": False, **settings}, preset("smoke", recipe))
    steps, dense = named(recipe).steps(config), skeleton(config.model)
    return {each.name: each for each in estimate(config, steps, dense, SIZES)}


def test_work_of_the_standard_steps_adds_up() -> None:
    learned = {"epochs": 3, "keep": "best", "loss": ["soft"]}
    steps = found(plan={"macs": 0.5}, distill=learned, score={"samples": 64})
    whole = cost(skeleton(preset("smoke").model)).macs
    half = steps["plan"].model
    assert half is not None and 0.4 * whole < half.macs <= 0.5 * whole
    # weights that nothing provides are learned: a forward and a backward of twice the work
    train, validation = steps["dense"].readings
    assert (train.images, train.macs) == (30 * 100, 3 * whole)
    assert (validation.images, validation.macs) == (30 * 10, whole)
    (scored,) = steps["score"].readings
    assert (scored.images, scored.macs, scored.path) == (64, 2 * whole, "evaluation")
    (swept,) = steps["sweep"].readings
    # all there are
    assert (swept.images, swept.macs) == (100, 2.5 * whole)
    train, validation = steps["distill"].readings
    assert (train.images, train.macs, train.path) == (300, 3 * half.macs + whole, "training")
    # the best is looked for from the start, and the teacher is compared with
    assert (validation.images, validation.macs) == (40, half.macs + whole)
    (tested,) = steps["evaluate"].readings
    # dense, cut, swept and taught
    assert (tested.images, tested.macs) == (20, whole + 3 * half.macs)
    assert not (steps["prune"].readings or steps["report"].readings or steps["data"].readings)
    assert steps["prune"].model == steps["distill"].model == half


def test_hours_are_those_of_what_is_slower() -> None:
    (reading,) = found(score={"samples": 64})["score"].readings
    # 36 s of a device that computes 1e9 a second, and 6.4 s of two cores that read 5 a second
    slow = replace(reading, images=64, macs=36e9 / 64)
    step = StepEstimate("one", True, (slow, replace(slow, macs=0.0)))
    assert slow.seconds(MACHINE) == pytest.approx((36, 6.4))
    assert step.hours(MACHINE, 1) == pytest.approx((36 + 6.4) / 3600)
    assert step.hours(MACHINE, 8) == pytest.approx((36 + 6.4) / 3600 / 8)
    assert step.waits_for(MACHINE) == "device" and step.images("train") == 128
    alone = replace(step, shared=False, readings=step.readings[1:])
    assert alone.hours(MACHINE, 8) == alone.hours(MACHINE, 1) == pytest.approx(6.4 / 3600)
    assert alone.waits_for(MACHINE) == "images"
    # images that lie in memory are read at once
    assert replace(slow, path="").seconds(MACHINE)[1] == 0


def test_masks_count_what_is_live_and_gates_all() -> None:
    whole = cost(skeleton(preset("smoke").model)).macs
    masks = {"macs": 0.5, "shape": "linear", "start": 0.0, "end": 1.0, "every": 1}
    masked = found(masks=masks, distill={"epochs": 30, "alpha": 0.0, "loss": ["soft"]})
    train, _, scored = masked["distill"].readings
    # three quarters on average
    assert train.macs == pytest.approx(3 * 0.75 * whole, rel=0.01)
    assert scored.macs == 2 * whole
    gated = found(gates={"kind": "l1", "epochs": 2, "macs": 0.25}, distill={"epochs": 1})
    train, _ = gated["gates"].readings
    assert (train.images, train.macs) == (200, 4 * whole)
    assert gated["prune"].model is not None
    assert gated["prune"].model.macs == pytest.approx(whole / 4, abs=1)


def test_leaving_out_costs_a_pass_for_every_unit() -> None:
    whole = cost(skeleton(preset("smoke").model)).macs

    def forwards(**score: Any) -> float:
        readings = found(score={"samples": 10, **score})["score"].readings
        return sum(each.macs for each in readings) / whole

    assert forwards(criterion="magnitude", units=["head"]) == 0
    assert forwards(criterion="activation", units=["neuron"]) == 1
    assert forwards(criterion="fisher", draws=3, units=["head"]) == 4
    # 4 blocks of 4 heads, and what comes before a head is computed once
    assert forwards(criterion="kl", units=["head"]) == 1 + 16 / 2


@pytest.mark.parametrize("recipe", names())
def test_every_recipe_can_be_estimated(recipe: str) -> None:
    config = preset("smoke", recipe)
    steps = named(recipe).steps(config)
    made = estimate(config, steps, skeleton(config.model), SIZES)
    assert [each.name for each in made] == [step.name for step in steps]
    assert all(each.known for each in made)
    assert made[-2].name == "evaluate" and made[-2].images("test") == 20
    last = next(each for each in reversed(made) if each.model)
    assert (last.model is not None and last.model.macs < cost(skeleton(config.model)).macs) or (
        "ratio" in recipe
    )


def test_a_step_of_one_s_own_is_not_known() -> None:
    def mine(job: Any, **names: str) -> dict[str, Any]:
        return {}

    config = preset("smoke", "standard")
    (made,) = estimate(config, [Step("mine", mine)], skeleton(config.model), SIZES)
    assert not made.known and made.hours(MACHINE, 1) == 0


def test_what_a_backward_needs_is_counted_once() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = (nn.Linear(8, 8, bias=False) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.one(x.flatten(1)).sigmoid()
            return self.other(hidden) * hidden

    # input, hidden (of three ops) and the last product; weights are there anyway
    assert kept_for_backward(Two(), (8,), torch.float32) == 3 * 8 * 4


def test_imagenet_is_estimated_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--preset", "imagenet", "--recipe", "one-shot", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert not [*tmp_path.iterdir()]
    assert "1,271,167 train, 10,000 validation, 50,000 test images of ImageNet-1k" in text
    lines = [[cell.strip() for cell in re.split("[│┃]", line)] for line in text.splitlines()]
    rows = {cells[0]: cells[1:] for cells in lines if len(cells) > 4}
    assert list(rows)[:4] == ["step", "data", "dense", "score"] and list(rows)[-1] == "all"
    # DeiT-B, and half of it
    assert rows["dense"][:2] == ["17.6", "86.6 M"] and rows["prune"][0] == "8.78"
    assert rows["score"][2] == "5,000" and rows["evaluate"][4] == rows["all"][4] == "50,000"
    for topic in ("data", "memory", "device", "reading", "work"):
        assert re.search(f"^{topic} .*", text, re.MULTILINE)
    assert "an assumption" in text


def test_data_that_is_named_must_be_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = ["--preset", "imagenet", "--data", "folder:nowhere"]
    for words in (["--preset", "images", "--train-dense"], named):
        assert main(["run", *words, "--out", str(tmp_path / "run"), "--dry-run"]) == 2
        assert "the data folder must exist" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_files_say_how_large_they_are(tmp_path: Path) -> None:
    for number in range(24):
        file = tmp_path / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (10, 10)).save(file)
    data = vp.open_data(f"folder:{tmp_path}", image_size=8, channels=3)
    sizes = DataSizes.of(data)
    assert sizes.image_bytes == (tmp_path / "a" / "0.png").stat().st_size
    assert sum(sizes.images.values()) == 24 and sizes.classes == ("a", "b")
    assert DataSizes.of(vp.open_data("digits", image_size=8, channels=1)).image_bytes == 0
