"""What a criterion is: how it measures, and what for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from ..registry import named, names
from ..structure import Axis, Structure
from ..target_loss import TargetLoss
from .scores import MeasureBatch
from .stream import ScoreBatch
from .taylor import PathChoice, scorer

FOLDER = "scoring/criteria"


@dataclass(frozen=True)
class Asked:
    """What a criterion gets: the model, the axes, and the arguments of ``score`` it may read.

    Attributes:
        model: computes in the dtype asked for.
        structure: of the model.
        axes: whose units are scored.
        reduction: one of the criterion's.
        seed: of labels that are drawn.
        draws: labels drawn per sample.
        candidates: units left out at once.
        loss_scale: the loss is multiplied by it, and the scores divided.
        path: how gradients of units are taken.
        cuda_graph: whether a step is replayed.
        loss: what outputs and targets are compared by.
        features: outputs are features, whose targets are drawn around them.
    """

    model: nn.Module
    structure: Structure
    axes: Sequence[Axis]
    reduction: str
    seed: int = 0
    draws: int = 1
    candidates: int = 32
    loss_scale: float | None = None
    path: PathChoice = "auto"
    cuda_graph: bool = False
    loss: TargetLoss = field(default_factory=partial(TargetLoss.of, "score", None))
    features: bool = False


Measure = Callable[[Asked], AbstractContextManager[ScoreBatch]]


@dataclass(frozen=True)
class Criterion:
    """How much a unit matters.

    Attributes:
        measure: gives, for as long as its context lasts, a function from the images, the labels and
            the place of the first sample of a micro-batch to rows: axis name -> (samples, units),
            one for each label drawn. Sums over samples, memory, processes and resuming are none of
            its business.
        of_weights: for a criterion without data: axis name -> (units,).
        reductions: how rows can become one number per unit, its own first.
        gradients: whether it differentiates: float16 then needs a loss scale, and 16 bits are
            compared with float32 on the first samples.
        classes: whether it needs a model that tells classes apart, unless a loss or features are
            asked for.
        targets: whether it reads labels or other targets, so that a loss may be given.
        features: whether it can judge features, by what it draws or by their distance.
        numbers: of a row for each unit: its columns are (numbers, units).
        combine: from the means of the numbers over the samples (numbers, units), fp64, to (units,);
            None where there is one number.
    """

    measure: Measure | None = None
    of_weights: Callable[[Asked], Mapping[str, Tensor]] | None = None
    reductions: tuple[str, ...] = ("mean",)
    gradients: bool = False
    classes: bool = True
    targets: bool = False
    features: bool = False
    numbers: int = 1
    combine: Callable[[Tensor], Tensor] | None = None

    @property
    def combined(self) -> Callable[[Tensor], Tensor] | None:
        """``combine`` of the means of one axis side by side, (numbers * units,)."""
        combine = self.combine
        if combine is None:
            return None
        return lambda means: combine(means.view(self.numbers, -1))


def by_forwards(build: Callable[[Asked], MeasureBatch]) -> Measure:
    """The ``measure`` of a criterion that runs forward only, once for every micro-batch.

    Args:
        build: gives the function from images, and what came with them, to rows.
    """

    @contextmanager
    def measuring(asked: Asked) -> Iterator[ScoreBatch]:
        measure = build(asked)
        yield lambda images, given, first: [measure(images, given)]

    return measuring


def by_gradients(*, drawn_labels: bool = False) -> Measure:
    """The ``measure`` of a criterion made of g, the derivative of a sample's loss by a unit's gate.

    Args:
        drawn_labels: of labels drawn from the model's prediction, not of those given.
    """

    def measuring(asked: Asked) -> AbstractContextManager[ScoreBatch]:
        return scorer(
            asked.model,
            asked.structure,
            asked.axes,
            path=asked.path,
            per_token=asked.reduction == "token_abs",
            loss_scale=asked.loss_scale,
            loss=asked.loss,
            drawn=(asked.seed, asked.draws) if drawn_labels or asked.features else None,
            features=asked.features,
            cuda_graph=asked.cuda_graph,
        )

    return measuring


def criterion_names() -> list[str]:
    """The names of all criteria."""
    return names(FOLDER)


def criterion_named(name: str) -> Criterion:
    """The criterion of that name; KeyError where there is none."""
    return named(FOLDER, name, "CRITERION")
