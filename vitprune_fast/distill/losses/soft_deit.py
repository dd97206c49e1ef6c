"""The same as soft, mean over images and classes.

So in DeiT's code, which makes it C times weaker. NViT has it at T = 20 and without the factor T^2:
a weight w there is w / T^2 here.
"""

from __future__ import annotations

from vitprune_fast.distill.losses.soft import Soft


class SoftDeit(Soft):
    """``soft`` divided by the number of logits."""

    reduction = "numel"
