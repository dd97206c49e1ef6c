"""A distillation step of a ViT-B towards its dense self, beside the loops one would write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.bench_masked_step import half, multiply, race
from bench.conftest import note_race
from vitprune_fast.distill import DistillConfig
from vitprune_fast.distill.objective import Objective, images_like
from vitprune_fast.distill.task import DistillTask
from vitprune_fast.distill.teachers import Teacher, TeacherSet
from vitprune_fast.planning import Plan, predict_cost
from vitprune_fast.structure import describe
from vitprune_fast.surgery.soft import SoftCompaction

OURS, SOFT = "vitprune_fast: dense", "vitprune_fast: soft-compacted"
EAGER, MASKED, COMPILED = "eager loop", "eager loop, multiplicative masks", "compiled loop"
CONFIG = DistillConfig(alpha=0.5, temperature=2.0, amp="bf16")


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-6, fused=next(model.parameters()).is_cuda)


class Written:
    """The loop one would write with timm: autocast, SDPA, plain losses, fused AdamW."""

    def __init__(self, student: Any, teacher: Any, *, compiled: bool = False) -> None:
        self.optimizer = optimizer_of(student.train())
        self.student, self.teacher = student, teacher.eval()
        if compiled:
            self.student, self.teacher = torch.compile(student), torch.compile(teacher)

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16):
            logits = self.student(images)
            with torch.no_grad():
                wanted = self.teacher(images)
        logits, wanted = logits.float() / 2.0, wanted.float() / 2.0
        divergence = F.kl_div(
            logits.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True
        )
        loss = 0.5 * F.cross_entropy(logits * 2.0, labels) + 0.5 * 4.0 * divergence
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


class Ours:
    """The step of ``distill``: teacher in bf16, one launch for both losses, live weights alone."""

    def __init__(self, student: Any, teacher: Any, plan: Plan | None) -> None:
        self.optimizer = optimizer_of(student)
        weight = next(student.parameters())
        teachers = TeacherSet([Teacher(teacher, dtype=torch.bfloat16)])
        images = images_like(student).to(weight)
        self.task = DistillTask(student, Objective(CONFIG, student, teachers, images), CONFIG)
        self.soft = None if plan is None else SoftCompaction(student, plan, torch.bfloat16)
        runner = student if self.soft is None else self.soft.refresh()
        self.task.run_on(runner, whole=self.soft is None)
        self.task.train()

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        if self.soft is not None:
            self.soft.refresh()
        loss = self.task(images, labels)["loss"]
        loss.backward()
        if self.soft is not None:
            self.soft.scatter()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def distill_step(request, name: str, batch: int, device: str, rounds: int, compiled: bool) -> None:
    torch.set_num_threads(1)

    def fresh(seed: int = 0) -> Any:
        torch.manual_seed(seed)
        return timm.create_model(name).to(device)

    structure = describe(fresh())
    plan = half(structure)
    masked = fresh()
    multiply(masked, structure, plan)
    loops: dict[str, Any] = {
        SOFT: Ours(fresh(), fresh(1), plan),
        OURS: Ours(fresh(), fresh(1), None),
        EAGER: Written(fresh(), fresh(1)),
        MASKED: Written(masked, fresh(1)),
    }
    if compiled:
        loops[COMPILED] = Written(fresh(), fresh(1), compiled=True)
    size = structure.input_size
    images, labels = torch.randn(batch, *size).to(device), torch.randint(1000, (batch,)).to(device)
    losses = {n: float(loop.step(images, labels)) for n, loop in loops.items()}
    for ours, other in ((SOFT, MASKED), (OURS, EAGER)):
        # both in bf16, a dozen blocks deep
        assert abs(losses[ours] - losses[other]) <= 3e-2 * losses[other], losses
    calls: dict[str, Callable[[], None]] = {
        n: (lambda loop=loop: loop.step(images, labels)) for n, loop in loops.items()
    }
    share = predict_cost(structure, plan).macs / predict_cost(structure).macs
    note = f"{share:.0%} of the multiply-accumulates"
    entries = race(calls, device, batch, rounds, note, SOFT)
    case = f"{name} with itself as teacher, batch {batch}, bf16"
    note_race(request.config, case, device, [asdict(e) for e in entries], kind="training")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_base_patch16_224"])
@pytest.mark.timeout(900)
def bench_distill_step_gpu(request, name):
    distill_step(request, name, 256, "cuda", rounds=20, compiled=True)
