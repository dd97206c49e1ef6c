"""Variance of what a neuron puts out, over all tokens of all images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...batches import as_input
from ...errors import InvalidInput
from ...modules.modes import evaluating
from ...modules.swap import Altered
from ...structure.paths import get
from ..criterion import Asked, Criterion, by_forwards
from ..scores import MeasureBatch, Rows


def build(asked: Asked) -> MeasureBatch:
    """Gives the means of x and of x^2 over the tokens, x what fc2 reads of a neuron.

    A neuron that hardly varies can be replaced by its mean. Source: VBP, ICCV 2025
    (arXiv:2507.12988).
    """
    if other := [axis.kind for axis in asked.axes if axis.kind != "neuron"]:
        raise InvalidInput(
            f"score: units must be neurons for the criterion 'variance', got {other[0]!r}"
        )
    modules = {a.name: get(asked.model, asked.structure.taps[a.name].module) for a in asked.axes}

    def measure(images: Tensor, labels: Tensor | None) -> Rows:
        rows: dict[str, Tensor] = {}

        def note(name: str, x: Tensor) -> None:
            x = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(1, -2)
            rows[name] = torch.cat([x.mean(1), x.square().mean(1)], dim=1)

        with evaluating(asked.model), torch.no_grad(), Altered() as altered:
            for name, module in modules.items():

                def before(_: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
                    note(name, inputs[0])

                altered.before(module, before)
            asked.model(as_input(asked.model, images))
        return rows

    return measure


CRITERION = Criterion(
    by_forwards(build),
    classes=False,
    numbers=2,
    combine=lambda means: means[1] - means[0].square(),
)
