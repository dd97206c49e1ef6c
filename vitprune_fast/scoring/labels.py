"""Targets drawn from the model's own prediction, for Fisher scores."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..randomness import derive_seed, normals, uniforms


def label_numbers(seed: int, first: int, count: int, draws: int) -> Tensor:
    """The random numbers behind the labels of some samples.

    Args:
        seed: of the scoring.
        first: place of the first sample in the stream.
        count: samples.
        draws: labels per sample.

    Returns:
        ``(count, draws)`` fp64 in [0, 1). A number depends on the seed and on the place of its
        sample in the stream alone, so another cut of the stream into batches draws the same labels.
    """
    places = np.arange(first, first + count)
    return torch.from_numpy(uniforms(derive_seed(seed, "fisher labels"), places, draws))


def feature_numbers(seed: int, first: int, count: int, draws: int, size: int) -> Tensor:
    """The noise that makes targets of features: ``(count, draws, size)`` fp64, standard normal.

    As :func:`label_numbers`; ``size`` are the numbers of one sample's features.
    """
    places = np.arange(first, first + count)
    drawn = normals(derive_seed(seed, "fisher features"), places, draws * size)
    return drawn.view(count, draws, size)


def draw_labels(logits_BC: Tensor, numbers: Tensor) -> list[Tensor]:
    """Labels ``y ~ softmax(logits)``, by the inverse of the cumulated probabilities in fp64.

    Args:
        logits_BC: ``(B, C)``, floating.
        numbers: ``(B, draws)`` fp64 in [0, 1), from :func:`label_numbers`.

    Returns:
        ``draws`` times ``(B,)`` int64. Deterministic; nothing waits for the device.
    """
    with torch.no_grad():
        steps_BC = logits_BC.double().softmax(1).cumsum(1)
        # the last step is 1 up to rounding only, and a number above it must not fall off the end
        heights = numbers * steps_BC[:, -1:]
        labels = [(steps_BC <= column[:, None]).sum(1) for column in heights.T]
    # a sample without a finite prediction gets some class; its scores are set aside anyway
    return [each.clamp(max=logits_BC.shape[1] - 1) for each in labels]
