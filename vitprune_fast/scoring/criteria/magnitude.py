"""Norms of the weights that make a unit, or of all that go with it; no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...errors import InvalidInput
from ...structure import Structure
from ...structure.axes import Axis
from ...structure.paths import get
from ..criterion import Criterion

# the power that is summed; the first is what `score` takes unless told otherwise
NORMS = {"group": 2, "l1": 1, "l2": 2}


def magnitude(
    model: nn.Module, structure: Structure, axes: Sequence[Axis], norm: str = "group"
) -> Mapping[str, Tensor]:
    """``(sum |w|^p) ** (1/p)`` over weights of a unit; biases, norms and LayerScale are left out.

    ``l1`` (p = 1) and ``l2`` (p = 2) are taken over the rows that produce the unit, as Li et al.
    (2017, arXiv:1608.08710, section 3.1) do with the filters that produce a feature map:

    =========  =============================================================================
    head       its rows of the query, key and value matrices (and of attention's gate)
    qk_dim     its row of the query and of the key matrix; of every head where a q/k norm shares it
    v_dim      its row of the value matrix (and of attention's gate)
    neuron     its row of fc1; of the gate and of the value half or matrix in a gated MLP; and its
               filter where it has a depthwise one
    embed      its row in everything that writes into the channel: patch embedding, proj, fc2; of
               keys and values that are reduced in a width of their own, the reduction
    =========  =============================================================================

    ``group`` (p = 2) is taken over every weight that goes when the unit goes, the columns that read
    it included (dependency groups as in Fang et al. 2023, arXiv:2301.12900): for a head also its
    columns of proj, for a neuron its column of fc2, for an embedding channel also its entry of the
    tokens and the position embedding and its column in everything that reads the stream.

    Branches and blocks have no rows of their own: with every norm it is taken over all weight
    matrices in the branch or block.

    Args:
        model: a supported model.
        structure: of the model.
        axes: of the structure, of any unit kind.
        norm: ``"l1"``, ``"l2"`` or ``"group"``.

    Returns:
        axis name -> (units,) fp32, >= 0; summed in fp64, deterministic.

    Raises:
        InvalidInput: a weight is not finite.
    """
    p = NORMS[norm]
    sums = {axis.name: torch.zeros(axis.size, dtype=torch.float64) for axis in axes}
    for name, layout in structure.tensors.items():
        if len(layout) < 2 or name in structure.buffers:
            continue
        powers = get(model, name).detach().double().cpu().abs() ** p
        if not powers.isfinite().all():
            raise InvalidInput(f"score: model must have finite weights, got NaN or Inf in {name}")
        for axis in axes:
            for unit, branches in enumerate(structure.held(axis)):
                if name.startswith(tuple(f"{branch}." for branch in branches)):
                    sums[axis.name][unit] += powers.sum()
            for at, dim in enumerate(layout if norm == "group" else layout[:1]):
                owner = torch.from_numpy(dim.owners(axis))
                if (owner >= 0).any():
                    line = powers.sum(dim=[d for d in range(powers.ndim) if d != at])
                    sums[axis.name].index_add_(0, owner[owner >= 0], line[owner >= 0])
    return {name: (total ** (1 / p)).float() for name, total in sums.items()}


CRITERION = Criterion(
    of_weights=lambda asked: magnitude(asked.model, asked.structure, asked.axes, asked.reduction),
    reductions=tuple(NORMS),
    classes=False,
)
