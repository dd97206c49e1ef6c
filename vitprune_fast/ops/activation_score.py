"""Backward of an activation, fused with the first-order score of each of its columns.

B batch, N tokens, F columns.
"""

from __future__ import annotations

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
from vitprune_fast.reference.activation_score import ACTIVATIONS as _FORWARD
from vitprune_fast.reference.activation_score import activation_score as _eager

ACTIVATIONS = tuple(_FORWARD)

_library = library.Library("vitprune_fast", "FRAGMENT")
_library.define(
    "activation_score(Tensor x_BNF, Tensor grad_BNF, str activation, bool per_token)"
    " -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@library.register_fake("vitprune_fast::activation_score", lib=_library)
def _fake(
    x_BNF: Tensor, grad_BNF: Tensor, activation: str, per_token: bool
) -> tuple[Tensor, Tensor]:
    batch, _, columns = x_BNF.shape
    return x_BNF.new_empty(x_BNF.shape), x_BNF.new_empty(batch, columns, dtype=score_dtype(x_BNF))


# C++ and Triton cannot both hold the CUDA key of one op, so the twin has its own name
@custom_op("vitprune_fast::activation_score_triton")
def _triton(
    x_BNF: Tensor, grad_BNF: Tensor, activation: str, per_token: bool
) -> tuple[Tensor, Tensor]:
    from vitprune_fast.kernels.activation_score import activation_score_bwd

    return activation_score_bwd(x_BNF, grad_BNF, activation, per_token)


_triton.register_fake(_fake)


def _run(
    x_BNF: Tensor, grad_BNF: Tensor, activation: str, per_token: bool, chosen: str
) -> tuple[Tensor, Tensor]:
    if chosen == "cpu":
        return torch.ops.vitprune_fast.activation_score(x_BNF, grad_BNF, activation, per_token)
    if chosen == "triton":
        return _triton(x_BNF, grad_BNF, activation, per_token)
    return _eager(x_BNF, grad_BNF, activation, per_token=per_token)


def check_activation(op: str, activation: str) -> None:
    """Raise unless ``activation`` is one of ``ACTIVATIONS``."""
    if activation not in ACTIVATIONS:
        names = ", ".join(ACTIVATIONS)
        _checks.require(False, op, "activation", f"be one of {names}", repr(activation))


def activation_score(
    x_BNF: Tensor,
    grad_BNF: Tensor,
    activation: str = "gelu",
    *,
    per_token: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Backward of an activation, and the first-order importance of its columns for each sample.

    With h = act(x) and ``grad`` the gradient of the loss w.r.t. h: ::

        grad_x = grad * act'(x)        score[b, f] = sum_n h[b, n, f] * grad[b, n, f]

    The score is the derivative of sample b's loss along scaling column f of h. h is computed again
    from x, so nothing but x need be kept for the backward. With ``per_token`` the tokens cannot
    cancel each other: ``sum_n |h * grad|``. Not differentiable.

    Reference: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019
    (arXiv:1906.10771): the first-order criterion before its square, with a gate on each column.
    Per token as in the code of Michel et al., "Are Sixteen Heads Really Better than One?", NeurIPS
    2019 (arXiv:1905.10650). GELU: Hendrycks and Gimpel, 2016 (arXiv:1606.08415).

    Args:
        x_BNF: input of the activation, ``(B, N, F)``, fp32/fp64/bf16/fp16; samples and tokens may
            lie anywhere, columns are copied together first when they are not adjacent.
        grad_BNF: gradient of the loss w.r.t. the activation's output; same shape, dtype, device.
        activation: one of ``ACTIVATIONS``: ``"gelu"`` (with erf), ``"gelu_tanh"``, ``"relu"``,
            ``"silu"``, ``"quick_gelu"`` (``x * sigmoid(1.702 x)``) or ``"sigmoid"``.
        per_token: sum the magnitude of each token's share instead of the share.
        backend: implementation to run (``"cpu"`` is the C++ kernel); an explicit choice never
            falls back.

    Returns:
        The gradient w.r.t. ``x_BNF``, ``(B, N, F)`` of its dtype, contiguous; and the score,
        ``(B, F)``, fp64 for fp64 inputs and else fp32, which is also what everything is computed
        in; signed (>= 0 with ``per_token``), in units of the loss. Row ``b`` of both depends on
        row ``b`` of the inputs alone; the bits of our kernels do not depend on the batch, the
        threads or the repetition.

    Raises:
        TypeError: an argument is not a tensor.
        InvalidInput: shapes, dtypes or devices disagree, or no activation has that name.
        BackendUnavailable: ``backend`` was named and cannot run here; the message says why.
    """
    op = "activation_score"
    _checks.require_tensor(op, "x_BNF", x_BNF)
    _checks.require_tensor(op, "grad_BNF", grad_BNF)
    _checks.require_dims(op, "x_BNF", x_BNF, 3)
    _checks.require_dtype(op, "x_BNF", x_BNF, DTYPES)
    _checks.require_like(op, "grad_BNF", grad_BNF, "x_BNF", x_BNF)
    check_activation(op, activation)
    chosen = choose(op, x_BNF.device, backend)
    return _run(x_BNF.detach(), grad_BNF.detach(), activation, per_token, chosen)


# torch's own forward is at the speed of memory; the backward is what has no equal there
@custom_op("vitprune_fast::scored_activation")
def _scored(
    x_BNF: Tensor, probe_BF: Tensor, activation: str, per_token: bool, backend: str
) -> Tensor:
    return _FORWARD[activation](x_BNF)


@_scored.register_fake
def _(x_BNF: Tensor, probe_BF: Tensor, activation: str, per_token: bool, backend: str) -> Tensor:
    return _FORWARD[activation](x_BNF)


def _save(ctx, inputs, output) -> None:
    x_BNF, _, *ctx.choices = inputs
    ctx.save_for_backward(x_BNF)


def _backward(ctx, grad_BNF: Tensor):
    refuse_second_derivative("scored_activation")
    (x_BNF,) = ctx.saved_tensors
    return *_run(x_BNF, grad_BNF, *ctx.choices), None, None, None


_scored.register_autograd(_backward, setup_context=_save)


def scored_activation(
    x_BNF: Tensor,
    probe_BF: Tensor,
    activation: str = "gelu",
    *,
    per_token: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """An activation that hands out, in backward, how much each of its columns matters.

    Computes act(x) as torch does. Its gradient w.r.t. ``x_BNF`` is that of the activation; the one
    w.r.t. ``probe_BF`` is ``activation_score``'s score, the derivative of each sample's loss by a
    gate of 1 on each column (when the loss is summed over samples). Differentiable once.

    Args:
        x_BNF: input, ``(B, N, F)``, fp32/fp64/bf16/fp16; the only thing kept for the backward.
        probe_BF: a number for each sample and column, never read; fp64 for fp64 inputs and else
            fp32. After a backward its ``.grad`` is the score.
        activation: one of ``ACTIVATIONS``.
        per_token: give the probe the sum of each token's magnitude instead of its gradient.
        backend: implementation of the backward; an explicit choice never falls back.

    Returns:
        act(x), ``(B, N, F)`` of the dtype of ``x_BNF``.

    Raises:
        TypeError: an argument is not a tensor.
        InvalidInput: shapes, dtypes or devices disagree, or no activation has that name.
        BackendUnavailable: ``backend`` was named and cannot run here; the message says why.
    """
    op = "scored_activation"
    _checks.require_tensor(op, "x_BNF", x_BNF)
    _checks.require_dims(op, "x_BNF", x_BNF, 3)
    _checks.require_dtype(op, "x_BNF", x_BNF, DTYPES)
    check_activation(op, activation)
    batch, _, columns = x_BNF.shape
    check_probe(op, "probe_BF", probe_BF, (batch, columns), "x_BNF", x_BNF)
    # settled here, so that a backend that cannot run is refused before the backward
    chosen = choose("activation_score", x_BNF.device, backend)
    return _scored(x_BNF, probe_BF, activation, per_token, chosen)
