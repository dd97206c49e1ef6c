"""Cross-entropy with labels and distance to a teacher at once; B samples, C classes."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vitprune_fast import _checks
from vitprune_fast._checks import DTYPES, refuse_second_derivative
from vitprune_fast.ops._dispatch import Backend, choose
from vitprune_fast.ops._forms import Forms
from vitprune_fast.reference.kd_cross_entropy import kd_cross_entropy as _eager
from vitprune_fast.wide import wide_dtype

_OP = "kd_cross_entropy"
_REDUCTIONS = ("batchmean", "numel", "sum")


class KdCrossEntropy(NamedTuple):
    """The loss and its parts.

    Attributes:
        loss: ``ce_weight * ce + alpha * kd``, a scalar; the gradient flows through it alone.
        ce: cross-entropy with the labels, a scalar in nats; detached.
        kd: divergence from the teacher as reduced, with its factor T^2; detached.
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor


def _fake(
    student_BC: Tensor,
    teacher_BC: Tensor,
    labels: Tensor,
    ce_weight: float,
    kd_weight: float,
    factor: float,
    temperature: float,
    label_smoothing: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = wide_dtype(student_BC)
    loss, ce, kd = (student_BC.new_empty((), dtype=dtype) for _ in range(3))
    shape = student_BC.shape if with_gradient else (0,)
    return loss, ce, kd, student_BC.new_empty(shape, dtype=dtype)


# plain torch differentiates by itself
_triton = Forms(_OP, _fake, None, triton="kd_cross_entropy:kd_cross_entropy_fwd_bwd")["triton"]


def _save(ctx, inputs, output) -> None:
    student_BC, *_, ctx.with_gradient = inputs
    ctx.dtype = student_BC.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[3])


def _backward(ctx, grad_loss: Tensor | None, *_grads: Tensor | None):
    refuse_second_derivative(_OP)
    (grad_BC,) = ctx.saved_tensors
    none = [None] * 8
    if grad_loss is None or not ctx.with_gradient:
        return None, *none
    # rounded as it is written, in one launch
    out = torch.empty_like(grad_BC, dtype=ctx.dtype)
    return torch.mul(grad_BC, grad_loss, out=out), *none


_triton.register_autograd(_backward, setup_context=_save)


def kd_cross_entropy(
    student_BC: Tensor,
    teacher_BC: Tensor,
    labels: Tensor,
    alpha: float = 0.5,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    *,
    ce_weight: float | None = None,
    reduction: Literal["batchmean", "numel", "sum"] = "batchmean",
    backend: Backend = "auto",
) -> KdCrossEntropy:
    """``(1 - alpha) * CE(labels) + alpha * T^2 * KL(teacher_T || student_T)``, and its gradient.

    On a GPU one launch reads both logits and writes the losses of every row and the student's
    gradient, which is kept for backward; a second one adds the rows: ::

        (1 - alpha) * (p - q) / B + alpha * T * (student_T - teacher_T) / B

    with q the smoothed labels. Equal logits give a KL and a gradient of it that are exactly 0 in
    the kernel, which is differentiable once. The student alone gets a gradient.

    Reference: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015
    (arXiv:1503.02531), section 2.

    Args:
        student_BC: logits ``(B, C)``, fp32/fp64/bf16/fp16.
        teacher_BC: logits ``(B, C)`` of the same or another of these dtypes, the same classes.
        labels: ``(B,)`` int64 in ``[0, C)``, or shares ``(B, C)`` of a floating dtype. A number
            out of range is refused on the CPU and makes the loss NaN on a GPU.
        alpha: weight of the teacher.
        temperature: T > 0, finite.
        label_smoothing: the share of a label spread over all classes, ``[0, 1]``.
        ce_weight: weight of the labels; None is ``1 - alpha``.
        reduction: what the divergences are divided by: B, B * C as in DeiT's code, or nothing as in
            UP-ViT's.
        backend: implementation to run (``"eager"`` is torch's own, with its backward); an explicit
            choice never falls back.

    Returns:
        Three scalars, fp64 for an fp64 student and else fp32, which is also what is computed in.
        The same bits every time.

    Raises:
        TypeError: an argument is not a tensor.
        InvalidInput: shapes, dtypes or devices disagree, or an argument is out of range.
        BackendUnavailable: ``backend`` was named and cannot run here; the message says why.
    """
    _check(student_BC, teacher_BC, labels)
    positive = 0 < temperature < math.inf
    _checks.require(positive, _OP, "temperature", "be positive and finite", temperature)
    for name, weight in (("alpha", alpha), ("ce_weight", ce_weight or 0.0)):
        # math.isfinite takes no number of torch.compile's
        _checks.require(-math.inf < weight < math.inf, _OP, name, "be finite", weight)
    in_range = 0 <= label_smoothing <= 1
    _checks.require(in_range, _OP, "label_smoothing", "be from 0 to 1", label_smoothing)
    rule = f"be one of {', '.join(_REDUCTIONS)}"
    _checks.require(reduction in _REDUCTIONS, _OP, "reduction", rule, repr(reduction))
    batch, classes = student_BC.shape
    # of the mean over samples of the plain divergence
    factor = {"batchmean": 1.0, "numel": 1 / classes, "sum": float(batch)}[reduction]
    factor *= temperature**2
    unable = {}
    if torch.float64 in (student_BC.dtype, teacher_BC.dtype):
        unable["triton"] = "its weights and its temperature are float32"
    weights = (
        float(1 - alpha if ce_weight is None else ce_weight),
        float(alpha),
        float(factor),
        float(temperature),
        float(label_smoothing),
    )
    teacher_BC, labels = teacher_BC.detach(), labels.detach()
    if choose(_OP, student_BC, backend, unable) == "eager":
        # torch's own backward costs no more there
        loss, ce, kd = _eager(student_BC, teacher_BC, labels, *weights)
        return KdCrossEntropy(loss, ce.detach(), kd.detach())
    with_gradient = torch.is_grad_enabled() and student_BC.requires_grad
    loss, ce, kd, _ = _triton(student_BC, teacher_BC, labels, *weights, with_gradient)
    return KdCrossEntropy(loss, ce, kd)


def _check(student_BC: Tensor, teacher_BC: Tensor, labels: Tensor) -> None:
    for name, x in (("student_BC", student_BC), ("teacher_BC", teacher_BC), ("labels", labels)):
        _checks.require_tensor(_OP, name, x)
        _checks.require_near(_OP, name, x, "student_BC", student_BC)
    for name, x in (("student_BC", student_BC), ("teacher_BC", teacher_BC)):
        _checks.require_dims(_OP, name, x, 2)
        _checks.require_dtype(_OP, name, x, DTYPES)
        _checks.require(x.numel() > 0, _OP, name, "not be empty", tuple(x.shape))
    batch, classes = student_BC.shape
    why = " like student_BC, the same classes"
    _checks.require_shape(_OP, "teacher_BC", teacher_BC, (batch, classes), why)
    numbers = labels.dtype == torch.int64 and labels.shape == (batch,)
    fits = numbers or (labels.is_floating_point() and labels.shape == student_BC.shape)
    if not fits:
        rule = f"be ({batch},) int64 or ({batch}, {classes}) floating"
        got = f"{tuple(labels.shape)} {str(labels.dtype).removeprefix('torch.')}"
        _checks.require(False, _OP, "labels", rule, got)
    if numbers and labels.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in labels.aminmax())
        rule = f"hold numbers from 0 to {classes - 1}"
        _checks.require(low >= 0, _OP, "labels", rule, low)
        _checks.require(high < classes, _OP, "labels", rule, high)
