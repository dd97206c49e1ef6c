"""An activation with a gate on each column, differentiable by its input and by the gates.

B batch, N tokens, F columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, library

from vitprune_fast import _checks
from vitprune_fast.ops._custom_op import custom_op
from vitprune_fast.ops._dispatch import Backend, choose
from vitprune_fast.ops._probes import DTYPES, refuse_second_derivative, score_dtype
from vitprune_fast.ops.activation_score import check_activation
from vitprune_fast.reference.gated_activation import gated_activation as _eager
from vitprune_fast.reference.gated_activation import gated_activation_backward as _eager_backward

_library = library.Library("vitprune_fast", "FRAGMENT")
_library.define(
    "gated_activation_fwd(Tensor x_BNF, Tensor gate_F, str activation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# the gates' gradient is apart by sample, (B, F): autograd adds the samples up
_library.define(
    "gated_activation_bwd(Tensor x_BNF, Tensor gate_F, Tensor grad_BNF, str activation)"
    " -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@library.register_fake("vitprune_fast::gated_activation_fwd", lib=_library)
def _fake(x_BNF: Tensor, gate_F: Tensor, activation: str) -> Tensor:
    return x_BNF.new_empty(x_BNF.shape)


@library.register_fake("vitprune_fast::gated_activation_bwd", lib=_library)
def _fake_backward(
    x_BNF: Tensor, gate_F: Tensor, grad_BNF: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    batch, _, columns = x_BNF.shape
    return x_BNF.new_empty(x_BNF.shape), gate_F.new_empty(batch, columns)


# C++ and Triton cannot both hold the CUDA key of one op, so the twins have names of their own
@custom_op("vitprune_fast::gated_activation_fwd_triton")
def _triton(x_BNF: Tensor, gate_F: Tensor, activation: str) -> Tensor:
    from vitprune_fast.kernels.gated_activation import gated_activation_fwd

    return gated_activation_fwd(x_BNF, gate_F, activation)


@custom_op("vitprune_fast::gated_activation_bwd_triton")
def _triton_backward(
    x_BNF: Tensor, gate_F: Tensor, grad_BNF: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    from vitprune_fast.kernels.gated_activation import gated_activation_bwd

    return gated_activation_bwd(x_BNF, gate_F, grad_BNF, activation)


_triton.register_fake(_fake)
_triton_backward.register_fake(_fake_backward)

_FORMS = {
    "cpu": (
        torch.ops.vitprune_fast.gated_activation_fwd,
        torch.ops.vitprune_fast.gated_activation_bwd,
    ),
    "triton": (_triton, _triton_backward),
    "eager": (_eager, _eager_backward),
}


@custom_op("vitprune_fast::gated_activation")
def _gated(x_BNF: Tensor, gate_F: Tensor, activation: str, backend: str) -> Tensor:
    return _FORMS[backend][0](x_BNF, gate_F, activation)


@_gated.register_fake
def _(x_BNF: Tensor, gate_F: Tensor, activation: str, backend: str) -> Tensor:
    return x_BNF.new_empty(x_BNF.shape)


def _save(ctx, inputs, output) -> None:
    x_BNF, gate_F, ctx.activation, ctx.backend = inputs
    ctx.save_for_backward(x_BNF, gate_F)


def _backward(ctx, grad_BNF: Tensor):
    refuse_second_derivative("gated_activation")
    x_BNF, gate_F = ctx.saved_tensors
    form = _FORMS[ctx.backend][1]
    grad_x_BNF, grad_gate_BF = form(x_BNF, gate_F, grad_BNF, ctx.activation)
    return grad_x_BNF, grad_gate_BF.sum(0), None, None


_gated.register_autograd(_backward, setup_context=_save)


def check_gate(op: str, gate_F: Tensor, columns: int, x_name: str, x: Tensor) -> None:
    """Raise unless ``gate_F`` has a number per column of ``x``, in the dtype it is computed in."""
    _checks.require_tensor(op, "gate_F", gate_F)
    why = ", one number per column of "
    _checks.require_shape(op, "gate_F", gate_F, (columns,), why + x_name)
    wanted = score_dtype(x)
    if gate_F.dtype != wanted:
        rule = f"have dtype {wanted}, in which {x_name} is computed"
        _checks.require(False, op, "gate_F", rule, gate_F.dtype)
    _checks.require_near(op, "gate_F", gate_F, x_name, x)


def gated_activation(
    x_BNF: Tensor, gate_F: Tensor, activation: str = "gelu", *, backend: Backend = "auto"
) -> Tensor:
    """An activation and a gate on each of its columns, ``act(x) * gate``, in one pass.

    Backward is one pass too: with h = act(x) computed again from x, and ``grad`` the gradient of
    the loss w.r.t. the result, ::

        grad_x = grad * gate * act'(x)        grad_gate[f] = sum_{b, n} h[b, n, f] * grad[b, n, f]

    Nothing is divided by a gate, so its gradient is exact at 0 too, and a unit can come back. A
    gate of 0 leaves exactly 0 of its column in the result and in ``grad_x``, also where x is NaN
    or Inf; its own gradient is then NaN. Differentiable once.

    Reference: the gate of Molchanov et al., "Importance Estimation for Neural Network Pruning",
    CVPR 2019 (arXiv:1906.10771), section 3.2, behind the activation.

    Args:
        x_BNF: input of the activation, ``(B, N, F)``, fp32/fp64/bf16/fp16; samples and tokens may
            lie anywhere, columns are copied together first when they are not adjacent. The only
            thing of that size that is kept for the backward.
        gate_F: a factor for each column, ``(F,)``, any number; fp64 for fp64 inputs and else fp32.
        activation: one of ``ACTIVATIONS``.
        backend: implementation of forward and backward (``"cpu"`` is the C++ kernel); an explicit
            choice never falls back.

    Returns:
        ``(B, N, F)`` of the dtype of ``x_BNF``, contiguous, rounded once. Everything is computed
        in the dtype of ``gate_F``. Samples do not mix, but in the gates' gradient, which sums over
        tokens first and over samples then. The bits of our kernels do not depend on threads or
        repetition.

    Raises:
        TypeError: an argument is not a tensor.
        InvalidInput: shapes, dtypes or devices disagree, or no activation has that name.
        BackendUnavailable: ``backend`` was named and cannot run here; the message says why.
    """
    op = "gated_activation"
    _checks.require_tensor(op, "x_BNF", x_BNF)
    _checks.require_dims(op, "x_BNF", x_BNF, 3)
    _checks.require_dtype(op, "x_BNF", x_BNF, DTYPES)
    check_activation(op, activation)
    check_gate(op, gate_F, x_BNF.shape[2], "x_BNF", x_BNF)
    # settled here, so that a backend that cannot run is refused before the backward
    chosen = choose(op, x_BNF.device, backend)
    return _gated(x_BNF, gate_F.contiguous(), activation, chosen)
