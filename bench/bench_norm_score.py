"""norm_score against torch's own backward followed by the score: one norm of a ViT-B."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.shapes import VIT_BASE
from vitprune_fast import ops
from vitprune_fast.ops import Backend
from vitprune_fast.reference.norm_score import norm_score as plain

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EPS = 1e-6


def torch_then_score(x: Tensor, grad_y: Tensor, weight: Tensor, bias: Tensor):
    """torch's fused backward for the gradient, then the score from what the forward has saved."""
    size = weight.shape
    y, mean, scale = torch.native_layer_norm(x, size, weight, bias, EPS)

    def backward() -> tuple[Tensor, Tensor]:
        grad_x = torch.ops.aten.native_layer_norm_backward(
            grad_y, x, size, mean, scale, weight, bias, [True, False, False]
        )[0]
        x_hat = (x.float() - mean) * scale
        gradient = grad_y.float() * weight.float()
        c1, c2 = (gradient * x_hat).mean(2, keepdim=True), gradient.mean(2, keepdim=True)
        share = 1 - EPS * scale.float().square()
        parts = y.float() * grad_y.float() - x_hat * c2 - (x_hat.square() - share) * c1 / 2
        return grad_x, parts.sum(1)

    return backward


def forms(shape: tuple[int, int, int], dtype: torch.dtype, device: str, backend: Backend) -> dict:
    """Ours, and what one would write without us, accumulating in fp32 as ours does."""
    x, grad_y = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(shape[2], device=device).to(dtype) for _ in range(2))
    tensors = (x, grad_y, weight, bias)
    found = {
        "vitprune": lambda: ops.norm_score(*tensors, EPS, backend=backend),
        "torch's backward, then the score": torch_then_score(*tensors),
        "plain torch": lambda: plain(*tensors, EPS),
    }
    if backend == "triton":
        compiled = torch.compile(plain)
        found["torch.compile"] = lambda: compiled(*tensors, EPS)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def bench_norm_score_cpu(race, dtype):
    shape = (4, VIT_BASE.tokens, VIT_BASE.width)
    itemsize = DTYPES[dtype].itemsize
    race(
        "norm_score",
        f"ViT-B LayerNorm {shape}, {dtype}",
        forms(shape, DTYPES[dtype], "cpu", "cpu"),
        device="cpu",
        bytes_moved=3 * itemsize * shape[0] * shape[1] * shape[2],
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def bench_norm_score_gpu(race, dtype):
    shape = (256, VIT_BASE.tokens, VIT_BASE.width)
    itemsize = DTYPES[dtype].itemsize
    race(
        "norm_score",
        f"ViT-B LayerNorm {shape}, {dtype}",
        forms(shape, DTYPES[dtype], "cuda", "triton"),
        device="cuda",
        bytes_moved=3 * itemsize * shape[0] * shape[1] * shape[2],
    )
