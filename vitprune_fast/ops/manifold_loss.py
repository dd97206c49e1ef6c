"""How far the similarities among a student's rows are from those among a teacher's.

S sets, R rows, D width of the student, E width of the teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitprune_fast import _checks
from vitprune_fast._checks import DTYPES, refuse_second_derivative
from vitprune_fast.ops._dispatch import Backend, choose
from vitprune_fast.ops._forms import Forms, custom_op
from vitprune_fast.reference.manifold_loss import new_gradient, set_by_set
from vitprune_fast.wide import wide_dtype

_OP = "manifold_loss"
# what products may be rounded to
_OPERANDS = (torch.bfloat16, torch.float16)


def _fake(
    student_SRD: Tensor, teacher_SRE: Tensor, with_gradient: bool, operand: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    loss = student_SRD.new_empty((), dtype=wide_dtype(student_SRD))
    return loss, new_gradient(student_SRD, with_gradient)


def _eager(
    student_SRD: Tensor, teacher_SRE: Tensor, with_gradient: bool, operand: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    with torch.autocast(student_SRD.device.type, enabled=False):
        grad_SRD = new_gradient(student_SRD, with_gradient)
        return set_by_set(student_SRD, teacher_SRE, grad_SRD), grad_SRD


_forms = Forms("manifold_loss_fwd", _fake, _eager, triton="manifold_loss:manifold_loss_fwd_bwd")


@custom_op("vitprune_fast::manifold_loss")
def _manifold_loss(
    student_SRD: Tensor,
    teacher_SRE: Tensor,
    with_gradient: bool,
    operand: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _forms.plain[backend](student_SRD, teacher_SRE, with_gradient, operand)


@_manifold_loss.register_fake
def _(student_SRD, teacher_SRE, with_gradient, operand, backend):
    return _fake(student_SRD, teacher_SRE, with_gradient, operand)


def _save(ctx, inputs, output) -> None:
    student_SRD, _, with_gradient, *_ = inputs
    _, grad_SRD = output
    sets, rows, _ = student_SRD.shape
    ctx.with_gradient, ctx.dtype = with_gradient, student_SRD.dtype
    ctx.scale = 4 / (sets * rows**2)
    ctx.mark_non_differentiable(grad_SRD)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_SRD)


def _backward(ctx, grad_loss: Tensor | None, _grad: Tensor | None):
    refuse_second_derivative(_OP)
    (grad_SRD,) = ctx.saved_tensors
    if grad_loss is None or not ctx.with_gradient:
        return None, None, None, None, None
    # only now, with the loss scale in it. The factor has a dimension, so that the product is in
    # its dtype, and is rounded as it is written
    factor = (grad_loss * ctx.scale).view(1)
    out = torch.empty_like(grad_SRD, dtype=ctx.dtype)
    return torch.mul(grad_SRD, factor, out=out), None, None, None, None


_manifold_loss.register_autograd(_backward, setup_context=_save)


def manifold_loss(
    student_SRD: Tensor,
    teacher_SRE: Tensor,
    *,
    operand_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Mean squared difference of the cosine similarities of rows, within each set.

    With X and Y the rows of a set at length 1: ::

        loss = mean_s mean_ij (Y_s Y_s^T - X_s X_s^T)_ij ^ 2

    The widths need not be equal. A set is an image (its tokens are the rows: intra-image), a
    position (``x.transpose(0, 1)``, read in place: inter-image) or a few rows drawn from all. The
    gradient is made in the same pass as the loss and kept for backward; no more than one set's R x
    R similarities are ever held, and on a GPU none of them in memory. Differentiable once, by the
    student alone.

    A row shorter than 1e-12 has no direction: its similarities are 0, and so is its gradient. Rows
    longer than 1e19 are beyond fp32's squares. Of equal states of equal dtypes the loss and the
    gradient are exactly 0.

    Reference: Hao et al., "Learning Efficient Vision Transformers via Fine-Grained Manifold
    Distillation", NeurIPS 2022 (arXiv:2107.01378), whose code takes means like these.

    Args:
        student_SRD: ``(S, R, D)``, fp32/fp64/bf16/fp16; sets and rows may lie anywhere.
        teacher_SRE: ``(S, R, E)``, of the same or another dtype, on the same device.
        operand_dtype: bf16 or fp16 to round the operands of the GPU kernel's matrix products to,
            as autocast does; None leaves them as they are, and fp32 then has no tensor cores
            unless ``torch.backends.cuda.matmul.allow_tf32``.
        backend: implementation to run (``"eager"`` goes set by set); an explicit choice never
            falls back.

    Returns:
        A scalar >= 0, fp64 for an fp64 student and else fp32, which is also what is accumulated
        in. The same bits every time.

    Raises:
        TypeError: an argument is not a tensor.
        InvalidInput: shapes or devices disagree, there are no rows, or a dtype is not one of these.
        BackendUnavailable: ``backend`` was named and cannot run here; the message says why.
    """
    for name, x in (("student_SRD", student_SRD), ("teacher_SRE", teacher_SRE)):
        _checks.require_input(_OP, name, x, 3, DTYPES)
        _checks.require(x.numel() > 0, _OP, name, "not be empty", tuple(x.shape))
    sets, rows, _ = student_SRD.shape
    rule = f"have {sets} sets of {rows} rows like student_SRD"
    same = teacher_SRE.shape[:2] == student_SRD.shape[:2]
    _checks.require(same, _OP, "teacher_SRE", rule, tuple(teacher_SRE.shape[:2]))
    _checks.require_near(_OP, "teacher_SRE", teacher_SRE, "student_SRD", student_SRD)
    known = operand_dtype is None or operand_dtype in _OPERANDS
    rule = "be torch.bfloat16, torch.float16 or None"
    _checks.require(known, _OP, "operand_dtype", rule, operand_dtype)
    unable = {}
    if torch.float64 in (student_SRD.dtype, teacher_SRE.dtype):
        unable["triton"] = "its products are those of tensor cores, which end at float32"
    chosen = choose(_OP, student_SRD, backend, unable)
    with_gradient = torch.is_grad_enabled() and student_SRD.requires_grad
    return _manifold_loss(student_SRD, teacher_SRE.detach(), with_gradient, operand_dtype, chosen)[
        0
    ]
