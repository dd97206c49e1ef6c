"""Oracle of ``ops.norm_score``."""

from __future__ import annotations

import torch
from torch import Tensor

from vitprune_fast.wide import wide_dtype


def norm_score(
    x_BNC: Tensor,
    grad_y_BNC: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    eps: float,
    rms: bool = False,
    output: bool = True,
) -> tuple[Tensor, Tensor]:
    """Gradient of the norm's input, and the derivative of the loss by a weight on each channel.

    The weights are 1; they enter the mean and the variance, and with ``output`` also multiply the
    result, so a weight of 0 is the channel removed. In fp64 for fp64 inputs, else in fp32.
    """
    dtype = wide_dtype(x_BNC)
    x, grad_y = x_BNC.to(dtype), grad_y_BNC.to(dtype)
    weight = 1.0 if weight_C is None else weight_C.to(dtype)
    bias = 0.0 if bias_C is None else bias_C.to(dtype)

    centred = x if rms else x - x.mean(2, keepdim=True)
    variance = centred.square().mean(2, keepdim=True)
    scale = (variance + eps).rsqrt()
    x_hat = centred * scale

    # the two row means of every backward of a norm: of grad x_hat * x_hat, and of grad x_hat
    grad_x_hat = grad_y * weight
    c1 = (grad_x_hat * x_hat).mean(2, keepdim=True)
    c2 = torch.zeros_like(c1) if rms else grad_x_hat.mean(2, keepdim=True)
    grad_x = (grad_x_hat - c2 - x_hat * c1) * scale

    # d mean / d weight_c = (x_c - mean) / C, d variance / d weight_c = ((x_c - mean)^2 - var) / C
    share = -x_hat * c2 - (x_hat.square() - variance * scale.square()) * c1 / 2
    if output:
        share = share + (x_hat * weight + bias) * grad_y
    return grad_x.to(x_BNC.dtype), share.sum(1)
