"""Group magnitude: the norm of every weight that goes with a unit. Needs no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..structure import Structure
from ..structure.axes import Axis
from ..structure.index import Index
from ..structure.paths import get

NORMS = {"l1": 1, "l2": 2}


def magnitude(
    model: nn.Module, structure: Structure, axes: Sequence[Axis], norm: str
) -> Mapping[str, Tensor]:
    """``(sum |w|^p) ** (1/p)`` over all weight matrices' entries that a unit owns, p = 1 or 2.

    A head owns its rows of qkv and its columns of proj, a neuron its row of fc1 and its column of
    fc2 (Li et al. 2017, arXiv:1608.08710, applied to dependency groups as in Fang et al. 2023,
    arXiv:2301.12900). Biases and norms are left out.

    Returns:
        axis name -> (units,) fp32, >= 0; summed in fp64, deterministic.
    """
    index = Index(structure, {})
    p = NORMS[norm]
    sums = {axis.name: torch.zeros(axis.size, dtype=torch.float64) for axis in axes}
    for name, layout in structure.tensors.items():
        if len(layout) < 2 or name in structure.buffers:
            continue
        powers = None
        for axis in axes:
            for at, dim in enumerate(layout):
                owner = torch.from_numpy(index.owners(dim, axis))
                if (owner < 0).all():
                    continue
                if powers is None:
                    powers = get(model, name).detach().double().cpu().abs() ** p
                others = [d for d in range(powers.ndim) if d != at]
                line = powers.sum(dim=others)
                sums[axis.name].index_add_(0, owner[owner >= 0], line[owner >= 0])
    return {name: (total ** (1 / p)).float() for name, total in sums.items()}
