"""Every op with a GPU kernel at the size that its speed is claimed for, and the tools for that."""

from __future__ import annotations

import pytest
import torch

from bench import one_launch
from bench.calls import CALLS, SMALL, TARGET, Size, own_kernels
from vitprune_fast._extension import OBSTACLE
from vitprune_fast.ops._dispatch import IMPLEMENTED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_every_op_with_a_gpu_kernel_has_a_call():
    on_gpu = {op for op, forms in IMPLEMENTED.items() if {"triton", "cuda"} & {*forms}}
    assert set(CALLS) == on_gpu, "bench/calls.py must have one call for each"


@pytest.mark.gpu
@pytest.mark.parametrize("op", CALLS)
def test_auto_takes_our_kernel_at_the_target_size(op):
    call = CALLS[op](TARGET)
    # what the best of our forms runs when it is named
    ours = own_kernels(call, "cuda" if "cuda" in IMPLEMENTED[op] else "triton", "cuda")
    assert own_kernels(call, "auto", "cuda") == ours != set()


@pytest.mark.gpu
@pytest.mark.parametrize("op", CALLS)
def test_same_bits_again_and_every_number_written_at_the_target_size(op):
    call = CALLS[op](TARGET)
    first, second = call("auto"), call("auto")
    for one, other in zip(first, second, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("shape", SMALL, ids=["odd", "even"])
def test_calls_are_the_same_in_every_form(op, shape):
    call = CALLS[op](Size(shape, 2, torch.float32, DEVICE))
    plain = call("eager")
    for backend in IMPLEMENTED[op]:
        if backend == "cpu" and (OBSTACLE is not None or DEVICE == "cuda"):
            continue
        if backend == "cuda" and DEVICE == "cpu":
            continue
        for got, wanted in zip(call(backend), plain, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("op", CALLS)
def test_plain_torch_is_told_from_our_kernels(op):
    call = CALLS[op](Size(SMALL[1], 2, torch.float32, DEVICE))
    assert own_kernels(call, "eager", "cpu") == own_kernels(call, "eager", "cuda") == set()
    if "triton" in IMPLEMENTED[op]:
        assert own_kernels(call, "triton", "cuda")
        assert not own_kernels(call, "triton", "cpu")
    if OBSTACLE is None and DEVICE == "cpu" and "cpu" in IMPLEMENTED[op]:
        assert own_kernels(call, "auto", "cpu")


@pytest.mark.slow
def test_one_launch_runs_every_kernel(capsys):
    one_launch.main(DEVICE)
    lines = capsys.readouterr().out.splitlines()
    runnable = ("triton", "cuda") if DEVICE == "cuda" else ("triton",)
    forms = {(op, name) for op in CALLS for name in IMPLEMENTED[op] if name in runnable}
    assert {*lines} == {f"{op}: {name}" for op, name in forms}
