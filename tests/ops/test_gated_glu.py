"""gated_glu and gated_glu_packed: B batch, N tokens, F columns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from error_budget import Rounded, assert_within_budget

from tests.registration import opcheck
from vitprune_fast import ops
from vitprune_fast._extension import OBSTACLE
from vitprune_fast.errors import BackendUnavailable, InvalidInput
from vitprune_fast.ops import ACTIVATIONS, gated_glu, gated_glu_packed
from vitprune_fast.reference.activation_score import ACTIVATIONS as FORWARD
from vitprune_fast.reference.gated_glu import gated_glu as reference
from vitprune_fast.reference.gated_glu import gated_glu_backward

FP32, FP64, FP16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
ON_GPU = torch.cuda.is_available()

native = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))
# every backend that can run here; a missing one is seen by the tests declared to need it
BACKENDS = ["triton", "eager"] if OBSTACLE else ["cpu", "triton", "eager"]
# bf16 arithmetic is wrong in the interpreter of Triton, so a GPU judges it
SHORT = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for name in BACKENDS
    for dtype in (FP32, FP16, BF16)
    if dtype != BF16 or name != "triton"
]
SHAPES = [
    pytest.param((2, 197, 256), id="B2-N197-F256"),
    pytest.param((1, 131, 37), id="B1-N131-F37-primes"),
    pytest.param((2, 5, 4500), id="B2-N5-wide"),
    pytest.param((1, 1, 1), id="ones"),
    pytest.param((0, 5, 8), id="no-samples"),
    pytest.param((2, 0, 8), id="no-tokens"),
    pytest.param((2, 5, 0), id="no-columns"),
]


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and ON_GPU else "cpu"


def inputs(shape, dtype, backend="cpu") -> tuple[Any, ...]:
    """Gate, value, gates of the columns of which some are 0, and the gradient."""
    device = device_of(backend)
    gate, value, grad = (
        (2 * torch.randn(shape, dtype=FP64)).to(dtype).to(device) for _ in range(3)
    )
    unit = torch.randn(shape[2], dtype=FP64).to(FP64 if dtype == FP64 else FP32).to(device)
    unit[1::3] = 0
    return gate, value, unit, grad


def results(gate, value, unit, grad, activation="silu", backend: Any = "auto"):
    """Output, gradients of gate and value, gradient of the columns' gates."""
    leaves = [each.detach().requires_grad_() for each in (gate, value, unit)]
    out = gated_glu(*leaves, activation=activation, backend=backend)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def packed_results(gate, value, unit, grad, activation="silu", backend: Any = "auto", *, gate_last):
    """The same through one tensor of both halves, whose gradient is taken apart again."""
    x = torch.cat([value, gate] if gate_last else [gate, value], 2).requires_grad_()
    leaves = x, unit.detach().requires_grad_()
    out = gated_glu_packed(*leaves, activation, gate_last=gate_last, backend=backend)
    grad_x, grad_unit = torch.autograd.grad(out, leaves, grad)
    assert grad_x.is_contiguous()
    first, last = grad_x.tensor_split(2, -1)
    return out.detach(), *((last, first) if gate_last else (first, last)), grad_unit


def expected(gate, value, unit, grad, activation="silu"):
    *halves, grad_unit_BF = gated_glu_backward(gate, value, unit, grad, activation)
    return reference(gate, value, unit, activation), *halves, grad_unit_BF.sum(0)


def sums_of(gate, value, grad, activation) -> tuple[None, None, None, Rounded]:
    """Only the gradient of the columns' gates is a sum: of one share of each sample and token."""
    act = FORWARD[activation](gate.double())
    shares = Rounded.of(act, gate.dtype) * Rounded.of(value, gate.dtype)
    return None, None, None, (shares * Rounded.of(grad, gate.dtype)).sum((0, 1))


def assert_results_within_budget(got, tensors, activation):
    eager = expected(*tensors, activation=activation)
    exact = expected(*(each.double().cpu() for each in tensors), activation=activation)
    gate, value, _, grad = tensors
    sums = sums_of(gate, value, grad, activation)
    for one, eager_one, exact_one, its_sums in zip(got, eager, exact, sums, strict=True):
        assert_within_budget(one.cpu(), eager_one.cpu(), exact_one, its_sums)


def assert_same_bits(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_the_product_and_its_derivative(activation):
    gate, value, unit, grad = inputs((3, 17, 12), FP64)
    leaves = [each.requires_grad_() for each in (gate, value, unit)]
    want = FORWARD[activation](gate) * value * unit
    wanted = torch.autograd.grad(want, leaves, grad)
    got = expected(*(leaf.detach() for leaf in leaves), grad=grad, activation=activation)
    for one, other in zip(got, (want, *wanted), strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gated_glu_gradcheck(backend):
    gate, value, unit, _ = inputs((2, 3, 4), FP64, backend)
    leaves = [each.requires_grad_() for each in (gate, value, unit)]
    assert torch.autograd.gradcheck(
        lambda *leaves: gated_glu(*leaves, activation="silu", backend=backend), leaves
    )
    x = torch.cat([value, gate], 2).detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, unit: gated_glu_packed(x, unit, "gelu", gate_last=True, backend=backend),
        (x, unit),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_glu_matches_reference(shape, dtype, backend):
    tensors = inputs(shape, dtype, backend)
    got = results(*tensors, backend=backend)
    for one in got[:3]:
        assert (one.shape, one.dtype, one.is_contiguous()) == (shape, dtype, True)
    assert (got[3].shape, got[3].dtype) == (shape[2:], FP32)
    assert_results_within_budget(got, tensors, "silu")
    # through one tensor the same numbers are computed
    for gate_last in (False, True):
        together = packed_results(*tensors, backend=backend, gate_last=gate_last)
        assert_same_bits(together, got)


@pytest.mark.parametrize(("backend", "dtype"), SHORT)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_glu_matches_reference_for_every_activation(activation, dtype, backend):
    tensors = inputs((2, 71, 147), dtype, backend)
    got = results(*tensors, activation=activation, backend=backend)
    assert_results_within_budget(got, tensors, activation)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_closed_gate_stops_everything_but_its_own_gradient(backend):
    gate, value, unit, grad = inputs((3, 20, 40), FP32, backend)
    unit[:] = 1
    unit[[4, 17]] = 0
    want = results(gate, value, unit, grad, backend=backend)
    # the gradient of a gate of 0 is that of any other
    assert torch.equal(want[3], results(gate, value, unit + 1, grad, backend=backend)[3])
    gate[1, 19, 17], value[0, 3, 4] = torch.nan, torch.inf
    got = results(gate, value, unit, grad, backend=backend)
    assert_same_bits(got[:3], want[:3])
    for one in got[:3]:
        assert not one[..., [4, 17]].any()
    assert (~got[3].isfinite()).nonzero().tolist() == [[4], [17]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
def test_gated_glu_same_bits_repeated_and_samples_apart(dtype, backend):
    gate, value, unit, grad = inputs((4, 71, 147), dtype, backend)
    whole = results(gate, value, unit, grad, backend=backend)
    assert_same_bits(whole, results(gate, value, unit, grad, backend=backend))
    for b in range(4):
        rows = slice(b, b + 1)
        alone = results(gate[rows], value[rows], unit, grad[rows], backend=backend)
        for one, other in zip(whole[:3], alone[:3], strict=True):
            # plain torch computes the last few numbers of a tensor in another way than the rest
            assert torch.equal(one[rows], other) or backend == "eager"
            torch.testing.assert_close(one[rows], other)


@native
def test_gated_glu_bits_are_the_same_for_every_instruction_set(processors):
    script = """
import torch
from vitprune_fast import ops
gate, value, unit, g = inputs
native, found = torch.ops.vitprune_fast, []
for t in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    wide = torch.float64 if t == torch.float64 else torch.float32
    tensors = gate.to(t), value.to(t), unit.to(wide)
    for name in ops.ACTIVATIONS:
        found.append(native.gated_glu_fwd(*tensors, name))
        found += native.gated_glu_bwd(*tensors, g.to(t), name, "gate_last")
"""
    tensors = inputs((2, 37, 83), FP32)
    processors.assert_same_bits(script, tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gated_glu_handles_any_layout(backend):
    gate, value, unit, grad = tensors = inputs((4, 34, 24), FP32, backend)
    want = results(*tensors, backend=backend)
    both = torch.cat([gate, value], 2)
    for change in (
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        turned = [change(each) for each in (gate, value, grad)]
        assert not any(each.is_contiguous() for each in turned)
        got = results(turned[0], turned[1], unit, turned[2], backend=backend)
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one, other) or backend == "eager"
            torch.testing.assert_close(one, other)
    got = results(both[..., :24], both[..., 24:], unit, grad, backend=backend)
    assert_same_bits(got, want)


def test_gated_glu_launches_nothing_for_an_empty_result(monkeypatch):
    """A grid of zero programs is an error on a GPU, and silently fine in the interpreter."""
    from vitprune_fast.kernels import gated_glu as kernels

    class Refuse:
        def __getitem__(self, grid):
            raise AssertionError(f"launched with grid {grid}")

    for name in ("fwd", "bwd"):
        monkeypatch.setattr(kernels, f"_gated_glu_{name}_kernel", Refuse())
    for shape in ((0, 5, 8), (2, 5, 0)):
        x, unit = torch.ones(shape), torch.ones(shape[2])
        assert kernels.gated_glu_fwd(x, x, unit, "silu").shape == shape
        grad_unit = kernels.gated_glu_bwd(x, x, unit, x, x.clone(), x.clone(), "silu")
        assert grad_unit.shape == (shape[0], shape[2])
    x, unit = torch.ones(2, 0, 8), torch.ones(8)
    assert kernels.gated_glu_fwd(x, x, unit, "silu").shape == x.shape
    with pytest.raises(AssertionError, match="launched"):
        kernels.gated_glu_bwd(x, x, unit, x, x.clone(), x.clone(), "silu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gated_glu_refuses_a_second_derivative(backend):
    gate, value, unit, _ = inputs((2, 5, 8), FP32, backend)
    out = gated_glu(gate.requires_grad_(), value, unit, backend=backend)
    with pytest.raises(RuntimeError, match="gated_glu: create_graph must be False"):
        torch.autograd.grad(out.sum(), gate, create_graph=True)
    x = torch.cat([gate, value], 2).detach().requires_grad_()
    out = gated_glu_packed(x, unit, gate_last=False, backend=backend)
    with pytest.raises(RuntimeError, match="gated_glu_packed: create_graph must be False"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


# as citizens of torch


def test_gated_glu_forms_opcheck():
    gate, value, unit, grad = inputs((2, 13, 12), FP32)
    for form in ["_triton"] + ([] if OBSTACLE else [""]):
        device = device_of("triton") if form else "cpu"
        moved = gate.to(device), value.to(device), unit.to(device)
        op = getattr(torch.ops.vitprune_fast, f"gated_glu_fwd{form}")
        opcheck(op.default, (*moved, "silu"))
        op = getattr(torch.ops.vitprune_fast, f"gated_glu_bwd{form}")
        for packed in (None, "gate_first", "gate_last"):
            opcheck(op.default, (*moved, grad.to(device), "gelu", packed))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gated_glu_opcheck(backend):
    gate, value, unit, _ = inputs((2, 13, 12), FP32, backend)
    x = torch.cat([gate, value], 2).requires_grad_()
    leaves = [each.requires_grad_() for each in (gate, value, unit)]
    opcheck(torch.ops.vitprune_fast.gated_glu.default, (*leaves, "gelu", backend))
    opcheck(torch.ops.vitprune_fast.gated_glu_packed.default, (x, unit, "silu", True, backend))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_gated_glu_compiles_fullgraph(backend):
    gate, value, unit, weight = inputs((2, 13, 12), FP32, backend)
    x = torch.cat([gate, value], 2).requires_grad_()
    leaves = (gate.requires_grad_(), value.requires_grad_(), unit.requires_grad_(), x)

    def loss(gate, value, unit, x):
        apart = gated_glu(gate, value, unit, backend=backend)
        together = gated_glu_packed(x, unit, gate_last=True, backend=backend)
        return ((apart + together) * weight).sum().sin()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same_bits(*(torch.autograd.grad(f(*leaves), leaves) for f in (loss, compiled)))


def test_gated_glu_rejects_wrong_arguments():
    x, unit = torch.ones(2, 3, 4), torch.ones(4)
    with pytest.raises(TypeError, match="gate_BNF must be a tensor, got list"):
        gated_glu([1.0], x, unit)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match=r"must have 3 dimensions, got \(3, 4\)"):
        gated_glu(x[0], x[0], unit)
    with pytest.raises(InvalidInput, match=r"value_BNF must have shape \(2, 3, 4\) like gate_BNF"):
        gated_glu(x, x[:, :2], unit)
    with pytest.raises(InvalidInput, match=r"gate_F must have shape \(4,\), .*, got \(2, 4\)"):
        gated_glu(x, x, unit.expand(2, 4))
    with pytest.raises(InvalidInput, match=r"dtype torch\.float32, .*, got torch\.float64"):
        gated_glu(x, x, unit.double())
    with pytest.raises(InvalidInput, match="gated_glu: activation must be one of"):
        gated_glu(x, x, unit, "SiLU")
    with pytest.raises(InvalidInput, match=r"gate_F must have shape \(2,\), .*, got \(4,\)"):
        gated_glu_packed(x, unit, gate_last=False)
    with pytest.raises(InvalidInput, match="even number of columns, gate and value, got 3"):
        gated_glu_packed(x[..., :3], unit, gate_last=False)
    # before any backward
    with pytest.raises(BackendUnavailable, match="there is no CUDA C"):
        gated_glu(x, x, unit, backend="cuda")
    with pytest.raises(BackendUnavailable, match="there is no CUDA C"):
        gated_glu_packed(x, unit[:2], gate_last=False, backend="cuda")


@native
def test_gated_glu_native_checks_memory_safety():
    native, x, unit = torch.ops.vitprune_fast, torch.ones(2, 3, 4), torch.ones(4)
    for tensors in ((x[0], x, unit), (x, x[:, :2], unit), (x, x, unit[:3]), (x, x.double(), unit)):
        with pytest.raises(RuntimeError, match=r"gated_glu: .* must .*, got"):
            native.gated_glu_fwd(*tensors, "silu")
    with pytest.raises(RuntimeError, match="gate_BNF must be float32"):
        native.gated_glu_fwd(x.long(), x.long(), unit, "silu")
    with pytest.raises(RuntimeError, match=r"grad_BNF must .*, got"):
        native.gated_glu_bwd(x, x, unit, x[..., :2], "silu", None)
    with pytest.raises(RuntimeError, match="packed must be gate_first, gate_last or None, got no"):
        native.gated_glu_bwd(x, x, unit, x, "silu", "no")


def test_gated_glu_named_backend_never_falls_back(monkeypatch):
    gate, value, unit, _ = inputs((2, 3, 4), FP32)
    monkeypatch.setenv("VITPRUNE_BACKEND", "eager")
    assert torch.equal(gated_glu(gate, value, unit), reference(gate, value, unit))
    monkeypatch.delenv("VITPRUNE_BACKEND")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendUnavailable, match="CUDA tensors only"):
        gated_glu(gate, value, unit, backend="triton")


# on a GPU: what the interpreter cannot judge


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
def test_gated_glu_triton_matches_reference(dtype, activation):
    """Outputs start as NaN (conftest), so what the kernel leaves out is seen."""
    for shape in ((4, 197, 768), (2, 197, 147)):
        tensors = inputs(shape, dtype, "triton")
        got = packed_results(*tensors, activation=activation, backend="triton", gate_last=True)
        assert_results_within_budget(got, tensors, activation)


@pytest.mark.gpu
def test_gated_glu_triton_at_the_target_shape():
    x = torch.randn(256, 197, 2 * 2048, device="cuda").to(BF16).requires_grad_()
    grad = torch.randn(256, 197, 2048, device="cuda").to(BF16)
    unit = torch.rand(2048, device="cuda").requires_grad_()
    choice = {c.device: c.backend for c in ops.backends() if c.op == "gated_glu"}
    assert choice["cuda"] == "triton"

    def run():
        out = gated_glu_packed(x, unit, gate_last=False)
        return out.detach(), *torch.autograd.grad(out, (x, unit), grad)

    first = run()
    assert not any(part.isnan().any() for part in first)
    for _ in range(20):
        assert_same_bits(first, run())
