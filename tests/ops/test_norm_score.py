"""norm_score and scored_norm: B batch, N tokens, C channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from error_budget import Rounded, assert_within_budget
from torch.nn import functional as F

from tests.registration import opcheck
from vitprune_fast import ops
from vitprune_fast._extension import OBSTACLE
from vitprune_fast.errors import BackendUnavailable, InvalidInput
from vitprune_fast.reference.norm_score import norm_score as reference

FP32, FP64, FP16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
ON_GPU = torch.cuda.is_available()
EPS = 1e-6

native = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))
# every backend that can run here; a missing one is seen by the tests declared to need it
BACKENDS = ["triton", "eager"] if OBSTACLE else ["cpu", "triton", "eager"]
RMS = pytest.mark.parametrize("rms", [False, True], ids=["layer-norm", "rms-norm"])
OUTPUT = pytest.mark.parametrize("output", [True, False], ids=["output", "statistics"])
SHAPES = [
    pytest.param((2, 197, 192), id="B2-N197-C192"),
    pytest.param((1, 65, 384), id="B1-N65-C384"),
    pytest.param((2, 33, 768), id="B2-N33-C768"),
    pytest.param((1, 5, 1536), id="B1-N5-C1536"),
    pytest.param((2, 197, 147), id="B2-N197-C147-odd"),
    pytest.param((3, 131, 37), id="B3-N131-C37-primes"),
    pytest.param((2, 32, 65), id="B2-N32-C65-one-part"),
    pytest.param((2, 70, 64), id="B2-N70-C64-heads"),
    pytest.param((1, 4, 2111), id="B1-N4-C2111-wide"),
    pytest.param((2, 3, 1), id="one-channel"),
    pytest.param((1, 1, 2), id="one-token"),
    pytest.param((0, 5, 8), id="no-samples"),
    pytest.param((2, 0, 8), id="no-tokens"),
    pytest.param((2, 5, 0), id="no-channels"),
]


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and ON_GPU else "cpu"


def inputs(shape, dtype, backend="cpu"):
    """x with a mean beside 0 and a spread beside 1, its gradient, weight and bias."""
    made = [torch.randn(shape, dtype=FP64) * 1.5 + 0.7, torch.randn(shape, dtype=FP64)]
    made += [1 + 0.3 * torch.randn(shape[2], dtype=FP64), torch.randn(shape[2], dtype=FP64)]
    return [x.to(dtype).to(device_of(backend)) for x in made]


def call(function, tensors, eps=EPS, **options):
    """Result of the op, the reference or the exact form for ``inputs``."""
    x, grad_y, weight, bias = tensors
    return function(x, grad_y, weight, bias, eps, **options)


def sums_of(x, grad_y, weight, bias, eps, rms=False, output=True) -> tuple[Rounded, Rounded]:
    """What rounding may do to both results, by the formulas of the reference."""
    dtype = x.dtype
    x, grad_y = Rounded.of(x, dtype), Rounded.of(grad_y, dtype)
    weight, bias = (
        Rounded.of(torch.tensor(default) if given is None else given, dtype)
        for given, default in ((weight, 1.0), (bias, 0.0))
    )
    centred = x if rms else x - x.mean(2)
    variance = (centred * centred).mean(2)
    scale = (variance + eps).power(-0.5)
    x_hat = centred * scale
    grad_x_hat = grad_y * weight
    c1 = (grad_x_hat * x_hat).mean(2)
    c2 = c1 * 0.0 if rms else grad_x_hat.mean(2)
    share = x_hat * c2 * -1.0 - (x_hat * x_hat - variance * scale * scale) * c1 * 0.5
    if output:
        share = share + (x_hat * weight + bias) * grad_y
    return (grad_x_hat - c2 - x_hat * c1) * scale, share.sum(1)


def assert_right(got, tensors, eps=EPS, **options):
    """Both results within the budget of plain torch and of the sums."""
    eager, truth = (call(function, tensors, eps, **options) for function in (reference, exact))
    sums = call(sums_of, tensors, eps, **options)
    for ours, plain, true, its_sums in zip(got, eager, truth, sums, strict=True):
        assert_within_budget(ours.cpu(), plain.cpu(), true, its_sums)


def assert_same(got, want):
    """The same bits in both results."""
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


def exact(x, grad_y, weight, bias, eps, rms=False, output=True):
    """Gradient and score in the extended precision of NumPy, written once more."""
    x, grad_y = (value.cpu().double().numpy().astype(np.longdouble) for value in (x, grad_y))
    weight = 1 if weight is None else weight.cpu().double().numpy().astype(np.longdouble)
    bias = 0 if bias is None else bias.cpu().double().numpy().astype(np.longdouble)
    channels = max(x.shape[2], 1)

    def mean(value):
        return value.sum(2, keepdims=True) / channels

    centred = x if rms else x - mean(x)
    variance = mean(centred**2)
    scale = 1 / np.sqrt(variance + np.longdouble(eps))
    x_hat, gradient = centred * scale, grad_y * weight
    c1, c2 = mean(gradient * x_hat), 0 if rms else mean(gradient)
    share = -x_hat * c2 - (x_hat**2 - variance / (variance + np.longdouble(eps))) * c1 / 2
    if output:
        share = share + (x_hat * weight + bias) * grad_y
    results = ((gradient - c2 - x_hat * c1) * scale, share.sum(1))
    return [torch.from_numpy(np.asarray(value, dtype=np.float64)) for value in results]


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, FP16, FP64], ids=["fp32", "fp16", "fp64"])
@pytest.mark.parametrize("shape", SHAPES)
@RMS
def test_norm_score_matches_reference(shape, dtype, backend, rms):
    tensors = inputs(shape, dtype, backend)
    got = call(ops.norm_score, tensors, rms=rms, backend=backend)
    assert (got[0].dtype, got[1].dtype) == (dtype, FP64 if dtype == FP64 else FP32)
    assert (got[0].shape, got[1].shape) == (shape, (shape[0], shape[2]))
    assert_right(got, tensors, rms=rms)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
@RMS
def test_norm_score_bf16_matches_reference(backend, rms):
    tensors = inputs((2, 197, 147), BF16)
    assert_right(call(ops.norm_score, tensors, rms=rms, backend=backend), tensors, rms=rms)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [64, 192, 384, 768, 1152, 1536])
@RMS
def test_norm_score_triton_bf16_matches_reference(channels, rms):
    tensors = inputs((4, 197, channels), BF16, "triton")
    assert_right(call(ops.norm_score, tensors, rms=rms, backend="triton"), tensors, rms=rms)


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
    assert not want[0][1, 3].isfinite().any()
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
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(5, 71, 48), (3, 20, 130)], ids=["parts", "one-part"])
def test_norm_score_same_bits_alone_repeated_and_in_a_batch(shape, dtype, backend):
    x, grad_y, weight, bias = inputs(shape, dtype, backend)

    def both(rows):
        return ops.norm_score(x[rows], grad_y[rows], weight, bias, EPS, backend=backend)

    whole = both(slice(None))
    assert_same(whole, both(slice(None)))
    for b in range(shape[0]):
        for batched, alone in zip(whole, both(slice(b, b + 1)), strict=True):
            if backend != "eager":
                assert torch.equal(batched[b : b + 1], alone)
            else:
                # plain torch chooses its own order of summation
                torch.testing.assert_close(batched[b : b + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "cpu"] or ["eager"])
def test_norm_score_same_bits_for_any_number_of_threads(backend):
    tensors = inputs((3, 197, 768), FP32)
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(call(ops.norm_score, tensors, backend=backend))
    finally:
        torch.set_num_threads(1)
    for other in results[1:]:
        assert_same(results[0], other)


@native
def test_norm_score_bits_are_the_same_for_every_instruction_set(processors):
    script = """
import torch
from vitprune_fast import ops
found = [part for t in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
         for r in (False, True)
         for part in ops.norm_score(*(x.to(t) for x in inputs), 1e-6, rms=r, backend="cpu")]
"""
    processors.assert_same_bits(script, inputs((2, 71, 147), FP32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_score_handles_any_layout(backend):
    x, grad_y, weight, bias = inputs((4, 34, 24), FP32, backend)
    want = ops.norm_score(x, grad_y, weight, bias, EPS, backend=backend)
    # the middle of a wider tensor, tokens first, channels not adjacent
    wide = torch.randn(4, 50, 72, device=x.device)
    wide[:, 3:37, 24:48] = x
    weight, bias = torch.stack([weight, bias], 1).unbind(1)
    layouts = [
        wide[:, 3:37, 24:48],
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.transpose(1, 2).contiguous().transpose(1, 2),
    ]
    for layout in layouts:
        assert not layout.is_contiguous()
        got = ops.norm_score(layout, grad_y, weight, bias, EPS, backend=backend)
        for ours, wanted in zip(got, want, strict=True):
            assert torch.equal(ours, wanted) or backend == "eager"
            torch.testing.assert_close(ours, wanted)
    # a loss that is a plain sum sends back one number for all
    expanded = grad_y[:1, :1, :1].expand_as(grad_y)
    got = ops.norm_score(x, expanded, weight, bias, EPS, backend=backend)
    for ours, wanted in zip(got, reference(x, expanded, weight, bias, EPS), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


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


def test_norm_score_launches_nothing_for_an_empty_result(monkeypatch):
    """A grid of zero programs is an error on a GPU, and silently fine in the interpreter."""
    from vitprune_fast.kernels import norm_score as kernels

    class Refuse:
        def __getitem__(self, grid):
            raise AssertionError(f"launched with grid {grid}")

    monkeypatch.setattr(kernels, "_norm_score_bwd_kernel", Refuse())
    monkeypatch.setattr(kernels, "_add_parts_kernel", Refuse())
    for shape in ((0, 5, 8), (2, 5, 0), (2, 0, 8)):
        x = torch.ones(shape)
        grad_x, score = kernels.norm_score_bwd(x, x, None, None, EPS, False, True)
        assert grad_x.numel() == 0 and torch.equal(score, torch.zeros(shape[0], shape[2]))
    with pytest.raises(AssertionError, match="launched"):
        x = torch.ones(1, 1, 1)
        kernels.norm_score_bwd(x, x, None, None, EPS, False, True)


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


def test_scored_norm_refuses_a_second_derivative():
    x, _, weight, bias = inputs((2, 5, 8), FP32)
    y = ops.scored_norm(x.requires_grad_(), torch.zeros(2, 8), weight, bias, EPS)
    with pytest.raises(RuntimeError, match="scored_norm: create_graph must be False"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_norm_score_is_cut_off_from_the_graph():
    x, grad_y, weight, bias = inputs((2, 5, 8), FP32)
    got = ops.norm_score(x.requires_grad_(), grad_y, weight.requires_grad_(), bias, EPS)
    assert not any(result.requires_grad for result in got)


def test_norm_score_opcheck():
    x, grad_y, weight, bias = inputs((2, 13, 12), FP32)
    odd = x.transpose(1, 2).contiguous().transpose(1, 2)
    registered = [torch.ops.vitprune_fast.norm_score_triton]
    registered += [] if OBSTACLE else [torch.ops.vitprune_fast.norm_score]
    for op in registered:
        device = device_of("triton") if "triton" in str(op) else "cpu"
        for a, w, b in ((x, weight, bias), (odd, weight, None), (x, None, None)):
            tensors = [None if t is None else t.to(device) for t in (a, grad_y, w, b)]
            opcheck(op.default, (*tensors, EPS, b is None, True))


@pytest.mark.parametrize("backend", ["eager", *(["cpu"] if OBSTACLE is None else [])])
def test_scored_norm_opcheck(backend):
    x, _, weight, bias = inputs((2, 13, 12), FP32)
    odd = x.transpose(1, 2).contiguous().transpose(1, 2)
    for a, rms in ((x, False), (odd, True), (odd, False)):
        probe = torch.zeros(2, 12, requires_grad=True)
        arguments = (a.detach().requires_grad_(), probe, weight, bias, EPS, rms, True, backend)
        opcheck(torch.ops.vitprune_fast.scored_norm.default, arguments)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@RMS
def test_scored_norm_compiles_fullgraph(backend, rms):
    x, grad_y, weight, bias = inputs((2, 13, 12), FP32, backend)

    def loss(x, probe):
        y = ops.scored_norm(x * 2, probe, weight, bias, EPS, rms=rms, backend=backend)
        return (y * grad_y).sum()

    results = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_(), torch.zeros(2, 12, device=x.device).requires_grad_()]
        results.append(torch.autograd.grad(call(*leaves), leaves))
    assert_same(*results)


def test_norm_score_rejects_wrong_arguments():
    x, grad_y, weight, bias = inputs((2, 3, 4), FP32)
    with pytest.raises(TypeError, match="norm_score: x_BNC must be a tensor, got list"):
        ops.norm_score([1.0], grad_y, weight, bias, EPS)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="weight_C must be a tensor, got float"):
        ops.norm_score(x, grad_y, 1.0, bias, EPS)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match=r"must have 3 dimensions, got \(3, 4\)"):
        ops.norm_score(x[0], grad_y, weight, bias, EPS)
    with pytest.raises(InvalidInput, match=r"must be float32 or .*, got torch\.int64"):
        ops.norm_score(x.long(), grad_y, weight, bias, EPS)
    with pytest.raises(InvalidInput, match=r"grad_y_BNC must have shape \(2, 3, 4\) like x_BNC"):
        ops.norm_score(x, grad_y[:, :2], weight, bias, EPS)
    with pytest.raises(InvalidInput, match=r"weight_C must have shape \(4,\), .*, got \(3,\)"):
        ops.norm_score(x, grad_y, weight[:3], bias, EPS)
    with pytest.raises(InvalidInput, match=r"bias_C must have dtype torch.float32 like x_BNC, got"):
        ops.norm_score(x, grad_y, weight, bias.half(), EPS)
    with pytest.raises(InvalidInput, match="eps must be at least 0, got -1"):
        ops.norm_score(x, grad_y, weight, bias, -1.0)


def test_scored_norm_rejects_wrong_arguments():
    x, _, weight, bias = inputs((2, 3, 4), FP32)
    probe = torch.zeros(2, 4, requires_grad=True)
    with pytest.raises(TypeError, match="scored_norm: probe_BC must be a tensor, got None"):
        ops.scored_norm(x, None, weight, bias, EPS)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match=r"probe_BC must have shape \(2, 4\), .*, got \(2, 3\)"):
        ops.scored_norm(x, probe[:, :3], weight, bias, EPS)
    with pytest.raises(
        InvalidInput, match=r"probe_BC must have dtype torch\.float32, .*, got torch\.float64"
    ):
        ops.scored_norm(x, probe.double(), weight, bias, EPS)
    with pytest.raises(InvalidInput, match=r"probe_BC must be on cpu like x_BNC, got meta"):
        ops.scored_norm(x, probe.to("meta"), weight, bias, EPS)
    with pytest.raises(InvalidInput, match=r"bias_C must be frozen by requires_grad_\(False\)"):
        ops.scored_norm(x, probe, weight, bias.requires_grad_(), EPS)
    with torch.no_grad():
        assert ops.scored_norm(x, probe, weight, bias, EPS).shape == x.shape


@native
def test_norm_score_native_checks_memory_safety():
    op = torch.ops.vitprune_fast.norm_score
    x, grad_y, weight, bias = inputs((2, 3, 4), FP32)
    for tensors in (
        (x[0], grad_y, weight, bias),
        (x, grad_y[:, :2], weight, bias),
        (x, grad_y.double(), weight, bias),
        (x, grad_y, weight[:2], bias),
        (x, grad_y, weight, bias[None]),
        (x, grad_y, weight.half(), bias),
        (x.long(), grad_y.long(), None, None),
    ):
        with pytest.raises(RuntimeError, match=r"norm_score: .* must .*, got"):
            op(*tensors, EPS, False, True)


def test_norm_score_named_backend_never_falls_back():
    x, grad_y, weight, bias = inputs((2, 3, 4), FP32)
    with pytest.raises(BackendUnavailable, match="there is no CUDA C"):
        ops.norm_score(x, grad_y, weight, bias, EPS, backend="cuda")
    with pytest.raises(BackendUnavailable, match="there is no CUDA C"):
        ops.scored_norm(x, torch.zeros(2, 4), weight, bias, EPS, backend="cuda")
