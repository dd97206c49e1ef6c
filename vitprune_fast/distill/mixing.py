"""timm's mixup, CutMix and random erasing, drawn from the seed and the number of the batch.

timm draws from the global generators of numpy, Python and torch; these are set from a seed and a
number for the duration of a call, so that any step can be repeated.
"""

from __future__ import annotations

import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from vitprune_fast.config.distill import DistillConfig
from vitprune_fast.randomness import seeded
from vitprune_fast.transfer import sent


class Mixing(Mixup):
    """Mixes image b with image B - 1 - b, and their labels, in one proportion per batch.

    Sources: Zhang et al., "mixup", ICLR 2018 (arXiv:1710.09412), section 2; Yun et al., "CutMix",
    ICCV 2019 (arXiv:1905.04899), eq. 1 and 2; Zhong et al., "Random Erasing Data Augmentation",
    AAAI 2020 (arXiv:1708.04896), algorithm 1, which comes first, as in DeiT.

    Args:
        config: how much of what, and the seed.
        num_classes: of the student; None where nothing is mixed.
    """

    def __init__(self, config: DistillConfig, num_classes: int | None) -> None:
        super().__init__(
            config.mixup,
            config.cutmix,
            prob=config.mix_prob,
            switch_prob=config.switch_prob,
            # the loss smooths
            label_smoothing=0.0,
            num_classes=num_classes or 0,
        )
        self._config = config

    def varied(self, number: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Erase and mix a batch.

        Args:
            number: of the batch in the training; with the seed all that the result depends on.
            images: ``(B, C, H, W)`` floating, normalised, left as they are.
            labels: ``(B,)`` int64 on any device; one without a class is mixed as the nearest one.

        Returns:
            New images in their dtype, and where they are mixed, shares ``(B, C)`` fp32 of labels on
            their device. The last image of an odd batch is not mixed.
        """
        config, images = self._config, images.clone()
        if config.erase:
            erasing = RandomErasing(config.erase, mode="pixel", device=str(images.device))
            with seeded(config.seed, "erase", number):
                images = erasing(images)
        if not config.mixes:
            return images, labels
        labels = sent(labels.clamp(0, self.num_classes - 1), images.device)
        even = len(images) // 2 * 2
        with seeded(config.seed, "mix", number):
            # in place
            _, shares = self(images[:even], labels[:even])
        return images, torch.cat([shares, mixup_target(labels[even:], self.num_classes)])

    def _params_per_batch(self) -> tuple[float, bool]:
        share, cuts = super()._params_per_batch()
        larger = cuts and self._config.cutmix_larger
        return (max(share, 1 - share) if larger else share), cuts
