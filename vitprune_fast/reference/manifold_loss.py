"""Oracle of ``ops.manifold_loss``, and the same a set at a time; S sets, R rows, D and E widths."""

from __future__ import annotations

import torch
from torch import Tensor

from vitprune_fast.wide import wide, wide_dtype

# a row of no more length than this has no direction: it is like no row, and gets no gradient
MIN_NORM = 1e-12
# similarities held at one time where a set has fewer: in the cache, or enough to fill a GPU
_HELD = {False: 2**18, True: 2**24}


def unit_rows(x: Tensor) -> Tensor:
    """``x`` in fp32 at least, its rows at length 1; rows of no length are 0, without a gradient."""
    x = wide(x)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    has_none = norm <= MIN_NORM
    return torch.where(has_none, 0, x / torch.where(has_none, 1, norm))


def manifold_loss(student_SRD: Tensor, teacher_SRE: Tensor) -> Tensor:
    """``mean((Y Y^T - X X^T)^2)`` over sets and pairs of rows, X and Y with rows of length 1."""
    x = unit_rows(student_SRD)
    y = unit_rows(teacher_SRE.to(x.dtype))
    return (x @ x.mT - y @ y.mT).square().mean()


def inverse_norms(x: Tensor) -> Tensor:
    """``(..., 1)`` of the rows of a wide ``x``; 0 of those of no length."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    # NaN is not <= anything, so it stays
    return torch.where(norm <= MIN_NORM, 0, 1 / norm)


def set_by_set(student_SRD: Tensor, teacher_SRE: Tensor, grad_SRD: Tensor) -> Tensor:
    """The same, holding the R x R numbers of one set at a time, or of a few small ones.

    Unless it is empty, fills ``grad_SRD`` with ``S R^2 / 4`` times the gradient w.r.t. the student:
    ``(g - x (x . g)) / |student|`` of each row, with ``g = (X X^T - Y Y^T) X``.
    """
    sets, rows, _ = student_SRD.shape
    step = max(1, _HELD[student_SRD.is_cuda] // rows**2)
    total = student_SRD.new_zeros((), dtype=torch.float64)
    for start in range(0, sets, step):
        some = slice(start, start + step)
        student = wide(student_SRD[some])
        teacher = teacher_SRE[some].to(student.dtype)
        inverse = inverse_norms(student)
        x, y = student * inverse, teacher * inverse_norms(teacher)
        difference = x @ x.mT
        # after both products and not within the second: equal states give exactly 0
        difference -= y @ y.mT
        total += difference.square().sum(dtype=torch.float64)
        if grad_SRD.numel():
            g = difference @ x
            g -= x * (x * g).sum(-1, keepdim=True)
            grad_SRD[some] = g.mul_(inverse)
    return (total / (sets * rows**2)).to(wide_dtype(student_SRD))


def new_gradient(student_SRD: Tensor, with_gradient: bool) -> Tensor:
    """Where it is kept, before it is made as small as the mean makes it, which fp16 cannot hold."""
    if not with_gradient:
        return student_SRD.new_empty(0)
    dtype = torch.float32 if student_SRD.dtype == torch.float16 else student_SRD.dtype
    return torch.empty_like(student_SRD, dtype=dtype)
