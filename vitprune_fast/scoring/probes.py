"""Probes: leaves of the graph whose gradients are the per-sample scores.

A probe holds one number per sample and unit. Nobody reads it: the operation it is handed to behaves
as if each unit were multiplied by a gate that is 1, and hands it the derivative by that gate when
the gradient passes. The first probe of a model is also the first tensor that requires a gradient,
so nothing below it is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..wide import wide_dtype


class Probes:
    """The probes of one batch at a time.

    Args:
        per_token: measure the mean over tokens of the magnitude of each token's term (the code of
            Michel et al. 2019), not the magnitude of their sum.
    """

    def __init__(self, per_token: bool = False):
        self.per_token = per_token
        self._leaves: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}

    def leaf(self, key: str, like: Tensor, *sizes: int) -> Tensor:
        """A new probe (B, *sizes) for units of ``like`` (B, ..., N, F); fp64 in fp64, else fp32."""
        self._tokens[key] = like.shape[-2] if like.ndim > 2 else 1
        probe = like.new_empty(len(like), *sizes, dtype=wide_dtype(like)).requires_grad_()
        self._leaves[key] = probe
        return probe

    def clear(self) -> None:
        """Forget the probes of the batch before."""
        self._leaves.clear()

    def __contains__(self, key: str) -> bool:
        """Whether the forward of this batch came by a place."""
        return key in self._leaves

    def readings(self, loss: Tensor, *, retain_graph: bool = False) -> dict[str, Tensor]:
        """Differentiate ``loss`` by every probe of the batch.

        Returns:
            probe key -> its gradient; zeros where the loss does not depend on the units.
        """
        leaves = list(self._leaves.values())
        gradients = torch.autograd.grad(
            loss, leaves, retain_graph=retain_graph, allow_unused=True, materialize_grads=True
        )
        found = dict(zip(self._leaves, gradients, strict=True))
        if self.per_token:
            return {key: gradient / self._tokens[key] for key, gradient in found.items()}
        return found


def tap(
    x: Tensor,
    probe: Tensor,
    group: int = 1,
    per_token: bool = False,
    part: tuple[int, int] | None = None,
    regrouped: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``x`` itself; the probe gets ``sum_n x * dx`` over tokens and ``group`` columns.

    Args:
        x: ``(B, ..., F)``; everything between is tokens.
        probe: ``(B, columns // group)``.
        group: columns that make one unit.
        per_token: add up magnitudes of the tokens' terms instead.
        part: the columns that count, ``[first, last)``; None takes all.
        regrouped: puts the columns of a unit side by side; None where they are.
    """
    columns = slice(None) if part is None else slice(*part)
    how = group, per_token, columns, regrouped
    return _Tap.apply(x, probe, *how)  # pyright: ignore[reportReturnType]


def tap_norm(
    y: Tensor, probe: Tensor, x: Tensor, norm: Any, *, rms: bool, eps: float, output: bool
) -> Tensor:
    """``y`` itself, the output of ``norm`` for ``x``; the probe gets the scores of its channels."""
    return _TapNorm.apply(  # pyright: ignore[reportReturnType]
        y, probe, x, norm.weight, getattr(norm, "bias", None), eps, rms, output
    )


def tap_bias(y: Tensor, probe: Tensor, bias: Tensor) -> Tensor:
    """``y`` itself; the probe (B, 1) gets ``sum_n bias . dy``."""
    return _TapBias.apply(y, probe, bias)  # pyright: ignore[reportReturnType]


def as_tokens(x: Tensor) -> Tensor:
    """``(B, ..., F)`` as (B, N, F): all that lies between counts as tokens."""
    return x.reshape(len(x), -1, x.shape[-1]) if x.ndim != 3 else x


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, probe: Tensor, *how: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.how = how
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,), (group, per_token, columns, regrouped) = ctx.saved_tensors, ctx.how
        x, grad = (as_tokens(each)[..., columns] for each in (x, grads[0]))
        if regrouped is not None:
            x, grad = regrouped(x), regrouped(grad)
        score = ops.taylor_score(x, grad, group, per_token=per_token)
        return grads[0], score, None, None, None, None


class _TapNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, probe: Tensor, x: Tensor, *how: Any) -> Tensor:
        weight, bias, *ctx.how = how
        ctx.save_for_backward(x, weight, bias)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x, *affine), (eps, rms, output) = ctx.saved_tensors, ctx.how
        # under autocast they differ
        dtypes = [each.dtype for each in (x, grads[0], *affine) if each is not None]
        wide = reduce(torch.promote_types, dtypes)
        weight, bias = (None if each is None else each.to(wide) for each in affine)
        columns = [as_tokens(each).to(wide) for each in (x, grads[0])]
        _, score = ops.norm_score(columns[0], columns[1], weight, bias, eps, rms=rms, output=output)
        return grads[0], score, *[None] * 6


class _TapBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, probe: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(bias)
        ctx.dtype = probe.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (bias,) = ctx.saved_tensors
        columns = as_tokens(grads[0]).sum(1, dtype=ctx.dtype)
        return grads[0], (columns * bias.to(ctx.dtype)).sum(1, keepdim=True), None
