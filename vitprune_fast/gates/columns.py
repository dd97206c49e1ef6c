"""Gates on columns of an activation: the multiplication itself, and the gradient of the gate.

B samples, F columns, U units of adjacent columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from .._checks import refuse_second_derivative
from ..ops._forms import CustomOp
from ..scoring.probes import as_tokens


def gate_columns(
    x: Tensor, gate_U: Tensor, group: int = 1, part: tuple[int, int] | None = None
) -> Tensor:
    """Multiply the units of ``x`` by their gates.

    Args:
        x: ``(B, ..., F)``; everything between is tokens.
        gate_U: one gate per unit, fp32, or fp64 where ``x`` is; any finite number.
        group: adjacent columns that make one unit.
        part: first and last + 1 column that hold units; None is all of them.

    Returns:
        Of the shape and dtype of ``x``, the product rounded once. Where a gate is 0 the result and
        the gradient of ``x`` are 0 whatever ``x`` holds, NaN too. The gradient of a gate is the
        sum of x times the gradient over samples, tokens and columns, also at 0, accumulated in
        fp32 (fp64 for fp64) and in a fixed order. Differentiable once.
    """
    first, last = part or (0, x.shape[-1])
    return _gate_columns(x, gate_U, group, first, last)


def _scaled(x: Tensor, gate_U: Tensor, group: int, first: int, last: int) -> Tensor:
    # not repeat_interleave: it would be an index on the device
    factor = gate_U[:, None].expand(-1, group).reshape(-1)
    if (first, last) != (0, x.shape[-1]):
        ones = factor.new_ones(x.shape[-1])
        ones[first:last] = factor
        factor = ones
    return torch.where(factor == 0, 0, x * factor).to(x.dtype)


# A registered op and no bare autograd.Function: torch.compile of torch 2.11 takes the gradients of
# one as 0 when its forward ends in an operation that changes nothing, as `.to(x.dtype)` does.
_gate_columns = CustomOp("vitprune_fast::gate_columns", _scaled)
# run on tensors without data the form itself gives the strides too
_gate_columns.register_fake(_scaled)


def _save(ctx, inputs, output) -> None:
    x, gate_U, *ctx.how = inputs
    ctx.save_for_backward(x, gate_U)


def _backward(ctx, grad: Tensor):
    refuse_second_derivative("gates")
    (x, gate_U), (group, first, last) = ctx.saved_tensors, ctx.how
    grad_x = _scaled(grad, gate_U, group, first, last) if ctx.needs_input_grad[0] else None
    grad_gate_U = None
    if ctx.needs_input_grad[1]:
        x, grad = (as_tokens(each)[..., first:last] for each in (x, grad))
        score_BU = ops.taylor_score(x, grad.to(x.dtype), group)
        grad_gate_U = score_BU.sum(0).to(gate_U.dtype)
    return grad_x, grad_gate_U, None, None, None


_gate_columns.register_autograd(_backward, setup_context=_save)
