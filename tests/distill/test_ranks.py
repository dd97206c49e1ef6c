"""Processes that share a training do what one does that accumulates their batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vitprune_fast as vp
from tests.processes import together
from vitprune_fast.distill import DistillConfig, DistillResult, MaskSchedule, distill
from vitprune_fast.errors import InvalidInput
from vitprune_fast.files import read_tensors, write_tensors
from vitprune_fast.testing import random_images, random_vit

WORLD = 2
KINDS = ("plain", "cut", "masks", "gates")


def train(kind: str, accumulate: int, name: str, checkpoints: str | None) -> DistillResult:
    """A short distillation with hidden states, saved as tensors; of a cut, before it and after."""
    model = random_vit(drop_path_rate=0.2, proj_drop_rate=0.1)
    images = random_images(model, 36)
    data = list(zip(images.split(4), (torch.arange(36) % 5).split(4), strict=True))
    data = data[: 8 if kind not in ("plain", "cut") else 9]
    config = DistillConfig(
        epochs=2, warmup_epochs=0, accumulate=accumulate, loss=("soft", "hidden"), mixup=0.4
    )
    more: dict[str, Any] = {}
    if kind == "gates":
        more["gates"] = vp.gates.attach(model, kind="l1")
    if kind == "masks":
        more["masks"] = MaskSchedule(0.6, "linear", end=0.9, every=2, samples=8)
    teacher = random_vit(seed=1, embed_dim=36)
    # a last batch that does not go round is left out
    rest: Any = (teacher, data[:8], data, config)
    result = distill(model, *rest, checkpoint_dir=checkpoints, **more)
    if kind == "cut":
        model = vp.prune(model, vp.Plan.of(vp.describe(model), {"blocks.1.attn.heads": [0, 2]}))
        distill(model, *rest)
    tensors = {n: t.detach() for n, t in model.named_parameters()}
    if kind == "gates":
        tensors |= {f"gates.{n}": t for n, t in more["gates"].state_dict().items() if t.ndim}
    write_tensors(Path(f"{name}.safetensors"), tensors)
    return result


def train_shared(rank: int, kind: str, folder: Path) -> None:
    train(kind, 1, f"{folder}/{rank}", f"{folder}/checkpoints")


def train_until_asked(rank: int, folder: Path) -> tuple[bool, int]:
    """Whether it finished, and how often it asked whether to stop."""
    model, asked = random_vit(), []
    data = [(random_images(model, 4), torch.arange(4))] * 10

    def stop() -> bool:
        asked.append(None)
        return rank == 1 and len(asked) == 1

    config = DistillConfig(epochs=1, warmup_epochs=0, alpha=0.0, log_steps=3)
    checkpoints = folder / "checkpoints"
    result = distill(model, None, data, None, config, checkpoint_dir=checkpoints, stop=stop)
    return result.finished, len(asked)


def train_on_wrong_labels(rank: int, mixup: float) -> tuple[int, str]:
    """How often it asked whether to stop, and what it was refused for."""
    model, asked = random_vit(), []
    data = [(random_images(model, 4), torch.arange(4) + 2 * (number == 3)) for number in range(20)]
    config = DistillConfig(epochs=1, warmup_epochs=0, lr=1e-3, alpha=0.0, log_steps=3, mixup=mixup)
    with pytest.raises(InvalidInput) as refused:
        distill(model, None, data, None, config, stop=lambda: bool(asked.append(None)))
    return len(asked), str(refused.value)


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_wrong_labels_of_one_process_are_refused_by_both_where_both_wait(
    mixup: float, tmp_path: Path
) -> None:
    # seen after the third step, when stop was asked twice; the batch is of the second one
    rule = "distill: labels must lie in 0..4 like the classes of the model, got "
    said = together(WORLD, train_on_wrong_labels, mixup, store=tmp_path / "store")
    assert said == [(2, f"{rule}others in another process"), (2, f"{rule}0..5")]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one_that_accumulates(kind: str, tmp_path: Path) -> None:
    together(WORLD, train_shared, kind, tmp_path, store=tmp_path / "store")
    train(kind, WORLD, str(tmp_path / "alone"), None)
    alone, first, second = (
        read_tensors(tmp_path / f"{name}.safetensors") for name in ("alone", "0", "1")
    )
    assert first.keys() == second.keys() == alone.keys()
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-8, msg=name)
    # one of them writes
    assert len(list((tmp_path / "checkpoints").glob("step-*.json"))) == 2


def test_one_that_is_asked_to_stop_stops_both_where_both_wait(tmp_path: Path) -> None:
    # asked after the first step; the event of the third is where they look at what came of steps
    said = together(WORLD, train_until_asked, tmp_path, store=tmp_path / "store")
    assert said == [(False, 3), (False, 3)]
    names = [path.name for path in (tmp_path / "checkpoints").glob("step-*.json")]
    assert names == ["step-00000003.json"]
