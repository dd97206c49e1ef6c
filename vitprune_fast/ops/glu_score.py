"""Backward of a gated linear unit, fused with the first-order score of each of its columns.

B batch, N tokens, F columns, 2F the columns of gate and value in one tensor.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, library

from vitprune_fast import _checks
from vitprune_fast.ops._custom_op import custom_op
from vitprune_fast.ops._dispatch import Backend, choose
from vitprune_fast.ops._probes import (
    DTYPES,
    check_probe,
    refuse_second_derivative,
    score_dtype,
)
from vitprune_fast.ops.activation_score import check_activation
from vitprune_fast.reference.activation_score import ACTIVATIONS as _FORWARD
from vitprune_fast.reference.glu_score import glu_score as _eager

_library = library.Library("vitprune_fast", "FRAGMENT")
# an op has no outputs that share memory, so both gradients come as one tensor: (B, N, 2F) when
# packed, else (2, B, N, F)
_library.define(
    "glu_score(Tensor gate_BNF, Tensor value_BNF, Tensor grad_BNF, str activation, str? packed, "
    "bool per_token) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def new_gradients(gate_BNF: Tensor, packed: str | None) -> Tensor:
    """One tensor for the gradients of gate and value: ``(B, N, 2F)`` or ``(2, B, N, F)``."""
    batch, tokens, columns = gate_BNF.shape
    if packed is None:
        return gate_BNF.new_empty(2, batch, tokens, columns)
    return gate_BNF.new_empty(batch, tokens, 2 * columns)


def split(x: Tensor, gate_last: bool) -> tuple[Tensor, Tensor]:
    """Gate and value of a packed tensor, as views."""
    first, last = x.tensor_split(2, -1)
    return (last, first) if gate_last else (first, last)


def both_gradients(gradients: Tensor, packed: str | None) -> tuple[Tensor, Tensor]:
    """The gradients of gate and value, as views of the tensor that holds both."""
    if packed is None:
        return gradients[0], gradients[1]
    return split(gradients, packed == "gate_last")


@library.register_fake("vitprune_fast::glu_score", lib=_library)
def _fake(
    gate_BNF: Tensor,
    value_BNF: Tensor,
    grad_BNF: Tensor,
    activation: str,
    packed: str | None,
    per_token: bool,
) -> tuple[Tensor, Tensor]:
    batch, _, columns = gate_BNF.shape
    score_BF = gate_BNF.new_empty(batch, columns, dtype=score_dtype(gate_BNF))
    return new_gradients(gate_BNF, packed), score_BF


# C++ and Triton cannot both hold the CUDA key of one op, so the twin has its own name
@custom_op("vitprune_fast::glu_score_triton")
def _triton(
    gate_BNF: Tensor,
    value_BNF: Tensor,
    grad_BNF: Tensor,
    activation: str,
    packed: str | None,
    per_token: bool,
) -> tuple[Tensor, Tensor]:
    from vitprune_fast.kernels.glu_score import glu_score_bwd

    gradients = new_gradients(gate_BNF, packed)
    grad_gate_BNF, grad_value_BNF = both_gradients(gradients, packed)
    score_BF = glu_score_bwd(
        gate_BNF, value_BNF, grad_BNF, grad_gate_BNF, grad_value_BNF, activation, per_token
    )
    return gradients, score_BF


_triton.register_fake(_fake)


def _run(
    gate_BNF: Tensor,
    value_BNF: Tensor,
    grad_BNF: Tensor,
    activation: str,
    packed: str | None,
    per_token: bool,
    chosen: str,
) -> tuple[Tensor, Tensor]:
    """Both gradients in one tensor, and the score."""
    arguments = (gate_BNF, value_BNF, grad_BNF, activation, packed, per_token)
    if chosen == "cpu":
        return torch.ops.vitprune_fast.glu_score(*arguments)
    if chosen == "triton":
        return _triton(*arguments)
    grad_gate_BNF, grad_value_BNF, score_BF = _eager(
        gate_BNF, value_BNF, grad_BNF, activation, per_token=per_token
    )
    if packed is None:
        return torch.stack([grad_gate_BNF, grad_value_BNF]), score_BF
    halves = [grad_gate_BNF, grad_value_BNF]
    return torch.cat(halves if packed == "gate_first" else halves[::-1], 2), score_BF


def glu_score(
    gate_BNF: Tensor,
    value_BNF: Tensor,
    grad_BNF: Tensor,
    activation: str = "silu",
    *,
    packed: Literal["gate_first", "gate_last"] | None = None,
    per_token: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of a gated linear unit, and the importance of its columns for each sample.

    With h = act(gate) * value and ``grad`` the gradient of the loss w.r.t. h: ::

        grad_gate = grad * value * act'(gate)        grad_value = grad * act(gate)
        score[b, f] = sum_n h[b, n, f] * grad[b, n, f]

    The score is the derivative of sample b's loss along scaling column f of h. h is computed again
    from gate and value. With ``per_token`` the tokens cannot cancel each other: ``sum_n |h *
    grad|``. Not differentiable.

    Reference: Shazeer, "GLU Variants Improve Transformer", 2020 (arXiv:2002.05202), eq. 5 and 6,
    for h; Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019
    (arXiv:1906.10771), for the first-order criterion before its square, with a gate on each column.

    Args:
        gate_BNF: what goes through the activation, ``(B, N, F)``, fp32/fp64/bf16/fp16; samples and
            tokens may lie anywhere, as in one half of a packed tensor; columns are copied together
            first when they are not adjacent.
        value_BNF: what is multiplied with it; same shape, dtype, device.
        grad_BNF: gradient of the loss w.r.t. h; same shape, dtype, device.
        activation: one of ``ACTIVATIONS``.
        packed: give the gradients as the halves of one contiguous ``(B, N, 2F)`` tensor, that of
            the gate first or last; None for two tensors of their own.
        per_token: sum the magnitude of each token's share instead of the share.
        backend: implementation to run (``"cpu"`` is the C++ kernel); an explicit choice never
            falls back.

    Returns:
        The gradients w.r.t. ``gate_BNF`` and ``value_BNF``, ``(B, N, F)`` of their dtype; and the
        score, ``(B, F)``, fp64 for fp64 inputs and else fp32, which is also what everything is
        computed in; signed (>= 0 with ``per_token``), in units of the loss. Row ``b`` of all
        depends on row ``b`` of the inputs alone; the bits of our kernels do not depend on the
        batch, the threads or the repetition.

    Raises:
        TypeError: an argument is not a tensor.
        InvalidInput: shapes, dtypes or devices disagree, or no activation or packing has that name.
        BackendUnavailable: ``backend`` was named and cannot run here; the message says why.
    """
    op = "glu_score"
    _checks.require_tensor(op, "gate_BNF", gate_BNF)
    _checks.require_dims(op, "gate_BNF", gate_BNF, 3)
    _checks.require_dtype(op, "gate_BNF", gate_BNF, DTYPES)
    for name, tensor in (("value_BNF", value_BNF), ("grad_BNF", grad_BNF)):
        _checks.require_tensor(op, name, tensor)
        _checks.require_like(op, name, tensor, "gate_BNF", gate_BNF)
    check_activation(op, activation)
    rule = "be 'gate_first', 'gate_last' or None"
    _checks.require(packed in ("gate_first", "gate_last", None), op, "packed", rule, repr(packed))
    inputs = (gate_BNF.detach(), value_BNF.detach(), grad_BNF.detach())
    chosen = choose(op, gate_BNF.device, backend)
    gradients, score_BF = _run(*inputs, activation, packed, per_token, chosen)
    return *both_gradients(gradients, packed), score_BF


# torch's own forward is at the speed of memory; the backward is what has no equal there
@custom_op("vitprune_fast::scored_glu")
def _scored(
    gate_BNF: Tensor,
    value_BNF: Tensor,
    probe_BF: Tensor,
    activation: str,
    per_token: bool,
    backend: str,
) -> Tensor:
    return _FORWARD[activation](gate_BNF) * value_BNF


@_scored.register_fake
def _(
    gate_BNF: Tensor,
    value_BNF: Tensor,
    probe_BF: Tensor,
    activation: str,
    per_token: bool,
    backend: str,
) -> Tensor:
    return _FORWARD[activation](gate_BNF) * value_BNF


def _save(ctx, inputs, output) -> None:
    gate_BNF, value_BNF, _, *ctx.choices = inputs
    ctx.save_for_backward(gate_BNF, value_BNF)


def _backward(ctx, grad_BNF: Tensor):
    refuse_second_derivative("scored_glu")
    activation, per_token, backend = ctx.choices
    gate_BNF, value_BNF = ctx.saved_tensors
    gradients, score_BF = _run(gate_BNF, value_BNF, grad_BNF, activation, None, per_token, backend)
    return *both_gradients(gradients, None), score_BF, None, None, None


_scored.register_autograd(_backward, setup_context=_save)


@custom_op("vitprune_fast::scored_glu_packed")
def _scored_packed(
    x_BN2F: Tensor,
    probe_BF: Tensor,
    activation: str,
    gate_last: bool,
    per_token: bool,
    backend: str,
) -> Tensor:
    gate_BNF, value_BNF = split(x_BN2F, gate_last)
    return _FORWARD[activation](gate_BNF) * value_BNF


@_scored_packed.register_fake
def _(
    x_BN2F: Tensor,
    probe_BF: Tensor,
    activation: str,
    gate_last: bool,
    per_token: bool,
    backend: str,
) -> Tensor:
    gate_BNF, value_BNF = split(x_BN2F, gate_last)
    return _FORWARD[activation](gate_BNF) * value_BNF


def _save_packed(ctx, inputs, output) -> None:
    x_BN2F, _, *ctx.choices = inputs
    ctx.save_for_backward(x_BN2F)


def _backward_packed(ctx, grad_BNF: Tensor):
    refuse_second_derivative("scored_glu_packed")
    activation, gate_last, per_token, backend = ctx.choices
    (x_BN2F,) = ctx.saved_tensors
    gate_BNF, value_BNF = split(x_BN2F, gate_last)
    packed = "gate_last" if gate_last else "gate_first"
    gradients, score_BF = _run(
        gate_BNF, value_BNF, grad_BNF, activation, packed, per_token, backend
    )
    return gradients, score_BF, None, None, None, None


_scored_packed.register_autograd(_backward_packed, setup_context=_save_packed)


def scored_glu(
    gate_BNF: Tensor,
    value_BNF: Tensor,
    probe_BF: Tensor,
    activation: str = "silu",
    *,
    per_token: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """A gated linear unit that hands out, in backward, how much each of its columns matters.

    Computes act(gate) * value as torch does. The gradient w.r.t. ``probe_BF`` is ``glu_score``'s
    score, the derivative of each sample's loss by a gate of 1 on each column (when the loss is
    summed over samples); the others are those of the unit. Differentiable once.

    Args:
        gate_BNF: what goes through the activation, ``(B, N, F)``, fp32/fp64/bf16/fp16.
        value_BNF: what is multiplied with it; same shape, dtype, device.
        probe_BF: a number for each sample and column, never read; fp64 for fp64 inputs and else
            fp32. After a backward its ``.grad`` is the score.
        activation: one of ``ACTIVATIONS``.
        per_token: give the probe the sum of each token's magnitude instead of its gradient.
        backend: implementation of the backward; an explicit choice never falls back.

    Returns:
        act(gate) * value, ``(B, N, F)`` of the dtype of ``gate_BNF``.

    Raises:
        TypeError: an argument is not a tensor.
        InvalidInput: shapes, dtypes or devices disagree, or no activation has that name.
        BackendUnavailable: ``backend`` was named and cannot run here; the message says why.
    """
    op = "scored_glu"
    _checks.require_tensor(op, "gate_BNF", gate_BNF)
    _checks.require_tensor(op, "value_BNF", value_BNF)
    _checks.require_dims(op, "gate_BNF", gate_BNF, 3)
    _checks.require_dtype(op, "gate_BNF", gate_BNF, DTYPES)
    _checks.require_like(op, "value_BNF", value_BNF, "gate_BNF", gate_BNF)
    check_activation(op, activation)
    batch, _, columns = gate_BNF.shape
    check_probe(op, "probe_BF", probe_BF, (batch, columns), "gate_BNF", gate_BNF)
    # settled here, so that a backend that cannot run is refused before the backward
    chosen = choose("glu_score", gate_BNF.device, backend)
    return _scored(gate_BNF, value_BNF, probe_BF, activation, per_token, chosen)


def scored_glu_packed(
    x_BN2F: Tensor,
    probe_BF: Tensor,
    activation: str = "silu",
    *,
    gate_last: bool,
    per_token: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """``scored_glu`` of the two halves of one tensor, whose gradient is written as one tensor.

    Args:
        x_BN2F: gate and value side by side, ``(B, N, 2F)``, fp32/fp64/bf16/fp16; the halves are
            read in place.
        probe_BF: a number for each sample and column, never read; fp64 for fp64 inputs and else
            fp32. After a backward its ``.grad`` is the score.
        activation: one of ``ACTIVATIONS``.
        gate_last: the gate is the second half; else it is the first.
        per_token: give the probe the sum of each token's magnitude instead of its gradient.
        backend: implementation of the backward; an explicit choice never falls back.

    Returns:
        act(gate) * value, ``(B, N, F)`` of the dtype of ``x_BN2F``.

    Raises:
        TypeError: an argument is not a tensor.
        InvalidInput: the number of columns is odd, shapes, dtypes or devices disagree, or no
            activation has that name.
        BackendUnavailable: ``backend`` was named and cannot run here; the message says why.
    """
    op = "scored_glu_packed"
    _checks.require_tensor(op, "x_BN2F", x_BN2F)
    _checks.require_dims(op, "x_BN2F", x_BN2F, 3)
    _checks.require_dtype(op, "x_BN2F", x_BN2F, DTYPES)
    batch, _, both = x_BN2F.shape
    rule = "have an even number of columns, gate and value"
    _checks.require(both % 2 == 0, op, "x_BN2F", rule, both)
    check_activation(op, activation)
    check_probe(op, "probe_BF", probe_BF, (batch, both // 2), "x_BN2F", x_BN2F)
    # settled here, so that a backend that cannot run is refused before the backward
    chosen = choose("glu_score", x_BN2F.device, backend)
    return _scored_packed(x_BN2F, probe_BF, activation, gate_last, per_token, chosen)
