"""A step of ``distill`` on a ViT towards its dense self, against the loops one would write."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.bench_masked_step import half, multiply, with_note
from vitprune_fast.distill import DistillConfig, MaskSchedule, distill
from vitprune_fast.distill.teachers import Teacher
from vitprune_fast.planning import Plan, predict_cost
from vitprune_fast.structure import describe
from vitprune_fast.timing import Entry, entries_of, in_turns

OURS, SOFT = "vitprune_fast: dense", "vitprune_fast: soft-compacted"
EAGER, MASKED, COMPILED = "eager loop", "eager loop, multiplicative masks", "compiled loop"
LR = 1e-6

# images and labels in memory
Batches = list[tuple[Tensor, Tensor]]
# trains on every batch, calls what it is given after each, and says the loss of the first
Loop = Callable[[Batches, Callable[[], bool]], float]


class Written:
    """The loop one would write with timm: autocast, SDPA, plain losses, fused AdamW."""

    def __init__(self, student: Any, teacher: Any, *, compiled: bool = False) -> None:
        weight = next(student.parameters())
        self.device = weight.device
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=LR, fused=weight.is_cuda)
        self.student, self.teacher = student.train(), teacher.eval()
        if compiled:
            self.student, self.teacher = torch.compile(student), torch.compile(teacher)

    def __call__(self, batches: Batches, after_step: Callable[[], bool]) -> float:
        losses = []
        for images, labels in batches:
            images = images.to(self.device, non_blocking=True)
            losses.append(self.step(images, labels.to(self.device, non_blocking=True)))
            after_step()
        return float(losses[0])

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
    """``distill`` as one calls it, with its events; under a plan on the live part alone."""

    def __init__(self, student: Any, teacher: Any, plan: Plan | None, log_steps: int) -> None:
        self.student = student
        self.teacher = Teacher(teacher, dtype=torch.bfloat16)
        self.config = DistillConfig(
            epochs=1,
            lr=LR,
            warmup_epochs=0,
            alpha=0.5,
            temperature=2.0,
            clip_norm=0.0,
            dtype="bfloat16",
            log_steps=log_steps,
        )
        self.masks = (
            None if plan is None else MaskSchedule(0.5, "one_shot", planner=lambda *_: plan)
        )
        self.told: list[dict[str, Any]] = []

    def __call__(self, batches: Batches, after_step: Callable[[], bool]) -> float:
        result = distill(
            self.student,
            self.teacher,
            batches,
            None,
            self.config,
            masks=self.masks,
            on_event=self.told.append,
            stop=after_step,
        )
        return result.history[0]["loss"]


def seconds_per_step(loop: Loop, batches: Batches, device: str, warm: int) -> float:
    """Of the steps after the first ``warm``, as they follow one another."""
    marks: list[Any] = []

    def mark() -> bool:
        if device == "cuda":
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.thread_time())
        return False

    loop(batches, mark)
    start, end = marks[warm - 1], marks[-1]
    if device == "cuda":
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / (len(marks) - warm)
    return (end - start) / (len(marks) - warm)


def distill_step(
    name: str,
    batch: int,
    device: str,
    rounds: int,
    *,
    compiled: bool = False,
    warm: int = 5,
    steps: int = 10,
) -> list[Entry]:
    """Time whole trainings on images that are in memory, in turns.

    Args:
        name: of the model of timm.
        batch: images per step.
        device: ``"cuda"`` or ``"cpu"``, where it is the time of one thread.
        rounds: how often each loop trains; its best time counts. At 0 they are only checked.
        compiled: race a compiled loop too.
        warm: steps before the timed ones; so many lie between two events of ``distill`` too.
        steps: timed ones.

    Raises:
        AssertionError: the first losses of two loops differ; nothing was timed.
    """
    torch.set_num_threads(1)

    def fresh(seed: int = 0) -> Any:
        torch.manual_seed(seed)
        return timm.create_model(name).to(device)

    structure = describe(fresh())
    plan = half(structure)
    masked = fresh()
    multiply(masked, structure, plan)
    loops: dict[str, Loop] = {
        SOFT: Ours(fresh(), fresh(1), plan, warm),
        OURS: Ours(fresh(), fresh(1), None, warm),
        EAGER: Written(fresh(), fresh(1)),
        MASKED: Written(masked, fresh(1)),
    }
    if compiled:
        loops[COMPILED] = Written(fresh(), fresh(1), compiled=True)
    images = torch.randn(batch, *structure.input_size)
    labels = torch.randint(masked.num_classes, (batch,))
    if device == "cuda":
        # as a DataLoader leaves them there
        images, labels = images.pin_memory(), labels.pin_memory()
    data = [(images, labels)]
    losses = {name: loop(data, lambda: False) for name, loop in loops.items()}
    for ours, other in ((SOFT, MASKED), (OURS, EAGER)):
        # both in bf16, a dozen blocks deep
        assert abs(losses[ours] - losses[other]) <= 3e-2 * losses[other], losses
    if not rounds:
        return []
    times = in_turns(
        {
            name: lambda loop=loop: seconds_per_step(loop, data * (warm + steps), device, warm)
            for name, loop in loops.items()
        },
        rounds,
    )
    share = predict_cost(structure, plan).macs / predict_cost(structure).macs
    return with_note(entries_of(times, batch, SOFT), share)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_base_patch16_224"])
@pytest.mark.timeout(900)
def bench_distill_step_gpu(note_race, entries, gpu, name):
    # whole trainings, so that a few steps of each make up the time there is
    batch, warm, steps, rounds = gpu.batch(256), *((1, 2, 1) if gpu.tiny else (3, 6, 2))
    found = distill_step(
        gpu.model(name),
        batch,
        gpu.device,
        rounds if entries.timed else 0,
        compiled=gpu.compiled,
        warm=warm,
        steps=steps,
    )
    if found:
        case = f"{name} with itself as teacher, batch {batch}, bf16"
        note_race(case, gpu.device, found, kind="training")
