"""kd_cross_entropy: B samples, C classes."""

from __future__ import annotations

import math

import pytest
import torch
from error_budget import Rounded, assert_within_budget
from torch import Tensor
from torch.nn import functional as F

from tests.registration import opcheck
from vitprune_fast import ops
from vitprune_fast.distill.labels import cross_entropy
from vitprune_fast.distill.losses.soft import soft_kd
from vitprune_fast.errors import BackendUnavailable, InvalidInput
from vitprune_fast.ops import _dispatch, kd_cross_entropy
from vitprune_fast.reference.kd_cross_entropy import kd_cross_entropy as reference

FP32, FP64, FP16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
ON_GPU = torch.cuda.is_available()
BACKENDS = ["triton", "eager"]
SHAPES = [
    pytest.param((5, 1000), id="B5-C1000"),
    pytest.param((3, 37), id="B3-C37-prime"),
    pytest.param((2, 5003), id="B2-C5003-walked"),
    pytest.param((1, 1), id="ones"),
]


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and ON_GPU else "cpu"


def inputs(shape, dtype, shares=False, backend="cpu") -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = (3 * torch.randn(shape, dtype=FP64) for _ in range(2))
    labels = torch.rand(shape).softmax(1) if shares else torch.randint(shape[1], shape[:1])
    device = device_of(backend)
    student, teacher = (x.to(dtype).to(device) for x in (student, teacher))
    return student.requires_grad_(), teacher, labels.to(device)


def value_and_gradient(loss, student, *rest):
    value, ce, kd = loss(student, *rest)
    return value.detach(), ce.detach(), kd.detach(), torch.autograd.grad(value, student)[0]


def sums_of(tensors, ce_weight, kd_weight, factor, temperature, smoothing) -> list[Rounded]:
    """What rounding may do to the loss, its two parts, and the gradient of the student."""
    dtype = tensors[0].dtype
    student, teacher = (Rounded.of(x, dtype) for x in tensors[:2])
    batch, classes = student.value.shape
    labels = tensors[2]
    q = labels if labels.is_floating_point() else F.one_hot(labels, classes)
    q = (1 - smoothing) * q.double() + smoothing / classes

    def logarithms(logits: Rounded) -> Rounded:
        return logits - logits.logsumexp()

    log_p = logarithms(student)
    log_s, log_t = (logarithms(x * (1 / temperature)) for x in (student, teacher))
    ce = (log_p * q).sum((0, 1)) * (-1 / batch)
    kd = (log_t.exp() * (log_t - log_s)).sum((0, 1)) * (factor / batch)
    gradient = (log_p.exp() - q) * (ce_weight / batch)
    gradient += (log_s.exp() - log_t.exp()) * (kd_weight * factor / temperature / batch)
    return [ce * ce_weight + kd * kd_weight, ce, kd, gradient]


@pytest.mark.parametrize("shares", [False, True], ids=["numbers", "shares"])
def test_reference_is_its_formula_and_has_its_gradient(shares):
    student, teacher, labels = inputs((3, 5), FP64, shares)
    arguments = (teacher, labels, 0.3, 0.7, 4.0, 2.0, 0.1)
    assert torch.autograd.gradcheck(lambda x: reference(x, *arguments)[0], student)
    q = labels if shares else torch.nn.functional.one_hot(labels, 5)
    q = 0.9 * q.double() + 0.1 / 5
    p, s, t = (x.softmax(1) for x in (student, student / 2, teacher / 2))
    ce, kd = -(q * p.log()).sum() / 3, 4 * (t * (t / s).log()).sum() / 3
    for got, wanted in zip(
        reference(student, *arguments), (0.3 * ce + 0.7 * kd, ce, kd), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shares", [False, True], ids=["numbers", "shares"])
@pytest.mark.parametrize("shape", SHAPES)
def test_kd_cross_entropy_matches_reference(shape, shares, dtype, backend):
    student, teacher, labels = inputs(shape, dtype, shares, backend)
    for temperature, smoothing in ((1.0, 0.0), (4.0, 0.1), (0.3, 0.0)):
        got = value_and_gradient(
            lambda *a, t=temperature, e=smoothing: kd_cross_entropy(
                *a, alpha=0.3, temperature=t, label_smoothing=e, backend=backend
            ),
            student,
            teacher,
            labels,
        )
        assert [part.dtype for part in got] == [FP32, FP32, FP32, dtype]
        arguments = (0.7, 0.3, temperature**2, temperature, smoothing)
        tensors = (student.detach().cpu().requires_grad_(), teacher.cpu(), labels.cpu())
        eager = value_and_gradient(reference, *tensors, *arguments)
        doubles = [x.detach().double() if x.is_floating_point() else x for x in tensors]
        doubles[0].requires_grad_()
        exact = value_and_gradient(reference, *doubles, *arguments)
        sums = sums_of(tensors, *arguments)
        for one, other, precise, its_sums in zip(got, eager, exact, sums, strict=True):
            assert_within_budget(one.cpu(), other, precise, its_sums)


def test_kd_cross_entropy_adds_more_rows_than_a_program_holds(monkeypatch):
    from vitprune_fast.kernels import kd_cross_entropy as kernels

    tensors = inputs((21, 3), FP32, backend="triton")
    wanted = value_and_gradient(lambda *a: kd_cross_entropy(*a, backend="triton"), *tensors)
    monkeypatch.setattr(kernels, "BLOCK_ROWS", 4)
    got = value_and_gradient(lambda *a: kd_cross_entropy(*a, backend="triton"), *tensors)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kd_cross_entropy_is_the_sum_of_the_losses(backend):
    student, teacher, labels = inputs((6, 10), FP32, False, backend)
    for reduction in ("batchmean", "numel", "sum"):
        got = kd_cross_entropy(
            student,
            teacher,
            labels,
            0.2,
            3.0,
            0.1,
            ce_weight=1.0,
            reduction=reduction,  # pyright: ignore[reportArgumentType]
            backend=backend,
        )
        kd = soft_kd(
            student,
            teacher,
            3.0,
            reduction=reduction,  # pyright: ignore[reportArgumentType]
        )
        ce = cross_entropy(student, labels, 0.1)
        torch.testing.assert_close(got.ce, ce.detach())
        torch.testing.assert_close(got.kd, kd.detach())
        wanted = ce + 0.2 * kd
        torch.testing.assert_close(got.loss, wanted)
        gradients = [torch.autograd.grad(loss, student)[0] for loss in (got.loss, wanted)]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)
        assert got.loss.requires_grad and not (got.ce.requires_grad or got.kd.requires_grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kd_cross_entropy_of_equal_logits_has_no_divergence(backend):
    student, _, labels = inputs((4, 1000), FP32, False, backend)
    got = kd_cross_entropy(
        student, student.detach().clone(), labels, 1.0, 3.0, ce_weight=0.0, backend=backend
    )
    got.loss.backward()
    assert got.loss == got.kd == 0
    assert student.grad is not None
    # torch's softmax sums to 1 but for rounding
    assert student.grad.abs().max() <= (1e-8 if backend == "eager" else 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kd_cross_entropy_keeps_digits_of_large_logits(backend):
    student, teacher, labels = inputs((4, 50), FP32, False, backend)
    # exact in fp32, as 3 * randn is not
    student, teacher = (x.detach().half().float() for x in (student, teacher))
    plain = kd_cross_entropy(student, teacher, labels, backend=backend)
    moved = kd_cross_entropy(student + 4096, teacher - 4096, labels, backend=backend)
    nearer = (student + 4096) - 4096, (teacher - 4096) + 4096
    wanted = kd_cross_entropy(*nearer, labels, backend=backend)
    for one, other in zip(moved, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert plain.loss.isfinite()


def test_kd_cross_entropy_leaves_a_label_out_of_range_no_number():
    """The kernel does not read beyond the row for it, and nobody misses that it is wrong."""
    from vitprune_fast.kernels.kd_cross_entropy import kd_cross_entropy_fwd_bwd

    student, teacher, labels = inputs((3, 8), FP32, False, "triton")
    labels[1] = 8
    loss, ce, kd, _ = kd_cross_entropy_fwd_bwd(
        student.detach(), teacher, labels, 0.5, 0.5, 1.0, 1.0, 0.0, True
    )
    assert loss.isnan() and ce.isnan() and kd.isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_kd_cross_entropy_reads_any_layout_and_is_the_same_bits_again(backend):
    student, teacher, labels = inputs((4, 37), FP32, True, backend)
    tensors = student, teacher, labels
    spread = [torch.stack([x.detach(), x.detach()], 2).flatten(1)[:, ::2] for x in tensors]
    padded = [torch.nn.functional.pad(x.detach(), (3, 5))[:, 3:40] for x in tensors]
    wanted = value_and_gradient(lambda *a: kd_cross_entropy(*a, backend=backend), *tensors)
    for one in (tensors, spread, padded):
        got = value_and_gradient(
            lambda *a: kd_cross_entropy(*a, backend=backend), one[0].requires_grad_(), *one[1:]
        )
        for part, other in zip(got, wanted, strict=True):
            if backend == "triton" or one is tensors:
                assert torch.equal(part, other)
            torch.testing.assert_close(part, other)


def test_kd_cross_entropy_refuses_a_second_derivative():
    tensors = inputs((2, 5), FP32, False, "triton")
    with pytest.raises(RuntimeError, match="kd_cross_entropy: create_graph must be False"):
        loss = kd_cross_entropy(*tensors, backend="triton").loss
        torch.autograd.grad(loss, tensors[0], create_graph=True)


def test_kd_cross_entropy_opcheck():
    op = torch.ops.vitprune_fast.kd_cross_entropy_triton
    for dtype, shares, gradient in ((FP32, False, True), (FP16, True, True), (FP32, True, False)):
        tensors = inputs((3, 13), dtype, shares, "triton")
        opcheck(op.default, (*tensors, 0.3, 0.7, 4.0, 2.0, 0.1, gradient))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_kd_cross_entropy_compiles_fullgraph(backend):
    def both(student, teacher, labels):
        return kd_cross_entropy(student * 2, teacher, labels, backend=backend)

    tensors = inputs((3, 13), FP32, False, backend)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    got, wanted = (value_and_gradient(f, *tensors) for f in (compiled, both))
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


def test_kd_cross_entropy_compiles_with_weights_that_change():
    # from the second value on they are symbols of the compiler
    tensors = inputs((3, 13), FP32, False, "eager")
    compiled = torch.compile(kd_cross_entropy, fullgraph=True, backend="aot_eager")
    for alpha, temperature in ((0.3, 2.0), (0.4, 2.0), (0.5, 3.0), (0.6, 4.0)):
        got, wanted = (f(*tensors, alpha, temperature).loss for f in (compiled, kd_cross_entropy))
        torch.testing.assert_close(got, wanted)


def test_kd_cross_entropy_rejects_wrong_arguments():
    x, labels = torch.ones(2, 3), torch.zeros(2).long()
    with pytest.raises(TypeError, match="labels must be a tensor, got list"):
        kd_cross_entropy(x, x, [0, 1])  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match=r"student_BC must have 2 dimensions, got \(3,\)"):
        kd_cross_entropy(x[0], x, labels)
    with pytest.raises(
        InvalidInput, match=r"teacher_BC must have shape \(2, 3\) .*the same classes"
    ):
        kd_cross_entropy(x, torch.ones(2, 4), labels)
    with pytest.raises(InvalidInput, match=r"must be float32 or .*, got torch\.int64"):
        kd_cross_entropy(x.long(), x, labels)
    with pytest.raises(InvalidInput, match=r"student_BC must not be empty, got \(0, 3\)"):
        kd_cross_entropy(x[:0], x[:0], labels[:0])
    with pytest.raises(InvalidInput, match=r"labels must be \(2,\) int64 or .*, got \(2,\) int32"):
        kd_cross_entropy(x, x, labels.int())
    with pytest.raises(InvalidInput, match="labels must hold numbers from 0 to 2, got 3"):
        kd_cross_entropy(x, x, labels + 3)
    with pytest.raises(InvalidInput, match="labels must hold numbers from 0 to 2, got -100"):
        kd_cross_entropy(x, x, labels - 100)
    for temperature in (0, -1.0, math.inf, math.nan):
        with pytest.raises(InvalidInput, match="temperature must be positive and finite, got"):
            kd_cross_entropy(x, x, labels, temperature=temperature)
    with pytest.raises(InvalidInput, match="alpha must be finite, got nan"):
        kd_cross_entropy(x, x, labels, math.nan)
    with pytest.raises(InvalidInput, match="ce_weight must be finite, got inf"):
        kd_cross_entropy(x, x, labels, ce_weight=math.inf)
    with pytest.raises(InvalidInput, match="label_smoothing must be from 0 to 1, got 2"):
        kd_cross_entropy(x, x, labels, label_smoothing=2)
    with pytest.raises(InvalidInput, match=r"reduction must be one of .*, got 'mean'"):
        kd_cross_entropy(x, x, labels, reduction="mean")  # pyright: ignore[reportArgumentType]


def test_kd_cross_entropy_named_backend_never_falls_back(monkeypatch):
    x, labels = torch.ones(2, 3), torch.zeros(2).long()
    with pytest.raises(BackendUnavailable, match="there is no CUDA C"):
        kd_cross_entropy(x, x, labels, backend="cuda")
    with pytest.raises(BackendUnavailable, match="its temperature are float32"):
        kd_cross_entropy(x.double(), x, labels, backend="triton")
    monkeypatch.setattr(_dispatch, "_interpreting", lambda: False)
    with pytest.raises(BackendUnavailable, match="CUDA tensors only"):
        kd_cross_entropy(x, x, labels, backend="triton")


# on a GPU: what the interpreter cannot judge


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("shape", [(256, 1000), (64, 21841), (8, 65536)])
def test_kd_cross_entropy_triton_matches_reference(shape, dtype):
    """Outputs start as NaN (conftest), so what the kernel leaves out is seen."""
    for shares in (False, True):
        test_kd_cross_entropy_matches_reference(shape, shares, dtype, "triton")


@pytest.mark.gpu
def test_kd_cross_entropy_triton_is_chosen_and_repeats():
    tensors = inputs((256, 1000), BF16, False, "triton")
    found = {c.device: c.backend for c in ops.backends() if c.op == "kd_cross_entropy"}
    assert found["cuda"] == "triton"
    first = value_and_gradient(kd_cross_entropy, *tensors)
    for _ in range(20):
        again = value_and_gradient(kd_cross_entropy, *tensors)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
