"""manifold_loss: S sets, R rows, D width of the student, E width of the teacher."""

from __future__ import annotations

import pytest
import torch
from error_budget import Rounded, assert_within_budget
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.registration import opcheck
from vitprune_fast import ops
from vitprune_fast.errors import BackendUnavailable, InvalidInput
from vitprune_fast.ops import _dispatch, manifold_loss
from vitprune_fast.reference.manifold_loss import MIN_NORM, set_by_set
from vitprune_fast.reference.manifold_loss import manifold_loss as reference

FP32, FP64, FP16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
ON_GPU = torch.cuda.is_available()
BACKENDS = ["triton", "eager"]
SHAPES = [
    pytest.param((1, 197, 16, 24), id="S1-R197-D16-E24"),
    pytest.param((2, 49, 20, 40), id="S2-R49-D20-E40"),
    pytest.param((1, 257, 13, 7), id="S1-R257-primes"),
    pytest.param((2, 5, 192, 384), id="S2-R5-D192-E384"),
    pytest.param((5, 2, 16, 8), id="S5-R2"),
]


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and ON_GPU else "cpu"


def inputs(shape, dtype, backend="cpu") -> tuple[Tensor, Tensor]:
    sets, rows, width, teacher_width = shape
    # lengths that differ, and neighbours that are alike
    student = torch.randn(sets, rows, width, dtype=FP64) * torch.rand(sets, rows, 1).double() * 8
    teacher = torch.randn(sets, rows, teacher_width, dtype=FP64).cumsum(1)
    device = device_of(backend)
    return student.to(dtype).to(device).requires_grad_(), teacher.to(dtype).to(device)


def value_and_gradient(loss, student, teacher, factor: float = 1.0):
    value = loss(student, teacher)
    return value.detach(), torch.autograd.grad(factor * value, student)[0]


def eager_and_exact(student, teacher, factor: float = 1.0):
    exact = student.detach().double().cpu().requires_grad_()
    student, teacher = student.detach().cpu().requires_grad_(), teacher.cpu()
    return (
        value_and_gradient(reference, student, teacher, factor),
        value_and_gradient(reference, exact, teacher.double(), factor),
    )


def unit_rows(x: Rounded) -> tuple[Rounded, Rounded]:
    """The rows at length 1, and the inverse of their lengths."""
    length = (x * x).sum(-1).power(0.5).unsqueeze(-1)
    inverse = length.power(-1).masked_fill(length.value <= MIN_NORM, 0)
    return x * inverse, inverse


def sums_of(student, teacher, factor: float = 1.0) -> tuple[Rounded, Rounded]:
    """What rounding may do to the loss and its gradient, by the formulas of ``set_by_set``."""
    sets, rows, _ = student.shape
    x, inverse = unit_rows(Rounded.of(student, student.dtype))
    y, _ = unit_rows(Rounded.of(teacher, student.dtype))
    difference = x @ x.mT - y @ y.mT
    g = difference @ x
    g = (g - x * (x * g).sum(-1).unsqueeze(-1)) * inverse
    share = 1 / (sets * rows**2)
    return (difference * difference).sum((0, 1, 2)) * share, g * (4 * factor * share)


def assert_results_within_budget(got, student, teacher, factor: float = 1.0):
    both, sums = eager_and_exact(student, teacher, factor), sums_of(student, teacher, factor)
    for one, eager, exact, its_sums in zip(got, *both, sums, strict=True):
        assert_within_budget(one.cpu(), eager, exact, its_sums)


def test_reference_has_the_gradient_of_its_formula():
    student, teacher = inputs((2, 5, 4, 6), FP64)
    assert torch.autograd.gradcheck(lambda x: reference(x, teacher), student)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_manifold_loss_matches_reference(shape, dtype, backend):
    student, teacher = inputs(shape, dtype, backend)
    # a loss scale, as fp16 has: without it the gradient is below its smallest numbers
    factor = 2.0**14 if dtype == FP16 else 1.0
    got = value_and_gradient(
        lambda s, t: manifold_loss(s, t, backend=backend), student, teacher, factor
    )
    assert [part.dtype for part in got] == [FP32, dtype]
    assert_results_within_budget(got, student, teacher, factor)


@pytest.mark.parametrize("backend", BACKENDS)
def test_manifold_loss_of_many_rows_and_columns(backend):
    """More rows than a program's tile of 16-bit numbers, and two parts of the gradient."""
    student, teacher = inputs((1, 260, 136, 8), FP16, backend)
    got = value_and_gradient(
        lambda s, t: manifold_loss(s, t, backend=backend), student, teacher, 2.0**14
    )
    assert_results_within_budget(got, student, teacher, 2.0**14)
    alone = manifold_loss(student.detach(), teacher, backend=backend)
    torch.testing.assert_close(alone, got[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_manifold_loss_of_a_single_row_is_0(backend):
    student, teacher = inputs((3, 1, 8, 12), FP32, backend)
    got = value_and_gradient(lambda s, t: manifold_loss(s, t, backend=backend), student, teacher)
    # a row is as similar to itself as rounding lets it be
    assert got[0] < 1e-12 and got[1].abs().max() < 1e-6


def test_manifold_loss_fp64_matches_reference():
    for shape in ((3, 49, 24, 40), (1, 1, 3, 3)):
        student, teacher = inputs(shape, FP64)
        got = value_and_gradient(manifold_loss, student, teacher)
        wanted = value_and_gradient(reference, student, teacher)
        for one, other in zip(got, wanted, strict=True):
            assert one.dtype == FP64
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_manifold_loss_takes_sides_of_other_dtypes(backend):
    student, teacher = inputs((3, 37, 24, 40), FP32, backend)
    got = value_and_gradient(
        lambda s, t: manifold_loss(s, t.half(), backend=backend), student, teacher
    )
    assert_results_within_budget(got, student, teacher.half().float())


def test_manifold_loss_rounds_operands_as_autocast_does():
    student, teacher = inputs((2, 49, 64, 40), FP32, "triton")

    def rounded(s, t):
        return manifold_loss(s, t, operand_dtype=FP16, backend="triton")

    got = value_and_gradient(rounded, student, teacher)
    exact = value_and_gradient(reference, student, teacher)
    assert got[1].dtype == FP32 and not torch.equal(got[1], exact[1])
    # lengths are those of the rows as they are; products are of numbers with 11 bits
    torch.testing.assert_close(got[0], exact[0], rtol=2**-11, atol=0)
    limit = 2**-10 * exact[1].abs().max().item()
    torch.testing.assert_close(got[1], exact[1], rtol=0, atol=limit)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("rows", [17, 40])
def test_manifold_loss_of_equal_states_is_exactly_0(rows, dtype, backend):
    student, _ = inputs((1, rows, 40, 8), dtype, backend)
    loss = manifold_loss(student, student.detach().clone(), backend=backend)
    (gradient,) = torch.autograd.grad(loss, student)
    # a GPU rounds a product and the difference from another at once: 1 ulp at most of each cosine
    limit = torch.finfo(FP32).eps if loss.is_cuda else 0.0
    assert loss <= limit**2 and gradient.abs().max() <= limit


@pytest.mark.parametrize("backend", BACKENDS)
def test_manifold_loss_reads_positions_and_parts_in_place(backend):
    student, teacher = inputs((4, 9, 24, 40), FP32, backend)

    def inter(s, t):
        return manifold_loss(s.transpose(0, 1), t.transpose(0, 1), backend=backend)

    def copied(s, t):
        return manifold_loss(
            s.transpose(0, 1).contiguous(), t.transpose(0, 1).contiguous(), backend=backend
        )

    def without_first(s, t):
        return manifold_loss(s[:, 1:], t[:, 1:], backend=backend)

    def apart(s, t):
        return manifold_loss(s[..., ::2], t[..., ::2], backend=backend)

    def gathered(s, t):
        return manifold_loss(s[..., ::2].contiguous(), t[..., ::2].contiguous(), backend=backend)

    for one, other in ((inter, copied), (apart, gathered)):
        got, wanted = (value_and_gradient(f, student, teacher) for f in (one, other))
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    exact = reference(student.transpose(0, 1), teacher.transpose(0, 1))
    torch.testing.assert_close(inter(student, teacher), exact)
    _, gradient = value_and_gradient(without_first, student, teacher)
    assert not gradient[:, 0].any() and gradient[:, 1:].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [31, 37])
def test_manifold_loss_of_rows_without_a_direction(rows, backend):
    student, teacher = inputs((2, rows, 24, 40), FP32, backend)
    student = student.detach().clone()
    student[:, 3], student[0, 5], teacher[1, 4] = 0, 1e-13, 0
    student.requires_grad_()
    got = value_and_gradient(lambda s, t: manifold_loss(s, t, backend=backend), student, teacher)
    assert not got[1][:, 3].any() and not got[1][0, 5].any()
    assert_results_within_budget(got, student, teacher)
    student = student.detach().clone()
    student[1, 7, 2] = torch.nan
    assert manifold_loss(student, teacher, backend=backend).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_manifold_loss_is_the_same_bits_again(backend):
    student, teacher = inputs((3, 49, 64, 40), FP32, backend)
    first, second = (
        value_and_gradient(lambda s, t: manifold_loss(s, t, backend=backend), student, teacher)
        for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


class Largest(TorchDispatchMode):
    """The largest number of elements among all results."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_manifold_loss_holds_one_sets_similarities_at_a_time():
    student, teacher = (x.detach() for x in inputs((8, 600, 4, 4), FP32))
    with Largest() as largest:
        set_by_set(student, teacher, torch.empty_like(student))
    assert largest.elements == 600**2


def test_manifold_loss_launches_one_program_for_each_block(monkeypatch):
    from vitprune_fast.kernels import manifold_loss as kernels

    grids = []

    class Record:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **constants: None

    for name in ("_inverse_norms_kernel", "_manifold_loss_kernel"):
        monkeypatch.setattr(kernels, name, Record())
    student, teacher = inputs((2, 257, 130, 16), FP16, "triton")
    manifold_loss(student, teacher, backend="triton")
    # blocks of 64 rows and of 128 columns of the gradient, which needs all rows
    assert grids == [(2 * 17,), (2 * 5 * 2,)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_manifold_loss_refuses_a_second_derivative(backend):
    student, teacher = inputs((2, 5, 4, 6), FP32, backend)
    with pytest.raises(RuntimeError, match="manifold_loss: create_graph must be False"):
        loss = manifold_loss(student, teacher, backend=backend)
        torch.autograd.grad(loss, student, create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_manifold_loss_opcheck(backend):
    op = torch.ops.vitprune_fast.manifold_loss
    for dtype, with_gradient in ((FP32, False), (FP16, True)):
        student, teacher = inputs((2, 13, 12, 8), dtype, backend)
        opcheck(op.default, (student, teacher, with_gradient, None, backend))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_manifold_loss_compiles_fullgraph(backend):
    def scaled(student, teacher):
        return 2 * manifold_loss(student + 0, teacher, backend=backend)

    student, teacher = inputs((2, 13, 12, 8), FP32, backend)
    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    got, wanted = (value_and_gradient(f, student, teacher) for f in (compiled, scaled))
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


def test_manifold_loss_rejects_wrong_arguments():
    x = torch.ones(2, 3, 4)
    with pytest.raises(TypeError, match="student_SRD must be a tensor, got list"):
        manifold_loss([1.0], x)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match=r"must have 3 dimensions, got \(3, 4\)"):
        manifold_loss(x[0], x)
    with pytest.raises(InvalidInput, match=r"must be float32 or .*, got torch\.int64"):
        manifold_loss(x.long(), x)
    with pytest.raises(
        InvalidInput, match=r"teacher_SRE must have 2 sets of 3 rows .*, got \(2, 2"
    ):
        manifold_loss(x, x[:, :2])
    with pytest.raises(InvalidInput, match=r"student_SRD must not be empty, got \(0, 3, 4\)"):
        manifold_loss(x[:0], x[:0])
    with pytest.raises(InvalidInput, match=r"operand_dtype must be torch\.bfloat16, .*float64"):
        manifold_loss(x, x, operand_dtype=FP64)


def test_manifold_loss_named_backend_never_falls_back(monkeypatch):
    x = torch.ones(2, 3, 4)
    with pytest.raises(BackendUnavailable, match="there is no CUDA C"):
        manifold_loss(x, x, backend="cuda")
    with pytest.raises(BackendUnavailable, match="tensor cores, which end at float32"):
        manifold_loss(x.double(), x, backend="triton")
    monkeypatch.setattr(_dispatch, "_interpreting", lambda: False)
    with pytest.raises(BackendUnavailable, match="CUDA tensors only"):
        manifold_loss(x, x, backend="triton")


# on a GPU: what the interpreter cannot judge


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("shape", [(4, 197, 768, 768), (4, 577, 192, 384), (196, 32, 384, 768)])
def test_manifold_loss_triton_matches_reference(shape, dtype):
    """Outputs start as NaN (conftest), so what the kernel leaves out is seen."""
    student, teacher = inputs(shape, dtype, "triton")
    factor = 2.0**14 if dtype == FP16 else 1.0
    got = value_and_gradient(
        lambda s, t: manifold_loss(s, t, backend="triton"), student, teacher, factor
    )
    assert_results_within_budget(got, student, teacher, factor)


@pytest.mark.gpu
def test_manifold_loss_triton_at_the_target_shape():
    student, teacher = (torch.randn(256, 196, 768, device="cuda").to(BF16) for _ in range(2))
    student.requires_grad_()
    assert {c.device: c.backend for c in ops.backends() if c.op == "manifold_loss"}["cuda"] == (
        "triton"
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    first = value_and_gradient(manifold_loss, student, teacher)
    # the gradient as it is kept and as it is handed on, and little else
    assert torch.cuda.max_memory_allocated() - before < 2.1 * student.nbytes
    for _ in range(20):
        again = value_and_gradient(manifold_loss, student, teacher)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
