"""activation_score and scored_activation: B batch, N tokens, F columns."""

from __future__ import annotations

import pytest
import torch
from error_budget import Rounded, assert_within_budget
from exact_activations import exact_value_and_slope, rounded, sum_of_tokens

from tests.registration import opcheck
from vitprune_fast import ops
from vitprune_fast._extension import OBSTACLE
from vitprune_fast.errors import BackendUnavailable, InvalidInput
from vitprune_fast.ops import ACTIVATIONS, activation_score, scored_activation
from vitprune_fast.reference.activation_score import ACTIVATIONS as FORWARD
from vitprune_fast.reference.activation_score import activation_score as reference
from vitprune_fast.reference.activation_score import value_and_slope

FP32, FP64, FP16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
ON_GPU = torch.cuda.is_available()

native = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))
# every backend that can run here; a missing one is seen by the tests declared to need it
BACKENDS = ["triton", "eager"] if OBSTACLE else ["cpu", "triton", "eager"]
NOT_TRITON = [name for name in BACKENDS if name != "triton"]
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
    pytest.param((2, 5, 4500), id="B2-N5-wide"),
    pytest.param((1, 1, 1), id="ones"),
    pytest.param((0, 5, 8), id="no-samples"),
    pytest.param((2, 0, 8), id="no-tokens"),
    pytest.param((2, 5, 0), id="no-columns"),
]


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and ON_GPU else "cpu"


def inputs(shape, dtype, backend="cpu"):
    # wide enough to reach into the tails
    device = device_of(backend)
    return tuple((2 * torch.randn(shape, dtype=FP64)).to(dtype).to(device) for _ in range(2))


def sums_of(x, grad, activation) -> tuple[None, Rounded]:
    """The gradient is no sum; a score adds one share of each token."""
    value = Rounded.of(FORWARD[activation](x.double()), x.dtype)
    return None, (value * Rounded.of(grad, x.dtype)).sum(1)


def assert_results_within_budget(got, x, grad, activation, per_token):
    eager = reference(x, grad, activation, per_token=per_token)
    exact = reference(x.double().cpu(), grad.double().cpu(), activation, per_token=per_token)
    sums = sums_of(x, grad, activation)
    for one, eager_one, exact_one, its_sums in zip(got, eager, exact, sums, strict=True):
        assert_within_budget(one.cpu(), eager_one.cpu(), exact_one, its_sums)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_the_derivative_of_what_torch_computes(activation):
    x = (3 * torch.randn(1000, dtype=FP64)).requires_grad_()
    want = FORWARD[activation](x)
    (want_slope,) = torch.autograd.grad(want.sum(), x)
    value, slope = value_and_slope(x.detach(), activation)
    torch.testing.assert_close(value, want.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(slope, want_slope, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_activation_score_matches_reference(shape, dtype, backend):
    x, grad = inputs(shape, dtype, backend)
    for per_token in (False, True):
        grad_x, score = activation_score(x, grad, per_token=per_token, backend=backend)
        assert (grad_x.shape, grad_x.dtype, grad_x.is_contiguous()) == (shape, dtype, True)
        assert (score.shape, score.dtype) == ((shape[0], shape[2]), FP32)
        assert_results_within_budget((grad_x, score), x, grad, "gelu", per_token)


@pytest.mark.parametrize(("backend", "dtype"), SHORT)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_score_matches_reference_for_every_activation(activation, dtype, backend):
    x, grad = inputs((2, 71, 147), dtype, backend)
    for per_token in (False, True):
        got = activation_score(x, grad, activation, per_token=per_token, backend=backend)
        assert_results_within_budget(got, x, grad, activation, per_token)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_score_fp64_matches_exact_numbers(activation, backend):
    shape = (2, 33, 11)
    x, grad = inputs(shape, FP64, backend)
    values, slopes = exact_value_and_slope(x, activation)
    gradients = grad.flatten().tolist()
    exact_grad_x = rounded([s * g for s, g in zip(slopes, gradients, strict=True)], shape)
    shares = [v * g for v, g in zip(values, gradients, strict=True)]
    for per_token in (False, True):
        grad_x, score = activation_score(x, grad, activation, per_token=per_token, backend=backend)
        assert grad_x.dtype == score.dtype == FP64
        eager_grad_x, eager_score = reference(x, grad, activation, per_token=per_token)
        assert_within_budget(grad_x.cpu(), eager_grad_x.cpu(), exact_grad_x)
        exact_score = sum_of_tokens(shares, shape, per_token)
        sums = sums_of(x, grad, activation)[1]
        assert_within_budget(score.cpu(), eager_score.cpu(), exact_score, sums)


@native
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_score_cpu_keeps_digits_in_the_tail(activation):
    """Where torch rounds the gate to 0, its digits are still there."""
    # fp32: relative error of the tail by its polynomial 3.1e-5 for gelu, and else by the rounding
    # of the exponent, which is at most 9 here, twice; fp64: rounding of the exponent
    relative = {FP32: 4e-5 if activation == "gelu" else 4e-6, FP64: 1e-14}
    for dtype in (FP32, FP64):
        x = -torch.linspace(1.5, 8.0, 400, dtype=FP64).to(dtype)
        values, slopes = exact_value_and_slope(x, activation)
        ones = torch.ones(1, 1, 400, dtype=dtype)
        grad_x, score = activation_score(x.reshape(1, 1, -1), ones, activation, backend="cpu")
        for got, exact in ((score, values), (grad_x, slopes)):
            want = rounded(exact, (400,))
            torch.testing.assert_close(got.double().flatten(), want, rtol=relative[dtype], atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, FP64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_score_far_from_zero(activation, dtype, backend):
    # plain torch multiplies infinity by 0 where the cube of x overflows
    most = 1e10 if backend == "eager" else torch.finfo(dtype).max
    numbers = torch.tensor([40.0, 100.0, 800.0, 1e5, most], dtype=dtype, device=device_of(backend))
    x = torch.cat([-numbers, numbers]).reshape(1, 1, -1)
    grad_x, score = activation_score(x, torch.ones_like(x), activation, backend=backend)
    gate = (x > 0).to(dtype)
    value, slope = (gate, 0 * gate) if activation == "sigmoid" else (x * gate, gate)
    # silu is the slowest to arrive: 40 exp(-40) = 1.7e-16
    torch.testing.assert_close(score, value[:, 0], rtol=1e-15, atol=2e-16)
    torch.testing.assert_close(grad_x, slope, rtol=1e-15, atol=2e-16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_score_nan_stays_in_its_column(activation, backend):
    x, grad = inputs((3, 20, 40), FP32, backend)
    want_grad_x, want = activation_score(x, grad, activation, backend=backend)
    # NaNs of several kinds: one is quiet and bare, the others carry bits
    kinds = torch.tensor([0x7FC00000, 0x7FC00155, -1], dtype=torch.int32).view(FP32)
    for nan in kinds.to(x.device):
        x[1, 19, 17] = nan
        got_grad_x, got = activation_score(x, grad, activation, backend=backend)
        assert got.isnan().nonzero().tolist() == [[1, 17]]
        if activation != "relu":
            assert got_grad_x.isnan().nonzero().tolist() == [[1, 19, 17]]
        got[1, 17] = want[1, 17]
        got_grad_x[1, 19, 17] = want_grad_x[1, 19, 17]
        assert torch.equal(got, want)
        assert torch.equal(got_grad_x, want_grad_x)


@pytest.mark.parametrize("backend", NOT_TRITON)
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
def test_activation_score_reads_and_writes_every_16_bit_number(dtype, backend):
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()]
    # whole vectors, then an odd number of columns for the last vector
    for part in (numbers, numbers[3:]):
        x = part.reshape(1, 1, -1)
        ones = torch.ones_like(x)
        # relu: the score is the positive number itself, and the gradient of a positive x is kept
        grad_x, score = activation_score(x, ones, "relu", backend=backend)
        assert torch.equal(score, x[:, 0].float().relu())
        grad_x, _ = activation_score(ones, x, "relu", backend=backend)
        assert torch.equal(grad_x, x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
def test_activation_score_same_bits_alone_repeated_and_in_a_batch(dtype, backend):
    x, grad = inputs((5, 131, 147), dtype, backend)
    whole = activation_score(x, grad, backend=backend)
    again = activation_score(x, grad, backend=backend)
    for one, other in zip(whole, again, strict=True):
        assert torch.equal(one, other)
    for b in range(5):
        alone = activation_score(x[b : b + 1], grad[b : b + 1], backend=backend)
        for one, other in zip(whole, alone, strict=True):
            if backend != "eager":
                assert torch.equal(one[b : b + 1], other)
            else:
                # plain torch chooses its own order of summation
                torch.testing.assert_close(one[b : b + 1], other)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "cpu"] or ["eager"])
def test_activation_score_same_bits_for_any_number_of_threads(backend):
    # few samples: with more threads than samples the columns are shared out
    x, grad = inputs((2, 40, 3072), FP32)
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(activation_score(x, grad, backend=backend))
    finally:
        torch.set_num_threads(1)
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            assert torch.equal(one, other)


@native
def test_activation_score_bits_are_the_same_for_every_instruction_set(processors):
    script = """
import torch
from vitprune_fast import ops
x, g = inputs
found = [part for t in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
         for name in ops.ACTIVATIONS for per_token in (False, True)
         for part in ops.activation_score(x.to(t), g.to(t), name, per_token=per_token,
                                          backend="cpu")]
"""
    x, grad = inputs((2, 37, 83), FP32)
    x[0, 0, :6] = torch.tensor([1e30, -1e30, 50.0, -50.0, 13.2, -13.2])
    processors.assert_same_bits(script, (x, grad))


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_score_handles_any_layout(backend):
    x, grad = inputs((4, 34, 24), FP32, backend)
    want = activation_score(x, grad, backend=backend)
    # the middle of a wider tensor, tokens first, columns not adjacent, one gradient for all tokens
    wide = torch.randn(4, 50, 72, device=x.device)
    wide[:, 3:37, 24:48] = x
    layouts = [
        wide[:, 3:37, 24:48],
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.transpose(1, 2).contiguous().transpose(1, 2),
    ]
    for layout in layouts:
        assert not layout.is_contiguous()
        for got in (
            activation_score(layout, grad, backend=backend),
            activation_score(
                layout, grad.transpose(0, 1).contiguous().transpose(0, 1), backend=backend
            ),
        ):
            for one, other in zip(got, want, strict=True):
                assert torch.equal(one, other) or backend == "eager"
                torch.testing.assert_close(one, other)
    expanded = grad[:, :1].expand_as(grad)
    got = activation_score(x, expanded, backend=backend)
    for one, other in zip(got, reference(x, expanded), strict=True):
        torch.testing.assert_close(one, other)


def test_activation_score_launches_nothing_for_an_empty_result(monkeypatch):
    """A grid of zero programs is an error on a GPU, and silently fine in the interpreter."""
    from vitprune_fast.kernels import activation_score as kernels

    class Refuse:
        def __getitem__(self, grid):
            raise AssertionError(f"launched with grid {grid}")

    monkeypatch.setattr(kernels, "_activation_score_bwd_kernel", Refuse())
    for shape in ((0, 5, 8), (2, 5, 0)):
        x = torch.ones(shape)
        grad_x, score = kernels.activation_score_bwd(x, x, "gelu", False)
        assert grad_x.shape == shape and score.shape == (shape[0], shape[2])
    with pytest.raises(AssertionError, match="launched"):
        kernels.activation_score_bwd(torch.ones(1, 1, 1), torch.ones(1, 1, 1), "gelu", False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_score_is_cut_off_from_the_graph(backend):
    x, grad = inputs((2, 5, 8), FP32, backend)
    got = activation_score(x.requires_grad_(), grad, backend=backend)
    assert not any(part.requires_grad for part in got)


# the differentiable op


def gated(x, probe, activation, weight):
    """The loss of each sample with an explicit gate on each column, in plain torch."""
    h = FORWARD[activation](x) * (1 + probe.to(x.dtype))[:, None]
    return (h * weight).sum((1, 2)).sin()


def scored(x, probe, activation, weight, **options):
    return (scored_activation(x, probe, activation, **options) * weight).sum((1, 2)).sin()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_scored_activation_gives_the_gradient_of_a_gate(activation, backend):
    x, weight = inputs((3, 17, 12), FP64, backend)
    probe = torch.zeros(3, 12, dtype=FP64, device=x.device).requires_grad_()
    x.requires_grad_()
    want = torch.autograd.grad(gated(x, probe, activation, weight).sum(), (x, probe))
    # never read
    unread = torch.full_like(probe, torch.nan).requires_grad_()
    losses = scored(x, unread, activation, weight, backend=backend)
    assert torch.equal(losses, gated(x, torch.zeros_like(probe), activation, weight))
    got = torch.autograd.grad(losses.sum(), (x, unread))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("backend", "dtype"), SHORT)
def test_scored_activation_computes_what_torch_does(dtype, backend):
    x, grad = inputs((2, 13, 24), dtype, backend)
    for activation in ACTIVATIONS:
        for per_token in (False, True):
            probe = torch.empty(2, 24, device=x.device).requires_grad_()
            h = scored_activation(
                x.requires_grad_(), probe, activation, per_token=per_token, backend=backend
            )
            assert torch.equal(h, FORWARD[activation](x))
            got = torch.autograd.grad(h, (x, probe), grad)
            want = activation_score(x, grad, activation, per_token=per_token, backend=backend)
            assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_scored_activation_when_only_one_gradient_is_wanted():
    x, grad = inputs((2, 13, 24), FP32)
    want_grad_x, want_score = activation_score(x, grad)
    probe = torch.empty(2, 24)
    h = scored_activation(x.requires_grad_(), probe)
    assert torch.equal(torch.autograd.grad(h, x, grad)[0], want_grad_x)
    h = scored_activation(x.detach(), probe.requires_grad_())
    assert torch.equal(torch.autograd.grad(h, probe, grad)[0], want_score)
    assert not scored_activation(x.detach(), probe.detach()).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_scored_activation_adds_up_to_the_gradient_of_the_next_layer(backend):
    """Summed over samples, a neuron's score is the column sum of W2 * dW2 (METHODS, identity 4)."""
    x, _ = inputs((3, 17, 12), FP64, backend)
    layer = torch.nn.Linear(12, 5, dtype=FP64, device=x.device)
    probe = torch.empty(3, 12, dtype=FP64, device=x.device).requires_grad_()
    layer(scored_activation(x, probe, "gelu", backend=backend)).sin().sum().backward()
    assert probe.grad is not None and layer.weight.grad is not None
    want = (layer.weight * layer.weight.grad).sum(0)
    torch.testing.assert_close(probe.grad.sum(0), want.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scored_activation_refuses_a_second_derivative(backend):
    x, _ = inputs((2, 5, 8), FP32, backend)
    probe = torch.empty(2, 8, device=x.device).requires_grad_()
    h = scored_activation(x.requires_grad_(), probe, backend=backend)
    with pytest.raises(RuntimeError, match="scored_activation: create_graph must be False"):
        torch.autograd.grad(h.sum(), x, create_graph=True)


# as citizens of torch


def test_activation_score_opcheck():
    x, grad = inputs((2, 13, 12), FP32)
    odd = x.transpose(1, 2).contiguous().transpose(1, 2)
    registered = [torch.ops.vitprune_fast.activation_score_triton]
    registered += [] if OBSTACLE else [torch.ops.vitprune_fast.activation_score]
    for op in registered:
        device = device_of("triton") if "triton" in str(op) else "cpu"
        for one, activation, per_token in ((x, "gelu", False), (odd, "silu", True)):
            arguments = (one.to(device), grad.to(device), activation, per_token)
            opcheck(op.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scored_activation_opcheck(backend):
    x, _ = inputs((2, 13, 12), FP32, backend)
    probe = torch.zeros(2, 12, device=x.device).requires_grad_()
    halves = torch.cat([x, x], 2)[..., :12].detach().requires_grad_()
    for one, activation in ((x.requires_grad_(), "gelu"), (halves, "quick_gelu")):
        arguments = (one, probe, activation, False, backend)
        opcheck(torch.ops.vitprune_fast.scored_activation.default, arguments)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_activation_score_compiles_fullgraph(backend):
    def scaled(x, grad):
        grad_x, score = activation_score(x * 2, grad, "silu", backend=backend)
        return grad_x + 1, score + 1

    x, grad = inputs((2, 13, 12), FP32, backend)
    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(x, grad), scaled(x, grad), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_scored_activation_compiles_fullgraph(backend):
    x, weight = inputs((2, 13, 12), FP32, backend)
    probe = torch.empty(2, 12, device=x.device).requires_grad_()
    x.requires_grad_()
    compiled = torch.compile(scored, fullgraph=True, backend="aot_eager")
    results = []
    for function in (scored, compiled):
        losses = function(x, probe, "gelu", weight, backend=backend)
        results.append((losses, *torch.autograd.grad(losses.sum(), (x, probe))))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_activation_score_rejects_wrong_arguments():
    x = torch.ones(2, 3, 4)
    with pytest.raises(TypeError, match="x_BNF must be a tensor, got list"):
        activation_score([1.0], x)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="grad_BNF must be a tensor, got NoneType"):
        activation_score(x, None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match=r"must have 3 dimensions, got \(3, 4\)"):
        activation_score(x[0], x[0])
    with pytest.raises(InvalidInput, match=r"must be float32 or .*, got torch\.int64"):
        activation_score(x.long(), x.long())
    with pytest.raises(InvalidInput, match=r"must have shape \(2, 3, 4\) like x_BNF, got"):
        activation_score(x, x[:, :2])
    with pytest.raises(InvalidInput, match=r"dtype torch.float32 like x_BNF, got"):
        activation_score(x, x.double())
    with pytest.raises(InvalidInput, match=r"activation must be one of gelu, .*, got 'tanh'"):
        activation_score(x, x, "tanh")


def test_scored_activation_rejects_wrong_arguments():
    x, probe = torch.ones(2, 3, 4), torch.ones(2, 4)
    with pytest.raises(TypeError, match="probe_BF must be a tensor, got float"):
        scored_activation(x, 1.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match=r"probe_BF must have shape \(2, 4\), .*, got \(4,\)"):
        scored_activation(x, probe[0])
    with pytest.raises(InvalidInput, match=r"dtype torch\.float32, .*, got torch\.float64"):
        scored_activation(x.half(), probe.double())
    with pytest.raises(InvalidInput, match="be on cpu like x_BNF, got meta"):
        scored_activation(x, probe.to("meta"))
    with pytest.raises(InvalidInput, match="scored_activation: activation must be one of"):
        scored_activation(x, probe, "GELU")
    with pytest.raises(InvalidInput, match=r"x_BNF must have 3 dimensions, got \(3, 4\)"):
        scored_activation(x[0], probe)
    # before any backward
    with pytest.raises(BackendUnavailable, match="there is no CUDA C"):
        scored_activation(x, probe, backend="cuda")


@native
def test_activation_score_native_checks_memory_safety():
    op, x = torch.ops.vitprune_fast.activation_score, torch.ones(2, 3, 4)
    for arguments in ((x[0], x[0]), (x, x[:, :2]), (x, x.double())):
        with pytest.raises(RuntimeError, match=r"activation_score: .* must .*, got"):
            op(*arguments, "gelu", False)
    with pytest.raises(RuntimeError, match="x_BNF must be float32"):
        op(x.long(), x.long(), "gelu", False)
    with pytest.raises(RuntimeError, match="activation must name an activation, got tanh"):
        op(x, x, "tanh", False)


def test_activation_score_named_backend_never_falls_back(monkeypatch):
    x = torch.ones(2, 3, 4)
    with pytest.raises(BackendUnavailable, match="there is no CUDA C"):
        activation_score(x, x, backend="cuda")
    monkeypatch.setenv("VITPRUNE_BACKEND", "eager")
    grad_x, score = activation_score(x, x)
    assert all(
        torch.equal(one, other) for one, other in zip((grad_x, score), reference(x, x), strict=True)
    )
    monkeypatch.delenv("VITPRUNE_BACKEND")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendUnavailable, match="CUDA tensors only"):
        activation_score(x, x, backend="triton")


# on a GPU: what the interpreter cannot judge


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
def test_activation_score_triton_matches_reference(dtype, activation):
    """Outputs start as NaN (conftest), so what the kernel leaves out is seen."""
    for shape in ((4, 197, 768), (2, 197, 147)):
        x, grad = inputs(shape, dtype, "triton")
        for per_token in (False, True):
            got = activation_score(x, grad, activation, per_token=per_token, backend="triton")
            assert_results_within_budget(got, x, grad, activation, per_token)


@pytest.mark.gpu
def test_activation_score_triton_at_the_target_shape():
    x, grad = (torch.randn(256, 197, 3072, device="cuda").to(BF16) for _ in range(2))
    assert {c.device: c.backend for c in ops.backends() if c.op == "activation_score"}["cuda"] == (
        "triton"
    )
    first = activation_score(x, grad)
    assert not any(part.isnan().any() for part in first)
    named = activation_score(x, grad, backend="triton")
    assert all(torch.equal(one, other) for one, other in zip(first, named, strict=True))
    for _ in range(20):
        again = activation_score(x, grad)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    alone = activation_score(x[100:101], grad[100:101])
    assert all(torch.equal(one[100:101], other) for one, other in zip(first, alone, strict=True))


@pytest.mark.gpu
@pytest.mark.slow
def test_activation_score_handles_more_than_2_31_elements():
    x = torch.ones(3, 1024, 720_000, device="cuda", dtype=FP16)
    assert x.numel() > 2**31
    grad_x, score = activation_score(x, x, "relu", backend="triton")
    assert torch.equal(score, torch.full_like(score, 1024))
    assert bool((grad_x == 1).all())
