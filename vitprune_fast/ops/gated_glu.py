"""A gated linear unit with one more gate on each column, differentiable by all of them.

B batch, N tokens, F columns, 2F the columns of gate and value in one tensor. ``gate_BNF`` is what
goes through the activation, ``gate_F`` the gates of the columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, library

from vitprune_fast import _checks
from vitprune_fast.ops._custom_op import custom_op
from vitprune_fast.ops._dispatch import Backend, choose
from vitprune_fast.ops._probes import DTYPES, refuse_second_derivative
from vitprune_fast.ops.activation_score import check_activation
from vitprune_fast.ops.gated_activation import check_gate
from vitprune_fast.ops.glu_score import both_gradients, new_gradients, split
from vitprune_fast.reference.gated_glu import gated_glu as _eager
from vitprune_fast.reference.gated_glu import gated_glu_backward as _eager_backward

_library = library.Library("vitprune_fast", "FRAGMENT")
_library.define(
    "gated_glu_fwd(Tensor gate_BNF, Tensor value_BNF, Tensor gate_F, str activation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# an op has no outputs that share memory, so the gradients of gate and value come as one tensor:
# (B, N, 2F) when packed, else (2, B, N, F); that of gate_F is apart by sample, (B, F)
_library.define(
    "gated_glu_bwd(Tensor gate_BNF, Tensor value_BNF, Tensor gate_F, Tensor grad_BNF, "
    "str activation, str? packed) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@library.register_fake("vitprune_fast::gated_glu_fwd", lib=_library)
def _fake(gate_BNF: Tensor, value_BNF: Tensor, gate_F: Tensor, activation: str) -> Tensor:
    return gate_BNF.new_empty(gate_BNF.shape)


@library.register_fake("vitprune_fast::gated_glu_bwd", lib=_library)
def _fake_backward(
    gate_BNF: Tensor,
    value_BNF: Tensor,
    gate_F: Tensor,
    grad_BNF: Tensor,
    activation: str,
    packed: str | None,
) -> tuple[Tensor, Tensor]:
    batch, _, columns = gate_BNF.shape
    return new_gradients(gate_BNF, packed), gate_F.new_empty(batch, columns)


# C++ and Triton cannot both hold the CUDA key of one op, so the twins have names of their own
@custom_op("vitprune_fast::gated_glu_fwd_triton")
def _triton(gate_BNF: Tensor, value_BNF: Tensor, gate_F: Tensor, activation: str) -> Tensor:
    from vitprune_fast.kernels.gated_glu import gated_glu_fwd

    return gated_glu_fwd(gate_BNF, value_BNF, gate_F, activation)


@custom_op("vitprune_fast::gated_glu_bwd_triton")
def _triton_backward(
    gate_BNF: Tensor,
    value_BNF: Tensor,
    gate_F: Tensor,
    grad_BNF: Tensor,
    activation: str,
    packed: str | None,
) -> tuple[Tensor, Tensor]:
    from vitprune_fast.kernels.gated_glu import gated_glu_bwd

    gradients = new_gradients(gate_BNF, packed)
    halves = both_gradients(gradients, packed)
    return gradients, gated_glu_bwd(gate_BNF, value_BNF, gate_F, grad_BNF, *halves, activation)


_triton.register_fake(_fake)
_triton_backward.register_fake(_fake_backward)


def _eagerly(
    gate_BNF: Tensor,
    value_BNF: Tensor,
    gate_F: Tensor,
    grad_BNF: Tensor,
    activation: str,
    packed: str | None,
) -> tuple[Tensor, Tensor]:
    *halves, grad_unit_BF = _eager_backward(gate_BNF, value_BNF, gate_F, grad_BNF, activation)
    if packed is None:
        return torch.stack(halves), grad_unit_BF
    return torch.cat(halves if packed == "gate_first" else halves[::-1], 2), grad_unit_BF


_FORMS = {
    "cpu": (torch.ops.vitprune_fast.gated_glu_fwd, torch.ops.vitprune_fast.gated_glu_bwd),
    "triton": (_triton, _triton_backward),
    "eager": (_eager, _eagerly),
}


@custom_op("vitprune_fast::gated_glu")
def _gated(
    gate_BNF: Tensor, value_BNF: Tensor, gate_F: Tensor, activation: str, backend: str
) -> Tensor:
    return _FORMS[backend][0](gate_BNF, value_BNF, gate_F, activation)


@_gated.register_fake
def _(gate_BNF: Tensor, value_BNF: Tensor, gate_F: Tensor, activation: str, backend: str) -> Tensor:
    return gate_BNF.new_empty(gate_BNF.shape)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.activation, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_BNF: Tensor):
    refuse_second_derivative("gated_glu")
    form = _FORMS[ctx.backend][1]
    gradients, grad_unit_BF = form(*ctx.saved_tensors, grad_BNF, ctx.activation, None)
    return *both_gradients(gradients, None), grad_unit_BF.sum(0), None, None


_gated.register_autograd(_backward, setup_context=_save)


@custom_op("vitprune_fast::gated_glu_packed")
def _gated_packed(
    x_BN2F: Tensor, gate_F: Tensor, activation: str, gate_last: bool, backend: str
) -> Tensor:
    return _FORMS[backend][0](*split(x_BN2F, gate_last), gate_F, activation)


@_gated_packed.register_fake
def _(x_BN2F: Tensor, gate_F: Tensor, activation: str, gate_last: bool, backend: str) -> Tensor:
    return x_BN2F.new_empty(*x_BN2F.shape[:2], gate_F.shape[0])


def _save_packed(ctx, inputs, output) -> None:
    x_BN2F, gate_F, *ctx.choices = inputs
    ctx.save_for_backward(x_BN2F, gate_F)


def _backward_packed(ctx, grad_BNF: Tensor):
    refuse_second_derivative("gated_glu_packed")
    activation, gate_last, backend = ctx.choices
    x_BN2F, gate_F = ctx.saved_tensors
    packed = "gate_last" if gate_last else "gate_first"
    halves = split(x_BN2F, gate_last)
    gradients, grad_unit_BF = _FORMS[backend][1](*halves, gate_F, grad_BNF, activation, packed)
    return gradients, grad_unit_BF.sum(0), None, None, None


_gated_packed.register_autograd(_backward_packed, setup_context=_save_packed)


def gated_glu(
    gate_BNF: Tensor,
    value_BNF: Tensor,
    gate_F: Tensor,
    activation: str = "silu",
    *,
    backend: Backend = "auto",
) -> Tensor:
    """A gated linear unit and one more gate on each column, in one pass forward and one back.

    With h = act(gate) * value computed again from both, and ``grad`` the gradient of the loss
    w.r.t. the result ``h * gate_F``, ::

        grad_gate = grad * gate_F * value * act'(gate)        grad_value = grad * gate_F * act(gate)
        grad_gate_F[f] = sum_{b, n} h[b, n, f] * grad[b, n, f]

    As for ``gated_activation``: nothing is divided by a gate, and one that is 0 leaves exactly 0
    of its column in the result and in the gradients of gate and value. Differentiable once.

    Reference: Shazeer, "GLU Variants Improve Transformer", 2020 (arXiv:2002.05202), eq. 5 and 6,
    for h; Molchanov et al., CVPR 2019 (arXiv:1906.10771), section 3.2, for the gate behind it.

    Args:
        gate_BNF: what goes through the activation, ``(B, N, F)``, fp32/fp64/bf16/fp16; samples and
            tokens may lie anywhere, columns are copied together first when they are not adjacent.
        value_BNF: what is multiplied with it; same shape, dtype, device.
        gate_F: a factor for each column, ``(F,)``, any number; fp64 for fp64 inputs and else fp32.
        activation: one of ``ACTIVATIONS``.
        backend: implementation of forward and backward (``"cpu"`` is the C++ kernel); an explicit
            choice never falls back.

    Returns:
        ``(B, N, F)`` of the dtype of ``gate_BNF``, contiguous, rounded once; everything is computed
        in the dtype of ``gate_F``. Order of sums and bits as for ``gated_activation``.

    Raises:
        TypeError: an argument is not a tensor.
        InvalidInput: shapes, dtypes or devices disagree, or no activation has that name.
        BackendUnavailable: ``backend`` was named and cannot run here; the message says why.
    """
    op = "gated_glu"
    _checks.require_tensor(op, "gate_BNF", gate_BNF)
    _checks.require_tensor(op, "value_BNF", value_BNF)
    _checks.require_dims(op, "gate_BNF", gate_BNF, 3)
    _checks.require_dtype(op, "gate_BNF", gate_BNF, DTYPES)
    _checks.require_like(op, "value_BNF", value_BNF, "gate_BNF", gate_BNF)
    check_activation(op, activation)
    check_gate(op, gate_F, gate_BNF.shape[2], "gate_BNF", gate_BNF)
    # settled here, so that a backend that cannot run is refused before the backward
    chosen = choose(op, gate_BNF.device, backend)
    return _gated(gate_BNF, value_BNF, gate_F.contiguous(), activation, chosen)


def gated_glu_packed(
    x_BN2F: Tensor,
    gate_F: Tensor,
    activation: str = "silu",
    *,
    gate_last: bool,
    backend: Backend = "auto",
) -> Tensor:
    """``gated_glu`` of the two halves of one tensor, whose gradient is written as one tensor.

    Args:
        x_BN2F: gate and value side by side, ``(B, N, 2F)``, fp32/fp64/bf16/fp16; the halves are
            read in place.
        gate_F: a factor for each column, ``(F,)``, any number; fp64 for fp64 inputs and else fp32.
        activation: one of ``ACTIVATIONS``.
        gate_last: the gate is the second half; else it is the first.
        backend: implementation of forward and backward; an explicit choice never falls back.

    Returns:
        ``(B, N, F)`` of the dtype of ``x_BN2F``, contiguous.

    Raises:
        TypeError: an argument is not a tensor.
        InvalidInput: the number of columns is odd, shapes, dtypes or devices disagree, or no
            activation has that name.
        BackendUnavailable: ``backend`` was named and cannot run here; the message says why.
    """
    op = "gated_glu_packed"
    _checks.require_tensor(op, "x_BN2F", x_BN2F)
    _checks.require_dims(op, "x_BN2F", x_BN2F, 3)
    _checks.require_dtype(op, "x_BN2F", x_BN2F, DTYPES)
    both = x_BN2F.shape[2]
    rule = "have an even number of columns, gate and value"
    _checks.require(both % 2 == 0, op, "x_BN2F", rule, both)
    check_activation(op, activation)
    check_gate(op, gate_F, both // 2, "x_BN2F", x_BN2F)
    # settled here, so that a backend that cannot run is refused before the backward
    chosen = choose("gated_glu", x_BN2F.device, backend)
    return _gated_packed(x_BN2F, gate_F.contiguous(), activation, gate_last, chosen)
