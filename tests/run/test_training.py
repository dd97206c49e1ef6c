"""What `distill` is asked for is checked, and sized, before hours of training a teacher."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vitprune_fast.config.run import DataConfig, GateConfig, MaskConfig, TeacherConfig
from vitprune_fast.data import open_data
from vitprune_fast.distill import DistillConfig
from vitprune_fast.distill.loop import DistillResult
from vitprune_fast.errors import InvalidInput
from vitprune_fast.run import actions
from vitprune_fast.run.actions import Setting
from vitprune_fast.run.profile import choose_profile
from vitprune_fast.run.training import Trainings, learn_gates, teach
from vitprune_fast.testing import random_vit


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """Purpose of every training, and the shape of what its model says about two images."""
    trainings = []

    def train(model: Any, *_: Any, purpose: str, **__: Any) -> Any:
        with torch.no_grad():
            trainings.append((purpose, tuple(model(torch.zeros(2, 1, 8, 8)).shape)))
        return SimpleNamespace(model=model, plan=None, finished=True)

    monkeypatch.setattr(actions, "train", train)
    return trainings


def digits() -> tuple[Any, Setting]:
    """Images of eight pixels a side, and how they are read."""
    return (
        open_data("digits", image_size=8, channels=1),
        Setting(0, choose_profile("cpu"), DataConfig(augment=False, batch_size=32)),
    )


def small_vit() -> Any:
    """One that takes them."""
    sizes: dict[str, Any] = {
        "img_size": 8,
        "patch_size": 4,
        "in_chans": 1,
        "num_classes": 10,
        "depth": 2,
    }
    return random_vit(dtype=torch.float32, **sizes)


def taught(
    *names: str, loss: str = "soft", masks: float | None = None, size: int | None = None
) -> None:
    teach(
        small_vit(),
        DistillConfig(loss=(loss,)),
        Trainings(*digits()),
        teachers=TeacherConfig(names, pretrained=False, size=size),
        gates=GateConfig(),
        masks=MaskConfig(masks),
    )


def test_a_teacher_of_one_size_learns_from_images_of_that_size(seen: list) -> None:
    taught("vit_tiny_patch16_224")
    assert seen == [("teacher-0", (2, 10)), ("distill", (2, 10))]


def test_a_size_is_for_those_who_take_any(seen: list) -> None:
    """The dense model has one of its own."""
    taught("self", "resnet18", size=32)
    assert [purpose for purpose, _ in seen] == ["teacher-1", "distill"]


@pytest.mark.parametrize(
    ("names", "options", "sentence"),
    [
        (["resnet18"], {"loss": "cnn:soft"}, r"name one of the teachers \(resnet18\), got 'cnn"),
        (["resnet18", "resnet18"], {}, "teachers must have a name of their own each"),
        (["resnet18"], {"masks": 2.0}, r"macs must be in \(0, 1\], got 2.0"),
    ],
)
def test_what_cannot_be_is_said_before_a_teacher_is_trained(
    names: list[str], options: dict, sentence: str, seen: list
) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        taught(*names, **options)
    assert not seen


@pytest.mark.parametrize("budget", [False, True])
def test_thresholds_are_learned_where_a_budget_holds_them_down(budget: bool) -> None:
    data, setting = digits()

    def train(student: Any, _: Any, config: Any, *, gates: Any, gate_budget: Any) -> DistillResult:
        assert bool(gates.thresholds) == budget == (gate_budget is not None)
        return DistillResult(student, [], None, None, 0)

    config = GateConfig("ste", macs=0.6, budget=budget)
    gated = learn_gates(
        small_vit(), None, DistillConfig(), train, config, data=data, setting=setting
    )
    # nothing learned, so that thresholds are open still, and a share is what it was
    assert gated.start == gated.end and (gated.end == 1) == budget
    assert gated.result.plan is not None and gated.goal == pytest.approx(0.6, abs=1e-3)
