"""gated_unit and gated_unit_score beyond the contract: B batch, N tokens, F columns."""

from __future__ import annotations

import pytest
import torch
from error_budget import assert_within_budget
from exact_activations import exact_value_and_slope, rounded, sum_of_tokens

from tests.ops.contract import CASES
from vitprune_fast._extension import OBSTACLE
from vitprune_fast.ops import ACTIVATIONS, gated_unit, gated_unit_score
from vitprune_fast.reference.gated_unit import ACTIVATIONS as FORWARD
from vitprune_fast.reference.gated_unit import gated_unit_backward, halves, value_and_slope

FP32, FP64, FP16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
GATED, VALUED = CASES["gated_unit-gate"], CASES["gated_unit-gate-value"]
SCORED = CASES["gated_unit_score-value"]
BACKENDS = GATED.backends()

native = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


@every_activation
def test_reference_is_the_derivative_of_what_torch_computes(activation):
    x = (3 * torch.randn(1000, dtype=FP64)).requires_grad_()
    want = FORWARD[activation](x)
    (want_slope,) = torch.autograd.grad(want.sum(), x)
    value, slope = value_and_slope(x.detach(), activation)
    torch.testing.assert_close(value, want.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(slope, want_slope, rtol=1e-12, atol=1e-14)
    x, value, gate = VALUED.as_leaves(VALUED.given((3, 17, 12), FP64))
    assert x is not None and value is not None and gate is not None
    grad = torch.randn_like(x)
    want = FORWARD[activation](x) * value * gate
    wanted = want, *torch.autograd.grad(want, (x, value, gate), grad)
    given = (one.detach() for one in (x, value, gate))
    for one, other in zip(VALUED.expected(*given, grad, activation), wanted, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-12, atol=1e-12)


@every_backend
@every_activation
def test_fp64_matches_exact_numbers(activation, backend):
    shape = (2, 33, 11)
    x, value, grad = SCORED.given(shape, FP64, backend)
    assert x is not None and value is not None and grad is not None
    acts, slopes = exact_value_and_slope(x, activation)
    ones = torch.ones_like(value)
    for factor in (None, value):
        flat = (ones if factor is None else factor).flatten().tolist()
        rows = list(zip(acts, slopes, flat, grad.flatten().tolist(), strict=True))
        by_x = rounded([slope * v * g for _, slope, v, g in rows], shape)
        by_value = rounded([act * g for act, _, _, g in rows], shape)
        shares = [act * v * g for act, _, v, g in rows]
        for per_token in (False, True):
            options = {"activation": activation, "per_token": per_token}
            got = gated_unit_score(x, grad, value_BNF=factor, backend=backend, **options)
            eager = gated_unit_backward(x, factor, None, grad, activation, per_token)
            sums = SCORED.sums(x.cpu(), ones.cpu() if factor is None else value.cpu(),
                               grad.cpu(), None, **options)  # fmt: skip
            wanted = by_x, by_value, sum_of_tokens(shares, shape, per_token)
            for one, plain, exact, its_sums in zip(got, eager, wanted, sums, strict=True):
                if one is not None and plain is not None:
                    assert one.dtype == FP64
                    assert_within_budget(one.cpu(), plain.cpu(), exact, its_sums)


@every_backend
@pytest.mark.parametrize("name", ["gated_unit-gate-value", "gated_unit-gate-packed"])
def test_gradcheck(name, backend):
    case = CASES[name]
    leaves = case.as_leaves(case.given((2, 3, 4), FP64, backend))
    there = [leaf for leaf in leaves if leaf is not None]

    def call(*given):
        rest = iter(given)
        return case.outputs(tuple(x if x is None else next(rest) for x in leaves), backend)[0]

    assert torch.autograd.gradcheck(call, there)


@native
@every_activation
def test_cpu_keeps_digits_in_the_tail(activation):
    """Where torch rounds the gate to 0, its digits are still there."""
    # fp32: relative error of the tail by its polynomial 3.1e-5 for gelu, and else by the rounding
    # of the exponent, which is at most 9 here, twice; fp64: rounding of the exponent
    relative = {FP32: 4e-5 if activation == "gelu" else 4e-6, FP64: 1e-14}
    for dtype in (FP32, FP64):
        x = -torch.linspace(1.5, 8.0, 400, dtype=FP64).to(dtype).reshape(1, 1, -1)
        values, slopes = exact_value_and_slope(x, activation)
        got = gated_unit_score(x, torch.ones_like(x), activation=activation, backend="cpu")
        for one, exact in ((got.score, values), (got.x, slopes)):
            want = rounded(exact, (400,))
            torch.testing.assert_close(one.double().flatten(), want, rtol=relative[dtype], atol=0.0)


@every_backend
@pytest.mark.parametrize("dtype", [FP32, FP64], ids=["fp32", "fp64"])
@every_activation
def test_far_from_zero(activation, dtype, backend):
    # plain torch multiplies infinity by 0 where the cube of x overflows
    most = 1e10 if backend == "eager" else torch.finfo(dtype).max
    numbers = torch.tensor([40.0, 100.0, 800.0, 1e5, most], dtype=dtype)
    (x, *_) = GATED.given((1, 1, 10), dtype, backend)
    assert x is not None
    x.copy_(torch.cat([-numbers, numbers]))
    got = gated_unit_score(x, torch.ones_like(x), activation=activation, backend=backend)
    gate = (x > 0).to(dtype)
    value, slope = (gate, 0 * gate) if activation == "sigmoid" else (x * gate, gate)
    # silu is the slowest to arrive: 40 exp(-40) = 1.7e-16
    torch.testing.assert_close(got.score, value[:, 0], rtol=1e-15, atol=2e-16)
    torch.testing.assert_close(got.x, slope, rtol=1e-15, atol=2e-16)


@native
def test_bits_of_extreme_numbers_are_the_same_for_every_instruction_set(processors):
    script = """
from vitprune_fast import ops
found = [part for name in ops.ACTIVATIONS
         for part in ops.gated_unit_score(*inputs, activation=name, backend="cpu")
         if part is not None]
"""
    x = torch.tensor([1e30, -1e30, 50.0, -50.0, 13.2, -13.2]).reshape(1, 1, -1)
    processors.assert_same_bits(script, (x, torch.ones_like(x)))


@every_backend
@every_activation
def test_nan_stays_in_its_column(activation, backend):
    x, value, grad = tensors = SCORED.given((3, 20, 40), FP32, backend)
    assert x is not None and value is not None and grad is not None
    want = SCORED.run(tensors, None, backend, activation=activation)
    # NaNs of several kinds: one is quiet and bare, the others carry bits
    kinds = torch.tensor([0x7FC00000, 0x7FC00155, -1], dtype=torch.int32).view(FP32)
    for spoilt in (x, value, grad):
        before = spoilt[1, 19, 17].item()
        for nan in kinds.to(x.device):
            spoilt[1, 19, 17] = nan
            got = SCORED.run(tensors, None, backend, activation=activation)
            assert got[2].isnan().nonzero().tolist() == [[1, 17]]
            if activation != "relu" and spoilt is not value:
                assert got[0].isnan().nonzero().tolist() == [[1, 19, 17]]
            for part, wanted in zip(got, want, strict=True):
                index = (1, 17) if part.dim() == 2 else (1, 19, 17)
                part[index] = wanted[index]
            assert all(map(torch.equal, got, want))
        spoilt[1, 19, 17] = before


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
def test_reads_and_writes_every_16_bit_number(dtype, backend):
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()]
    # whole vectors, then an odd number of columns for the last vector
    for part in (numbers, numbers[3:]):
        x = part.reshape(1, 1, -1)
        ones = torch.ones_like(x)
        # relu: the score is the positive number itself, and the gradient of a positive x is kept
        got = gated_unit_score(x, ones, activation="relu", backend=backend)
        assert torch.equal(got.score, x[:, 0].float().relu())
        assert torch.equal(gated_unit_score(ones, x, activation="relu", backend=backend).x, x)


@every_backend
def test_a_closed_gate_stops_everything_but_its_own_gradient(backend):
    x, value, gate = tensors = VALUED.given((3, 20, 40), FP32, backend)
    assert x is not None and value is not None and gate is not None
    grad = torch.randn_like(x)
    gate[:] = 1
    gate[[4, 17]] = 0
    want = VALUED.run(tensors, grad, backend)
    # the gradient of a gate of 0 is that of any other
    assert torch.equal(want[3], VALUED.run((x, value, gate + 1), grad, backend)[3])
    x[1, 19, 17], value[0, 3, 4] = torch.nan, torch.inf
    got = VALUED.run(tensors, grad, backend)
    assert all(map(torch.equal, got[:3], want[:3]))
    for one in got[:3]:
        assert not one[..., [4, 17]].any()
    assert (~got[3].isfinite()).nonzero().tolist() == [[4], [17]]
    # an open one lets it through, in its column alone
    x[1, 19, 20] = torch.nan
    for one in VALUED.run(tensors, grad, backend)[:2]:
        assert one.isnan().nonzero().tolist() == [[1, 19, 20]]


@every_backend
@pytest.mark.parametrize("packed", ["x_first", "x_last"])
def test_packed_is_the_same_in_one_tensor(packed, backend):
    for shape in ((3, 13, 24), (2, 5, 7), (2, 0, 3), (0, 2, 3), (2, 3, 0)):
        x, value, gate = VALUED.given(shape, FP32, backend)
        assert x is not None and value is not None and gate is not None
        both = torch.cat([x, value] if packed == "x_first" else [value, x], 2).requires_grad_()
        grad, options = torch.randn_like(x), {"packed": packed, "backend": backend}
        out = gated_unit(both, gate.requires_grad_(), **options)
        gradients = torch.autograd.grad(out, (both, gate), grad)
        assert gradients[0].is_contiguous()
        got = [out.detach(), *halves(gradients[0], packed), gradients[1]]
        want = VALUED.run((x, value, gate.detach()), grad, backend)
        assert all(map(torch.equal, got, want))
        apart = gated_unit_score(x, grad, value_BNF=value, backend=backend)
        scored = gated_unit_score(both, grad, **options)
        assert scored.value is None and apart.value is not None and scored.x.is_contiguous()
        got = *halves(scored.x, packed), scored.score
        assert all(map(torch.equal, got, (apart.x, apart.value, apart.score)))


@every_backend
def test_a_value_of_one_is_none(backend):
    x, _, grad = SCORED.given((2, 40, 33), FP64, backend)
    assert x is not None and grad is not None
    for activation in ACTIVATIONS:
        options = {"activation": activation, "backend": backend}
        got = gated_unit_score(x, grad, value_BNF=torch.ones_like(x), **options)
        want = gated_unit_score(x, grad, **options)
        torch.testing.assert_close((got.x, got.score), (want.x, want.score), rtol=1e-14, atol=1e-14)


@every_backend
@every_activation
def test_a_probe_gets_the_gradient_of_a_gate(activation, backend):
    """And leaves torch's own forward as it is."""
    x, value, weight = SCORED.given((3, 17, 12), FP64, backend)
    assert x is not None and value is not None and weight is not None
    for factor in (None, value):
        probe = torch.zeros(3, 12, dtype=FP64, device=x.device).requires_grad_()
        leaves = x.detach().requires_grad_(), probe
        h = FORWARD[activation](leaves[0])
        h = h if factor is None else h * factor
        losses = (h * (1 + probe)[:, None] * weight).sum((1, 2)).sin()
        want = torch.autograd.grad(losses.sum(), leaves)
        out = gated_unit(leaves[0], value_BNF=factor, probe_BF=probe, activation=activation,
                         backend=backend)  # fmt: skip
        assert torch.equal(out, h)
        got = torch.autograd.grad((out * weight).sum((1, 2)).sin().sum(), leaves)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@every_backend
def test_scores_add_up_to_the_gradient_of_the_next_layer(backend):
    """Summed over samples, a neuron's score is the column sum of W2 * dW2 (METHODS, identity 4)."""
    x, value, _ = SCORED.given((3, 17, 12), FP64, backend)
    assert x is not None and value is not None
    for factor in (None, value):
        layer = torch.nn.Linear(12, 5, dtype=FP64, device=x.device)
        probe = torch.empty(3, 12, dtype=FP64, device=x.device).requires_grad_()
        hidden = gated_unit(x, value_BNF=factor, probe_BF=probe, backend=backend)
        layer(hidden).sin().sum().backward()
        assert probe.grad is not None and layer.weight.grad is not None
        want = (layer.weight * layer.weight.grad).sum(0)
        torch.testing.assert_close(probe.grad.sum(0), want.detach(), rtol=1e-12, atol=1e-12)


# on a GPU: what the interpreter cannot judge


@pytest.mark.gpu
@every_activation
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.op == "gated_unit"])
def test_triton_matches_reference_on_a_gpu(name, dtype, activation):
    """Outputs start as NaN (conftest), so what the kernel leaves out is seen."""
    from tests.ops.test_contract import assert_matches

    for shape in ((4, 197, 768), (2, 197, 147)):
        inputs = CASES[name].given(shape, dtype, "triton")
        assert_matches(CASES[name], inputs, "triton", activation=activation)


@pytest.mark.gpu
@pytest.mark.slow
def test_handles_more_than_2_31_elements():
    x = torch.ones(3, 1024, 720_000, device="cuda", dtype=FP16)
    assert x.numel() > 2**31
    got = gated_unit_score(x, x, activation="relu", backend="triton")
    assert torch.equal(got.score, torch.full_like(got.score, 1024))
    assert bool((got.x == 1).all())
