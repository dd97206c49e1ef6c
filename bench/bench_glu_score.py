"""glu_score against torch's own backward followed by the score: one gated MLP, halves packed."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from bench.place import CPU, Place
from bench.shapes import VIT_BASE_SWIGLU
from vitprune_fast.ops import glu_score
from vitprune_fast.reference.glu_score import glu_score as plain

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run(race, place: Place, batch: int, dtype: torch.dtype) -> None:
    """One race: the packed gradient and the score."""
    sizes, dtype = place.shape(VIT_BASE_SWIGLU), place.dtype(dtype)
    shape = (place.batch(batch), sizes.tokens, sizes.hidden)
    x = torch.randn(*shape[:2], 2 * sizes.hidden, device=place.device).to(dtype)
    grad = torch.randn(shape, device=place.device).to(dtype)
    gate, value = x.tensor_split(2, -1)
    # what the forward has kept
    act = F.silu(gate)
    h = act * value

    def ours():
        grad_gate, _, score = glu_score(
            gate, value, grad, packed="gate_first", backend=place.backend
        )
        return grad_gate._base, score

    def torch_then_score():
        grad_gate = torch.ops.aten.silu_backward(grad * value, gate)
        return torch.cat([grad_gate, grad * act], 2), (h * grad).sum(1, dtype=torch.float32)

    def plainly():
        grad_gate, grad_value, score = plain(gate, value, grad)
        return torch.cat([grad_gate, grad_value], 2), score

    peers = {"torch's backward, then (h * grad).sum": torch_then_score, "plain torch": plainly}
    if place.compiled:
        peers = {"torch.compile": torch.compile(plainly)}
    name = f"SwiGLU {shape}, packed, {str(dtype).removeprefix('torch.')}"
    forms, moved = {"vitprune": ours, **peers}, 2 * x.nbytes + grad.nbytes
    race("glu_score", name, forms, device=place.device, bytes_moved=moved)


@pytest.mark.parametrize("dtype", DTYPES)
def bench_glu_score_cpu(race, dtype):
    run(race, CPU, 4, DTYPES[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def bench_glu_score_gpu(race, gpu, dtype):
    run(race, gpu, 256, DTYPES[dtype])
