"""taylor_score: B batch, N tokens, F columns, U units of K columns."""

from __future__ import annotations

import math

import pytest
import torch
from error_budget import Rounded, assert_within_budget

from tests.registration import opcheck
from vitprune_fast import ops
from vitprune_fast._extension import OBSTACLE
from vitprune_fast.errors import BackendUnavailable, InvalidInput
from vitprune_fast.ops import _dispatch
from vitprune_fast.reference.taylor_score import taylor_score as reference

FP32, FP64, FP16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
ON_GPU = torch.cuda.is_available()

native = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))
# every backend that can run here; a missing one is seen by the tests declared to need it
PER_TOKEN = pytest.mark.parametrize("per_token", [False, True], ids=["sum", "per-token"])
BACKENDS = ["triton", "eager"] if OBSTACLE else ["cpu", "triton", "eager"]
SHAPES = [
    pytest.param((2, 197, 384), 1, id="B2-N197-F384-neurons"),
    pytest.param((2, 197, 192), 64, id="B2-N197-heads3x64"),
    pytest.param((2, 197, 147), 1, id="B2-N197-F147-odd"),
    pytest.param((1, 131, 37), 1, id="B1-N131-F37-primes"),
    pytest.param((3, 13, 5 * 48), 48, id="B3-N13-heads5x48"),
    pytest.param((2, 50, 2 * 80), 80, id="B2-N50-heads2x80"),
    pytest.param((2, 7, 3 * 7), 7, id="B2-N7-heads3x7"),
    pytest.param((2, 5, 2 * 1030), 1030, id="B2-N5-wide-units"),
    pytest.param((1, 1, 1), 1, id="ones"),
    pytest.param((0, 5, 8), 2, id="no-samples"),
    pytest.param((2, 0, 8), 2, id="no-tokens"),
    pytest.param((2, 5, 0), 1, id="no-columns"),
]


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and ON_GPU else "cpu"


def inputs(shape, dtype, backend="cpu"):
    device = device_of(backend)
    return tuple(torch.randn(shape, dtype=FP64).to(dtype).to(device) for _ in range(2))


def exact(activation, gradient, group_size, per_token=False):
    """The score as the correctly rounded fp64 value of the exact sum (of magnitudes of sums)."""
    batch, num_tokens, columns = activation.shape
    units = columns // group_size
    # exact for fp32 and shorter numbers; for fp64 each product carries one rounding
    product = activation.double() * gradient.double()
    groups = product.cpu().unflatten(2, (-1, group_size)).permute(0, 2, 1, 3)
    if per_token:
        tokens = groups.reshape(-1, group_size).tolist()
        shares = torch.tensor([abs(math.fsum(token)) for token in tokens], dtype=FP64)
        groups = shares.reshape(batch, units, num_tokens, 1)
    sums = [[math.fsum(unit) for unit in sample] for sample in groups.flatten(2).tolist()]
    return torch.tensor(sums, dtype=FP64).reshape(batch, units)


def sums_of(activation, gradient, group_size) -> Rounded:
    """A score adds the products of all tokens and of a unit's columns."""
    dtype = activation.dtype
    products = Rounded.of(activation, dtype) * Rounded.of(gradient, dtype)
    units = products.value.shape[2] // group_size
    return products.unflatten(2, (units, group_size)).sum((1, 3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, FP16, FP64], ids=["fp32", "fp16", "fp64"])
@pytest.mark.parametrize(("shape", "group_size"), SHAPES)
@PER_TOKEN
def test_taylor_score_matches_reference(shape, group_size, dtype, backend, per_token):
    activation, gradient = inputs(shape, dtype, backend)
    got = ops.taylor_score(activation, gradient, group_size, per_token=per_token, backend=backend)
    assert got.dtype == (FP64 if dtype == FP64 else FP32)
    assert got.shape == (shape[0], shape[2] // group_size)
    eager = reference(activation, gradient, group_size, per_token=per_token).cpu()
    wanted = exact(activation, gradient, group_size, per_token)
    assert_within_budget(got.cpu(), eager, wanted, sums_of(activation, gradient, group_size))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
@pytest.mark.parametrize("group_size", [1, 21])
@PER_TOKEN
def test_taylor_score_bf16_matches_reference(backend, group_size, per_token):
    activation, gradient = inputs((2, 197, 147), BF16)
    got = ops.taylor_score(activation, gradient, group_size, per_token=per_token, backend=backend)
    eager = reference(activation, gradient, group_size, per_token=per_token)
    wanted = exact(activation, gradient, group_size, per_token)
    assert_within_budget(got, eager, wanted, sums_of(activation, gradient, group_size))


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", [1, 64], ids=["neurons", "heads"])
@PER_TOKEN
def test_taylor_score_triton_bf16_matches_reference(group_size, per_token):
    activation, gradient = inputs((4, 197, 768), BF16, "triton")
    got = ops.taylor_score(activation, gradient, group_size, per_token=per_token, backend="triton")
    eager = reference(activation, gradient, group_size, per_token=per_token).cpu()
    wanted = exact(activation, gradient, group_size, per_token)
    assert_within_budget(got.cpu(), eager, wanted, sums_of(activation, gradient, group_size))


def test_taylor_score_per_token_lets_no_token_cancel_another():
    activation = torch.tensor([[[1.0, 2.0], [-1.0, -2.0]]])
    gradient = torch.ones_like(activation)
    assert ops.taylor_score(activation, gradient).tolist() == [[0.0, 0.0]]
    assert ops.taylor_score(activation, gradient, per_token=True).tolist() == [[2.0, 4.0]]
    # the columns of a unit do cancel
    activation[0, 1] = torch.tensor([-2.0, 2.0])
    assert ops.taylor_score(activation, gradient, 2, per_token=True).tolist() == [[3.0]]


@pytest.mark.gpu
@pytest.mark.slow
def test_taylor_score_handles_more_than_2_31_elements():
    activation = torch.ones(3, 1024, 720_000, device="cuda", dtype=FP16)
    assert activation.numel() > 2**31
    got = ops.taylor_score(activation, activation, 720, backend="triton")
    assert torch.equal(got, torch.full_like(got, 1024 * 720))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
def test_taylor_score_reads_every_fp16_and_bf16_number(backend):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in (FP16, BF16):
        # four tokens and a multiple of 16 columns: every number goes through the vector path;
        # 15 columns less, and the last ones go through the scalar tail; one token is scalar too
        numbers = bits.view(dtype)
        values = torch.stack([numbers, *[torch.zeros_like(numbers)] * 3])[None]
        for part in (values, values[..., 15:], values[:, :1]):
            got = ops.taylor_score(part, torch.ones_like(part), backend=backend)
            assert torch.equal(got.nan_to_num(3.0), part[:, 0].float().nan_to_num(3.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
@PER_TOKEN
def test_taylor_score_same_bits_alone_repeated_and_in_a_batch(dtype, backend, per_token):
    for group_size in (1, 48):
        activation, gradient = inputs((5, 131, 3 * 48), dtype, backend)

        def score(rows, group_size=group_size, activation=activation, gradient=gradient):
            arguments = (activation[rows], gradient[rows], group_size)
            return ops.taylor_score(*arguments, per_token=per_token, backend=backend)

        whole = score(slice(None))
        assert torch.equal(whole, score(slice(None)))
        for b in range(len(whole)):
            alone = score(slice(b, b + 1))
            if backend != "eager":
                assert torch.equal(whole[b : b + 1], alone)
            else:
                # plain torch chooses its own order of summation
                torch.testing.assert_close(whole[b : b + 1], alone)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "cpu"] or ["eager"])
@PER_TOKEN
def test_taylor_score_same_bits_for_any_number_of_threads(backend, per_token):
    activation, gradient = inputs((3, 197, 3072), FP32)
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            got = ops.taylor_score(activation, gradient, 64, per_token=per_token, backend=backend)
            results.append(got)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(results[0], other) for other in results[1:])


@native
def test_taylor_score_bits_are_the_same_for_every_instruction_set(processors):
    script = """
import torch
from vitprune_fast import ops
a, g = inputs
found = [ops.taylor_score(a.to(t), g.to(t), k, per_token=p, backend="cpu")
         for t in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
         for k in (1, 21) for p in (False, True)]
"""
    processors.assert_same_bits(script, inputs((2, 131, 21 * 7), FP32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_taylor_score_handles_any_layout(backend):
    activation, gradient = inputs((4, 34, 24), FP32, backend)
    want = ops.taylor_score(activation, gradient, 6, backend=backend)
    # the middle of a wider tensor, tokens first, columns not adjacent, one gradient for all tokens
    wide = torch.randn(4, 50, 72, device=activation.device)
    wide[:, 3:37, 24:48] = activation
    layouts = [
        wide[:, 3:37, 24:48],
        activation.transpose(0, 1).contiguous().transpose(0, 1),
        activation.transpose(1, 2).contiguous().transpose(1, 2),
    ]
    for layout in layouts:
        assert not layout.is_contiguous()
        got = ops.taylor_score(layout, gradient, 6, backend=backend)
        assert torch.equal(got, want) or backend == "eager"
        torch.testing.assert_close(got, want)
    expanded = gradient[:, :1].expand_as(gradient)
    got = ops.taylor_score(activation, expanded, 6, backend=backend)
    torch.testing.assert_close(got, reference(activation, expanded, 6))


@pytest.mark.parametrize("backend", BACKENDS)
@PER_TOKEN
def test_taylor_score_nan_stays_in_its_unit(backend, per_token):
    activation, gradient = inputs((3, 20, 40), FP32, backend)
    want = ops.taylor_score(activation, gradient, 8, per_token=per_token, backend=backend)
    activation[1, 19, 17] = torch.nan
    got = ops.taylor_score(activation, gradient, 8, per_token=per_token, backend=backend)
    assert got.isnan().nonzero().tolist() == [[1, 2]]
    want[1, 2] = got[1, 2] = 0
    assert torch.equal(got, want)


def test_taylor_score_launches_nothing_for_an_empty_result(monkeypatch):
    """A grid of zero programs is an error on a GPU, and silently fine in the interpreter."""
    from vitprune_fast.kernels import taylor_score as kernels

    class Refuse:
        def __getitem__(self, grid):
            raise AssertionError(f"launched with grid {grid}")

    monkeypatch.setattr(kernels, "_taylor_score_fwd_kernel", Refuse())
    for shape in ((0, 5, 8), (2, 5, 0)):
        assert kernels.taylor_score_fwd(torch.ones(shape), torch.ones(shape), 1, False).numel() == 0
    with pytest.raises(AssertionError, match="launched"):
        kernels.taylor_score_fwd(torch.ones(1, 1, 1), torch.ones(1, 1, 1), 1, False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_taylor_score_is_cut_off_from_the_graph(backend):
    activation, gradient = inputs((2, 5, 8), FP32, backend)
    got = ops.taylor_score(activation.requires_grad_(), gradient, 2, backend=backend)
    assert not got.requires_grad


def test_taylor_score_opcheck():
    activation, gradient = inputs((2, 13, 12), FP32)
    odd = activation.transpose(1, 2).contiguous().transpose(1, 2)
    registered = [torch.ops.vitprune_fast.taylor_score_triton]
    registered += [] if OBSTACLE else [torch.ops.vitprune_fast.taylor_score]
    for op in registered:
        device = device_of("triton") if "triton" in str(op) else "cpu"
        for a, group_size in ((activation, 1), (activation, 4), (odd, 3)):
            arguments = (a.to(device), gradient.to(device), group_size, group_size == 4)
            opcheck(op.default, arguments)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_taylor_score_compiles_fullgraph(backend):
    def scaled(activation, gradient):
        score = ops.taylor_score(activation * 2, gradient, 4, backend=backend)
        return (
            score + ops.taylor_score(activation, gradient, per_token=True, backend=backend)[:, :3]
        )

    activation, gradient = inputs((2, 13, 12), FP32, backend)
    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(activation, gradient), scaled(activation, gradient))


def test_taylor_score_rejects_wrong_arguments():
    x = torch.ones(2, 3, 4)
    with pytest.raises(TypeError, match="activation_BNF must be a tensor, got list"):
        ops.taylor_score([1.0], x)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match=r"must have 3 dimensions, got \(3, 4\)"):
        ops.taylor_score(x[0], x[0])
    with pytest.raises(InvalidInput, match=r"must be float32 or .*, got torch\.int64"):
        ops.taylor_score(x.long(), x.long())
    with pytest.raises(InvalidInput, match=r"must have shape \(2, 3, 4\) like activation_BNF, got"):
        ops.taylor_score(x, x[:, :2])
    with pytest.raises(InvalidInput, match=r"dtype torch.float32 like activation_BNF, got"):
        ops.taylor_score(x, x.double())
    for group_size in (0, -1, 3):
        with pytest.raises(InvalidInput, match=f"divide the 4 columns .*, got {group_size}"):
            ops.taylor_score(x, x, group_size)


@native
def test_taylor_score_native_checks_memory_safety():
    op, x = torch.ops.vitprune_fast.taylor_score, torch.ones(2, 3, 4)
    for arguments in ((x[0], x[0], 1), (x, x[:, :2], 1), (x, x.double(), 1), (x, x, 3), (x, x, 0)):
        with pytest.raises(RuntimeError, match=r"taylor_score: .* must .*, got"):
            op(*arguments, False)
    with pytest.raises(RuntimeError, match="activation_BNF must be float32"):
        op(x.long(), x.long(), 1, False)


def test_taylor_score_named_backend_never_falls_back(monkeypatch):
    x = torch.ones(2, 3, 4)
    with pytest.raises(BackendUnavailable, match="there is no CUDA C"):
        ops.taylor_score(x, x, backend="cuda")
    with pytest.raises(
        InvalidInput, match="must be one of auto, triton, cuda, cpu, eager, got 'x'"
    ):
        ops.taylor_score(x, x, backend="x")  # pyright: ignore[reportArgumentType]
    monkeypatch.setenv("VITPRUNE_BACKEND", "cuda")
    with pytest.raises(BackendUnavailable, match="VITPRUNE_BACKEND 'cuda' cannot run here"):
        ops.taylor_score(x, x)
    monkeypatch.setenv("VITPRUNE_BACKEND", "eager")
    assert torch.equal(ops.taylor_score(x, x), torch.full((2, 4), 3.0))
    assert {choice.backend for choice in ops.backends()} == {"eager"}
    monkeypatch.setattr(_dispatch, "_interpreting", lambda: False)
    with pytest.raises(BackendUnavailable, match="CUDA tensors only"):
        ops.taylor_score(x, x, backend="triton")
