"""The hidden units of an MLP: an activation, perhaps times a value, with a gate or a probe on each.

B batch, N tokens, F columns, 2F the columns of x and value in one tensor.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vitprune_fast import _checks
from vitprune_fast._checks import DTYPES, check_wide, refuse_second_derivative
from vitprune_fast.ops._dispatch import Backend, choose
from vitprune_fast.ops._forms import Forms, custom_op
from vitprune_fast.reference import gated_unit as _reference
from vitprune_fast.reference.gated_unit import halves
from vitprune_fast.wide import wide_dtype

ACTIVATIONS = tuple(_reference.ACTIVATIONS)
_OP = "gated_unit"
Packed = Literal["x_first", "x_last"]


class GatedUnitScore(NamedTuple):
    """Results of the backward of hidden units.

    Args:
        x: gradient w.r.t. ``x_BNF``, of its shape and dtype, contiguous.
        value: that w.r.t. ``value_BNF``; None where none was given.
        score: ``(B, F)``, fp32 or fp64.
    """

    x: Tensor
    value: Tensor | None
    score: Tensor


def _hidden(x_BNF: Tensor, packed: str | None) -> list[int]:
    """The shape of the hidden units."""
    batch, num_tokens, columns = x_BNF.shape
    return [batch, num_tokens, columns if packed is None else columns // 2]


def _fake(
    x_BNF: Tensor, value_BNF: Tensor | None, gate_F: Tensor, activation: str, packed: str | None
) -> Tensor:
    return x_BNF.new_empty(_hidden(x_BNF, packed))


def _fake_backward(
    x_BNF: Tensor,
    value_BNF: Tensor | None,
    gate_F: Tensor | None,
    grad_BNF: Tensor,
    activation: str,
    packed: str | None,
    per_token: bool,
) -> tuple[Tensor, Tensor]:
    batch, _, columns = _hidden(x_BNF, packed)
    shape = x_BNF.shape if value_BNF is None else (2, *x_BNF.shape)
    return x_BNF.new_empty(shape), x_BNF.new_empty(batch, columns, dtype=wide_dtype(x_BNF))


def _eager(
    x_BNF: Tensor, value_BNF: Tensor | None, gate_F: Tensor, activation: str, packed: str | None
) -> Tensor:
    if packed is not None:
        x_BNF, value_BNF = halves(x_BNF, packed)
    return _reference.gated_unit(x_BNF, value_BNF, gate_F, activation)


def _eager_backward(
    x_BNF: Tensor,
    value_BNF: Tensor | None,
    gate_F: Tensor | None,
    grad_BNF: Tensor,
    activation: str,
    packed: str | None,
    per_token: bool,
) -> tuple[Tensor, Tensor]:
    if packed is not None:
        x_BNF, value_BNF = halves(x_BNF, packed)
    grad_x_BNF, grad_value_BNF, score_BF = _reference.gated_unit_backward(
        x_BNF, value_BNF, gate_F, grad_BNF, activation, per_token
    )
    if grad_value_BNF is None:
        return grad_x_BNF, score_BF
    both = [grad_x_BNF, grad_value_BNF]
    if packed is None:
        return torch.stack(both), score_BF
    return torch.cat(both if packed == "x_first" else both[::-1], 2), score_BF


_forward_forms = Forms(
    "gated_unit_fwd",
    _fake,
    _eager,
    triton="gated_unit:gated_unit_fwd",
    cpu=True,
)
# an op has no outputs that share memory, so the gradients of x and value come as one tensor:
# packed like x, or (2, B, N, F); that of the gate is apart by sample
_backward_forms = Forms(
    "gated_unit_bwd",
    _fake_backward,
    _eager_backward,
    triton="gated_unit:gated_unit_bwd",
    cpu=True,
)


@custom_op("vitprune_fast::gated_unit")
def _gated_unit(
    x_BNF: Tensor,
    value_BNF: Tensor | None,
    gate_F: Tensor | None,
    probe_BF: Tensor | None,
    activation: str,
    packed: str | None,
    per_token: bool,
    backend: str,
) -> Tensor:
    if gate_F is not None:
        return _forward_forms.plain[backend](x_BNF, value_BNF, gate_F, activation, packed)
    # torch's own forward runs at memory speed; only the backward has no equal in torch
    if packed is not None:
        x_BNF, value_BNF = halves(x_BNF, packed)
    h_BNF = _reference.ACTIVATIONS[activation](x_BNF)
    return h_BNF if value_BNF is None else h_BNF * value_BNF


@_gated_unit.register_fake
def _(x_BNF, value_BNF, gate_F, probe_BF, activation, packed, per_token, backend):
    if gate_F is not None:
        return _fake(x_BNF, value_BNF, gate_F, activation, packed)
    return _gated_unit.form(x_BNF, value_BNF, None, None, activation, packed, per_token, backend)


def _setup_context(ctx, inputs, output) -> None:
    ctx.options = inputs[4:7]
    ctx.backend = inputs[7]
    ctx.save_for_backward(*inputs[:3])


def _backward(ctx, grad_BNF: Tensor):
    refuse_second_derivative(_OP)
    x_BNF, value_BNF, gate_F = ctx.saved_tensors
    gradients, score_BF = _backward_forms[ctx.backend](
        x_BNF, value_BNF, gate_F, grad_BNF, *ctx.options
    )
    _, _, needs_gate, needs_score = ctx.needs_input_grad[:4]
    grad_gate_F = score_BF.sum(0) if needs_gate else None
    rest = (grad_gate_F, score_BF if needs_score else None, None, None, None, None)
    return (gradients, None, *rest) if value_BNF is None else (*gradients.unbind(), *rest)


_gated_unit.register_autograd(_backward, setup_context=_setup_context)


def _checked_columns(
    op: str, x_BNF: Tensor, value_BNF: Tensor | None, activation: str, packed: str | None
) -> int:
    """The number of hidden units, where the inputs of a forward are as they must be."""
    _checks.require_input(op, "x_BNF", x_BNF, 3, DTYPES)
    if activation not in ACTIVATIONS:
        rule = f"be one of {', '.join(ACTIVATIONS)}"
        _checks.require(False, op, "activation", rule, repr(activation))
    if value_BNF is not None:
        _checks.require_like(op, "value_BNF", value_BNF, "x_BNF", x_BNF)
    columns = x_BNF.shape[2]
    if packed is None:
        return columns
    rule = "be 'x_first', 'x_last' or None"
    _checks.require(packed in ("x_first", "x_last"), op, "packed", rule, repr(packed))
    _checks.require(value_BNF is None, op, "value_BNF", "be None where x_BNF is packed", "a tensor")
    rule = "have an even number of columns where it is packed"
    _checks.require(columns % 2 == 0, op, "x_BNF", rule, columns)
    return columns // 2


def gated_unit(
    x_BNF: Tensor,
    gate_F: Tensor | None = None,
    *,
    value_BNF: Tensor | None = None,
    probe_BF: Tensor | None = None,
    activation: str = "gelu",
    packed: Packed | None = None,
    per_token: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """The hidden units of an MLP, ``act(x) * value * gate``, in one pass forward and one back.

    With h = act(x), or h = act(x) * value for a gated linear unit (GLU), computed again from its
    inputs in the backward, and ``grad`` the gradient of the loss w.r.t. the result ``h * gate``: ::

        grad_x = grad * gate * value * act'(x)        grad_value = grad * gate * act(x)
        grad_gate[f] = sum_{b, n} h[b, n, f] * grad[b, n, f]

    Nothing is divided by a gate, so its gradient is exact at 0 too, and a unit can come back. A
    gate of 0 leaves exactly 0 of its column in the result and in ``grad_x`` and ``grad_value``,
    also where x is NaN or Inf; its own gradient says nothing then.

    A probe stands for a gate of 1 on each column of each sample. It is never read, and its gradient
    is the score of ``gated_unit_score``: the derivative of the sample's loss by that gate (when the
    loss is summed over samples). Differentiable once.

    Reference: the gate of Molchanov et al., "Importance Estimation for Neural Network Pruning",
    CVPR 2019 (arXiv:1906.10771), section 3.2, behind the activation. GELU: Hendrycks and Gimpel,
    2016 (arXiv:1606.08415). GLU: Shazeer, "GLU Variants Improve Transformer", 2020
    (arXiv:2002.05202), eq. 5 and 6.

    Args:
        x_BNF: what goes through the activation, ``(B, N, F)``, fp32/fp64/bf16/fp16; samples and
            tokens may lie anywhere, columns are copied together first when they are not adjacent.
            It and ``value_BNF`` are all of that size that is kept for the backward.
        gate_F: a factor for each column, ``(F,)``, any number; fp64 for fp64 inputs and else fp32.
            None for 1, with torch's own forward.
        value_BNF: what the activation is multiplied with; same shape, dtype, device. Or None.
        probe_BF: a number for each sample and column, ``(B, F)``, fp64 for fp64 inputs and else
            fp32; only without ``gate_F``. After a backward its ``.grad`` is the score.
        activation: one of ``ACTIVATIONS``: ``"gelu"`` (with erf), ``"gelu_tanh"``, ``"relu"``,
            ``"silu"``, ``"quick_gelu"`` (``x * sigmoid(1.702 x)``) or ``"sigmoid"``.
        packed: ``x_BNF`` is ``(B, N, 2F)`` and holds x and value side by side, x first or last:
            the halves are read in place, and their gradient is one tensor. Or None.
        per_token: give the probe the sum of each token's magnitude instead of its gradient.
        backend: implementation of the backward, and of the forward with a gate (``"cpu"`` is the
            C++ kernel); an explicit choice never falls back.

    Returns:
        ``(B, N, F)`` of the dtype of ``x_BNF``. With a gate it is contiguous, computed in the dtype
        of the gate and rounded once. Samples do not mix, but in the gate's gradient, which sums
        over tokens first and over samples then. The bits of our kernels do not depend on threads
        or repetition.

    Raises:
        TypeError: an argument is not a tensor.
        InvalidInput: shapes, dtypes or devices disagree, no activation or packing has that name, or
            arguments exclude each other.
        BackendUnavailable: ``backend`` was named and cannot run here; the message says why.
    """
    columns = _checked_columns(_OP, x_BNF, value_BNF, activation, packed)
    if gate_F is not None:
        why = ", one number per column of the result"
        check_wide(_OP, "gate_F", gate_F, (columns,), why, "x_BNF", x_BNF)
        gate_F = gate_F.contiguous()
        _checks.require(probe_BF is None, _OP, "probe_BF", "be None with a gate_F", "a tensor")
        _checks.require(not per_token, _OP, "per_token", "be False with a gate_F", per_token)
    elif probe_BF is not None:
        why = ", one number per sample and column of the result"
        check_wide(_OP, "probe_BF", probe_BF, (x_BNF.shape[0], columns), why, "x_BNF", x_BNF)
    # chosen here, so that a backend that cannot run is refused before the backward
    chosen = choose(_OP, x_BNF, backend)
    return _gated_unit(x_BNF, value_BNF, gate_F, probe_BF, activation, packed, per_token, chosen)


def gated_unit_score(
    x_BNF: Tensor,
    grad_BNF: Tensor,
    *,
    value_BNF: Tensor | None = None,
    activation: str = "gelu",
    packed: Packed | None = None,
    per_token: bool = False,
    backend: Backend = "auto",
) -> GatedUnitScore:
    """Backward of ``gated_unit`` without a gate, and the importance of its columns by sample.

    With ``grad`` the gradient of the loss w.r.t. h = act(x) * value: its gradients, and ::

        score[b, f] = sum_n h[b, n, f] * grad[b, n, f]

    the derivative of sample b's loss along scaling column f of h. With ``per_token`` the tokens
    cannot cancel each other: ``sum_n |h * grad|``. Not differentiable.

    Reference: Molchanov et al., CVPR 2019 (arXiv:1906.10771): the first-order criterion before its
    square, with a gate on each column. Per token as in the code of Michel et al., "Are Sixteen
    Heads Really Better than One?", NeurIPS 2019 (arXiv:1905.10650).

    Args:
        x_BNF: as in ``gated_unit``.
        grad_BNF: ``(B, N, F)``, of the dtype and device of ``x_BNF``.
        value_BNF: as in ``gated_unit``.
        activation: one of ``ACTIVATIONS``.
        packed: as in ``gated_unit``.
        per_token: sum the magnitude of each token's share instead of the share.
        backend: implementation to run; an explicit choice never falls back.

    Returns:
        The gradients, and the score, ``(B, F)``, fp64 for fp64 inputs and else fp32, which is also
        what everything is computed in; signed (>= 0 with ``per_token``), in units of the loss. Row
        ``b`` of all depends on row ``b`` of the inputs alone; the bits of our kernels do not depend
        on the batch, the threads or the repetition.

    Raises:
        TypeError: an argument is not a tensor.
        InvalidInput: shapes, dtypes or devices disagree, no activation or packing has that name, or
            arguments exclude each other.
        BackendUnavailable: ``backend`` was named and cannot run here; the message says why.
    """
    op = "gated_unit_score"
    columns = _checked_columns(op, x_BNF, value_BNF, activation, packed)
    _checks.require_tensor(op, "grad_BNF", grad_BNF)
    shape = (*x_BNF.shape[:2], columns)
    _checks.require_shape(op, "grad_BNF", grad_BNF, shape, " like the result")
    _checks.require_dtype(op, "grad_BNF", grad_BNF, (x_BNF.dtype,))
    _checks.require_near(op, "grad_BNF", grad_BNF, "x_BNF", x_BNF)
    gradients, score_BF = _backward_forms[choose(_OP, x_BNF, backend)](
        x_BNF.detach(),
        None if value_BNF is None else value_BNF.detach(),
        None,
        grad_BNF.detach(),
        activation,
        packed,
        per_token,
    )
    grad_x_BNF, grad_value_BNF = (gradients, None) if value_BNF is None else gradients.unbind()
    return GatedUnitScore(grad_x_BNF, grad_value_BNF, score_BF)
