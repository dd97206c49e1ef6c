"""No step of a training waits for the device; what steps came to is read where it is said to be.

The device is ``far.FAR``, in a process of its own, which is asked for all recipes at once.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vitprune_fast as vp
from vitprune_fast import transfer
from vitprune_fast.distill import DistillConfig, MaskSchedule, distill, optim
from vitprune_fast.distill.task import DistillTask
from vitprune_fast.distill.training_checkpoints import read_newest
from vitprune_fast.errors import InvalidInput, StageFailed
from vitprune_fast.testing import random_images, random_vit

STEPS = 6
INSIDE = ("hidden", "features", "manifold", "manifold_full", "relation")
RECIPES: dict[str, dict[str, Any]] = {
    "labels alone": {"alpha": 0.0, "clip_norm": 0.0},
    "soft": {},
    "hard, layer decay": {"loss": ("hard",), "layer_decay": 0.7},
    "inside": {"loss": INSIDE},
    "mixed": {"mixup": 0.4, "cutmix": 1.0, "label_smoothing": 0.1, "erase": 0.5, "accumulate": 2},
    "average": {"ema": 0.9},
    "momentum": {"optimizer": "sgd", "lr": 1e-2, "ema": 0.9},
    "float16": {"dtype": "float16"},
    "masks": {},
    "gates at random": {},
    "gates by a threshold": {},
    "gates by a share": {},
    "gates that stay": {},
    "labels on the device": {"label_smoothing": 0.1},
    "wrong labels on the device": {},
    "wrong mixed labels on the device": {"mixup": 0.4, "cutmix": 1.0},
    "told": {"log_steps": 3},
    "checkpoints": {"checkpoint_steps": 3},
    "poisoned": {"ema": 0.9},
}
# steps in which something is read, besides the last one; a checkpoint is written on the way to the
# next one
READS = {"masks": {2}, "told": {3}, "checkpoints": {3, 4}}


def half(model: Any, kinds: tuple[str, ...]) -> vp.Plan:
    """Every other unit."""
    structure = vp.describe(model)
    axes = [axis for kind in kinds for axis in structure.units(kind)]
    return vp.Plan.of(structure, {axis.name: range(0, axis.size, 2) for axis in axes})


def more_of(recipe: str, model: Any) -> dict[str, Any]:
    """What a recipe gives besides its config."""
    attach = vp.gates.attach
    if recipe == "masks":
        # fewer dims that make logits: rows are scaled on their way into the copy
        return {
            "masks": MaskSchedule(
                0.5, "one_shot", start=0.2, planner=lambda *_: half(model, ("neuron", "qk_dim"))
            )
        }
    if recipe == "gates at random":
        gates = attach(model, kind="hard_concrete", penalty=1e-3)
        return {"gates": gates, "gate_budget": vp.gates.BudgetLoss(gates, 0.5)}
    if recipe == "gates by a threshold":
        return {"gates": attach(model, kind="ste", thresholds="learned")}
    if recipe == "gates by a share":
        return {"gates": attach(model, kind="ste", keep={"head": 0.0, "neuron": 0.5})}
    if recipe == "gates that stay":
        return {"gates": attach(model, kind="fixed", init=half(model, ("head", "neuron")))}
    return {}


def train(recipe: str, device: torch.device, **options: Any) -> dict[str, Any]:
    """One short training: the waits of each step, and what came out."""
    import far

    there = far.sent_there if device.type == far.FAR else lambda model: model
    settings = {"epochs": 1, "lr": 1e-3, "warmup_epochs": 0, "log_steps": 0, **RECIPES[recipe]}
    config = DistillConfig(**settings)
    dtype = torch.float32 if recipe == "float16" else torch.float64
    model = there(random_vit(dtype=dtype))
    teacher = there(random_vit(seed=1, dtype=dtype, embed_dim=36 if recipe == "inside" else 24))
    count = STEPS * config.accumulate
    images = random_images(random_vit(), 2 * count)
    if recipe == "poisoned":
        images[3] = math.nan
    labels = torch.arange(2 * count) % 5
    if recipe.endswith("labels on the device"):
        labels = (labels + (recipe.startswith("wrong"))).to(device)
    data = list(zip(images.split(2), labels.split(2), strict=True))
    seen, events = [len(far.waits)], []

    def stop() -> bool:
        seen.append(len(far.waits))
        return len(seen) - 1 == options.get("stop_at")

    found: dict[str, Any] = {"error": "", "loss": None}
    try:
        result = distill(
            model,
            teacher,
            data,
            None,
            config,
            checkpoint_dir=options.get("folder"),
            on_event=events.append,
            stop=stop,
            **more_of(recipe, model),
        )
        found["loss"] = result.history[0]["loss"] if result.finished else None
    except InvalidInput as error:
        found["error"] = str(error)
    return {
        **found,
        "waits": [far.waits[a:b] for a, b in pairwise(seen)],
        "skipped": [e["step"] for e in events if e["event"] == "skipped_step"],
        "weights": [
            getattr(p, "near", p).detach().double().norm().item() for p in model.parameters()
        ],
    }


def report() -> None:
    """Train by every recipe on the device; the results as JSON."""
    import far

    device = far.use()
    optim.can_fuse = lambda types: types in ({far.FAR}, {"cpu"})
    transfer.pins = lambda device: device.type == far.FAR
    # the device has no precision but its own; the loss is scaled all the same
    DistillTask.autocast = lambda self: nullcontext()
    for name in ("adam", "sgd"):
        vars(import_module(f"torch.optim.{name}"))["_device_dtype_check_for_fused"] = (
            lambda *_, **__: None
        )
    found = {}
    with far.Far(), tempfile.TemporaryDirectory() as folder:
        for recipe in RECIPES:
            near = train(recipe, torch.device("cpu"))
            written = f"{folder}/{recipe}" if "checkpoint_steps" in RECIPES[recipe] else None
            found[recipe] = {**train(recipe, device, folder=written), "near": near}
        for start, end in (("cpu", far.FAR), (far.FAR, "cpu")):
            there = f"{folder}/{start}"
            optim.can_fuse = lambda types: types == {far.FAR}
            train("soft", torch.device(start), folder=there, stop_at=3)
            found[f"{start} to {end}"] = train("soft", torch.device(end), folder=there)
    print(json.dumps(found))


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    command = [sys.executable, "-c", "from distill.test_waits import report; report()"]
    here = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{here.parent}:{here}"}
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_step_waits_but_where_it_is_read(recipe: str, found: dict[str, Any]) -> None:
    waits = found[recipe]["waits"]
    # before the first one things are set up
    waiting = {number for number, each in enumerate(waits, 1) if each} - {1}
    assert waiting == ({STEPS} | READS.get(recipe, set()) if not found[recipe]["error"] else set())


def _apart(steps: int, lr: float, eps: float) -> float:
    """How far weights may be apart where gradients are equal but for the rounding of their sums.

    Of about a hundred numbers of size 1; a step of Adam is lr at most, and divides a gradient that
    is nothing but rounding by 1e-8.
    """
    return steps * lr * min(1.0, 100 * eps / 1e-8)


def _check_close(got: dict[str, Any], wanted: dict[str, Any], eps: float) -> None:
    # torch chooses other forms of attention for the two
    apart = _apart(STEPS, 1e-3, eps)
    assert got["weights"] == pytest.approx(wanted["weights"], rel=100 * eps, abs=apart)
    assert got["loss"] == pytest.approx(wanted["loss"], rel=100 * eps + apart)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_device_that_is_not_waited_for_trains_alike(recipe: str, found: dict[str, Any]) -> None:
    far, near = found[recipe], found[recipe]["near"]
    assert far["skipped"] == near["skipped"] == ([1] if recipe == "poisoned" else [])
    if recipe.startswith("wrong"):
        assert "labels must lie in 0..4 like the classes of the model, got 1..5" in far["error"]
        return
    _check_close(far, near, 2.0 ** (-23 if recipe == "float16" else -52))


@pytest.mark.parametrize("way", ["cpu to far", "far to cpu"])
def test_a_checkpoint_goes_on_on_another_device(way: str, found: dict[str, Any]) -> None:
    # one side is fused, with its step counts on the device, and the other is not
    _check_close(found[way], found["soft"], 2.0**-52)


# the same loop on the CPU, whose optimizers torch can fuse as well


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "can_fuse", lambda types: True)


def test_what_is_all_on_gpus_is_fused() -> None:
    assert optim.can_fuse({"cuda"})
    assert not any(optim.can_fuse(types) for types in ({"cpu"}, {"cuda", "cpu"}, set()))
    model = random_vit()
    for name in ("adamw", "sgd"):
        config = DistillConfig(optimizer=name)
        made = optim.make_optimizer(model, dict(model.named_parameters()), [], config)
        assert not optim.is_fused(made)


def poisoned(steps: set[int], count: int) -> list[tuple[Tensor, Tensor]]:
    images = random_images(random_vit(), 2 * count)
    for step in steps:
        images[2 * step] = math.nan
    return list(zip(images.split(2), (torch.arange(2 * count) % 5).split(2), strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_left_out_on_the_device_keeps_all_bits(
    optimizer: Any, fused: None, tmp_path: Path
) -> None:
    config = DistillConfig(
        epochs=1,
        lr=1e-2,
        warmup_epochs=0,
        alpha=0.0,
        ema=0.9,
        optimizer=optimizer,
        checkpoint_steps=1,
        log_steps=0,
    )
    model = random_vit()
    stored: list[dict[str, Tensor]] = []

    def note(event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint":
            newest = read_newest(tmp_path)
            assert newest is not None
            stored.append(newest.tensors)

    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = poisoned({0, 2, 3}, 5)
    result = distill(model, None, data, None, config, checkpoint_dir=tmp_path, on_event=note)
    assert result.skipped_steps == 3
    assert all(torch.equal(stored[0][f"model.{name}"], start[name]) for name in start)
    state = [name for name in stored[0] if name.startswith("optimizer.")]
    # no step was counted, and nothing is in the moments
    assert state and all(not stored[0][name].any() for name in state)
    for before, after in ((1, 2), (2, 3)):
        assert all(torch.equal(t, stored[after][name]) for name, t in stored[before].items())
    for before, after in ((0, 1), (3, 4)):
        moved = {n for n, t in stored[before].items() if not torch.equal(t, stored[after][n])}
        assert {name.partition(".")[0] for name in moved} == {"model", "average", "optimizer"}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_fused_is_the_same_training(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DistillConfig(
        epochs=1, lr=1e-2, warmup_epochs=0, alpha=0.0, optimizer=optimizer, max_bad_steps=1
    )
    models = [random_vit(), random_vit()]
    for model, answer in zip(models, (False, True), strict=True):
        monkeypatch.setattr(optim, "can_fuse", lambda types, answer=answer: answer)
        distill(model, None, poisoned({0, 3}, 6), None, config)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=_apart(4, 1e-2, 2.0**-52))


def test_a_loss_scale_is_halved_by_every_step_left_out(fused: None, tmp_path: Path) -> None:
    config = DistillConfig(
        epochs=1, lr=1e-3, warmup_epochs=0, alpha=0.0, dtype="float16", checkpoint_steps=1
    )
    scales, skipped = [], []

    def note(event: dict[str, Any]) -> None:
        if event["event"] == "skipped_step":
            skipped.append(event["step"])
        if event["event"] == "checkpoint":
            newest = read_newest(tmp_path)
            assert newest is not None
            scales.append(newest.state["scaler"]["scale"])

    model, data = random_vit(dtype=torch.float32), poisoned({1, 2}, 4)
    distill(model, None, data, None, config, checkpoint_dir=tmp_path, on_event=note)
    # others overflow for themselves
    assert {1, 2} <= set(skipped) and len(scales) == 4
    assert scales == [2.0 ** (16 - sum(bad <= step for bad in skipped)) for step in range(4)]


def test_a_training_that_tells_nothing_fails_before_the_epoch_ends() -> None:
    config = DistillConfig(
        epochs=1, lr=1e-3, warmup_epochs=0, alpha=0.0, log_steps=0, max_bad_steps=2
    )
    asked: list[None] = []

    def stop() -> bool:
        asked.append(None)
        return False

    data = poisoned({7, 8, 9}, 110)
    with pytest.raises(StageFailed, match=r"got 3 up to step 10 \(loss nan"):
        distill(random_vit(), None, data, None, config, stop=stop)
    assert len(asked) == 99
