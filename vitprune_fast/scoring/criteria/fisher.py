"""Diagonal of the Fisher information: g^2 with labels drawn from the model's prediction."""

from __future__ import annotations

from contextlib import AbstractContextManager

from ..criterion import Asked, Criterion
from ..stream import ScoreBatch
from ..taylor import scorer


def measure(asked: Asked) -> AbstractContextManager[ScoreBatch]:
    """Twice the second-order term of the KL divergence to the model without the unit."""
    return scorer(
        asked.model,
        asked.structure,
        asked.axes,
        path=asked.path,
        loss_scale=asked.loss_scale,
        fisher=(asked.seed, asked.draws),
        cuda_graph=asked.cuda_graph,
    )


CRITERION = Criterion(measure, reductions=("square",), gradients=True)
