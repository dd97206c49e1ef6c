"""What can the model do without: scores of its units."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from ..errors import InvalidInput
from ..structure import Axis, Structure, describe
from .magnitude import NORMS, magnitude
from .scores import Accumulator, Scores
from .taylor import accumulate

__all__ = ["Scores", "score"]

CRITERIA = ("taylor", "magnitude")


def score(
    model: nn.Module,
    batches: Iterable[Sequence[Any]] | None = None,
    criterion: Literal["taylor", "magnitude"] = "taylor",
    units: Sequence[str] = ("head", "neuron"),
    reduction: Literal["abs", "square", "signed"] = "abs",
    per_sample: bool = False,
    norm: Literal["l1", "l2"] = "l2",
) -> Scores:
    """How much the loss would change without each unit.

    ``taylor``: with g(b, u) the sum over tokens and the unit's dims of activation x gradient of the
    summed cross-entropy, exact for every sample from one batched backward with frozen weights.
    ``magnitude``: the norm of all weights that go with the unit; needs no data.

    Dropout and drop path are off. The model comes back exactly as it was, also after an error.

    Args:
        model: a supported model.
        batches: yields (images (B, C, H, W) floating, labels: B integers, ...); images go to the
            device and dtype of the model. Not needed for ``magnitude``.
        criterion: ``"taylor"`` or ``"magnitude"``.
        units: unit kinds to score. ``taylor`` scores ``head``, ``v_dim`` and ``neuron``.
        reduction: of the samples, for ``taylor``: ``abs`` = mean |g|, ``square`` = mean g^2,
            ``signed`` = mean g.
        per_sample: keep g itself, as ``.per_sample[axis]`` (samples, units) fp32.
        norm: for ``magnitude``: ``"l1"`` or ``"l2"``.

    Returns:
        Scores in fp32. Reduced per sample in fp32, summed over samples in fp64 in stream order:
        the same batches give the same bits.

    Raises:
        InvalidInput: an argument or a batch has a value that cannot be used, or ``taylor`` is
            asked for inside ``torch.inference_mode()``.
        UnsupportedArchitecture: the model has no layout.
    """
    structure = describe(model)
    axes = scored_axes(structure, units, criterion)
    provenance = {"model": structure.family, "torch": torch.__version__}
    if criterion == "magnitude":
        if norm not in NORMS:
            raise InvalidInput(f"score: norm must be one of {', '.join(NORMS)}, got {norm!r}")
        return Scores(
            magnitude(model, structure, axes, norm), criterion, norm, 0, provenance=provenance
        )
    if batches is None:
        raise InvalidInput("score: batches must be given for the criterion 'taylor', got None")
    accumulator = Accumulator(reduction, per_sample)
    accumulate(model, structure, batches, axes, accumulator)
    return accumulator.result(criterion, provenance)


def scored_axes(structure: Structure, units: Sequence[str], criterion: str) -> list[Axis]:
    """The axes of the asked unit kinds, in model order.

    Raises:
        InvalidInput: the criterion is unknown, or cannot score one of the kinds.
    """
    if criterion not in CRITERIA:
        raise InvalidInput(
            f"score: criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}"
        )
    if isinstance(units, str) or not units:
        raise InvalidInput(
            f"score: units must be a list of unit kinds such as ('head', 'neuron'), got {units!r}"
        )
    axes = [axis for kind in dict.fromkeys(units) for axis in structure.units(kind)]
    scorable = (
        structure.taps
        if criterion == "taylor"
        else {
            axis.name: axis
            for axis in structure.axes.values()
            # whole branches and blocks own no entries of a tensor
            if axis.kind not in ("attn_branch", "mlp_branch", "block")
        }
    )
    if unscored := sorted({axis.kind for axis in axes if axis.name not in scorable}):
        kinds = dict.fromkeys(structure.axes[name].kind for name in scorable)
        raise InvalidInput(
            f"score: units must be among {', '.join(kinds)} for the criterion {criterion!r}, "
            f"got {unscored[0]!r}"
        )
    if not axes:
        raise InvalidInput(
            f"score: model must have units of the kinds {', '.join(units)}, got one without any"
        )
    order = list(structure.axes)
    return sorted(axes, key=lambda axis: order.index(axis.name))
