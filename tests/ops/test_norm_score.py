"""norm_score and scored_norm: B batch, N tokens, C channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from error_budget import assert_within_budget
from torch.nn import functional as F

from tests.ops.contract import NORM, exact_norm, norm_sums
from tests.ops.test_contract import assert_matches
from vitprune_fast import ops
from vitprune_fast.reference.norm_score import norm_score as reference

FP32, FP64, FP16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
EPS = 1e-6

BACKENDS = NORM.backends()
RMS = pytest.mark.parametrize("rms", [False, True], ids=["layer-norm", "rms-norm"])
OUTPUT = pytest.mark.parametrize("output", [True, False], ids=["output", "statistics"])


def inputs(shape, dtype, backend="cpu") -> Any:
    return list(NORM.given(shape, dtype, backend))


def call(function, tensors, eps=EPS, **options):
    """Result of the op, the reference or the exact form for ``inputs``."""
    x, grad_y, weight, bias = tensors
    return function(x, grad_y, weight, bias, eps, **options)


def assert_right(got, tensors, eps=EPS, **options):
    """Both results within the budget of plain torch and of the sums."""
    eager, truth = (call(function, tensors, eps, **options) for function in (reference, exact_norm))
    sums = call(norm_sums, tensors, eps, **options)
    for ours, plain, true, its_sums in zip(got, eager, truth, sums, strict=True):
        assert_within_budget(ours.cpu(), plain.cpu(), true, its_sums)


def assert_same(got, want):
    """The same bits in both results."""
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


def weighted_norm(x, z, weight, bias, eps, rms):
    """The norm with a weight on each channel of each sample; a weight of 0 removes the channel."""
    z, total = z[:, None], z.sum(1)[:, None, None]
    mean = 0 if rms else (z * x).sum(2, keepdim=True) / total
    variance = (z * (x - mean) ** 2).sum(2, keepdim=True) / total
    return (x - mean) / (variance + eps).sqrt() * weight + bias, z


@RMS
def test_a_channel_of_weight_zero_is_a_channel_removed(rms):
    x, _, weight, bias = inputs((2, 7, 12), FP64)
    kept = torch.arange(12) != 5
    z = kept.double().expand(2, 12)
    got = weighted_norm(x, z, weight, bias, 0.1, rms)[0][..., kept]
    if rms:
        want = F.rms_norm(x[..., kept], (11,), weight[kept], 0.1) + bias[kept]
    else:
        want = F.layer_norm(x[..., kept], (11,), weight[kept], bias[kept], 0.1)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@RMS
@OUTPUT
# the second is of the order of the variance, so its part in the formula is seen
@pytest.mark.parametrize("eps", [1e-6, 1.0])
def test_norm_score_reference_is_the_derivative_by_the_weights(rms, output, eps):
    x, _, weight, bias = inputs((3, 7, 12), FP64)
    z = torch.ones(3, 12, dtype=FP64, requires_grad=True)
    x.requires_grad_()
    y, weights = weighted_norm(x, z, weight, bias, eps, rms)
    y = y * weights if output else y
    mixed = torch.sin(y) @ torch.randn(12, 5, dtype=FP64)
    grad_y, by_x, by_z = torch.autograd.grad(mixed.square().sum(), [y, x, z])
    grad_x, score = reference(x, grad_y, weight, bias, eps, rms=rms, output=output)
    torch.testing.assert_close(grad_x, by_x, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(score, by_z, rtol=1e-11, atol=1e-11)


@RMS
def test_norm_score_of_the_output_is_the_score_of_the_parameters(rms):
    """Summed over samples, y * dy is weight * d weight + bias * d bias."""
    tensors = inputs((3, 11, 24), FP64)
    x, grad_y, *parameters = tensors
    weight, bias = (parameter.clone().requires_grad_() for parameter in parameters)
    if rms:
        y = F.rms_norm(x, (24,), weight, EPS) + bias
    else:
        y = F.layer_norm(x, (24,), weight, bias, EPS)
    by_weight, by_bias = torch.autograd.grad(y, [weight, bias], grad_y)
    both, statistics = (
        call(ops.norm_score, tensors, rms=rms, output=output)[1] for output in (True, False)
    )
    want = weight * by_weight + bias * by_bias
    torch.testing.assert_close((both - statistics).sum(0), want, rtol=1e-11, atol=1e-11)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [64, 192, 384, 768, 1152, 1536])
@RMS
def test_norm_score_triton_bf16_matches_reference(channels, rms):
    assert_matches(NORM, NORM.given((4, 197, channels), BF16, "triton"), "triton", rms=rms)


@pytest.mark.gpu
@pytest.mark.slow
def test_norm_score_handles_more_than_2_31_elements():
    x = torch.randn(2, 1, 768, device="cuda", dtype=BF16).expand(2, 1_500_000, 768)
    assert x.numel() > 2**31
    grad_x, score = ops.norm_score(x, x, None, None, EPS, backend="triton")
    alone, _ = ops.norm_score(x[:, :1], x[:, :1], None, None, EPS, backend="triton")
    assert torch.equal(grad_x[:, -1:], alone) and score.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@RMS
@OUTPUT
@pytest.mark.parametrize("affine", ["none", "weight", "bias"])
def test_norm_score_without_weight_bias_or_output(backend, rms, output, affine):
    x, grad_y, weight, bias = inputs((2, 13, 24), FP32, backend)
    weight = weight if affine == "weight" else None
    bias = bias if affine == "bias" else None
    tensors = (x, grad_y, weight, bias)
    got = call(ops.norm_score, tensors, 0.1, rms=rms, output=output, backend=backend)
    assert_right(got, tensors, 0.1, rms=rms, output=output)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_norm_score_of_a_token_without_variance(backend):
    tensors = inputs((2, 40, 24), FP32, backend)
    x = tensors[0]
    x[1, 3] = 2.5
    assert_right(call(ops.norm_score, tensors, backend=backend), tensors)
    # with eps 0 it has no gradient; the tokens and samples beside it keep theirs
    want = call(ops.norm_score, tensors, 0.0, backend=backend)
    x[1, 3] = torch.randn(24)
    clean = call(ops.norm_score, tensors, 0.0, backend=backend)
    # a GPU multiplies by a rounded 1 / 24, so that the mean is not 2.5 and some variance is left
    assert want[0].is_cuda or not want[0][1, 3].isfinite().any()
    assert torch.equal(want[0][0], clean[0][0]) and torch.equal(want[1][0], clean[1][0])
    assert torch.equal(want[0][1, 4:], clean[0][1, 4:])


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_norm_score_rounds_gradients_as_torch_does(backend, dtype):
    """With x 0 and eps 1 the gradient is weight * grad_y, exact in fp32 and rounded once."""
    grad_y = torch.randn(300, 67) * 2.0 ** torch.randint(-26, 16, (300, 67))
    grad_y = grad_y.clamp(-65504, 65504)
    weight = (torch.randn(67) * 2.0 ** torch.randint(-4, 4, (67,))).to(dtype)
    weight[:2] = 1
    grad_y = grad_y.to(dtype)[None]
    # ties to even on both sides, the largest number and what is rounded away from it
    grad_y[0, 0, :8] = torch.tensor([1.0, 3.0, 2.0**-24, 3 * 2.0**-25, 65504, -65504, 0, -0.0])
    grad_y[0, 1, 3] = torch.nan
    product = grad_y.float() * weight.float()
    if dtype == FP16:
        assert product.half().isinf().any()
        assert (product.half().abs()[product != 0] < 2.0**-14).any()
    x = torch.zeros_like(grad_y)
    got, _ = ops.norm_score(x, grad_y, weight, None, 1.0, rms=True, backend=backend)
    want = product.to(dtype)
    want[0, 1] = torch.nan
    assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
    assert torch.equal(got.isnan(), want.isnan())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("argument", [0, 1], ids=["x", "gradient"])
def test_norm_score_nan_stays_in_its_sample_and_token(backend, argument):
    tensors = inputs((3, 20, 40), FP32, backend)
    want = call(ops.norm_score, tensors, backend=backend)
    tensors[argument][1, 19, 17] = torch.nan
    got = call(ops.norm_score, tensors, backend=backend)
    assert got[0].isnan().flatten(2).any(2).nonzero().tolist() == [[1, 19]]
    assert got[1].isnan().any(1).tolist() == [False, True, False]
    for ours, wanted in zip(got, want, strict=True):
        assert torch.equal(ours[::2], wanted[::2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 0, 8), (0, 5, 8)])
@RMS
@OUTPUT
def test_scored_norm_is_the_norm_and_hands_out_the_score(backend, shape, rms, output):
    x, grad_y, weight, bias = inputs(shape, FP32, backend)
    probe = torch.full((shape[0], shape[2]), torch.nan, device=x.device, requires_grad=True)
    x.requires_grad_()
    got = ops.scored_norm(x, probe, weight, bias, EPS, rms=rms, output=output, backend=backend)
    norm = F.rms_norm(x, shape[2:], weight, EPS) + bias
    plain = norm if rms else F.layer_norm(x, shape[2:], weight, bias, EPS)
    assert torch.equal(got, plain)
    by_ours = torch.autograd.grad(got, [x, probe], grad_y)
    tensors = (x, grad_y, weight, bias)
    options = {"rms": rms, "output": output, "backend": backend}
    assert_same(by_ours, call(ops.norm_score, tensors, **options))
    (by_torch,) = torch.autograd.grad(plain, x, grad_y)
    torch.testing.assert_close(by_ours[0], by_torch, rtol=1e-4, atol=1e-5)


def test_scored_norm_without_affine_and_in_bf16():
    for dtype in (BF16, FP16, FP64):
        x, grad_y, *_ = inputs((2, 9, 24), dtype)
        probe = torch.zeros(2, 24, dtype=FP64 if dtype == FP64 else FP32, requires_grad=True)
        y = ops.scored_norm(x, probe, None, None, EPS)
        assert torch.equal(y, F.layer_norm(x, (24,), None, None, EPS))
        (score,) = torch.autograd.grad(y, probe, grad_y)
        assert torch.equal(score, ops.norm_score(x, grad_y, None, None, EPS)[1])
