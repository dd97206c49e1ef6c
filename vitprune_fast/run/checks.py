"""What a step must prove about its own result before the run goes on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitprune_fast import planning, surgery
from vitprune_fast.batches import as_input, logits_of
from vitprune_fast.errors import StageFailed
from vitprune_fast.modules.modes import evaluating
from vitprune_fast.randomness import generator
from vitprune_fast.saved_models import load
from vitprune_fast.structure import describe

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Allowed difference of masked and pruned logits, relative to max(1, max |logits|)."""
HALF_PRECISION_ROUNDINGS = 8
"""The same in half precision, in units of the dtype's eps.

Products accumulate wider than they are stored, so what differs is where a stored value falls: by
eps / 2 for each branch added to the residual stream, with either sign. The 48 branches of 24 blocks
make sqrt(48) / 2 = 3.5 eps of that; 8 is twice as much.
"""


SHORT_OF_GOAL = 0.01
"""Share of the way to their budget that learned gates may fall short of, on either side of which
the last small steps leave them."""


@dataclass(frozen=True)
class Check:
    """One claim, whether it holds, and what was measured."""

    name: str
    holds: bool
    measured: str


def require(stage: str, checks: Iterable[Check]) -> list[dict[str, Any]]:
    """The checks as plain values.

    Raises:
        StageFailed: naming every check that does not hold.
    """
    checks = list(checks)
    failed = [f"{check.name} ({check.measured})" for check in checks if not check.holds]
    if failed:
        raise StageFailed(f"run: step {stage} failed its own check: {'; '.join(failed)}")
    return [asdict(check) for check in checks]


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (B, classes) in evaluation mode, of images on any device and in any floating dtype.

    The modes of the model come back as they were.
    """
    with evaluating(model):
        return logits_of(model(as_input(model, images)))


def tolerance(dtype: torch.dtype) -> float:
    """Allowed difference of masked and pruned logits, relative to max(1, max |logits|)."""
    return TOLERANCE.get(dtype) or HALF_PRECISION_ROUNDINGS * torch.finfo(dtype).eps


def finite(model: nn.Module, images: Tensor) -> Check:
    """All logits on these images are finite."""
    bad = int((~torch.isfinite(logits(model, images))).sum())
    return Check("logits are finite", bad == 0, f"{bad} of them are not")


def same_cost(predicted: Any, counted: Any) -> Check:
    """The planner's closed form equals what the built model really costs, exactly."""
    wanted = (int(predicted.params), int(predicted.macs))
    got = (int(counted.params), int(counted.macs))
    return Check(
        "predicted cost equals counted cost",
        wanted == got,
        f"predicted {wanted[0]:,} params and {wanted[1]:,} MACs, counted {got[0]:,} and {got[1]:,}",
    )


def fewer_macs(student: nn.Module, dense: nn.Module) -> Check:
    """The student costs fewer multiply-accumulates than the dense model."""
    own, whole = planning.cost(student).macs, planning.cost(dense).macs
    return Check("student costs fewer MACs", own < whole, f"{own:,} of the dense model's {whole:,}")


def within_budget(counted: Any, limits: Mapping[str, int]) -> list[Check]:
    """The built model meets the budget that was asked for (shares of units are no limits)."""
    return [
        Check(
            f"{measure} are within the budget",
            getattr(counted, measure) <= limit,
            f"{getattr(counted, measure):,} of {limit:,}",
        )
        for measure, limit in limits.items()
    ]


def reached(start: float, end: float, goal: float) -> Check:
    """Learned gates came down from one share of the multiply-accumulates to their goal."""
    holds = end <= goal + max(start - goal, 0) * SHORT_OF_GOAL
    measured = f"{start:.1%} of the MACs at first, {end:.1%} in the end, goal {goal:.1%}"
    advice = "" if holds else ", which more gate-epochs or a larger gate-lr come nearer to"
    return Check("gates reach the budget", holds, measured + advice)


def untouched(before: Mapping[str, str], after: Mapping[str, str]) -> Check:
    """The weights of all teachers, by name, are what they were before the training."""
    changed = [name for name, weights in before.items() if after[name] != weights]
    return Check(
        "teachers are untouched",
        not changed,
        f"{', '.join(changed or before)}: {'changed' if changed else 'same weights'}",
    )


def masked_equals_pruned(dense: nn.Module, pruned: nn.Module, plan: Any, images: Tensor) -> Check:
    """Removing the units equals silencing them, up to rounding."""
    with surgery.mask(dense, plan):
        wanted = logits(dense, images)
    # in fp64, so that the comparison itself rounds nothing
    difference = float((wanted.double() - logits(pruned, images).double()).abs().max())
    limit = tolerance(wanted.dtype) * max(1.0, float(wanted.abs().max()))
    # a NaN compares false, so it fails here too
    return Check(
        "masked model equals pruned model",
        difference <= limit,
        f"largest difference {difference:.3g}, allowed {limit:.3g}",
    )


def reloads(model: nn.Module, folder: Path, images: Tensor) -> Check:
    """The model saved in `folder` gives the same bits as the one in memory."""
    same = torch.equal(logits(load(folder).to(images.device), images), logits(model, images))
    return Check("saved model reloads bit-equal", same, "logits differ" if not same else "equal")


def prune_and_prove(dense: nn.Module, plan: Any, images: Tensor) -> tuple[nn.Module, list[Check]]:
    """The pruned model in evaluation mode, and what was checked about it on these images."""
    pruned = surgery.prune(dense, plan).eval()
    return pruned, [
        same_cost(planning.predict_cost(describe(dense), plan), planning.cost(pruned)),
        finite(pruned, images),
        masked_equals_pruned(dense, pruned, plan, images),
    ]


def random_images(model: nn.Module, count: int = 4) -> Tensor:
    """Normally distributed images (count, C, H, W), always the same.

    They have the model's input size, device and dtype.
    """
    size = describe(model).input_size
    return as_input(model, torch.randn(count, *size, generator=generator(0, "probe")))
