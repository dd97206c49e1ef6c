"""The races of `vitprune_fast.benches.ops.manifold_loss` as tests, and memory."""

from __future__ import annotations

import pytest
import torch

from bench.conftest import note_memory
from bench.peak_memory import peak_of, peak_of_manifold
from bench.raced import as_tests
from vitprune_fast.benches.ops.manifold_loss import SMALL, TINY, cases, states_of, written_out
from vitprune_fast.ops import manifold_loss

bench_manifold_loss_cpu, bench_manifold_loss_gpu = as_tests(cases, backend="auto")


@pytest.mark.parametrize("kind", ["intra", "full"])
def bench_manifold_memory(request, kind):
    found = {how: peak_of_manifold(how, kind, 32) for how in ("vitprune", "materialised")}
    note_memory(
        request.config, f"manifold {kind}, batch 32, {TINY} and {SMALL}, fp32", "cpu", found
    )


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["intra", "inter"])
def bench_manifold_memory_gpu(request, gpu, kind):
    if gpu.compiled:
        return
    student, teacher = states_of(gpu, torch.bfloat16)
    swap = kind == "inter"

    def step(loss) -> None:
        s, t = (x.transpose(0, 1) if swap else x for x in (student, teacher))
        with torch.autocast(gpu.device, torch.bfloat16, enabled=gpu.device == "cuda"):
            torch.autograd.grad(loss(s, t), student)

    found = {
        "vitprune": peak_of(lambda: step(manifold_loss), gpu.device),
        "materialised": peak_of(lambda: step(written_out), gpu.device),
    }
    case = f"manifold {kind}, {tuple(student.shape)}, {str(student.dtype).removeprefix('torch.')}"
    note_memory(request.config, case, gpu.device, found)
