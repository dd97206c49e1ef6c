"""gated_attention: B batch, N tokens, H heads, L live heads, K head dim."""

from __future__ import annotations

import sys

import pytest
import torch
from attention_sums import attention_sums
from error_budget import Rounded, assert_within_budget
from torch import Tensor

from tests.ops.contract import xfail_where_refused
from tests.registration import opcheck
from vitprune_fast import ops
from vitprune_fast._extension import OBSTACLE
from vitprune_fast.errors import BackendUnavailable, InvalidInput
from vitprune_fast.ops._dispatch import IMPLEMENTED
from vitprune_fast.reference.gated_attention import gated_attention as reference

FP32, FP64, FP16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
DTYPES = {"fp32": FP32, "fp16": FP16, "fp64": FP64}
ON_GPU = torch.cuda.is_available()
# every backend that can run here
BACKENDS = [name for name in IMPLEMENTED["gated_attention"] if name != "cpu" or OBSTACLE is None]
RUNS = [
    pytest.param(backend, dtype, id=f"{backend}-{name}")
    for backend in BACKENDS
    for name, dtype in DTYPES.items()
    if (backend, name) != ("triton", "fp64")
]
# exactly 0 among them
GATES = (0.0, -1.3, 0.4, 1.0, 2.5, 0.0)
# (B, N, H, K) and live heads: every head dim and number of tokens that is promised
SHAPES = [
    pytest.param((3, 1, 3, 64), (0, 2), id="N1-K64"),
    pytest.param((3, 2, 4, 32), (1, 2, 3), id="N2-K32"),
    pytest.param((2, 49, 4, 48), (0, 1, 2, 3), id="N49-K48-all-live"),
    pytest.param((2, 49, 6, 96), (5,), id="N49-K96"),
    pytest.param((1, 197, 3, 64), (0, 2), id="N197-K64"),
    pytest.param((1, 197, 2, 48), (1,), id="N197-K48"),
    pytest.param((1, 257, 3, 80), (1,), id="N257-K80"),
    pytest.param((1, 33, 4, 128), (1, 3), id="N33-K128"),
    pytest.param((2, 9, 3, 16), (), id="none-live"),
    pytest.param((0, 5, 3, 16), (1,), id="no-samples"),
    pytest.param((2, 0, 3, 16), (1,), id="no-tokens"),
    pytest.param((2, 5, 0, 16), (), id="no-heads"),
]


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and ON_GPU else "cpu"


def inputs(shape, dtype, backend="cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Packed qkv, gates, and the gradient of a drop-in output."""
    batch, num_tokens, num_heads, head_dim = shape
    qkv = torch.randn(batch, num_tokens, 3, num_heads, head_dim, dtype=FP64)
    grad = torch.randn(batch, num_tokens, num_heads, head_dim, dtype=FP64)
    gate = torch.tensor(GATES[:num_heads], dtype=FP64 if dtype == FP64 else FP32)
    qkv, grad = (x.to(dtype).to(device_of(backend)) for x in (qkv, grad))
    xfail_where_refused(qkv)
    return qkv, gate.to(qkv.device), grad


def mask_of(shape) -> Tensor:
    """Some keys of each sample, none of the first."""
    mask = torch.rand(shape[:2]) < 0.6
    mask[1:, :1] = True
    mask[:1] = False
    return mask


def of_torch(qkv, gate, live, mask, scale, compact) -> Tensor:
    """What one writes without us, in the dtype of the input."""
    picked = qkv[:, :, :, list(live)]
    q, k, v = (x.transpose(1, 2) for x in picked.unbind(2))
    if mask is None and q.numel():
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    else:
        logits = scale * q @ k.mT
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None], -torch.inf)
        # a row without any key is all NaN here
        out = logits.softmax(-1).nan_to_num(0.0) @ v
    out = out.transpose(1, 2)
    if gate is not None:
        out = out * gate.to(qkv.dtype)[list(live), None]
    if compact:
        return out
    zeros = torch.zeros_like(qkv[:, :, 0])
    return zeros.index_copy(2, torch.tensor(live, dtype=torch.int64), out)


def with_gradients(function, qkv, gate, grad, *arguments, **options) -> list[Tensor]:
    """Output, and gradients of qkv and of the gate where there is one."""
    leaves = [x.detach().clone().requires_grad_() for x in (qkv, gate) if x is not None]
    out = function(leaves[0], leaves[1] if gate is not None else None, *arguments, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def sums_of(qkv, gate, grad, live, mask, factor, compact) -> list[Rounded]:
    """What rounding may do to output, gradient of qkv and gradient of the gate."""
    live = list(live)
    gates = 1.0 if gate is None else gate[live]
    dout = grad if compact else grad[:, :, live]
    sums = attention_sums(qkv[:, :, :, live], dout, factor, mask, gates)
    return [sums.out, sums.dqkv, *([] if gate is None else [sums.head.sum((0, 2))])]


def assert_matches(
    shape, dtype, backend, live, mask=None, gated=True, compact=False, scale: float | None = None
):
    qkv, gate, grad = inputs(shape, dtype, backend)
    gate = gate if gated else None
    grad = grad[:, :, list(live)] if compact else grad
    factor = shape[3] ** -0.5 if scale is None else scale
    got = with_gradients(
        ops.gated_attention,
        qkv,
        gate,
        grad,
        live_heads=live,
        key_mask_BN=None if mask is None else mask.to(qkv.device),
        scale=scale,
        compact=compact,
        backend=backend,
    )
    qkv, grad, gate = qkv.cpu(), grad.cpu(), None if gate is None else gate.cpu()
    eager = with_gradients(of_torch, qkv, gate, grad, live, mask, factor, compact)
    exact_gate = None if gate is None else gate.double()
    exact = with_gradients(
        reference, qkv.double(), exact_gate, grad.double(), live, mask, factor, compact
    )
    sums = sums_of(qkv, gate, grad, live, mask, factor, compact)
    assert got[0].is_contiguous()
    assert [x.dtype for x in got] == [dtype, dtype, *([] if gate is None else [gate.dtype])]
    for one, plain, truth, its_sums in zip(got, eager, exact, sums, strict=True):
        if one.dtype == FP64:
            # nothing exacter is at hand than the reference itself
            torch.testing.assert_close(one, truth, rtol=1e-12, atol=1e-12)
        else:
            assert_within_budget(one.cpu(), plain, truth, its_sums)
    dead = sorted({*range(shape[2])} - {*live})
    assert not got[1][:, :, :, dead].any()
    assert not gated or not got[2][dead].any()
    assert compact or not got[0][:, :, dead].any()


@pytest.mark.parametrize(
    ("shape", "live", "backend", "dtype"),
    [
        pytest.param(*shape.values, *run.values, id=f"{shape.id}-{run.id}")
        for k, shape in enumerate(SHAPES)
        for run in RUNS
        # the interpreter takes one dtype for each shape, in turn
        if run.values[0] != "triton" or ON_GPU or run.values[1] == (FP32, FP16)[k % 2]
    ],
)
def test_gated_attention_matches_reference(shape, live, dtype, backend):
    assert_matches(shape, dtype, backend, live)


@pytest.mark.parametrize(("backend", "dtype"), RUNS)
@pytest.mark.parametrize(("shape", "live"), [SHAPES[k] for k in (0, 2, 4)] + SHAPES[8:])
def test_gated_attention_with_a_key_mask_matches_reference(shape, live, dtype, backend):
    """The first sample has no key at all, and the output has the live heads only."""
    assert_matches(shape, dtype, backend, live, mask_of(shape), compact=True)


@pytest.mark.parametrize(("backend", "dtype"), RUNS)
@pytest.mark.parametrize(("scale", "compact"), [(None, False), (0.0, True), (-0.3, True)])
def test_gated_attention_without_a_gate_matches_reference(scale, compact, dtype, backend):
    shape, live = (2, 37, 4, 24), (0, 1, 3)
    assert_matches(shape, dtype, backend, live, gated=False, compact=compact, scale=scale)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "key-mask"])
@pytest.mark.parametrize(("shape", "live"), SHAPES[:8])
def test_gated_attention_gpu_matches_reference(shape, live, masked, dtype):
    for compact in (False, True):
        mask = mask_of(shape) if masked else None
        assert_matches(shape, dtype, "triton", live, mask, compact=compact)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [577, 1200])
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_gated_attention_gpu_long_sequences_match_reference(num_tokens, backend):
    """With a gate that is learned, and without, where auto takes torch's own attention."""
    for gated in (True, False):
        assert_matches((2, num_tokens, 4, 64), BF16, backend, (0, 1, 3), gated=gated)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"live": (0, 2)},
        {"live": (1,), "compact": True},
        {"live": (0, 2), "masked": True},
        {"live": (), "compact": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["reference", "eager", *(b for b in BACKENDS if b == "cpu")])
def test_gated_attention_gradcheck(backend, options):
    qkv, gate, _ = inputs((2, 5, 3, 4), FP64)
    live, compact = options.get("live", (0, 1, 2)), options.get("compact", False)
    mask = mask_of((2, 5)) if options.get("masked") else None

    def call(qkv, gate):
        if backend == "reference":
            return reference(qkv, gate, live, mask, 0.7, compact)
        return ops.gated_attention(
            qkv,
            gate,
            live_heads=live,
            key_mask_BN=mask,
            scale=0.7,
            compact=compact,
            backend=backend,
        )

    torch.autograd.gradcheck(call, (qkv.requires_grad_(), gate.requires_grad_()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs_gate", [False, True])
def test_gated_attention_frozen_gate_gives_the_same_gradient_of_qkv(needs_gate, backend):
    """Then the output behind the gate is kept in place of the one before it."""
    qkv, gate, grad = inputs((2, 19, 4, 24), FP32, backend)
    wanted = with_gradients(ops.gated_attention, qkv, gate, grad, live_heads=[0, 1, 3])
    leaf = qkv.requires_grad_(not needs_gate)
    gate.requires_grad_(needs_gate)
    out = ops.gated_attention(leaf, gate, live_heads=[0, 1, 3], backend=backend)
    (got,) = torch.autograd.grad(out, gate if needs_gate else leaf, grad)
    torch.testing.assert_close(got, wanted[2 if needs_gate else 1], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        again = ops.gated_attention(leaf, gate, live_heads=[0, 1, 3], backend=backend)
    assert torch.equal(again, out)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gated_attention_never_reads_dead_heads_and_masked_keys(value, compact, backend):
    qkv, gate, grad = inputs((2, 19, 4, 24), FP32, backend)
    live = [1, 2]
    grad = grad[:, :, live] if compact else grad
    mask = mask_of((2, 19)).to(qkv.device)

    def call(qkv, gate, grad):
        options = {"live_heads": live, "key_mask_BN": mask, "compact": compact}
        return with_gradients(ops.gated_attention, qkv, gate, grad, **options, backend=backend)

    wanted = call(qkv, gate, grad)
    qkv, grad = qkv.clone(), grad.clone()
    qkv[:, :, :, [0, 3]] = value
    if not compact:
        grad[:, :, [0, 3]] = value
    qkv[:, :, 1:][~mask] = value
    got = call(qkv, gate, grad)
    assert all(x.isfinite().all() for x in got)
    assert all(map(torch.equal, got, wanted))
    assert not got[1][:, :, :, [0, 3]].any() and not got[2][[0, 3]].any()
    assert not got[0][0].any() and not got[1][0].any()
    assert not got[1][:, :, 1:][~mask].any()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "eager"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_gated_attention_same_bits_again_and_for_any_batch(dtype, backend):
    qkv, gate, grad = inputs((4, 19, 3, 24), DTYPES[dtype], backend)

    def call(qkv, grad):
        options = {"live_heads": [0, 1], "backend": backend}
        return with_gradients(ops.gated_attention, qkv, gate, grad, **options)

    whole = call(qkv, grad)
    assert all(map(torch.equal, whole, call(qkv, grad)))
    order = torch.tensor([2, 0, 3, 1], device=qkv.device)
    permuted = call(qkv[order], grad[order])
    assert all(
        torch.equal(one, other[order]) for one, other in zip(permuted[:2], whole, strict=False)
    )
    alone = call(qkv[1:2], grad[1:2])
    assert all(torch.equal(one, other[1:2]) for one, other in zip(alone[:2], whole, strict=False))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gated_attention_handles_any_layout(backend):
    """qkv whose dims are not adjacent, inside NaN; and a gradient that was broadcast."""
    qkv, gate, grad = inputs((2, 18, 2, 48), FP32, backend)
    want = with_gradients(ops.gated_attention, qkv, gate, grad, backend=backend)
    around = torch.full((2, 30, 3, 4, 70), torch.nan, device=qkv.device)
    inside = around[:, 3:21, :, 1:3, 2:50]
    inside.copy_(qkv)
    swapped = qkv.transpose(0, 4).contiguous().transpose(0, 4)
    for layout in (inside, swapped):
        leaf, gates = layout.detach().requires_grad_(), gate.clone().requires_grad_()
        out = ops.gated_attention(leaf, gates, backend=backend)
        odd_grad = grad.transpose(1, 3).contiguous().transpose(1, 3)
        got = [out, *torch.autograd.grad(out, (leaf, gates), odd_grad)]
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other)
    ones = torch.ones_like(grad)
    want = with_gradients(ops.gated_attention, qkv, gate, ones, backend=backend)
    leaf = qkv.clone().requires_grad_()
    ops.gated_attention(leaf, gate, backend=backend).sum().backward()
    torch.testing.assert_close(leaf.grad, want[1])


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "eager"])
def test_gated_attention_can_be_differentiated_once(backend):
    qkv, _, _ = inputs((1, 9, 2, 8), FP32, backend)
    out = ops.gated_attention(qkv.requires_grad_(), backend=backend)
    with pytest.raises(RuntimeError, match="gated_attention: create_graph must be False"):
        torch.autograd.grad(out.sum(), qkv, create_graph=True)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "eager"])
def test_gated_attention_opcheck(backend):
    qkv, gate, grad = inputs((1, 13, 3, 12), FP32, backend)
    mask = mask_of((1, 13)).to(qkv.device)
    twin = "" if backend == "cpu" else "_triton"
    differentiable, forward, backward = (
        getattr(torch.ops.vitprune_fast, name).default
        for name in ("gated_attention", f"gated_attention_fwd{twin}", f"gated_attention_bwd{twin}")
    )
    leaf, gate_leaf = qkv.clone().requires_grad_(), gate.clone().requires_grad_()
    for arguments in (
        (leaf, gate_leaf, None, [0, 2], 0.3, False, True),
        (leaf, gate, mask, [0, 2], 0.3, True, True),
        (leaf, None, None, [0, 1, 2], 0.3, True, False),
    ):
        opcheck(differentiable, (*arguments, backend))
        raw = arguments[6]
        fixed = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
        opcheck(forward, tuple(fixed))
        out, before, lse = forward(*fixed)
        given = grad[:, :, : out.shape[2]]
        for qkv_too in (True, False):
            opcheck(backward, (given, *fixed[:3], before if raw else out, lse, *fixed[3:], qkv_too))
    with pytest.raises(RuntimeError, match="raw must be True where the gate needs a gradient"):
        differentiable(qkv, gate_leaf, None, [0], 0.3, False, False, backend)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_gated_attention_compiles_fullgraph(backend):
    qkv, gate, grad = inputs((2, 13, 3, 16), FP32, backend)

    def layer(qkv, gate):
        out = ops.gated_attention(qkv * 2, gate, live_heads=(0, 2), backend=backend)
        return out + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert all(
        map(
            torch.equal,
            with_gradients(compiled, qkv, gate, grad),
            with_gradients(layer, qkv, gate, grad),
        )
    )


def test_gated_attention_takes_live_heads_as_a_tensor():
    qkv, gate, _ = inputs((1, 5, 3, 8), FP32)
    wanted = ops.gated_attention(qkv, gate, live_heads=[0, 2], compact=True)
    for dtype in (torch.int32, torch.int64):
        live = torch.tensor([0, 2], dtype=dtype)
        assert torch.equal(ops.gated_attention(qkv, gate, live_heads=live, compact=True), wanted)


def test_gated_attention_rejects_wrong_arguments():
    qkv, gate = torch.ones(2, 4, 3, 2, 8), torch.ones(2)
    with pytest.raises(TypeError, match="gated_attention: qkv_BN3HK must be a tensor, got list"):
        ops.gated_attention([1.0])  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="gated_attention: gate_H must be a tensor, got float"):
        ops.gated_attention(qkv, 1.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match=r"gate_H must have shape \(2,\), .*, got \(3,\)"):
        ops.gated_attention(qkv, torch.ones(3))
    with pytest.raises(InvalidInput, match=r"gate_H must have dtype torch\.float32, .*64"):
        ops.gated_attention(qkv, gate.double())
    # which costs a look at the gates; it is seen in the loss
    assert ops.gated_attention(qkv, torch.tensor([1.0, torch.nan]))[:, :, 1].isnan().all()
    for live in ([1, 0], [0, 0], [2], [-1], [0.5], ["0"]):
        with pytest.raises(
            InvalidInput, match=r"live_heads must hold .* 0 to 1, each once, .* got"
        ):
            ops.gated_attention(qkv, live_heads=live)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match=r"live_heads must have 1 dimensions, got \(1, 2\)"):
        ops.gated_attention(qkv, live_heads=torch.tensor([[0, 1]]))
    with pytest.raises(InvalidInput, match=r"live_heads must be int32 or int64, got torch\.bool"):
        ops.gated_attention(qkv, live_heads=torch.tensor([True, False]))
    with pytest.raises(TypeError, match="key_mask_BN must be a tensor, got list"):
        ops.gated_attention(qkv, key_mask_BN=[True])  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match=r"key_mask_BN must have shape \(2, 4\), got \(2, 3\)"):
        ops.gated_attention(qkv, key_mask_BN=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(InvalidInput, match=r"key_mask_BN must be bool, got torch\.float32"):
        ops.gated_attention(qkv, key_mask_BN=torch.ones(2, 4))
    with pytest.raises(BackendUnavailable, match=r"'triton' cannot run here: .* end at float32"):
        ops.gated_attention(qkv.double(), backend="triton")
    with pytest.raises(BackendUnavailable, match="'triton' cannot run here: a head of 129 dims"):
        ops.gated_attention(torch.ones(1, 2, 3, 1, 129), backend="triton")


def test_gated_attention_takes_the_peer_where_it_is_better(monkeypatch):
    """Many tokens and nothing to learn on a GPU: torch's own attention has fewer products."""
    module = sys.modules["vitprune_fast.ops.gated_attention"]
    monkeypatch.setattr(module, "choose_attention", lambda *arguments: "triton")
    monkeypatch.delenv("VITPRUNE_BACKEND", raising=False)
    long, short = torch.empty(1, 577, 3, 1, 8), torch.empty(1, 197, 3, 1, 8)
    learned = torch.ones(1, requires_grad=True)
    assert module._choose(long, None, "auto") == module._choose(long, learned.detach(), "auto")
    assert module._choose(long, None, "auto") == "eager"
    for qkv, gate, backend in (
        (short, None, "auto"),
        (long, learned, "auto"),
        (long, None, "triton"),
    ):
        assert module._choose(qkv, gate, backend) == "triton"
    monkeypatch.setenv("VITPRUNE_BACKEND", "triton")
    assert module._choose(long, None, "auto") == "triton"


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "cpu"])
def test_gated_attention_same_bits_for_any_number_of_threads(backend):
    qkv, gate, grad = inputs((3, 61, 5, 20), FP32)
    options = {"live_heads": [0, 1, 4], "key_mask_BN": mask_of((3, 61)), "backend": backend}
    results = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(with_gradients(ops.gated_attention, qkv, gate, grad, **options))
    finally:
        torch.set_num_threads(1)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))
def test_gated_attention_native_checks_memory_safety():
    forward, backward = (
        getattr(torch.ops.vitprune_fast, name)
        for name in ("gated_attention_fwd", "gated_attention_bwd")
    )
    qkv, gate, mask = torch.ones(2, 4, 3, 2, 8), torch.ones(2), torch.ones(2, 4, dtype=torch.bool)
    for arguments in (
        (qkv[0], gate, mask, [0]),
        (qkv, gate[:1], mask, [0]),
        (qkv, gate.double(), mask, [0]),
        (qkv, gate, mask[:, :3], [0]),
        (qkv, gate, mask.float(), [0]),
        (qkv, gate, mask, [2]),
        (qkv, gate, mask, [-1]),
        (qkv, gate, mask, [1, 0]),
    ):
        with pytest.raises(RuntimeError, match=r"gated_attention: \w+ must .*, got"):
            forward(*arguments, 1.0, False, True)
    out, raw, lse = forward(qkv, gate, mask, [1], 1.0, False, True)
    for arguments in (
        (out[:, :, :1], qkv, gate, mask, raw, lse, [1]),
        (out.double(), qkv, gate, mask, raw, lse, [1]),
        (out, qkv, gate, mask, out, lse, [1]),
        (out, qkv, gate, mask, raw, lse[:, :0], [1]),
        (out, qkv, gate, mask, raw, lse.double(), [1]),
        (out, qkv, gate, mask, raw, lse, [2]),
    ):
        with pytest.raises(RuntimeError, match=r"gated_attention: \w+ must .*, got"):
            backward(*arguments, 1.0, False, True, True)
