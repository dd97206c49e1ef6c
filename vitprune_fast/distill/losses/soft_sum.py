"""The same as soft, summed over images.

So in UP-ViT's code, whose weight therefore grows with the batch: its ``CE + 0.2 * soft_sum`` is 1.2
times the loss of ``alpha = 1 / 6``.
"""

from __future__ import annotations

from vitprune_fast.distill.losses.soft import Soft


class SoftSum(Soft):
    """``soft`` divided by nothing."""

    reduction = "sum"
