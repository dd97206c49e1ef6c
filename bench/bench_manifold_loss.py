"""Manifold losses, forward and backward, against the similarities written out, and their memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.conftest import keep_freed_memory, note_memory
from bench.peak_memory import peak_of_manifold
from vitprune_fast.distill.losses import manifold_full
from vitprune_fast.ops import manifold_loss

# DeiT-Ti of ViT-S or CaiT-S24, and a ViT-B of another, at 224 pixels
TOKENS, TINY, SMALL, BASE = 196, 192, 384, 768


def written_out(student: Tensor, teacher: Tensor) -> Tensor:
    """As in the code of the paper: all similarities of a set, in the dtype of autocast."""
    s, t = (F.normalize(x.float(), dim=-1) for x in (student, teacher))
    difference = t @ t.mT - s @ s.mT
    return (difference * difference).mean()


def both(loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor):
    """The loss, and the gradient at a size that all dtypes hold."""
    value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value * student.numel(), student)
    return value.detach(), gradient


def states(batch: int, width: int, teacher_width: int, dtype: torch.dtype, device: str):
    """Of a student, which needs a gradient, and a teacher."""
    widths = width, teacher_width
    student, teacher = (torch.randn(batch, TOKENS, w, device=device).to(dtype) for w in widths)
    return student.requires_grad_(), teacher


# glibc gives allocations above 32 MiB back to the system whatever it is told to keep by default, so
# that a real training asks for all similarities anew in every step
KEPT = {"as glibc has it": 2**25, "memory kept": 2**30}


@pytest.mark.parametrize("memory", KEPT)
def bench_manifold_full_cpu(race, memory):
    student, teacher = states(32, TINY, SMALL, torch.float32, "cpu")
    forms = {
        "vitprune": lambda: both(manifold_full, student, teacher),
        "all similarities": lambda: both(
            lambda s, t: written_out(s.flatten(0, 1), t.flatten(0, 1)), student, teacher
        ),
    }
    name = f"all rows of (32, {TOKENS}, {TINY} and {SMALL}), float32, {memory}"
    moved = 2 * student.nbytes + teacher.nbytes
    # seconds each, and far from the noise
    keep_freed_memory(KEPT[memory])
    try:
        race("manifold_full", name, forms, device="cpu", bytes_moved=moved, rounds=3)
    finally:
        keep_freed_memory()


@pytest.mark.parametrize("kind", ["intra", "inter"])
def bench_manifold_loss_cpu(race, kind):
    run(race, kind, states(32, TINY, SMALL, torch.float32, "cpu"), "auto")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["intra", "inter"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32-autocast"])
def bench_manifold_loss_gpu(race, kind, dtype):
    run(race, kind, states(256, BASE, BASE, dtype, "cuda"), "triton")


def run(race, kind: str, tensors: tuple[Tensor, Tensor], backend) -> None:
    """One race, on a GPU with products in bf16, as autocast has them."""
    student, teacher = tensors
    device = student.device.type
    operand = torch.bfloat16 if device == "cuda" else None
    order = (1, 0, 2) if kind == "inter" else (0, 1, 2)

    def ours(s, t):
        sets = s.permute(order), t.permute(order)
        return manifold_loss(*sets, operand_dtype=operand, backend=backend)

    def plainly(s, t):
        with torch.autocast(device, torch.bfloat16, enabled=operand is not None):
            return written_out(s.permute(order), t.permute(order))

    forms = {
        "vitprune": lambda: both(ours, student, teacher),
        "similarities in memory": lambda: both(plainly, student, teacher),
    }
    if device == "cuda":
        compiled = torch.compile(plainly)
        forms["torch.compile"] = lambda: both(compiled, student, teacher)
    shape = tuple(student.shape[:2])
    name = f"{kind} {shape}, {student.shape[2]} and {teacher.shape[2]}, " + (
        str(student.dtype).removeprefix("torch.") + (", autocast" if operand else "")
    )
    moved = 2 * student.nbytes + teacher.nbytes
    race("manifold_loss", name, forms, device=device, bytes_moved=moved)


@pytest.mark.parametrize("kind", ["intra", "full"])
def bench_manifold_memory(request, kind):
    found = {how: peak_of_manifold(how, kind, 32) for how in ("vitprune", "materialised")}
    note_memory(
        request.config, f"manifold {kind}, batch 32, {TINY} and {SMALL}, fp32", "cpu", found
    )


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["intra", "inter"])
def bench_manifold_memory_gpu(request, kind):
    student, teacher = states(256, BASE, BASE, torch.bfloat16, "cuda")
    swap = kind == "inter"

    def peak(loss) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        s, t = (x.transpose(0, 1) if swap else x for x in (student, teacher))
        with torch.autocast("cuda", torch.bfloat16):
            torch.autograd.grad(loss(s, t), student)
        return torch.cuda.max_memory_allocated() - before

    found = {"vitprune": peak(manifold_loss), "materialised": peak(written_out)}
    note_memory(request.config, f"manifold {kind}, batch 256, {BASE}, bf16", "cuda", found)
