"""glu_score against torch's own backward followed by the score: one gated MLP, halves packed."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vitprune_fast.ops import glu_score
from vitprune_fast.reference.glu_score import glu_score as plain

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# ViT-B with SwiGLU at 224 pixels, patch 16: two thirds of the usual hidden width
TOKENS, HIDDEN = 197, 2048


def run(race, batch: int, dtype: torch.dtype, device: str, backend) -> None:
    """One race: the packed gradient and the score."""
    shape = (batch, TOKENS, HIDDEN)
    x = torch.randn(batch, TOKENS, 2 * HIDDEN, device=device).to(dtype)
    grad = torch.randn(shape, device=device).to(dtype)
    gate, value = x.tensor_split(2, -1)
    # what the forward has kept
    act = F.silu(gate)
    h = act * value

    def ours():
        grad_gate, _, score = glu_score(gate, value, grad, packed="gate_first", backend=backend)
        return grad_gate._base, score

    def torch_then_score():
        grad_gate = torch.ops.aten.silu_backward(grad * value, gate)
        return torch.cat([grad_gate, grad * act], 2), (h * grad).sum(1, dtype=torch.float32)

    def plainly():
        grad_gate, grad_value, score = plain(gate, value, grad)
        return torch.cat([grad_gate, grad_value], 2), score

    forms = {
        "vitprune": ours,
        "torch's backward, then (h * grad).sum": torch_then_score,
        "plain torch": plainly,
    }
    if device == "cuda":
        forms["torch.compile"] = torch.compile(plainly)
    name = f"SwiGLU {shape}, packed, {str(dtype).removeprefix('torch.')}"
    race("glu_score", name, forms, device=device, bytes_moved=2 * x.nbytes + grad.nbytes)


@pytest.mark.parametrize("dtype", DTYPES)
def bench_glu_score_cpu(race, dtype):
    run(race, 4, DTYPES[dtype], "cpu", "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def bench_glu_score_gpu(race, dtype):
    run(race, 256, DTYPES[dtype], "cuda", "triton")
