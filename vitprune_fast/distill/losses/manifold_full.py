"""Similarities of all tokens of the batch.

The manifold loss before it is decoupled, by Gram matrices. B images, N tokens, n = B * N rows, D
width of the student, E width of the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from vitprune_fast._checks import refuse_second_derivative
from vitprune_fast.distill.losses._base import Comparison, OfBlocks
from vitprune_fast.ops._forms import custom_op
from vitprune_fast.reference.manifold_loss import inverse_norms
from vitprune_fast.wide import wide_dtype

# rows whose products are summed in fp32, and held in memory at a time
_CHUNK_ROWS = 1024
# rows of a symmetric matrix that are computed from the diagonal on
_BLOCK = 96


class ManifoldFull(OfBlocks):
    """``manifold_full``, averaged over the compared pairs of blocks."""

    def __call__(self, both: Comparison) -> Tensor:
        return torch.stack([manifold_full(*pair) for pair in both.states(self.pairs)]).mean()


def manifold_full(student_BND: Tensor, teacher_BNE: Tensor) -> Tensor:
    """Mean squared difference of the similarities among all tokens of all images.

    With S and T all n = B * N rows of length 1, ``mean((S S^T - T T^T)^2)`` over n x n pairs, of
    which none is computed; the matrices needed are as large as the widths. Where these differ: ::

        |S S^T - T T^T|^2 = |S^T S|^2 - 2 |S^T T|^2 + |T^T T|^2
        its gradient w.r.t. S:  4 (S (S^T S) - T (T^T S))

    The terms cancel as the student comes near the teacher. So equal widths, of which alone a
    student starts as the teacher, have A = S - T and P = S + T in their place, and a loss and a
    gradient that are exactly 0 for equal states: ::

        |S S^T - T T^T|^2 = (<A^T A, P^T P> + <P^T A, A^T P>) / 2
        its gradient w.r.t. S:  A (P^T P + P^T A) + P (A^T A + A^T P)

    Products are in fp32 (never tf32 or autocast's dtype) over a thousand rows, their sums in
    fp64. Cheaper than the direct form where n > (D^2 + D E + E^2) / (D + E). Differentiable once. A
    row shorter than 1e-12 counts as 0.

    Reference: the loss before it is decoupled, Hao et al. (arXiv:2107.01378), section 3; the
    identity is that of squared Frobenius norms of products.

    Args:
        student_BND: states ``(B, N, D)``; gradients flow here only.
        teacher_BNE: states ``(B, N, E)``.

    Returns:
        A scalar >= 0, fp32 (fp64 for fp64 states). The same bits every time.
    """
    return _full(student_BND, teacher_BNE.detach())[0]


@custom_op("vitprune_fast::manifold_full")
def _full(
    student_BND: Tensor, teacher_BNE: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, what x and y are multiplied with for ``(S S^T - T T^T) S``, and inverse lengths."""
    (batch, tokens, width), other = student_BND.shape, teacher_BNE.shape[2]
    dtype = wide_dtype(student_BND)
    inverses = [student_BND.new_empty(batch, tokens, 1, dtype=dtype) for _ in range(2)]
    xx_DD, yx_ED, yy_EE = (
        student_BND.new_zeros(shape, dtype=torch.float64)
        for shape in ((width, width), (other, width), (other, other))
    )
    with _exact_products(student_BND):
        for some in _chunks(student_BND):
            for states, inverse in zip((student_BND, teacher_BNE), inverses, strict=True):
                inverse[some] = inverse_norms(states[some].to(dtype))
            x, y, _ = _rows(student_BND[some], teacher_BNE[some], *(i[some] for i in inverses))
            _add_gram(xx_DD, x)
            _add_gram(yy_EE, y)
            yx_ED += y.mT @ x
    xx_DD, yy_EE = (gram.triu() + gram.triu(1).mT for gram in (xx_DD, yy_EE))
    if width == other:
        total = ((xx_DD * yy_EE).sum() + (yx_ED * yx_ED.mT).sum()) / 2
        for_x_DD, for_y_ED = (yy_EE + yx_ED) / 4, (yx_ED.mT + xx_DD) / 4
    else:
        squares = [gram.square().sum() for gram in (xx_DD, yx_ED, yy_EE)]
        total = squares[0] - 2 * squares[1] + squares[2]
        for_x_DD, for_y_ED = xx_DD, -yx_ED
    # below 0 by rounding alone
    loss = (total / (batch * tokens) ** 2).clamp(min=0)
    return loss.to(dtype), for_x_DD.to(dtype), for_y_ED.to(dtype), inverses[0], inverses[1]


@_full.register_fake
def _(student_BND: Tensor, teacher_BNE: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (batch, tokens, width), other = student_BND.shape, teacher_BNE.shape[2]
    dtype = wide_dtype(student_BND)
    shapes = ((), (width, width), (other, width), (batch, tokens, 1), (batch, tokens, 1))
    loss, for_x_DD, for_y_ED, of_s, of_t = (student_BND.new_empty(x, dtype=dtype) for x in shapes)
    return loss, for_x_DD, for_y_ED, of_s, of_t


@custom_op("vitprune_fast::manifold_full_backward")
def _full_backward(
    grad_loss: Tensor,
    student_BND: Tensor,
    teacher_BNE: Tensor,
    for_x_DD: Tensor,
    for_y_ED: Tensor,
    inverse_student: Tensor,
    inverse_teacher: Tensor,
) -> Tensor:
    batch, tokens, _ = student_BND.shape
    grad_BND = torch.empty_like(student_BND)
    scale = grad_loss * (4 / (batch * tokens) ** 2)
    with _exact_products(student_BND):
        for some in _chunks(student_BND):
            inverses = inverse_student[some], inverse_teacher[some]
            x, y, s = _rows(student_BND[some], teacher_BNE[some], *inverses)
            g = x @ for_x_DD
            g += y @ for_y_ED
            # without the part along the row, which only changes its length
            g.addcmul_(s, (s * g).sum(1, keepdim=True), value=-1)
            g *= inverses[0].flatten(0, 1) * scale
            grad_BND[some] = g.view(-1, tokens, g.shape[1])
    return grad_BND


@_full_backward.register_fake
def _(grad_loss, student_BND, *_arguments):
    return torch.empty_like(student_BND)


def _save(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs, *output[1:])


def _backward(ctx, grad_loss: Tensor, *_grads: Tensor | None):
    refuse_second_derivative("manifold_full")
    return _full_backward(grad_loss, *ctx.saved_tensors), None


_full.register_autograd(_backward, setup_context=_save)


def _chunks(x_BND: Tensor) -> list[slice]:
    """Images whose rows are about as many as are taken at once."""
    batch, tokens, _ = x_BND.shape
    step = max(1, _CHUNK_ROWS // tokens)
    return [slice(start, start + step) for start in range(0, batch, step)]


def _add_gram(gram_DD: Tensor, x: Tensor) -> None:
    """``gram_DD += x^T x`` in its upper triangle, in parts that are still large products."""
    for start in range(0, x.shape[1], _BLOCK):
        gram_DD[start : start + _BLOCK, start:] += x[:, start : start + _BLOCK].mT @ x[:, start:]


def _rows(
    student: Tensor, teacher: Tensor, inverse_student: Tensor, inverse_teacher: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of some images: x, y, and S."""
    s = (student * inverse_student).flatten(0, 1)
    # in the dtype of the student's
    t = (teacher.to(s.dtype) * inverse_teacher).flatten(0, 1)
    return *((s - t, s + t) if s.shape == t.shape else (s, t)), s


@contextmanager
def _exact_products(x: Tensor) -> Iterator[None]:
    """Products of fp32 numbers in fp32, whatever is allowed outside."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(x.device.type, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
