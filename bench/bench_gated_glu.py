"""gated_glu against torch's activation and products: one gated MLP, halves packed, and back."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vitprune_fast.ops import gated_glu_packed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# ViT-B with SwiGLU at 224 pixels, patch 16: two thirds of the usual hidden width
TOKENS, HIDDEN = 197, 2048


def run(race, batch: int, dtype: torch.dtype, device: str, backend) -> None:
    """One race of forward and backward, with the gradient of the gates."""
    shape = (batch, TOKENS, HIDDEN)
    x = torch.randn(batch, TOKENS, 2 * HIDDEN, device=device).to(dtype).requires_grad_()
    grad = torch.randn(shape, device=device).to(dtype)
    unit = torch.rand(HIDDEN, device=device).requires_grad_()

    def plain(x, unit):
        gate, value = x.tensor_split(2, -1)
        return F.silu(gate) * value * unit.to(x.dtype)

    def there_and_back(form):
        out = form(x, unit)
        return out.detach(), *torch.autograd.grad(out, (x, unit), grad)

    def ours(x, unit):
        return gated_glu_packed(x, unit, gate_last=False, backend=backend)

    forms = {"vitprune": lambda: there_and_back(ours), "plain torch": lambda: there_and_back(plain)}
    if device == "cuda":
        compiled = torch.compile(plain)
        forms["torch.compile"] = lambda: there_and_back(compiled)
    name = f"SwiGLU {shape}, packed, {str(dtype).removeprefix('torch.')}, forward and backward"
    race("gated_glu", name, forms, device=device, bytes_moved=3 * x.nbytes + 2 * grad.nbytes)


@pytest.mark.parametrize("dtype", DTYPES)
def bench_gated_glu_cpu(race, dtype):
    run(race, 4, DTYPES[dtype], "cpu", "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def bench_gated_glu_gpu(race, dtype):
    run(race, 256, DTYPES[dtype], "cuda", "triton")
