"""The short way of plain eager code: taken there alone, and the same as the registered op."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

from bench import host_time
from bench.calls import CALLS, SMALL, Size
from bench.op_names import OpNames
from vitprune_fast import ops
from vitprune_fast.ops._dispatch import IMPLEMENTED
from vitprune_fast.ops._forms import custom_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# what the form and the backward of `twice` were given
given: list[tuple[bool, ...]] = []


@custom_op("vitprune_fast::test_twice")
def twice(x: Tensor, unread: Tensor | None, factor: float) -> Tensor:
    given.append((x.is_neg(),))
    return x * (2 * factor)


@twice.register_fake
def _(x: Tensor, unread: Tensor | None, factor: float) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx, inputs, output) -> None:
    x, _, ctx.factor = inputs
    ctx.save_for_backward(x)


def _backward(ctx, grad: Tensor):
    given.append(tuple(ctx.needs_input_grad[:3]))
    return grad * (2 * ctx.factor), grad * ctx.saved_tensors[0], None


twice.register_autograd(_backward, setup_context=_save)


@custom_op("vitprune_fast::test_twice_alone")
def twice_alone(x: Tensor) -> Tensor:
    return x * 2


@pytest.fixture(autouse=True)
def _nothing_given():
    given.clear()


def dispatched(call: Callable[[], object]) -> set[str]:
    """The names of our ops that go through the dispatcher; a profiler is no mode."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        call()
    return {event.key for event in profile.key_averages() if event.key.startswith("vitprune_fast")}


def gradients(x: Tensor, unread: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(twice(x, unread, 1.5), (x, unread), torch.ones_like(x))


def test_plain_eager_code_does_not_dispatch():
    x, unread = torch.randn(2, 3, 4).requires_grad_(), torch.zeros(2, 3, 4).requires_grad_()
    assert not dispatched(lambda: gradients(x, unread))
    assert not dispatched(lambda: twice(x.detach(), None, 1.5))
    with torch.no_grad():
        assert not dispatched(lambda: twice_alone(torch.nn.Parameter(x)))
    with torch.inference_mode():
        assert not dispatched(lambda: twice(x, unread, 1.5))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert not dispatched(lambda: gradients(x, unread))
    # the registered op is what such a profile shows
    with OpNames():
        assert dispatched(lambda: twice(x, None, 1.5)) == {"vitprune_fast::test_twice"}


def test_what_needs_a_gradient_is_told_to_the_backward_alike():
    x, unread = torch.randn(3).requires_grad_(), torch.zeros(3)
    for way in (OpNames, torch.enable_grad):
        given.clear()
        with way():
            twice(x, unread, 1.5).sum().backward()
        assert given == [(False,), (True, False, False)]
    assert x.grad is not None and x.grad.tolist() == [6.0] * 3
    assert unread.grad is None


def test_an_op_without_a_derivative_says_so():
    x = torch.ones(3).requires_grad_()
    with pytest.raises(RuntimeError, match="no autograd formula"):
        twice_alone(x).sum().backward()


def test_modes_see_the_registered_op():
    x = torch.ones(3).requires_grad_()
    with OpNames() as watch:
        twice(x, None, 1.0)
    assert watch.names == ["vitprune_fast::test_twice"]

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[object] = []
    with Functions():
        twice(x, None, 1.0)
    assert torch.ops.vitprune_fast.test_twice.default in seen


def test_types_of_tensor_of_their_own_see_the_registered_op():
    class Tagged(Tensor):
        pass

    assert type(twice(torch.ones(3).as_subclass(Tagged), None, 1.0)) is Tagged
    assert type(twice(torch.ones(3), torch.ones(3).as_subclass(Tagged), 1.0)) is Tagged
    given.clear()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.ones(3))
    assert twice(fake, None, 1.0).shape == (3,)
    assert twice(torch.ones(3, device="meta"), None, 1.0).is_meta
    assert not given, "the fake form stands in for it"


def test_views_to_be_negated_are_negated_first():
    x = torch.imag(torch.tensor([1 + 2j]).conj())
    assert x.is_neg()
    assert twice(x, None, 1.0).tolist() == [-4.0]
    assert given == [(False,)]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functorch_sees_the_registered_op():
    seen = dispatched(lambda: torch.func.vmap(lambda x: twice(x, None, 1.5))(torch.ones(2, 3)))
    assert seen == {"vitprune_fast::test_twice"}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_traced_graph_holds_the_op():
    traced: Any = torch.jit.trace(lambda x: twice(x, None, 1.5), torch.ones(3))
    assert "vitprune_fast::test_twice" in str(traced.graph)


def test_compiled_graphs_hold_the_op():
    held: list[str] = []

    def backend(graph, _inputs):
        held.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(lambda x: twice(x, None, 1.5) + 1, fullgraph=True, backend=backend)
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 4.0))
    assert "vitprune_fast.test_twice.default" in held


# what is C++ has no other way; only the gather is C++ and CUDA alone
TRITON = [op for op in CALLS if "triton" in IMPLEMENTED[op]]


@pytest.mark.parametrize("op", TRITON)
def test_plain_calls_do_not_dispatch_and_both_ways_give_the_same_bits(op):
    call = CALLS[op](Size(SMALL[1], 2, torch.float32, DEVICE))
    with OpNames() as watch:
        watched = call("triton")
    assert any(name.startswith("vitprune_fast::") for name in watch.names)
    plain: list[tuple[Tensor, ...]] = []
    assert not dispatched(lambda: plain.append(call("triton")))
    for one, other in zip(*plain, watched, strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride()


def test_host_time_is_measured_in_both_ways_and_launches_nothing(capsys):
    rows = host_time.raced(rounds=1, repeats=1)
    assert [row["op"] for row in rows] == list(host_time.calls())
    assert all(us > 0 for row in rows for us in row["us"].values())
    with host_time.without_launches():
        # a launch would write every number of what is poisoned here
        out = ops.attention(torch.zeros(1, 2, 3, 1, 16), backend="triton")[0]
        for op, (ours, _) in host_time.calls().items():
            assert not dispatched(ours)
            with host_time.registered():
                assert f"vitprune_fast::{op}" in dispatched(ours)
    assert out.isnan().all()
    assert not ops.attention(torch.zeros(1, 2, 3, 1, 16), backend="triton")[0].isnan().any()


IMPORTED_WITHOUT_LAUNCHES = """
import torch
from bench import host_time
with host_time.without_launches():
    pass
from vitprune_fast import ops
x, unit = torch.randn(2, 3, 8), torch.ones(2, 8, requires_grad=True)
ops.gated_unit(x, probe_BF=unit, backend="triton").sum().backward()
assert unit.grad.isfinite().all()
"""


def test_kernels_first_imported_without_launches_run_afterwards():
    command = [sys.executable, "-c", IMPORTED_WITHOUT_LAUNCHES]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
