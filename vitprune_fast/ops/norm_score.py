"""Backward of a norm, fused with the score of removing each channel it normalises over.

B batch, N tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vitprune_fast import _checks
from vitprune_fast._checks import DTYPES, check_wide, refuse_second_derivative
from vitprune_fast.ops._dispatch import Backend, choose
from vitprune_fast.ops._forms import Forms, custom_op
from vitprune_fast.reference.norm_score import norm_score as _eager
from vitprune_fast.wide import wide_dtype


def _fake(
    x_BNC: Tensor,
    grad_y_BNC: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    eps: float,
    rms: bool,
    output: bool,
) -> tuple[Tensor, Tensor]:
    batch, _, channels = x_BNC.shape
    return x_BNC.new_empty(x_BNC.shape), x_BNC.new_empty(batch, channels, dtype=wide_dtype(x_BNC))


_forms = Forms("norm_score", _fake, _eager, triton="norm_score:norm_score_bwd", cpu=True)


def _check(
    op: str, x_BNC: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, eps: float
) -> None:
    _checks.require_input(op, "x_BNC", x_BNC, 3, DTYPES)
    _checks.require(eps >= 0, op, "eps", "be at least 0", eps)
    shape, why = (x_BNC.shape[2],), ", one number per channel of x_BNC"
    for name, value in (("weight_C", weight_C), ("bias_C", bias_C)):
        if value is None:
            continue
        _checks.require_tensor(op, name, value)
        _checks.require_shape(op, name, value, shape, why)
        for what in ("dtype", "device"):
            wanted, got = getattr(x_BNC, what), getattr(value, what)
            if wanted != got:
                _checks.require(False, op, name, f"have {what} {wanted} like x_BNC", got)


def norm_score(
    x_BNC: Tensor,
    grad_y_BNC: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    eps: float,
    *,
    rms: bool = False,
    output: bool = True,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Backward of a norm, and what removing each of its channels does to the loss, to first order.

    For LayerNorm, with x_hat = (x - mean) / sqrt(var + eps) and y = x_hat * weight + bias: ::

        c1 = mean_c(weight * grad_y * x_hat)    c2 = mean_c(weight * grad_y)
        grad_x = (weight * grad_y - c2 - x_hat * c1) / sqrt(var + eps)
        score[b, c] = sum_n [y * grad_y] - x_hat * c2 - (x_hat ** 2 - var / (var + eps)) * c1 / 2

    The score is the derivative of sample b's loss, at z = 1, by a weight z on each channel that
    enters the statistics (mean = sum z x / sum z, and so the variance) and multiplies the output:
    at z = 0 the norm is that of the kept channels. RMSNorm has mean 0, c2 0 and the mean square for
    the variance. Not differentiable.

    Reference: the backward of Ba et al., "Layer Normalization", 2016 (arXiv:1607.06450), eq. 4;
    the gate of Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019
    (arXiv:1906.10771), on the channels whose statistics are taken again, as they are when an
    embedding channel is removed.

    Args:
        x_BNC: input of the norm, ``(B, N, C)``, fp32/fp64/bf16/fp16; samples and tokens may lie
            anywhere, channels are copied together first when they are not adjacent.
        grad_y_BNC: gradient of the loss w.r.t. the norm's output; like ``x_BNC``.
        weight_C: scale of each channel, ``(C,)`` of the dtype of ``x_BNC``, or None for 1.
        bias_C: shift of each channel, or None for 0.
        eps: added to the variance.
        rms: the norm is RMSNorm, else LayerNorm.
        output: count the channel's own output; without it only what its removal does to the
            statistics, hence to the other channels.
        backend: implementation to run (``"cpu"`` is the C++ kernel); an explicit choice never
            falls back.

    Returns:
        The gradient w.r.t. ``x_BNC``, ``(B, N, C)`` of its dtype, and the score, ``(B, C)``, fp64
        for fp64 inputs and else fp32, which is also what is accumulated in; signed, in units of
        the loss. Row ``b`` of both depends on row ``b`` of the inputs alone; the bits of our
        kernels do not depend on the batch, the threads or the repetition.

    Raises:
        TypeError: an argument is not a tensor.
        InvalidInput: shapes, dtypes or devices disagree, or ``eps`` is negative.
        BackendUnavailable: ``backend`` was named and cannot run here; the message says why.
    """
    op = "norm_score"
    _check(op, x_BNC, weight_C, bias_C, eps)
    _checks.require_like(op, "grad_y_BNC", grad_y_BNC, "x_BNC", x_BNC)
    x_BNC, grad_y_BNC = x_BNC.detach(), grad_y_BNC.detach()
    weight_C = None if weight_C is None else weight_C.detach()
    bias_C = None if bias_C is None else bias_C.detach()
    form = _forms[choose(op, x_BNC, backend)]
    return form(x_BNC, grad_y_BNC, weight_C, bias_C, eps, rms, output)


# torch's own forward runs at memory speed; only the backward has no equal in torch
@custom_op("vitprune_fast::scored_norm")
def _scored(
    x_BNC: Tensor,
    probe_BC: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    eps: float,
    rms: bool,
    output: bool,
    backend: str,
) -> Tensor:
    channels = x_BNC.shape[2:]
    if not rms:
        return F.layer_norm(x_BNC.contiguous(), channels, weight_C, bias_C, eps)
    y_BNC = F.rms_norm(x_BNC.contiguous(), channels, weight_C, eps)
    return y_BNC if bias_C is None else y_BNC + bias_C


@_scored.register_fake
def _(x_BNC, *_arguments):
    return x_BNC.new_empty(x_BNC.shape)


def _save(ctx, inputs, output) -> None:
    x_BNC, _, weight_C, bias_C, *ctx.options, ctx.backend = inputs
    ctx.save_for_backward(x_BNC, weight_C, bias_C)


def _backward(ctx, grad_y_BNC: Tensor):
    refuse_second_derivative("scored_norm")
    x_BNC, weight_C, bias_C = ctx.saved_tensors
    results = _forms[ctx.backend](x_BNC, grad_y_BNC, weight_C, bias_C, *ctx.options)
    return *results, None, None, None, None, None, None


_scored.register_autograd(_backward, setup_context=_save)


def scored_norm(
    x_BNC: Tensor,
    probe_BC: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    eps: float,
    *,
    rms: bool = False,
    output: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """LayerNorm or RMSNorm whose backward hands the score of removing each channel to a probe.

    The result is that of ``torch.nn.functional.layer_norm`` or ``rms_norm`` over the last
    dimension. ``probe_BC`` is never read; after ``backward`` its gradient is the ``score`` of
    ``norm_score``. Differentiable once, w.r.t. ``x_BNC`` and ``probe_BC``.

    Args:
        x_BNC: input of the norm, ``(B, N, C)``, fp32/fp64/bf16/fp16, any layout.
        probe_BC: any numbers, ``(B, C)``, fp64 for fp64 inputs and else fp32.
        weight_C: scale of each channel, ``(C,)`` of the dtype of ``x_BNC``, or None for 1; frozen.
        bias_C: shift of each channel, or None for 0; frozen.
        eps: added to the variance.
        rms: RMSNorm, else LayerNorm.
        output: count the channel's own output in the score.
        backend: implementation of the backward, see ``norm_score``.

    Returns:
        ``(B, N, C)`` of the dtype of ``x_BNC``, contiguous.

    Raises:
        TypeError: an argument is not a tensor.
        InvalidInput: shapes, dtypes or devices disagree, ``eps`` is negative, or the weight or the
            bias wants a gradient, which scoring never computes.
        BackendUnavailable: ``backend`` was named and cannot run here; the message says why.
    """
    op = "scored_norm"
    _check(op, x_BNC, weight_C, bias_C, eps)
    batch, _, channels = x_BNC.shape
    why = ", one number per sample and channel of x_BNC"
    check_wide(op, "probe_BC", probe_BC, (batch, channels), why, "x_BNC", x_BNC)
    if torch.is_grad_enabled():
        for name, value in (("weight_C", weight_C), ("bias_C", bias_C)):
            trained = value is not None and value.requires_grad
            rule = "be frozen by requires_grad_(False)"
            _checks.require(not trained, op, name, rule, "one that wants a gradient")
    chosen = choose("norm_score", x_BNC, backend)
    return _scored(x_BNC, probe_BC, weight_C, bias_C, eps, rms, output, chosen)
