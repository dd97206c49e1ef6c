"""gated_activation against torch's activation and product: one MLP of a ViT-B, there and back."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from bench.shapes import VIT_BASE
from vitprune_fast.ops import gated_activation

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run(race, batch: int, dtype: torch.dtype, device: str, backend) -> None:
    """One race of forward and backward, with the gradient of the gates."""
    shape = (batch, VIT_BASE.tokens, VIT_BASE.hidden)
    x, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    x.requires_grad_()
    gate = torch.rand(VIT_BASE.hidden, device=device).requires_grad_()

    def plain(x, gate):
        return F.gelu(x) * gate.to(x.dtype)

    def there_and_back(form):
        out = form(x, gate)
        return out.detach(), *torch.autograd.grad(out, (x, gate), grad)

    def ours(x, gate):
        return gated_activation(x, gate, backend=backend)

    forms = {"vitprune": lambda: there_and_back(ours), "plain torch": lambda: there_and_back(plain)}
    if device == "cuda":
        compiled = torch.compile(plain)
        forms["torch.compile"] = lambda: there_and_back(compiled)
    name = f"ViT-B gelu {shape}, {str(dtype).removeprefix('torch.')}, forward and backward"
    race("gated_activation", name, forms, device=device, bytes_moved=5 * x.nbytes)


@pytest.mark.parametrize("dtype", DTYPES)
def bench_gated_activation_cpu(race, dtype):
    run(race, 4, DTYPES[dtype], "cpu", "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def bench_gated_activation_gpu(race, dtype):
    run(race, 256, DTYPES[dtype], "cuda", "triton")
