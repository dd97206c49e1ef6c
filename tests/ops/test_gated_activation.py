"""gated_activation: B batch, N tokens, F columns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from error_budget import Rounded, assert_within_budget
from exact_activations import exact_value_and_slope, rounded

from tests.registration import opcheck
from vitprune_fast import ops
from vitprune_fast._extension import OBSTACLE
from vitprune_fast.errors import BackendUnavailable, InvalidInput
from vitprune_fast.ops import ACTIVATIONS, gated_activation
from vitprune_fast.reference.activation_score import ACTIVATIONS as FORWARD
from vitprune_fast.reference.gated_activation import gated_activation as reference
from vitprune_fast.reference.gated_activation import gated_activation_backward

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
    pytest.param((2, 197, 384), id="B2-N197-F384"),
    pytest.param((2, 197, 147), id="B2-N197-F147-odd"),
    pytest.param((1, 131, 37), id="B1-N131-F37-primes"),
    pytest.param((3, 257, 24), id="B3-N257-F24"),
    pytest.param((2, 5, 4500), id="B2-N5-wide"),
    pytest.param((1, 1, 1), id="ones"),
    pytest.param((0, 5, 8), id="no-samples"),
    pytest.param((2, 0, 8), id="no-tokens"),
    pytest.param((2, 5, 0), id="no-columns"),
]


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and ON_GPU else "cpu"


def wide(dtype: torch.dtype) -> torch.dtype:
    return FP64 if dtype == FP64 else FP32


def inputs(shape, dtype, backend="cpu") -> tuple[Any, ...]:
    """x and the gradient, wide enough to reach into the tails, and gates of which some are 0."""
    device = device_of(backend)
    x, grad = ((2 * torch.randn(shape, dtype=FP64)).to(dtype).to(device) for _ in range(2))
    gate = torch.randn(shape[2], dtype=FP64).to(wide(dtype)).to(device)
    gate[1::3] = 0
    return x, gate, grad


def results(x, gate, grad, activation="gelu", backend: Any = "auto"):
    """Output, gradient of x, gradient of the gates."""
    leaves = x.detach().requires_grad_(), gate.detach().requires_grad_()
    out = gated_activation(*leaves, activation, backend=backend)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def expected(x, gate, grad, activation="gelu"):
    grad_x, grad_gate_BF = gated_activation_backward(x, gate, grad, activation)
    return reference(x, gate, activation), grad_x, grad_gate_BF.sum(0)


def sums_of(x, grad, activation) -> tuple[None, None, Rounded]:
    """Only the gradient of the gates is a sum: of one share of each sample and token."""
    value = Rounded.of(FORWARD[activation](x.double()), x.dtype)
    return None, None, (value * Rounded.of(grad, x.dtype)).sum((0, 1))


def assert_results_within_budget(got, x, gate, grad, activation):
    eager = expected(x, gate, grad, activation)
    exact = expected(*(each.double().cpu() for each in (x, gate, grad)), activation=activation)
    sums = sums_of(x, grad, activation)
    for one, eager_one, exact_one, its_sums in zip(got, eager, exact, sums, strict=True):
        assert_within_budget(one.cpu(), eager_one.cpu(), exact_one, its_sums)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_the_product_and_its_derivative(activation):
    x, gate, grad = inputs((3, 17, 12), FP64)
    leaves = x.requires_grad_(), gate.requires_grad_()
    want = FORWARD[activation](x) * gate
    wanted = torch.autograd.grad(want, leaves, grad)
    got = expected(x.detach(), gate.detach(), grad, activation)
    for one, other in zip(got, (want, *wanted), strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_gated_activation_gradcheck(activation, backend):
    x, gate, _ = inputs((2, 3, 5), FP64, backend)
    assert torch.autograd.gradcheck(
        lambda x, gate: gated_activation(x, gate, activation, backend=backend),
        (x.requires_grad_(), gate.requires_grad_()),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_activation_matches_reference(shape, dtype, backend):
    x, gate, grad = inputs(shape, dtype, backend)
    out, grad_x, grad_gate = results(x, gate, grad, backend=backend)
    assert (out.shape, out.dtype, out.is_contiguous()) == (shape, dtype, True)
    assert (grad_x.shape, grad_x.dtype, grad_x.is_contiguous()) == (shape, dtype, True)
    assert (grad_gate.shape, grad_gate.dtype) == (shape[2:], FP32)
    assert_results_within_budget((out, grad_x, grad_gate), x, gate, grad, "gelu")


@pytest.mark.parametrize(("backend", "dtype"), SHORT)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_activation_matches_reference_for_every_activation(activation, dtype, backend):
    x, gate, grad = inputs((2, 71, 147), dtype, backend)
    got = results(x, gate, grad, activation, backend)
    assert_results_within_budget(got, x, gate, grad, activation)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_activation_fp64_matches_exact_numbers(activation, backend):
    shape = (1, 33, 11)
    x, gate, grad = inputs(shape, FP64, backend)
    values, slopes = exact_value_and_slope(x, activation)
    factors, gradients = gate.tolist() * 33, grad.flatten().tolist()
    out = [v * f for v, f in zip(values, factors, strict=True)]
    grad_x = [s * f * g for s, f, g in zip(slopes, factors, gradients, strict=True)]
    shares = [v * g for v, g in zip(values, gradients, strict=True)]
    grad_gate = [sum(shares[f::11]) for f in range(11)]
    exact = rounded(out, shape), rounded(grad_x, shape), rounded(grad_gate, (11,))
    got, eager = results(x, gate, grad, activation, backend), expected(x, gate, grad, activation)
    sums = sums_of(x, grad, activation)
    for one, eager_one, exact_one, its_sums in zip(got, eager, exact, sums, strict=True):
        assert one.dtype == FP64
        assert_within_budget(one.cpu(), eager_one.cpu(), exact_one, its_sums)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_closed_gate_stops_everything_but_its_own_gradient(backend):
    x, gate, grad = inputs((3, 20, 40), FP32, backend)
    gate[:] = 1
    gate[[4, 17]] = 0
    want = results(x, gate, grad, backend=backend)
    # the gradient of a gate of 0 is that of any other
    torch.testing.assert_close(
        want[2], results(x, gate + 1, grad, backend=backend)[2], rtol=0, atol=0
    )
    x[1, 19, 17], x[0, 3, 17] = torch.nan, torch.inf
    out, grad_x, grad_gate = results(x, gate, grad, backend=backend)
    for one in (out, grad_x):
        assert not one[..., [4, 17]].any()
        assert one.isfinite().all()
    assert grad_gate.isnan().nonzero().tolist() == [[17]]
    assert torch.equal(out, want[0]) and torch.equal(grad_x, want[1])
    # an open one lets it through, in its column alone
    x[1, 19, 20] = torch.nan
    out, grad_x, grad_gate = results(x, gate, grad, backend=backend)
    assert out.isnan().nonzero().tolist() == [[1, 19, 20]]
    assert grad_x.isnan().nonzero().tolist() == [[1, 19, 20]]
    assert grad_gate.isnan().nonzero().tolist() == [[17], [20]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
def test_gated_activation_same_bits_repeated_and_samples_apart(dtype, backend):
    x, gate, grad = inputs((5, 131, 147), dtype, backend)
    whole, again = (results(x, gate, grad, backend=backend) for _ in range(2))
    for one, other in zip(whole, again, strict=True):
        assert torch.equal(one, other)
    for b in range(5):
        alone = results(x[b : b + 1], gate, grad[b : b + 1], backend=backend)
        for one, other in zip(whole[:2], alone[:2], strict=True):
            # plain torch computes the last few numbers of a tensor in another way than the rest
            assert torch.equal(one[b : b + 1], other) or backend == "eager"
            torch.testing.assert_close(one[b : b + 1], other)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "cpu"] or ["eager"])
def test_gated_activation_same_bits_for_any_number_of_threads(backend):
    # few samples: with more threads than samples the columns are shared out
    x, gate, grad = inputs((2, 40, 3072), FP32)
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(results(x, gate, grad, backend=backend))
    finally:
        torch.set_num_threads(1)
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert torch.equal(one, other)


@native
def test_gated_activation_bits_are_the_same_for_every_instruction_set(processors):
    script = """
import torch
from vitprune_fast import ops
x, gate, g = inputs
native, found = torch.ops.vitprune_fast, []
for t in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    wide = torch.float64 if t == torch.float64 else torch.float32
    for name in ops.ACTIVATIONS:
        found.append(native.gated_activation_fwd(x.to(t), gate.to(wide), name))
        found += native.gated_activation_bwd(x.to(t), gate.to(wide), g.to(t), name)
"""
    x, gate, grad = inputs((2, 37, 83), FP32)
    x[0, 0, :6] = torch.tensor([1e30, -1e30, 50.0, -50.0, 13.2, -13.2])
    processors.assert_same_bits(script, (x, gate, grad))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gated_activation_handles_any_layout(backend):
    x, gate, grad = inputs((4, 34, 24), FP32, backend)
    want = results(x, gate, grad, backend=backend)
    # the middle of a wider tensor, tokens first, columns not adjacent
    around = torch.randn(4, 50, 72, device=x.device)
    around[:, 3:37, 24:48] = x
    layouts = [
        around[:, 3:37, 24:48],
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.transpose(1, 2).contiguous().transpose(1, 2),
    ]
    strided = torch.stack([gate, gate], 1)[:, 0]
    for layout in layouts:
        assert not layout.is_contiguous() and not strided.is_contiguous()
        turned = grad.transpose(0, 1).contiguous().transpose(0, 1)
        got = results(layout, strided, turned, backend=backend)
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one, other) or backend == "eager"
            torch.testing.assert_close(one, other)
    expanded = grad[:, :1].expand_as(grad)
    got = results(x, gate, expanded, backend=backend)
    for one, other in zip(got, expected(x, gate, expanded), strict=True):
        torch.testing.assert_close(one, other)


def test_gated_activation_launches_nothing_for_an_empty_result(monkeypatch):
    """A grid of zero programs is an error on a GPU, and silently fine in the interpreter."""
    from vitprune_fast.kernels import gated_activation as kernels

    class Refuse:
        def __getitem__(self, grid):
            raise AssertionError(f"launched with grid {grid}")

    for name in ("fwd", "bwd"):
        monkeypatch.setattr(kernels, f"_gated_activation_{name}_kernel", Refuse())
    for shape in ((0, 5, 8), (2, 5, 0)):
        x, gate = torch.ones(shape), torch.ones(shape[2])
        assert kernels.gated_activation_fwd(x, gate, "gelu").shape == shape
        grad_x, grad_gate = kernels.gated_activation_bwd(x, gate, x, "gelu")
        assert grad_x.shape == shape and grad_gate.shape == (shape[0], shape[2])
    x, gate = torch.ones(2, 0, 8), torch.ones(8)
    assert kernels.gated_activation_fwd(x, gate, "gelu").shape == x.shape
    with pytest.raises(AssertionError, match="launched"):
        kernels.gated_activation_bwd(x, gate, x, "gelu")


def test_gated_activation_when_only_one_gradient_is_wanted():
    x, gate, grad = inputs((2, 13, 24), FP32)
    _, want_x, want_gate = results(x, gate, grad)
    out = gated_activation(x.requires_grad_(), gate)
    assert torch.equal(torch.autograd.grad(out, x, grad)[0], want_x)
    out = gated_activation(x.detach(), gate.requires_grad_())
    assert torch.equal(torch.autograd.grad(out, gate, grad)[0], want_gate)
    assert not gated_activation(x.detach(), gate.detach()).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_gated_activation_refuses_a_second_derivative(backend):
    x, gate, _ = inputs((2, 5, 8), FP32, backend)
    out = gated_activation(x.requires_grad_(), gate, backend=backend)
    with pytest.raises(RuntimeError, match="gated_activation: create_graph must be False"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


# as citizens of torch


def test_gated_activation_forms_opcheck():
    x, gate, grad = inputs((2, 13, 12), FP32)
    odd = x.transpose(1, 2).contiguous().transpose(1, 2)
    for one, activation in ((x, "gelu"), (odd, "silu")):
        for form in ["_triton"] + ([] if OBSTACLE else [""]):
            device = device_of("triton") if form else "cpu"
            forward = one.to(device), gate.to(device), activation
            backward = *forward[:2], grad.to(device), activation
            for name, arguments in (("fwd", forward), ("bwd", backward)):
                op = getattr(torch.ops.vitprune_fast, f"gated_activation_{name}{form}")
                opcheck(op.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gated_activation_opcheck(backend):
    x, gate, _ = inputs((2, 13, 12), FP32, backend)
    halves = torch.cat([x, x], 2)[..., :12].detach().requires_grad_()
    for one, activation in ((x.requires_grad_(), "gelu"), (halves, "quick_gelu")):
        arguments = (one, gate.requires_grad_(), activation, backend)
        opcheck(torch.ops.vitprune_fast.gated_activation.default, arguments)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_gated_activation_compiles_fullgraph(backend):
    x, gate, weight = inputs((2, 13, 12), FP32, backend)
    leaves = x.requires_grad_(), gate.requires_grad_()

    def loss(x, gate):
        return (gated_activation(x * 2, gate, "silu", backend=backend) * weight).sum().sin()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager, traced = (torch.autograd.grad(f(*leaves), leaves) for f in (loss, compiled))
    for one, other in zip(eager, traced, strict=True):
        assert torch.equal(one, other)


def test_gated_activation_rejects_wrong_arguments():
    x, gate = torch.ones(2, 3, 4), torch.ones(4)
    with pytest.raises(TypeError, match="x_BNF must be a tensor, got list"):
        gated_activation([1.0], gate)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="gate_F must be a tensor, got float"):
        gated_activation(x, 1.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match=r"x_BNF must have 3 dimensions, got \(3, 4\)"):
        gated_activation(x[0], gate)
    with pytest.raises(InvalidInput, match=r"must be float32 or .*, got torch\.int64"):
        gated_activation(x.long(), gate)
    with pytest.raises(InvalidInput, match=r"gate_F must have shape \(4,\), .*, got \(3,\)"):
        gated_activation(x, gate[:3])
    with pytest.raises(InvalidInput, match=r"dtype torch\.float32, .*, got torch\.float16"):
        gated_activation(x.half(), gate.half())
    with pytest.raises(InvalidInput, match="gate_F must be on cpu like x_BNF, got meta"):
        gated_activation(x, gate.to("meta"))
    with pytest.raises(InvalidInput, match=r"activation must be one of gelu, .*, got 'tanh'"):
        gated_activation(x, gate, "tanh")
    # before any backward
    with pytest.raises(BackendUnavailable, match="there is no CUDA C"):
        gated_activation(x, gate, backend="cuda")


@native
def test_gated_activation_native_checks_memory_safety():
    native, x, gate = torch.ops.vitprune_fast, torch.ones(2, 3, 4), torch.ones(4)
    for arguments in ((x[0], gate), (x, gate[:3]), (x, gate.double()), (x, gate[::2])):
        with pytest.raises(RuntimeError, match=r"gated_activation: .* must .*, got"):
            native.gated_activation_fwd(*arguments, "gelu")
    for grad in (x[:, :2], x.double()):
        with pytest.raises(RuntimeError, match=r"gated_activation: grad_BNF must .*, got"):
            native.gated_activation_bwd(x, gate, grad, "gelu")
    with pytest.raises(RuntimeError, match="x_BNF must be float32"):
        native.gated_activation_fwd(x.long(), gate, "gelu")
    with pytest.raises(RuntimeError, match="activation must name an activation, got tanh"):
        native.gated_activation_fwd(x, gate, "tanh")


def test_gated_activation_named_backend_never_falls_back(monkeypatch):
    x, gate, _ = inputs((2, 3, 4), FP32)
    monkeypatch.setenv("VITPRUNE_BACKEND", "eager")
    assert torch.equal(gated_activation(x, gate), reference(x, gate))
    monkeypatch.delenv("VITPRUNE_BACKEND")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendUnavailable, match="CUDA tensors only"):
        gated_activation(x, gate, backend="triton")


# on a GPU: what the interpreter cannot judge


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
def test_gated_activation_triton_matches_reference(dtype, activation):
    """Outputs start as NaN (conftest), so what the kernel leaves out is seen."""
    for shape in ((4, 197, 768), (2, 197, 147)):
        x, gate, grad = inputs(shape, dtype, "triton")
        got = results(x, gate, grad, activation, "triton")
        assert_results_within_budget(got, x, gate, grad, activation)


@pytest.mark.gpu
def test_gated_activation_triton_at_the_target_shape():
    x, grad = (torch.randn(256, 197, 3072, device="cuda").to(BF16) for _ in range(2))
    gate = torch.rand(3072, device="cuda")
    choice = {c.device: c.backend for c in ops.backends() if c.op == "gated_activation"}
    assert choice["cuda"] == "triton"
    first = results(x, gate, grad)
    assert not any(part.isnan().any() for part in first)
    for _ in range(20):
        again = results(x, gate, grad)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    alone = results(x[100:101], gate, grad[100:101])
    for one, other in zip(first[:2], alone[:2], strict=True):
        assert torch.equal(one[100:101], other)
