"""Attention with its backward on a CPU: our op, torch's fused one, and the plain form of timm.

python -m pytest bench/bench_attention_form.py -p no:xdist -s

Writes bench/results/<month>_attention_form.json, from which ``scoring.fused.quick_attention`` takes
its rule. In 16 bits it matters what the processor can multiply, so that these are measured twice:
as it is, and held to what AVX-512 without products of 16 bits can do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench import study
from vitprune_fast import ops
from vitprune_fast.benches.harness import check_same, keep_freed_memory
from vitprune_fast.timing import in_turns, measure

ROUNDS = 10
WIDTH, BATCH = 384, 8
TOKENS = (17, 37, 65, 101, 145, 197, 325, 577)
HEAD_DIMS = (16, 32, 64)
# torch multiplies matrices of 16 bits with oneDNN
PRODUCTS = {"as it is": {}, "none": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}}


def fused(qkv_BN3HK: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in qkv_BN3HK.unbind(2))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2)


def plain(qkv_BN3HK: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in qkv_BN3HK.unbind(2))
    attn = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (attn.softmax(-1) @ v).transpose(1, 2)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "vitprune": ops.scored_attention,
    "fused": fused,
    "plain": plain,
}


def raced(dtype: torch.dtype, tokens: int, head_dim: int) -> dict[str, float]:
    """Form -> ms of a forward and its backward, from packed qkv to packed dqkv."""
    qkv = torch.randn(BATCH, tokens, 3, WIDTH // head_dim, head_dim, dtype=dtype)
    qkv.requires_grad_()
    grad = torch.randn(BATCH, tokens, WIDTH // head_dim, head_dim, dtype=dtype)

    def call(form: Callable[[Tensor], Tensor]) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = form(qkv)
        return [out.detach(), *torch.autograd.grad(out, [qkv], grad)]

    calls = {name: (lambda form=form: call(form)) for name, form in FORMS.items()}
    ours = calls["vitprune"]()
    for name, other in calls.items():
        check_same(f"attention: form {name!r} in {dtype}", ours, other())
    turns = {name: lambda call=call: measure(call, "cpu") for name, call in calls.items()}
    times = in_turns(turns, ROUNDS)
    return {name: round(min(taken) * 1e3, 2) for name, taken in times.items()}


def main() -> None:
    """Print a line of JSON per case of the dtypes that are named."""
    torch.set_num_threads(1)
    keep_freed_memory()
    for name in sys.argv[1:]:
        for tokens in TOKENS:
            for head_dim in HEAD_DIMS:
                ms = raced(getattr(torch, name), tokens, head_dim)
                row = {"dtype": name, "tokens": tokens, "head_dim": head_dim, "ms": ms}
                print(json.dumps(row), flush=True)


@pytest.mark.usefixtures("only_timed")
@pytest.mark.timeout(3600)
def bench_attention_form() -> None:
    load_average = round(os.getloadavg()[0], 1)
    rows = []
    for products, environ in PRODUCTS.items():
        dtypes = ["bfloat16"] if environ else ["float32", "bfloat16"]
        words = [sys.executable, "-m", "bench.bench_attention_form", *dtypes]
        job = subprocess.run(
            words, env={**os.environ, **environ}, stdout=subprocess.PIPE, text=True, check=True
        )
        found = [json.loads(line) for line in job.stdout.splitlines()]
        rows += [{"products": "-" if r["dtype"] == "float32" else products, **r} for r in found]
    study.write(
        "attention_form",
        command="python -m pytest bench/bench_attention_form.py -p no:xdist -s",
        model="random qkv",
        load_average=load_average,
        rounds=ROUNDS,
        width=WIDTH,
        batch=BATCH,
        attention=rows,
    )


if __name__ == "__main__":
    main()
