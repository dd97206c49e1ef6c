"""Processes that share a training do what one does that accumulates their batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vitprune_fast as vp
from vitprune_fast.distill import DistillConfig, DistillResult, MaskSchedule, distill
from vitprune_fast.files import read_tensors, write_tensors
from vitprune_fast.testing import random_images, random_vit

WORLD = 2
KINDS = ("plain", "masks", "gates")

WORKER = """
import sys
import torch
from torch import distributed as dist
from distill.test_ranks import train

rank, folder, kind = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
train(kind, 1, f"{folder}/{rank}", f"{folder}/checkpoints")
dist.destroy_process_group()
"""


def train(kind: str, accumulate: int, name: str, checkpoints: str | None) -> DistillResult:
    """A short distillation with hidden states, saved as tensors."""
    model = random_vit(drop_path_rate=0.2, proj_drop_rate=0.1)
    images = random_images(model, 36)
    data = list(zip(images.split(4), (torch.arange(36) % 5).split(4), strict=True))
    data = data[: 8 if kind != "plain" else 9]
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
    result = distill(model, teacher, data[:8], data, config, checkpoint_dir=checkpoints, **more)
    tensors = {n: t.detach() for n, t in model.named_parameters()}
    if kind == "gates":
        tensors |= {f"gates.{n}": t for n, t in more["gates"].state_dict().items() if t.ndim}
    write_tensors(Path(f"{name}.safetensors"), tensors)
    return result


def run(code: str, folder: Path, *words: str) -> list[str]:
    """What each of two processes prints."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(folder), *words],
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2]}:."},
        )
        for rank in range(WORLD)
    ]
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    return [output for output, _ in said]


ASKED = """
import sys
import torch
from torch import distributed as dist
from vitprune_fast.distill import DistillConfig, distill
from vitprune_fast.testing import random_images, random_vit

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
model, asked = random_vit(), []
data = [(random_images(model, 4), torch.arange(4))] * 10

def stop():
    asked.append(None)
    return rank == 1 and len(asked) == 1

config = DistillConfig(epochs=1, warmup_epochs=0, alpha=0.0, log_steps=3)
result = distill(model, None, data, None, config, checkpoint_dir=f"{folder}/checkpoints", stop=stop)
dist.destroy_process_group()
print(result.finished, len(asked))
"""


WRONG = """
import sys
import torch
from torch import distributed as dist
from vitprune_fast.distill import DistillConfig, distill
from vitprune_fast.errors import InvalidInput
from vitprune_fast.testing import random_images, random_vit

rank, folder, mixup = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
model, asked = random_vit(), []
data = [(random_images(model, 4), torch.arange(4) + 2 * (number == 3)) for number in range(20)]
config = DistillConfig(epochs=1, warmup_epochs=0, lr=1e-3, alpha=0.0, log_steps=3, mixup=mixup)
try:
    distill(model, None, data, None, config, stop=lambda: bool(asked.append(None)))
except InvalidInput as error:
    print(len(asked), error)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("mixup", ["0", "0.4"])
def test_wrong_labels_of_one_process_are_refused_by_both_where_both_wait(
    mixup: str, tmp_path: Path
) -> None:
    # seen after the third step, when stop was asked twice; the batch is of the second one
    rule = "2 distill: labels must lie in 0..4 like the classes of the model, got "
    said = run(WRONG, tmp_path, mixup)
    assert said == [f"{rule}others in another process\n", f"{rule}0..5\n"]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one_that_accumulates(kind: str, tmp_path: Path) -> None:
    run(WORKER, tmp_path, kind)
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
    assert run(ASKED, tmp_path) == ["False 3\n", "False 3\n"]
    names = [path.name for path in (tmp_path / "checkpoints").glob("step-*.json")]
    assert names == ["step-00000003.json"]
