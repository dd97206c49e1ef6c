"""Judge a table: does it say of a model what scoring, masks, cost and surgery need to be right?

It uses scoring, masks, costs and surgery; none of them imports it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..bare import bare
from ..errors import InvalidInput
from ..modules.behaviour import check_behaviour
from ..structure import Structure, describe, families
from . import cuts, declared, scored
from .declared import Fault
from .drawn import randomise
from .report import Check, StructureReport
from .subject import Subject, sentence

__all__ = ["Check", "StructureReport", "check_structure"]


@torch.inference_mode(False)
def check_structure(
    model: nn.Module,
    structure: Structure | None = None,
    *,
    images: Tensor | None = None,
    seed: int = 0,
    plans: int = 2,
) -> StructureReport:
    """Whether a table is right, tried with random plans: what a family of one's own has to pass.

    Everything runs on a copy in float64 with random weights, in evaluation mode; the model is only
    read. The same arguments give the same report.

    * *layouts*: every parameter and buffer has a layout of its shape, tied ones are noted.
    * *declarations*: names are those of modules and tensors, sizes are what the model has, and the
      tensors of a Linear or a norm fit each other.
    * *keep all*: a plan that keeps everything changes no bit of the tensors and of the logits.
    * *cuts have an effect*: no unit is one that nothing reads; of a model with norms over a single
      channel, through which nothing passes, that is a finding too.
    * *cost of modules*: the table counts the MACs of every module as PyTorch does.
    * *masked is pruned*: max |difference of logits| <= 1e-12 max(1, max |logits|), for plans of
      every unit kind, ragged and even, for attention without q/k dims, for emptied and removed
      branches, and for mixtures.
    * *cost*: the predicted params and MACs of every plan are those counted on the pruned model.
    * *described again*: the family finds the sizes of the plan in the pruned model.
    * *twice is once*: a plan and then another one is the one plan that does both.
    * *readers*: a channel that is masked at the readers of its stream is masked altogether.
    * *scores*: Taylor scores are the central difference of the loss by a gate on the unit, which
      stands in the tensors and not at the tap, for every sample of some units of every axis. Of
      dims and neurons that reach no projection of a branch, and are no width of queries, it is
      only known that they can be scored.

    A plan that breaks is cut down to the axis that breaks it, and declarations are added for a try
    that may be missing there.

    Args:
        model: of any family, registered ones included; or of none, with ``structure``.
        structure: a table to be judged in place of the family's.
        images: (B, C, H, W) floating to try it with; None is noise of the size in the table.
        seed: of weights, images and plans.
        plans: how many of every kind.

    Returns:
        The report: ``.ok``, ``.failures``, and a table as ``str()``. What fails inside a check is a
        failure of it, with the sentence of the error. Left out are *described again* and *twice
        is once* of a model without a family, *cost* where *layouts* or *cost of modules* failed,
        and scores of a model that tells no classes apart.

    Raises:
        UnsupportedArchitecture: no table is given, and the model has no family or no layout.
        InvalidInput: the model computes by more than its classes, or another argument has a value
            that cannot be used.
    """
    if structure is not None and not isinstance(structure, Structure):
        raise InvalidInput(
            f"check_structure: structure must be a Structure, got {type(structure).__name__}"
        )
    if type(plans) is not int or plans < 1:
        raise InvalidInput(f"check_structure: plans must be a whole number >= 1, got {plans!r}")
    if type(seed) is not int:
        raise InvalidInput(f"check_structure: seed must be a whole number, got {seed!r}")
    model = bare("check_structure", model)
    check_behaviour(model, "check_structure")
    if images is not None and not (
        isinstance(images, Tensor) and images.ndim == 4 and images.is_floating_point()
    ):
        is_tensor = isinstance(images, Tensor)
        shown = f"{tuple(images.shape)} in {images.dtype}" if is_tensor else type(images).__name__
        raise InvalidInput(f"check_structure: images must be floating (B, C, H, W), got {shown}")
    structure = describe(model) if structure is None else structure
    model = copy.deepcopy(model).double().eval()
    report = _Report(model)
    report.add(
        "layouts",
        f"{len(structure.tensors)} tensors",
        lambda: declared.layout_faults(model, structure),
    )
    report.add(
        "declarations",
        f"{len(structure.attrs)} sizes, {len(structure.norms)} norms, "
        f"{len(structure.stream)} writes",
        lambda: declared.declaration_faults(model, structure),
    )
    try:
        subject, labels = _subject(model, structure, images, seed)
        drawn = cuts.drawn_plans(structure, seed, plans)
    # what a wrong table does to code that trusts it is not known
    except Exception as error:
        report.fail("runs", type(model).__name__, sentence(error))
        return report.result()
    report.add("keep all", "", lambda: cuts.keeping_all(subject))
    report.add(
        "cuts have an effect",
        f"{len(structure.axes)} axes",
        lambda: cuts.cuts_have_an_effect(subject),
    )
    report.add("cost of modules", "", lambda: cuts.costs_of_modules(subject))
    checks = [cuts.masked_is_pruned(subject)]
    if not report.failed("layouts", "cost of modules"):
        checks.append(cuts.costs_are_predicted(subject))
    if families.find(model) is not None:
        checks += [cuts.results_are_described(subject), cuts.twice_is_once(subject, seed)]
    cuts.try_plans(subject, drawn, checks)
    for check in checks:
        report.add(check.name, f"{len(drawn)} plans", lambda check=check: check.faults)
    report.add("readers", "", lambda: scored.readers_are_all(subject))
    if subject.full.ndim == 2 and subject.full.shape[1] > 1:
        report.add(
            "scores",
            f"{scored.UNITS} units of every axis",
            lambda: scored.scores_are_derivatives(subject, labels, seed),
        )
    return report.result()


def _subject(
    model: nn.Module, structure: Structure, images: Tensor | None, seed: int
) -> tuple[Subject, Tensor]:
    """The model with random weights, images for it, and a label for each."""
    randomise(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in structure.buffers:
            buffer = dict(model.named_buffers(remove_duplicate=False)).get(name)
            over = any(list(dim.axes) for dim in structure.tensors.get(name, ()))
            if buffer is not None and over and buffer.is_floating_point():
                # entries that are all alike would hide their order; none gets a smaller value
                noise = torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype)
                buffer.add_(noise.to(buffer.device))
    if images is None:
        images = torch.randn(2, *structure.input_size, generator=generator, dtype=torch.float64)
    subject = Subject(model, structure, images.to(next(model.parameters()).device).double())
    labels = torch.arange(len(images), device=subject.full.device) % subject.full.shape[-1]
    return subject, labels


class _Report:
    """Checks as they come in."""

    def __init__(self, model: nn.Module):
        self._model = type(model).__name__
        self._checks: list[Check] = []

    def add(self, name: str, tried: str, faults: Callable[[], Iterable[Fault]]) -> None:
        """Run one check; what it raises is a fault of its own."""
        found: list[Fault] = []
        try:
            for fault in faults():
                found.append(fault)
        except Exception as error:
            found.append(("", sentence(error)))
        for where, detail in found:
            self.fail(name, where, detail)
        if not found:
            self._checks.append(Check(name, "", True, tried))

    def fail(self, name: str, where: str, detail: str) -> None:
        """Note a fault."""
        self._checks.append(Check(name, where, False, detail))

    def failed(self, *names: str) -> bool:
        """Whether one of these checks found a fault."""
        return any(check.name in names and not check.passed for check in self._checks)

    def result(self) -> StructureReport:
        """All of them."""
        return StructureReport(self._model, tuple(self._checks))
