"""``importance_scores`` for ``torch.nn.utils.prune``, made of scores of units."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..bare import bare
from ..errors import InvalidInput
from ..scoring import Scores
from ..structure import Structure, describe
from ..structure.paths import get

__all__ = ["importance_scores"]


def importance_scores(
    model: nn.Module, scores: Scores, structure: Structure | None = None
) -> dict[tuple[nn.Module, str], Tensor]:
    """Every weight entry gets the score of the unit it belongs to.

    All entries of a unit have the same importance, so unstructured pruning masks whole units, the
    least important first, and splits at most one unit per call. An entry of several units (the row
    of a neuron and the column of an embedding channel) is of no use without any of them and has the
    smallest of their scores; an entry of none is never pruned.

    Args:
        model: whose weights are to be pruned; only read.
        scores: of :func:`vitprune_fast.score` or of an integration.
        structure: of the model; None finds it.

    Returns:
        (module, name of its weight) -> fp32 tensor of the weight's shape, on its device, for all
        matrices that hold a scored unit, in model order: the arguments ``importance_scores`` and
        ``parameters`` of ``prune.global_unstructured``. Biases and norms are left out: a head or
        neuron whose outgoing weights are masked contributes nothing.

    Raises:
        InvalidInput: scores of another model, or of units that own no weights.
        UnsupportedArchitecture: the model has no layout.
    """
    model = bare("importance_scores", model)
    structure = describe(model) if structure is None else structure
    scores.check_of("importance_scores", structure)
    axes = [structure.axes[name] for name in scores]
    found: dict[tuple[nn.Module, str], Tensor] = {}
    for path, weight in model.named_parameters():
        layout = structure.tensors.get(path, ())
        if len(layout) < 2:
            continue
        parent, _, name = path.rpartition(".")
        importance = torch.full(weight.shape, torch.inf, dtype=torch.float64)
        for axis in axes:
            values = torch.cat([scores.ranking(axis.name), torch.tensor([torch.inf]).double()])
            for at, dim in enumerate(layout):
                # -1, no unit of this axis, reads the infinity at the end
                own = values[torch.from_numpy(dim.owners(axis))]
                shape = [-1 if d == at else 1 for d in range(weight.ndim)]
                importance = importance.minimum(own.view(shape))
        if importance.isfinite().any():
            found[get(model, parent), name] = importance.to(weight.device, torch.float32)
    if not found:
        raise InvalidInput(
            "importance_scores: scores must be of units that own weights, "
            f"got those of {', '.join(sorted({axis.kind for axis in axes})) or 'nothing'}"
        )
    return found
