"""glu_score, scored_glu and scored_glu_packed: B batch, N tokens, F columns."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from operator import itemgetter

import pytest
import torch
from error_budget import Rounded, assert_within_budget
from exact_activations import exact_value_and_slope, rounded, sum_of_tokens
from torch import Tensor

from tests.registration import opcheck
from vitprune_fast import ops
from vitprune_fast._extension import OBSTACLE
from vitprune_fast.errors import BackendUnavailable, InvalidInput
from vitprune_fast.ops import (
    ACTIVATIONS,
    activation_score,
    glu_score,
    scored_glu,
    scored_glu_packed,
)
from vitprune_fast.reference.activation_score import ACTIVATIONS as FORWARD
from vitprune_fast.reference.glu_score import glu_score as reference

FP32, FP64, FP16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
ON_GPU = torch.cuda.is_available()
PACKED = (None, "gate_first", "gate_last")

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
    pytest.param((2, 5, 4500), id="B2-N5-wide"),
    pytest.param((1, 1, 1), id="ones"),
    pytest.param((0, 5, 8), id="no-samples"),
    pytest.param((2, 0, 8), id="no-tokens"),
    pytest.param((2, 5, 0), id="no-columns"),
]


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and ON_GPU else "cpu"


Three = tuple[Tensor, Tensor, Tensor]


def each(function: Callable[[Tensor], Tensor], tensors: Three) -> Three:
    gate, value, grad = tensors
    return function(gate), function(value), function(grad)


def inputs(shape, dtype, backend="cpu") -> Three:
    device = device_of(backend)
    gate, value, grad = (torch.randn(shape, dtype=FP64) for _ in range(3))
    # gates wide enough to reach into the tails
    return each(lambda x: x.to(dtype).to(device), (2 * gate, value, grad))


def sums_of(tensors: Three, activation) -> tuple[None, None, Rounded]:
    """The gradients are no sums; a score adds one share of each token."""
    gate, value, grad = each(Tensor.double, tensors)
    dtype = tensors[0].dtype
    h = Rounded.of(FORWARD[activation](gate), dtype) * Rounded.of(value, dtype)
    return None, None, (h * Rounded.of(grad, dtype)).sum(1)


def assert_results_within_budget(got, tensors: Three, activation, per_token):
    eager = reference(*tensors, activation, per_token=per_token)
    doubles = each(lambda x: x.double().cpu(), tensors)
    exact = reference(*doubles, activation, per_token=per_token)
    sums = sums_of(tensors, activation)
    for one, eager_one, exact_one, its_sums in zip(got, eager, exact, sums, strict=True):
        assert_within_budget(one.cpu(), eager_one.cpu(), exact_one, its_sums)


def assert_same_bits(ones, others):
    assert all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_glu_score_matches_reference(shape, dtype, backend):
    tensors = inputs(shape, dtype, backend)
    for per_token in (False, True):
        got = glu_score(*tensors, per_token=per_token, backend=backend)
        assert [part.dtype for part in got] == [dtype, dtype, FP32]
        assert [part.shape for part in got] == [shape, shape, (shape[0], shape[2])]
        assert all(part.is_contiguous() for part in got)
        assert_results_within_budget(got, tensors, "silu", per_token)


@pytest.mark.parametrize(("backend", "dtype"), SHORT)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_glu_score_matches_reference_for_every_activation(activation, backend, dtype):
    tensors = inputs((2, 71, 147), dtype, backend)
    for per_token in (False, True):
        got = glu_score(*tensors, activation, per_token=per_token, backend=backend)
        assert_results_within_budget(got, tensors, activation, per_token)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_glu_score_fp64_matches_exact_numbers(activation, backend):
    shape = (2, 33, 11)
    gate, value, grad = inputs(shape, FP64, backend)
    acts, slopes = exact_value_and_slope(gate, activation)
    flat = list(zip(acts, slopes, value.flatten().tolist(), grad.flatten().tolist(), strict=True))
    exact = (
        rounded([slope * v * g for _, slope, v, g in flat], shape),
        rounded([act * g for act, _, _, g in flat], shape),
    )
    shares = [act * v * g for act, _, v, g in flat]
    sums = sums_of((gate, value, grad), activation)
    for per_token in (False, True):
        got = glu_score(gate, value, grad, activation, per_token=per_token, backend=backend)
        eager = reference(gate, value, grad, activation, per_token=per_token)
        score = sum_of_tokens(shares, shape, per_token)
        wanted = (*exact, score)
        for one, eager_one, exact_one, its_sums in zip(got, eager, wanted, sums, strict=True):
            assert one.dtype == FP64
            assert_within_budget(one.cpu(), eager_one.cpu(), exact_one, its_sums)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", ["gate_first", "gate_last"])
def test_glu_score_packed_gradients_are_halves_of_one_tensor(packed, backend):
    for shape in ((3, 13, 24), (2, 5, 7), (2, 0, 3), (0, 2, 3), (2, 3, 0)):
        tensors = inputs(shape, FP32, backend)
        grad_gate, grad_value, score = glu_score(*tensors, packed=packed, backend=backend)
        assert_same_bits((grad_gate, grad_value, score), glu_score(*tensors, backend=backend))
        batch, tokens, columns = shape
        whole = grad_gate._base
        assert whole is not None and whole is grad_value._base
        assert whole.shape == (batch, tokens, 2 * columns) and whole.is_contiguous()
        halves = (grad_gate, grad_value) if packed == "gate_first" else (grad_value, grad_gate)
        assert torch.equal(whole, torch.cat(halves, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_glu_score_of_ones_is_activation_score(backend):
    gate, _, grad = inputs((2, 40, 33), FP64, backend)
    for activation in ACTIVATIONS:
        grad_gate, _, score = glu_score(
            gate, torch.ones_like(gate), grad, activation, backend=backend
        )
        want = activation_score(gate, grad, activation, backend=backend)
        for one, other in zip((grad_gate, score), want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_glu_score_nan_stays_in_its_column(backend):
    tensors = inputs((3, 20, 40), FP32, backend)
    want = glu_score(*tensors, backend=backend)
    for x in tensors:
        before = x[1, 19, 17].item()
        x[1, 19, 17] = torch.nan
        got = glu_score(*tensors, backend=backend)
        x[1, 19, 17] = before
        assert got[2].isnan().nonzero().tolist() == [[1, 17]]
        for part, wanted in zip(got, want, strict=True):
            assert part.isnan().sum() <= 1
            index = (1, 17) if part.dim() == 2 else (1, 19, 17)
            part[index] = wanted[index]
        assert_same_bits(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
def test_glu_score_same_bits_alone_repeated_and_in_a_batch(dtype, backend):
    tensors = inputs((4, 131, 147), dtype, backend)
    whole = glu_score(*tensors, backend=backend)
    assert_same_bits(whole, glu_score(*tensors, backend=backend))
    for b in range(4):
        alone = glu_score(*each(itemgetter(slice(b, b + 1)), tensors), backend=backend)
        for one, other in zip(whole, alone, strict=True):
            if backend != "eager":
                assert torch.equal(one[b : b + 1], other)
            else:
                # plain torch chooses its own order of summation
                torch.testing.assert_close(one[b : b + 1], other)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "cpu"] or ["eager"])
def test_glu_score_same_bits_for_any_number_of_threads(backend):
    # few samples: with more threads than samples the columns are shared out
    tensors = inputs((2, 40, 2048), FP32)
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(glu_score(*tensors, packed="gate_first", backend=backend))
    finally:
        torch.set_num_threads(1)
    for others in results[1:]:
        assert_same_bits(results[0], others)


@native
def test_glu_score_bits_are_the_same_for_every_instruction_set(processors):
    script = """
import torch
from vitprune_fast import ops
found = [part for t in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
         for name in ops.ACTIVATIONS for per_token in (False, True)
         for part in ops.glu_score(*(x.to(t) for x in inputs), name, per_token=per_token,
                                   backend="cpu")]
"""
    processors.assert_same_bits(script, inputs((2, 37, 83), FP32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_glu_score_reads_halves_and_any_layout_in_place(backend):
    tensors = gate, value, grad = inputs((4, 34, 24), FP32, backend)
    want = glu_score(*tensors, backend=backend)
    halves = torch.cat([gate, value], 2)
    wide = torch.randn(4, 50, 72, device=gate.device)
    wide[:, 3:37, 24:48] = grad
    layouts = [
        (halves[..., :24], halves[..., 24:], grad),
        (gate, value, wide[:, 3:37, 24:48]),
        each(lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), tensors),
        each(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), tensors),
    ]
    for layout in layouts:
        assert not all(x.is_contiguous() for x in layout)
        got = glu_score(*layout, backend=backend)
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one, other) or backend == "eager"
            torch.testing.assert_close(one, other)
    expanded = grad[:, :1].expand_as(grad)
    got = glu_score(gate, value, expanded, backend=backend)
    for one, other in zip(got, reference(gate, value, expanded), strict=True):
        torch.testing.assert_close(one, other)


def test_glu_score_launches_nothing_for_an_empty_result(monkeypatch):
    """A grid of zero programs is an error on a GPU, and silently fine in the interpreter."""
    from vitprune_fast.kernels import glu_score as kernels

    class Refuse:
        def __getitem__(self, grid):
            raise AssertionError(f"launched with grid {grid}")

    monkeypatch.setattr(kernels, "_glu_score_bwd_kernel", Refuse())
    for shape in ((0, 5, 8), (2, 5, 0)):
        x = torch.ones(shape)
        score = kernels.glu_score_bwd(x, x, x, x.clone(), x.clone(), "silu", False)
        assert score.shape == (shape[0], shape[2])
    x = torch.ones(1, 1, 1)
    with pytest.raises(AssertionError, match="launched"):
        kernels.glu_score_bwd(x, x, x, x.clone(), x.clone(), "silu", False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_glu_score_is_cut_off_from_the_graph(backend):
    gate, value, grad = inputs((2, 5, 8), FP32, backend)
    got = glu_score(gate.requires_grad_(), value.requires_grad_(), grad, backend=backend)
    assert not any(part.requires_grad for part in got)


# the differentiable ops


def unit(gate, value, activation):
    return FORWARD[activation](gate) * value


def loss(h, weight):
    return (h * weight).sum((1, 2)).sin().sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_scored_glu_gives_the_gradient_of_a_gate(activation, backend):
    gate, value, weight = inputs((3, 17, 12), FP64, backend)
    leaves = (gate.requires_grad_(), value.requires_grad_())
    probe = torch.ones(3, 12, dtype=FP64, device=gate.device).requires_grad_()
    h = unit(gate, value, activation)
    want = torch.autograd.grad(loss(h * probe[:, None], weight), (*leaves, probe))
    # never read
    unread = torch.full_like(probe, torch.nan).requires_grad_()
    got_h = scored_glu(gate, value, unread, activation, backend=backend)
    assert torch.equal(got_h, h)
    got = torch.autograd.grad(loss(got_h, weight), (*leaves, unread))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    for gate_last in (False, True):
        halves = [value, gate] if gate_last else [gate, value]
        x = torch.cat(halves, 2).detach().requires_grad_()
        got_h = scored_glu_packed(x, unread, activation, gate_last=gate_last, backend=backend)
        # torch rounds otherwise where numbers are not adjacent
        torch.testing.assert_close(got_h, h, rtol=1e-14, atol=1e-14)
        grad_x, score = torch.autograd.grad(loss(got_h, weight), (x, unread))
        assert grad_x.is_contiguous()
        wanted = torch.cat([want[1], want[0]] if gate_last else [want[0], want[1]], 2)
        torch.testing.assert_close(grad_x, wanted, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(score, want[2], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("backend", "dtype"), SHORT)
def test_scored_glu_gives_what_glu_score_does(backend, dtype):
    gate, value, grad = inputs((2, 13, 24), dtype, backend)
    probe = torch.empty(2, 24, device=gate.device).requires_grad_()
    for activation, per_token in itertools.product(("silu", "gelu"), (False, True)):
        options = {"per_token": per_token, "backend": backend}
        want = glu_score(gate, value, grad, activation, **options)
        leaves = gate.clone().requires_grad_(), value.clone().requires_grad_()
        h = scored_glu(*leaves, probe, activation, **options)
        assert torch.equal(h, unit(gate, value, activation))
        assert_same_bits(torch.autograd.grad(h, (*leaves, probe), grad), want)
        x = torch.cat([value, gate], 2).requires_grad_()
        h = scored_glu_packed(x, probe, activation, gate_last=True, **options)
        grad_x, score = torch.autograd.grad(h, (x, probe), grad)
        assert_same_bits((grad_x[..., 24:], grad_x[..., :24], score), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scored_glu_adds_up_to_the_gradient_of_the_next_layer(backend):
    """Summed over samples, a neuron's score is the column sum of W2 * dW2 (METHODS, identity 4)."""
    gate, value, _ = inputs((3, 17, 12), FP64, backend)
    layer = torch.nn.Linear(12, 5, dtype=FP64, device=gate.device)
    probe = torch.empty(3, 12, dtype=FP64, device=gate.device).requires_grad_()
    layer(scored_glu(gate, value, probe, backend=backend)).sin().sum().backward()
    assert probe.grad is not None and layer.weight.grad is not None
    want = (layer.weight * layer.weight.grad).sum(0)
    torch.testing.assert_close(probe.grad.sum(0), want.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scored_glu_refuses_a_second_derivative(backend):
    gate, value, _ = inputs((2, 5, 8), FP32, backend)
    probe = torch.empty(2, 8, device=gate.device).requires_grad_()
    h = scored_glu(gate.requires_grad_(), value, probe, backend=backend)
    with pytest.raises(RuntimeError, match="scored_glu: create_graph must be False"):
        torch.autograd.grad(h.sum(), gate, create_graph=True)
    x = torch.cat([gate, value], 2).detach().requires_grad_()
    h = scored_glu_packed(x, probe, gate_last=False, backend=backend)
    with pytest.raises(RuntimeError, match="scored_glu_packed: create_graph must be False"):
        torch.autograd.grad(h.sum(), x, create_graph=True)


# as citizens of torch


def test_glu_score_opcheck():
    tensors = inputs((2, 13, 12), FP32)
    odd = each(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), tensors)
    registered = [torch.ops.vitprune_fast.glu_score_triton]
    registered += [] if OBSTACLE else [torch.ops.vitprune_fast.glu_score]
    for op in registered:
        device = device_of("triton") if "triton" in str(op) else "cpu"
        for ones, packed in zip((tensors, odd, tensors), PACKED, strict=True):
            arguments = (*(x.to(device) for x in ones), "silu", packed, False)
            opcheck(op.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scored_glu_opcheck(backend):
    gate, value, _ = inputs((2, 13, 12), FP32, backend)
    probe = torch.zeros(2, 12, device=gate.device).requires_grad_()
    x = torch.cat([gate, value], 2).requires_grad_()
    gate.requires_grad_()
    arguments = (gate, value, probe, "gelu", False, backend)
    opcheck(torch.ops.vitprune_fast.scored_glu.default, arguments)
    arguments = (x, probe, "silu", True, False, backend)
    opcheck(torch.ops.vitprune_fast.scored_glu_packed.default, arguments)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_glu_score_compiles_fullgraph(backend):
    def scaled(gate, value, grad, packed):
        return [
            part + 1 for part in glu_score(gate * 2, value, grad, packed=packed, backend=backend)
        ]

    tensors = inputs((2, 13, 12), FP32, backend)
    # one function is compiled only so many times, and each packing is one
    torch.compiler.reset()
    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    for packed in PACKED:
        assert_same_bits(compiled(*tensors, packed), scaled(*tensors, packed))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_scored_glu_compiles_fullgraph(backend):
    gate, value, weight = inputs((2, 13, 12), FP32, backend)
    probe = torch.empty(2, 12, device=gate.device).requires_grad_()
    x = torch.cat([gate, value], 2).requires_grad_()
    leaves = (gate.requires_grad_(), value.requires_grad_(), x, probe)

    def both(gate, value, x, probe):
        apart = scored_glu(gate, value, probe, backend=backend)
        together = scored_glu_packed(x, probe, gate_last=True, backend=backend)
        return loss(apart + together, weight)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(*leaves), leaves) for f in (both, compiled)]
    assert_same_bits(*results)


def test_glu_score_rejects_wrong_arguments():
    x = torch.ones(2, 3, 4)
    with pytest.raises(TypeError, match="gate_BNF must be a tensor, got list"):
        glu_score([1.0], x, x)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="grad_BNF must be a tensor, got NoneType"):
        glu_score(x, x, None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match=r"must have 3 dimensions, got \(3, 4\)"):
        glu_score(x[0], x[0], x[0])
    with pytest.raises(InvalidInput, match=r"must be float32 or .*, got torch\.int64"):
        glu_score(x.long(), x.long(), x.long())
    with pytest.raises(InvalidInput, match=r"value_BNF must have shape \(2, 3, 4\) like gate_BNF"):
        glu_score(x, x[:, :2], x)
    with pytest.raises(InvalidInput, match=r"grad_BNF must have dtype torch.float32 like gate_BNF"):
        glu_score(x, x, x.double())
    with pytest.raises(InvalidInput, match=r"activation must be one of gelu, .*, got 'swish'"):
        glu_score(x, x, x, "swish")
    with pytest.raises(InvalidInput, match=r"packed must be 'gate_first', .*, got 'first'"):
        glu_score(x, x, x, packed="first")  # pyright: ignore[reportArgumentType]


def test_scored_glu_rejects_wrong_arguments():
    x, probe = torch.ones(2, 3, 4), torch.ones(2, 4)
    with pytest.raises(InvalidInput, match=r"probe_BF must have shape \(2, 4\), .*, got \(4,\)"):
        scored_glu(x, x, probe[0])
    with pytest.raises(InvalidInput, match=r"value_BNF must have dtype torch\.float32"):
        scored_glu(x, x.double(), probe)
    with pytest.raises(InvalidInput, match="scored_glu: activation must be one of"):
        scored_glu(x, x, probe, "SiLU")
    with pytest.raises(InvalidInput, match=r"probe_BF must have shape \(2, 2\), .*, got \(2, 4\)"):
        scored_glu_packed(x, probe, gate_last=False)
    with pytest.raises(InvalidInput, match="even number of columns, gate and value, got 3"):
        scored_glu_packed(x[..., :3], probe, gate_last=False)
    # before any backward
    with pytest.raises(BackendUnavailable, match="there is no CUDA C"):
        scored_glu(x, x, probe, backend="cuda")
    with pytest.raises(BackendUnavailable, match="there is no CUDA C"):
        scored_glu_packed(x, probe[:, :2], gate_last=False, backend="cuda")


@native
def test_glu_score_native_checks_memory_safety():
    op, x = torch.ops.vitprune_fast.glu_score, torch.ones(2, 3, 4)
    for tensors in ((x[0], x, x), (x, x[:, :2], x), (x, x, x[..., :2]), (x, x, x.double())):
        with pytest.raises(RuntimeError, match=r"glu_score: .* must .*, got"):
            op(*tensors, "silu", None, False)
    with pytest.raises(RuntimeError, match="gate_BNF must be float32"):
        op(x.long(), x.long(), x.long(), "silu", None, False)
    with pytest.raises(RuntimeError, match="activation must name an activation, got tanh"):
        op(x, x, x, "tanh", None, False)
    with pytest.raises(RuntimeError, match="packed must be gate_first, gate_last or None, got no"):
        op(x, x, x, "silu", "no", False)


def test_glu_score_named_backend_never_falls_back(monkeypatch):
    x = torch.ones(2, 3, 4)
    with pytest.raises(BackendUnavailable, match="there is no CUDA C"):
        glu_score(x, x, x, backend="cuda")
    monkeypatch.setenv("VITPRUNE_BACKEND", "eager")
    assert_same_bits(glu_score(x, x, x), reference(x, x, x))
    monkeypatch.delenv("VITPRUNE_BACKEND")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendUnavailable, match="CUDA tensors only"):
        glu_score(x, x, x, backend="triton")


# on a GPU: what the interpreter cannot judge


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
def test_glu_score_triton_matches_reference(dtype, activation):
    """Outputs start as NaN (conftest), so what the kernel leaves out is seen."""
    for shape in ((4, 197, 768), (2, 197, 147)):
        tensors = inputs(shape, dtype, "triton")
        for per_token in (False, True):
            got = glu_score(
                *tensors, activation, packed="gate_last", per_token=per_token, backend="triton"
            )
            assert_results_within_budget(got, tensors, activation, per_token)


@pytest.mark.gpu
def test_glu_score_triton_at_the_target_shape():
    x = torch.randn(256, 197, 2 * 2048, device="cuda").to(BF16)
    grad = torch.randn(256, 197, 2048, device="cuda").to(BF16)
    gate, value = x.tensor_split(2, -1)
    assert {c.device: c.backend for c in ops.backends() if c.op == "glu_score"}["cuda"] == "triton"
    first = glu_score(gate, value, grad, packed="gate_first")
    assert not any(part.isnan().any() for part in first)
    named = glu_score(gate, value, grad, packed="gate_first", backend="triton")
    assert_same_bits(first, named)
    for _ in range(20):
        assert_same_bits(first, glu_score(gate, value, grad, packed="gate_first"))
    alone = glu_score(gate[100:101], value[100:101], grad[100:101])
    assert_same_bits((part[100:101] for part in first), alone)
