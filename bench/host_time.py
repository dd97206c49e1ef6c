"""What the host spends on a call of our ops, forward and backward, with nothing left to compute.

python -m bench.host_time [ROUNDS]

Tiny tensors on the CPU, and launches of Triton kernels that do nothing: what is left is Python, the
dispatcher and autograd, which a GPU would wait for. In turns with the way that compilers and modes
take, through the registered op, and with torch's own op, whose CPU kernels are counted in.
Processor time of one thread, least of the rounds. Writes bench/results/<yyyymm>_host_time.json.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import study
from vitprune_fast import ops
from vitprune_fast.ops._forms import CustomOp

BATCH, TOKENS, HEADS, HEAD_DIM, WIDTH = 2, 8, 3, 16, 64
CALLS = 300
Call = Callable[[], object]


def calls() -> dict[str, tuple[Call, Call]]:
    """Of each op: our Triton form and torch's own op, with their backward."""
    qkv = torch.randn(BATCH, TOKENS, 3, HEADS, HEAD_DIM).requires_grad_()
    x = torch.randn(BATCH, TOKENS, WIDTH).requires_grad_()
    head, unit = (torch.zeros(BATCH, n).requires_grad_() for n in (HEADS, WIDTH))
    gate = torch.ones(HEADS).requires_grad_()
    weight, bias = torch.ones(WIDTH), torch.zeros(WIDTH)
    grad, grad_out = torch.randn(x.shape), torch.randn(BATCH, TOKENS, HEADS, HEAD_DIM)

    def both(forward: Callable[[], Tensor], leaves: tuple[Tensor, ...], grad: Tensor) -> Call:
        return lambda: torch.autograd.grad(forward(), leaves, grad)

    def plain_attention() -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    attention = both(plain_attention, (qkv,), grad_out)
    return {
        "scored_attention": (
            both(lambda: ops.scored_attention(qkv, head, backend="triton"), (qkv, head), grad_out),
            attention,
        ),
        "gated_attention": (
            both(lambda: ops.gated_attention(qkv, gate, backend="triton"), (qkv, gate), grad_out),
            attention,
        ),
        "scored_norm": (
            both(
                lambda: ops.scored_norm(x, unit, weight, bias, 1e-6, backend="triton"),
                (x, unit),
                grad,
            ),
            both(lambda: F.layer_norm(x, (WIDTH,), weight, bias), (x,), grad),
        ),
        "gated_unit": (
            both(lambda: ops.gated_unit(x, probe_BF=unit, backend="triton"), (x, unit), grad),
            both(lambda: F.gelu(x), (x,), grad),
        ),
    }


class _Instead:
    """A kernel of which a launch is a call of something else."""

    def __init__(self, call: Callable[..., None]) -> None:
        self.call = call

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self.call


@contextmanager
def without_launches(instead: Callable[..., None] = lambda *_, **__: None) -> Iterator[None]:
    """Inside, no kernel of ours runs; what is given is called in its place."""
    # without a GPU the interpreter stands in for it, which is settled at the import of a kernel
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from triton.runtime.jit import KernelInterface

    from vitprune_fast import kernels

    names = [info.name for info in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}.")]
    # all before the first is exchanged: they import functions from one another, for good
    modules = [importlib.import_module(name) for name in names]
    with ExitStack() as stack:
        for module in modules:
            for name, value in vars(module).copy().items():
                if isinstance(value, KernelInterface):
                    stack.enter_context(patch.object(module, name, _Instead(instead)))
        yield


def registered() -> AbstractContextManager[object]:
    """Inside, all calls go through the registered op, as when somebody watches them."""
    return patch.object(CustomOp, "__call__", lambda op, *given: op.registered(*given))


def raced(rounds: int, repeats: int = CALLS) -> list[dict]:
    """The least microseconds of a call in each form, over the rounds."""
    rows = []
    with without_launches():
        for op, (ours, plain) in calls().items():
            forms = {
                "vitprune": (ours, nullcontext),
                "registered": (ours, registered),
                "torch": (plain, nullcontext),
            }
            best = dict.fromkeys(forms, float("inf"))
            for _ in range(rounds):
                for form, (call, way) in forms.items():
                    with way():
                        for _ in range(repeats // 10 + 1):
                            call()
                        start = time.thread_time()
                        for _ in range(repeats):
                            call()
                        seconds = (time.thread_time() - start) / repeats
                    best[form] = min(best[form], seconds)
            rows.append({"op": op, "us": {form: round(1e6 * s, 1) for form, s in best.items()}})
            print(f"{op:18}", *(f"{form} {us:7.1f} us" for form, us in rows[-1]["us"].items()))
    return rows


def main(rounds: str = "5") -> None:
    """Time all ops."""
    torch.set_num_threads(1)
    found = raced(int(rounds))
    about = "tiny tensors, launches that do nothing"
    study.write("host_time", model=about, calls=CALLS, rounds=int(rounds), host=found)


if __name__ == "__main__":
    main(*sys.argv[1:])
