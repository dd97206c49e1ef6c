"""Make a model behave as if pruned, without building the smaller one: the reference for surgery."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from ..bare import bare
from ..modules.norms import kept_by, norm_over_kept
from ..modules.swap import Altered, silence
from ..planning.plan import Plan
from ..structure import Structure, describe
from ..structure.paths import get
from ..structure.reading import Reading


@contextmanager
def mask(model: nn.Module, plan: Plan) -> Iterator[nn.Module]:
    """Inside the context ``model`` computes what the pruned model would.

    A masked unit contributes nothing: its entries are set to zero (so NaN or Inf in them has no
    effect), and every normalisation that runs over its axis takes its statistics over the kept
    units, with the original eps. A removed branch adds nothing, not even its bias.

    The tensors are exchanged, not multiplied: what is written into masked parameters inside the
    context is lost, and on leaving it, also by an exception, the model is bit for bit what it was.
    Code that was compiled runs as it is written. A mask inside a mask keeps what both keep.

    Args:
        model: a supported model.
        plan: made for this model.

    Raises:
        InvalidInput: the plan belongs to another model, or cuts the axis of a norm with a forward
            of its own.
    """
    inner = bare("mask", model)
    with masked_by(inner, describe(inner), plan):
        yield model


@contextmanager
def masked_by(model: nn.Module, structure: Structure, plan: Plan) -> Iterator[None]:
    """As :func:`mask`, by a table that is given."""
    plan = plan.check(structure)
    reading = Reading(structure, plan)
    with Altered() as altered:
        # what is made now may meet gradients later, whatever the mode of the caller
        with torch.inference_mode(False), torch.no_grad():
            for names in _names_of_tensors(structure, plan):
                tensor = get(model, names[0])
                masked = tensor.data
                for axis, size in enumerate(tensor.shape):
                    # what one place of a tied tensor has lost another may still need
                    kept = [reading.kept_positions(structure.tensors[name][axis]) for name in names]
                    lost = np.setdiff1d(np.arange(size), np.concatenate(kept))
                    if len(lost):
                        positions = torch.from_numpy(lost).to(tensor.device)
                        masked = masked.index_fill(axis, positions, 0)
                if masked is not tensor.data:
                    altered.callback(setattr, tensor, "data", tensor.data)
                    tensor.data = masked
            for path, dim in structure.norms.items():
                kept = reading.kept_positions(dim)
                if len(kept) < dim.length():
                    norm = get(model, path)
                    is_kept = torch.zeros(dim.length(), dtype=torch.bool)
                    is_kept[torch.from_numpy(kept)] = True
                    outer = kept_by("mask", path, norm)
                    both = is_kept if outer is None else is_kept & outer
                    altered.exchange(norm, norm_over_kept, norm, both)
        for write in structure.writes():
            if write.name in plan.removed:
                silent = get(model, write.output)
                altered.after(silent, silence)
        yield


def _names_of_tensors(structure: Structure, plan: Plan) -> list[list[str]]:
    """The names of every tensor; of a tied one without those in branches that are silenced."""
    silenced = tuple(f"{branch}." for branch in plan.removed)
    names: dict[str, list[str]] = {}
    for name in structure.tensors:
        if not (structure.is_tied(name) and name.startswith(silenced)):
            names.setdefault(structure.ties.get(name, name), []).append(name)
    return list(names.values())
