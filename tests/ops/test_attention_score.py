"""attention, attention_score, scored_attention: B batch, N tokens, H heads, K head dim."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_sums import attention_sums
from error_budget import Rounded, assert_within_budget
from torch import Tensor

from tests.ops.contract import xfail_where_refused
from vitprune_fast import ops
from vitprune_fast._extension import OBSTACLE
from vitprune_fast.errors import BackendUnavailable
from vitprune_fast.kernels import _assembler
from vitprune_fast.kernels import _attention_tiles as sizes
from vitprune_fast.kernels._attention_tiles import CANDIDATES, Tiles, forced
from vitprune_fast.kernels.attention import Attention
from vitprune_fast.ops._dispatch import IMPLEMENTED
from vitprune_fast.ops._qkv import triton_obstacle
from vitprune_fast.reference import attention_score as reference

FP32, FP64, FP16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
DTYPES = {"fp32": FP32, "fp16": FP16, "fp64": FP64}
ON_GPU = torch.cuda.is_available()
NAMES = ("qkv", "head", "qk_dim", "v_dim")

native = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))
# every backend that can run here
BACKENDS = [name for name in IMPLEMENTED["attention_score"] if name != "cpu" or OBSTACLE is None]
# (B, N, H, K); several heads each, because the budget is the largest of torch's own errors
SHAPES = [
    pytest.param((2, 197, 3, 64), id="B2-N197-heads3x64"),
    pytest.param((1, 257, 2, 80), id="B1-N257-heads2x80"),
    pytest.param((2, 49, 3, 32), id="B2-N49-heads3x32"),
    pytest.param((1, 131, 3, 37), id="B1-N131-heads3x37-primes"),
    pytest.param((1, 208, 2, 24), id="B1-N208-heads2x24"),
    pytest.param((1, 65, 3, 48), id="B1-N65-heads3x48"),
    # a length for whole rows of logits, and a head dim of two pieces
    pytest.param((1, 197, 2, 48), id="B1-N197-heads2x48"),
    pytest.param((1, 33, 3, 96), id="B1-N33-heads3x96"),
    pytest.param((2, 20, 3, 128), id="B2-N20-heads3x128"),
    pytest.param((3, 2, 2, 5), id="B3-N2-heads2x5"),
    pytest.param((1, 1, 1, 1), id="ones"),
    pytest.param((0, 5, 2, 8), id="no-samples"),
    pytest.param((2, 0, 2, 8), id="no-tokens"),
    pytest.param((2, 5, 0, 8), id="no-heads"),
]
# every backend with every dtype it takes
RUNS = [
    pytest.param(backend, dtype, id=f"{backend}-{name}")
    for backend in BACKENDS
    for name, dtype in DTYPES.items()
    if (backend, name) != ("triton", "fp64")
]


def rows(first: int) -> list[Any]:
    """Shapes with backends and dtypes; Triton's interpreter takes one dtype for each, in turn."""
    return [
        pytest.param(*shape.values, *run.values, id=f"{shape.id}-{run.id}")
        for k, shape in enumerate(SHAPES)
        for run in RUNS
        if run.values[0] != "triton" or ON_GPU or run.values[1] == (FP32, FP16)[(first + k) % 2]
    ]


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and ON_GPU else "cpu"


def inputs(shape, dtype, backend="cpu"):
    """Packed qkv and the gradient of the output."""
    batch, num_tokens, num_heads, head_dim = shape
    qkv = torch.randn(batch, num_tokens, 3, num_heads, head_dim, dtype=FP64)
    grad = torch.randn(batch, num_tokens, num_heads, head_dim, dtype=FP64)
    qkv, grad = (x.to(dtype).to(device_of(backend)) for x in (qkv, grad))
    xfail_where_refused(qkv)
    return qkv, grad


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == FP64 else x.float()


def forward_of_torch(qkv, scale):
    """What one writes without us, in the dtype of the input, on the CPU; and the same in fp64."""
    q, k, v = (x.transpose(1, 2) for x in qkv.cpu().unbind(2))
    if q.numel() == 0:
        # its kernels divide by the number of tokens
        out = (scale * q @ k.mT).softmax(-1) @ v
    else:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    exact, exact_lse = reference.attention(qkv.cpu().double(), scale)
    return out.transpose(1, 2), exact, exact_lse


def backward_of_torch(grad, qkv, out, lse, scale, per_token=False):
    """The same for the gradient of qkv and the scores of heads, q/k dims and v dims."""
    qkv, grad, out, lse = (x.cpu() for x in (qkv, grad, out, lse))
    leaf = qkv.clone().requires_grad_()
    (dqkv,) = torch.autograd.grad(forward_of_torch(leaf, scale)[0], leaf, grad)
    product = wide(out) * wide(grad)
    terms = (product.sum(3), wide(qkv[:, :, 0]) * wide(dqkv[:, :, 0]), product)
    scores = ((x.abs() if per_token else x).sum(1) for x in terms)
    exact = reference.attention_score(
        grad.double(), qkv.double(), out.double(), lse.double(), scale, per_token
    )
    return (dqkv, *scores), exact


def same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def grad_of(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def ours(qkv, grad, scale=None, per_token=False, backend: ops.Backend = "auto") -> list[Tensor]:
    out, lse = ops.attention(qkv, scale=scale, backend=backend)
    scores = ops.attention_score(
        grad, qkv, out, lse, scale=scale, per_token=per_token, backend=backend
    )
    return [out, *(score for score in scores if score is not None)]


def sums_of(qkv, grad, scale, out=None) -> dict[str, Rounded]:
    """What rounding may do to each result of forward, or of backward from a given ``out``."""
    sums = attention_sums(qkv, grad, scale, out_BNHK=out)
    return {
        "out": sums.out,
        "lse": sums.lse,
        "qkv": sums.dqkv,
        "head": sums.head.sum(2),
        "qk_dim": sums.qk_dim.sum(2),
        "v_dim": sums.v_dim.sum(2),
    }


def assert_matches(got, eager, exact, sums: Rounded):
    assert got.is_contiguous() and got.dtype == eager.dtype
    if got.dtype == FP64:
        # nothing exacter is at hand than the reference itself
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
    else:
        assert_within_budget(got.cpu(), eager, exact, sums)


def assert_backward_matches(shape, dtype, backend, per_token, scale=None):
    qkv, grad = inputs(shape, dtype, backend)
    factor = shape[3] ** -0.5 if scale is None else scale
    # forward has its own test: here all start from the same rounded output
    out, lse = reference.attention(qkv.double(), factor)
    out, lse = out.to(dtype), wide(lse.to(FP64 if dtype == FP64 else FP32))
    got = ops.attention_score(
        grad, qkv, out, lse, scale=scale, per_token=per_token, backend=backend
    )
    eager, exact = backward_of_torch(grad, qkv, out, lse, factor, per_token)
    sums = sums_of(qkv, grad, factor, out)
    for name, one, other, truth in zip(NAMES, got, eager, exact, strict=True):
        assert_matches(one, other, truth, sums[name])


def assert_forward_matches(shape, dtype, backend, scale=None):
    qkv, grad = inputs(shape, dtype, backend)
    out, lse = ops.attention(qkv, scale=scale, backend=backend)
    factor = shape[3] ** -0.5 if scale is None else scale
    eager, exact, exact_lse = forward_of_torch(qkv, factor)
    sums = sums_of(qkv, grad, factor)
    assert_matches(out, eager.contiguous(), exact, sums["out"])
    if backend == "eager" and dtype.itemsize == 2:
        # before it sums the weights of a row, torch rounds them to the dtype of the input
        atol = torch.finfo(dtype).eps
        torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=atol)
    else:
        assert_matches(lse, reference.attention(qkv.cpu(), factor)[1], exact_lse, sums["lse"])


@pytest.mark.parametrize(("shape", "backend", "dtype"), rows(0))
def test_attention_matches_reference(shape, dtype, backend):
    assert_forward_matches(shape, dtype, backend)


@pytest.mark.parametrize(("shape", "backend", "dtype"), rows(1))
def test_attention_score_matches_reference(shape, dtype, backend):
    assert_backward_matches(shape, dtype, backend, per_token=False)


@pytest.mark.parametrize(("backend", "dtype"), RUNS)
@pytest.mark.parametrize(
    "shape", [pytest.param((2, 49, 3, 32), id="N49"), pytest.param((1, 70, 5, 19), id="N70-K19")]
)
def test_attention_score_per_token_matches_reference(shape, dtype, backend):
    assert_forward_matches(shape, dtype, backend, scale=0.3)
    assert_backward_matches(shape, dtype, backend, per_token=True, scale=0.3)


@pytest.mark.parametrize(("backend", "dtype"), RUNS)
@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_attention_score_handles_any_sign_of_the_scale(scale, dtype, backend):
    """No width of a tile divides the tokens, so keys beyond the last have to weigh nothing."""
    assert_forward_matches((1, 37, 3, 24), dtype, backend, scale)
    assert_backward_matches((1, 37, 3, 24), dtype, backend, per_token=False, scale=scale)


@pytest.mark.parametrize(
    ("launch", "name"), [(launch, name) for launch in CANDIDATES for name in CANDIDATES[launch]]
)
def test_forced_tiles_are_launched_and_match_reference(launch, name, monkeypatch):
    seen, launched = [], Attention._launch

    def noted(self, kernel, how, *given, **flags):
        names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
        tiles = Tiles(*(how.flags[name] for name in names))
        seen.append((tiles, how.flags.get("WHOLE_ROWS", False)))
        launched(self, kernel, how, *given, **flags)

    monkeypatch.setattr(Attention, "_launch", noted)
    # a GPU of small tiles takes no candidate
    monkeypatch.setattr(sizes, "has_large_tiles", lambda major: True)
    with forced(**{launch: name}):
        assert_forward_matches((1, 197, 2, 64), FP16, "triton")
        assert_backward_matches((1, 197, 2, 64), FP16, "triton", per_token=False)
    in_order = ("forward", "queries", "keys")
    assert seen[in_order.index(launch)] == (CANDIDATES[launch][name], False)
    seen.clear()
    assert_forward_matches((1, 197, 2, 64), FP16, "triton")
    assert seen[0][1], "outside all is as it was"


@pytest.mark.parametrize("names", [{"forward": "none"}, {"keys": "tall"}], ids=str)
def test_tiles_that_nobody_knows_are_refused(names):
    with pytest.raises(ValueError, match=r"forced: \w+ must be one of \["), forced(**names):
        pass


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
def test_attention_score_bf16_matches_reference(backend):
    assert_forward_matches((2, 197, 3, 64), BF16, backend)
    assert_backward_matches((2, 197, 3, 64), BF16, backend, per_token=False)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
def test_attention_score_long_rows_match_reference(backend):
    """More tokens than a part of a sum has, on the C++ side."""
    assert_forward_matches((1, 601, 2, 16), FP32, backend)
    assert_backward_matches((1, 601, 2, 16), FP32, backend, per_token=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES[:11])
def test_attention_score_gpu_matches_reference(shape, dtype):
    assert_forward_matches(shape, dtype, "triton")
    assert_backward_matches(shape, dtype, "triton", per_token=False)


@pytest.mark.gpu
@pytest.mark.slow
def test_attention_score_handles_more_than_2_31_elements():
    qkv = torch.randn(912, 1024, 3, 12, 64, device="cuda", dtype=BF16)
    grad = torch.randn(912, 1024, 12, 64, device="cuda", dtype=BF16)
    assert qkv.numel() > 2**31
    whole = ours(qkv, grad, backend="triton")
    alone = ours(qkv[-1:], grad[-1:], backend="triton")
    assert all(torch.equal(one[-1:], other) for one, other in zip(whole, alone, strict=True))


def test_attention_score_copies_tokens_that_lie_too_far_apart():
    from vitprune_fast.kernels._attention_tiles import with_near_tokens

    near = torch.empty(1, 2, 2**23 - 1)[:, :, :4]
    assert with_near_tokens(near) is near
    assert with_near_tokens(torch.empty(1, 2, 2**23)[:, :, :4]).is_contiguous()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 197, 3, 64), (2, 65, 3, 37)])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=["bf16", "fp16", "fp32", "fp64"])
def test_attention_score_gpu_eager_matches_reference(dtype, shape):
    """torch's own attention behind the same names, where Triton is not there or is wrong."""
    qkv, grad = (x.cuda() for x in inputs(shape, dtype))
    scale = shape[-1] ** -0.5
    out, lse = ops.attention(qkv, backend="eager")
    eager, exact, _ = forward_of_torch(qkv, scale)
    assert_matches(out.cpu(), eager.contiguous(), exact, sums_of(qkv, grad, scale)["out"])
    got = ops.attention_score(grad, qkv, out, lse, backend="eager")
    eager, exact = backward_of_torch(grad, qkv, out, lse, scale)
    sums = sums_of(qkv, grad, scale, out)
    for name, one, other, truth in zip(NAMES, got, eager, exact, strict=True):
        assert one is not None
        assert_matches(one.cpu(), other, truth, sums[name])


def test_attention_score_reference_is_the_gradient_of_its_forward():
    qkv, grad = inputs((2, 7, 3, 5), FP64)
    qkv.requires_grad_()
    out, lse = reference.attention(qkv, 0.7)
    (want,) = torch.autograd.grad(out, qkv, grad)
    dqkv, head, qk_dim, v_dim = reference.attention_score(grad, qkv, out, lse, 0.7)
    torch.testing.assert_close(dqkv, want)
    # the scores are derivatives by gates of value 1 on outputs, queries and values
    gates = {
        "head": torch.ones(2, 1, 3, 1, dtype=FP64, requires_grad=True),
        "qk": torch.ones(2, 1, 3, 5, dtype=FP64, requires_grad=True),
        "v": torch.ones(2, 1, 3, 5, dtype=FP64, requires_grad=True),
    }
    q, k, v = qkv.detach().unbind(2)
    gated = torch.stack([q * gates["qk"], k, v * gates["v"]], 2)
    gated_out = reference.attention(gated, 0.7)[0] * gates["head"]
    by_gate = torch.autograd.grad(gated_out, list(gates.values()), grad)
    for got, expected in zip((head, qk_dim, v_dim), by_gate, strict=True):
        torch.testing.assert_close(got, expected.squeeze(1).view_as(got))


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_score_identities_hold(backend):
    """Scores of q dims and k dims agree; a head's score is that of its v dims, or V * dV."""
    qkv, grad = inputs((2, 50, 3, 24), FP32, backend)
    _, dqkv, head, qk_dim, v_dim = ours(qkv, grad, backend=backend)
    by_part = (qkv.double() * dqkv.double()).sum(1)
    torch.testing.assert_close(qk_dim.double(), by_part[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(qk_dim.double(), by_part[:, 1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(v_dim.double(), by_part[:, 2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(v_dim.sum(2), head, rtol=1e-4, atol=1e-4)
    # a key bias shifts every logit of a row alike: the keys' gradients sum to zero
    torch.testing.assert_close(
        dqkv[:, :, 1].sum(1), torch.zeros_like(v_dim), rtol=0, atol=50 * 2**-22
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", [(), ("qkv",), ("head",), ("qk_dim",), ("v_dim", "head")])
def test_attention_score_computes_what_is_needed(needs, backend):
    qkv, grad = inputs((2, 21, 2, 16), FP32, backend)
    out, lse = ops.attention(qkv, backend=backend)
    whole = ops.attention_score(grad, qkv, out, lse, backend=backend)
    got = ops.attention_score(grad, qkv, out, lse, needs=needs, backend=backend)
    for name, one, other in zip(NAMES, got, whole, strict=True):
        assert same(one, other if name in needs else None)
    if not {"qkv", "qk_dim"} & set(needs):
        # then no attention matrix is computed, and qkv not read
        unread = torch.full_like(qkv, torch.nan)
        again = ops.attention_score(grad, unread, out, lse, needs=needs, backend=backend)
        assert all(map(same, got, again))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scored_attention_grad_matches_reference(backend):
    qkv, grad = inputs((2, 41, 3, 16), FP32, backend)
    _, *want = ours(qkv, grad, per_token=True, backend=backend)
    qkv.requires_grad_()
    # probes are never read
    probes = [torch.full_like(x, torch.nan).requires_grad_() for x in want[1:]]
    out = ops.scored_attention(qkv, *probes, per_token=True, backend=backend)
    out.backward(grad)
    for leaf, expected in zip((qkv, *probes), want, strict=True):
        assert torch.equal(grad_of(leaf), expected)
    # a gradient that came through a broadcast has no strides
    qkv.grad = None
    ops.scored_attention(qkv, backend=backend).sum().backward()
    _, *want = ours(qkv.detach(), torch.ones_like(grad), backend=backend)
    assert torch.equal(grad_of(qkv), want[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_scored_attention_gives_only_what_requires_a_gradient(backend):
    qkv, grad = inputs((1, 9, 2, 8), FP32, backend)
    _, _, head, qk_dim, _ = ours(qkv, grad, backend=backend)
    probe = torch.zeros_like(head).requires_grad_()
    idle = torch.zeros_like(qk_dim)
    ops.scored_attention(qkv, probe, idle, backend=backend).backward(grad)
    # on a GPU less to compute is other code
    assert torch.equal(grad_of(probe), head) or head.is_cuda
    torch.testing.assert_close(grad_of(probe), head)
    assert idle.grad is None and qkv.grad is None
    assert not ops.scored_attention(qkv, backend=backend).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param((2, 34, 2, 16), FP32, id="fp32"),
        # two pieces of the head dim, and whole rows of logits
        pytest.param((2, 34, 2, 48), FP32, id="two-pieces"),
        pytest.param((1, 197, 2, 16), FP16, id="whole-rows"),
    ],
)
def test_attention_score_handles_any_layout(shape, dtype, backend):
    batch, num_tokens, _, head_dim = shape
    qkv, grad = inputs(shape, dtype, backend)
    want = ours(qkv, grad, backend=backend)
    # what lies around it is NaN, and must not be read
    around = torch.full((batch, 300, 3, 4, 70), torch.nan, device=qkv.device, dtype=dtype)
    inside = around[:, 3 : 3 + num_tokens, :, 1:3, 2 : 2 + head_dim]
    inside.copy_(qkv)
    # heads first, tokens first, dims not adjacent
    orders = [(2, 0, 3, 1, 4), (1, 0, 2, 3, 4), (0, 1, 2, 4, 3)]
    back = [(1, 3, 0, 2, 4), (1, 0, 2, 3, 4), (0, 1, 2, 4, 3)]
    layouts = [
        qkv.permute(order).contiguous().permute(inverse)
        for order, inverse in zip(orders, back, strict=True)
    ]
    odd_grad = grad.transpose(1, 3).contiguous().transpose(1, 3)
    tolerance = 10 * torch.finfo(dtype).eps
    for layout in (inside, *layouts):
        assert layout.shape == qkv.shape
        for one, other in zip(ours(layout, odd_grad, backend=backend), want, strict=True):
            assert torch.equal(one, other) or backend == "eager"
            torch.testing.assert_close(one, other, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_score_nan_stays_in_its_sample_and_head(backend):
    qkv, grad = inputs((3, 20, 3, 16), FP32, backend)
    want = ours(qkv, grad, backend=backend)
    qkv[1, 19, 1, 2, 3] = torch.nan
    got = ours(qkv, grad, backend=backend)
    heads_last = (2, 3, 1, 1, 1)
    for one, other, dim in zip(got, want, heads_last, strict=True):
        assert one.select(dim, 2)[1].isnan().any()
        one.select(dim, 2)[1] = other.select(dim, 2)[1] = 0
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("all_negative", [False, True], ids=["any-sign", "all-negative"])
def test_attention_handles_large_logits(all_negative, backend):
    qkv, grad = inputs((1, 33, 2, 16), FP32, backend)
    qkv[:, :, :2] *= 40
    if all_negative:
        # then a key that is not there, with the logit 0, would outweigh all others
        qkv[:, :, 0] = qkv[:, :, 0].abs()
        qkv[:, :, 1] = -qkv[:, :, 1].abs()
    q, k, _ = (x.cpu().transpose(1, 2) for x in qkv.unbind(2))
    largest = (0.25 * q @ k.mT).abs().max()
    # no exponential of it fits in fp32
    assert largest > 1000
    _, exact, _ = forward_of_torch(qkv, 0.25)
    got = ours(qkv, grad, backend=backend)
    lse = ops.attention(qkv, backend=backend)[1]
    _, exact_scores = backward_of_torch(grad, qkv, got[0], lse, 0.25)
    # logits and normalisers are rounded at their own magnitude, about four times on the way to a
    # weight, and a weight is relatively as wrong as they are absolutely
    relative = 4 * (torch.nextafter(largest, torch.tensor(torch.inf)) - largest)
    for one, truth in zip(got, (exact, *exact_scores), strict=True):
        error = (one.cpu().double() - truth).abs().max()
        assert error <= relative * truth.abs().max()


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        (name, dtype)
        for name in BACKENDS
        for dtype in (FP32, FP64)
        if (name, dtype) != ("triton", FP64)
    ],
)
def test_attention_where_one_key_has_all_the_weight(dtype, backend):
    """The sum of a row's weights is 1 or a rounding below, and its logarithm still about 0."""
    # the scale is no power of two, so that the largest logit is rounded
    scale = 24**-0.5
    qkv, grad = inputs((2, 37, 3, 24), dtype, backend)
    qkv = 10 * qkv
    out, lse = ops.attention(qkv, backend=backend)
    exact, exact_lse = reference.attention(qkv.double(), scale)
    logits = torch.einsum("bihk,bjhk->bhij", qkv[:, :, 0].double(), qkv[:, :, 1].double()) * scale
    assert (exact_lse - logits.amax(3)).median() < 1e-6
    # logits of some hundreds are off by this
    rounding = torch.finfo(dtype).eps * logits.abs().max().item()
    assert (lse.double() - exact_lse).abs().max() <= 8 * rounding
    assert (out.double() - exact).abs().max() <= 64 * rounding
    got = ops.attention_score(grad, qkv, out, lse, backend=backend)
    wanted = reference.attention_score(grad.double(), qkv.double(), exact, exact_lse, scale, False)
    for value, want in zip(got, wanted, strict=True):
        assert value is not None
        assert (value.double() - want).norm() <= 64 * rounding * want.norm()


@pytest.mark.parametrize(
    ("num_tokens", "head_dim", "dtype", "wrong"),
    [
        (65, 48, FP16, True),
        (33, 96, BF16, True),
        (131, 37, FP16, True),
        (577, 72, BF16, True),
        (131, 37, FP32, False),
        (197, 48, FP16, False),
        (257, 80, BF16, False),
        (49, 64, FP16, False),
        (20, 128, BF16, False),
    ],
)
def test_what_an_old_assembler_gets_wrong_runs_elsewhere(
    monkeypatch, num_tokens, head_dim, dtype, wrong
):
    """``tests.compiled`` finds such code; on an H200 the results were wrong."""
    shape = (2, num_tokens, 3, 4, head_dim)
    qkv: Any = SimpleNamespace(shape=shape, dtype=dtype, is_cuda=True, device=None)
    refused = f"ptxas 12.8 gets {num_tokens} tokens of {head_dim} dims wrong; .*PATH may name 12.9"
    for release, capability in (((12, 8), 9), ((12, 9), 9), ((13, 0), 9), ((12, 8), 8)):
        monkeypatch.setattr(_assembler, "release", lambda release=release: release)
        monkeypatch.setattr(_assembler, "capability", lambda _, capability=capability: capability)
        found = triton_obstacle(qkv)
        if wrong and (release, capability) == ((12, 8), 9):
            assert re.match(refused, found or "")
        else:
            assert found is None


def test_the_assembler_has_a_release():
    assert _assembler.release() >= (12, 0)


def test_attention_score_triton_refuses_what_it_cannot_do(monkeypatch):
    doubles, wide_heads = torch.ones(1, 3, 3, 1, 8, dtype=FP64), torch.ones(1, 3, 3, 1, 129)
    for qkv, reason in ((doubles, "which end at float32"), (wide_heads, "head of 129 dims")):
        qkv = qkv.to(device_of("triton"))
        with pytest.raises(
            BackendUnavailable, match=f"backend 'triton' cannot run here: .*{reason}"
        ):
            ops.attention(qkv, backend="triton")
        with pytest.raises(BackendUnavailable, match=reason):
            ops.scored_attention(qkv, backend="triton")
        # nobody named it, so another form runs
        assert ops.attention(qkv)[0].allclose(torch.ones((), dtype=qkv.dtype))


@native
@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8)])
def test_attention_score_native_handles_empty(shape):
    qkv, grad = inputs(shape, FP32)
    out, lse = torch.ops.vitprune_fast.attention(qkv, 1.0)
    needs = (1.0, False, True, True, True, True)
    results = torch.ops.vitprune_fast.attention_score(grad, qkv, out, lse, *needs)
    assert all(x.count_nonzero() == 0 for x in results)


@pytest.mark.parametrize("num_tokens", [1, 16, 63, 64, 65, 197, 208, 577])
@pytest.mark.parametrize("block", [16, 32, 64])
def test_attention_score_tiles_cover_the_tokens(num_tokens, block):
    from vitprune_fast.kernels._attention_tiles import tail

    last, rest = tail(num_tokens, block), num_tokens % block
    assert last & (last - 1) == 0 and rest <= last <= max(block, 16)
    assert (last == 0) == (rest == 0)
    # the next smaller one would not do
    assert rest == 0 or last == 16 or last // 2 < rest


@pytest.mark.parametrize(
    ("head_dim", "cut"),
    [
        (1, (16, 0)),
        (24, (32, 0)),
        (32, (32, 0)),
        (37, (32, 16)),
        (48, (32, 16)),
        (64, (64, 0)),
        (80, (64, 16)),
        (96, (64, 32)),
        (100, (128, 0)),
        (128, (128, 0)),
    ],
)
def test_attention_score_head_dims_are_cut_in_pieces(head_dim, cut):
    from vitprune_fast.kernels._attention_tiles import pieces

    assert pieces(head_dim) == cut
