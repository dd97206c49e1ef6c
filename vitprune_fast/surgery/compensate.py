"""What `prune(calibration=)` replaces: projections fitted one by one on the dense model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..batches import as_input, checked
from ..errors import InvalidInput
from ..modules.modes import evaluating
from ..modules.swap import Altered
from ..planning.plan import Plan
from ..structure import Structure, describe, families
from ..structure.paths import get
from ..structure.reading import Reading
from ..structure.table import Write
from .folds import refuse_tied

# a smaller share of the mean square may be the rounding of activations in float32, no variance
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Calibration:
    """What the output projection of every branch reads, K numbers per token, over some images.

    Args:
        tokens: how many tokens were seen.
        means: branch -> their mean, ``(K,)``.
        grams: branch -> the mean of ``a a^T``, ``(K, K)``; empty where only means were asked for.
    """

    tokens: int
    means: dict[str, Tensor] = field(default_factory=dict)
    grams: dict[str, Tensor] = field(default_factory=dict)


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    grams: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Calibration:
    """Measure what the output projections of a model read, for ``compensate``.

    Deprecated with it.

    Args:
        model: a supported model, run in eval mode and without gradients; left as it was.
        batches: yields (images, labels); labels are not read. A few hundred images are enough when
            they have many more tokens than a branch has units.
        grams: also take the products of all pairs of units, which ``least_squares`` needs:
            K^2 numbers per branch (for ViT-B 75 MB in float64, for each of 12 MLPs).
        dtype: of the sums, float64 or float32. Products within a batch are summed in the dtype of
            the model, float32 at least.

    Returns:
        The Calibration, on the device of the model.

    Raises:
        InvalidInput: no batches, or activations that are not finite.
        UnsupportedArchitecture: the model has no layout.
    """
    if dtype not in (torch.float32, torch.float64):
        raise InvalidInput(f"calibrate: dtype must be float32 or float64, got {dtype}")
    structure = describe(model)
    num_images, tokens = 0, dict[str, int]()
    means: dict[str, Tensor] = {}
    products: dict[str, Tensor] = {}

    def measure(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        read = inputs[0].flatten(0, -2)
        read = read.to(torch.promote_types(read.dtype, torch.float32))
        tokens[name] = tokens.get(name, 0) + len(read)
        for sums, one in ((means, read.sum(0)), *([(products, read.T @ read)] if grams else [])):
            sums[name] = sums[name] + one.to(dtype) if name in sums else one.to(dtype)

    opened = families.opened(model, structure)
    with opened, evaluating(model), torch.no_grad(), Altered() as altered:
        for write in _projections(structure):
            hook = partial(measure, write.name)
            altered.before(get(model, write.projection), hook)
        for images, _ in checked("calibrate", batches, model):
            model(as_input(model, images))
            num_images += len(images)
    if not num_images:
        raise InvalidInput("calibrate: batches must hold at least one image, got none")
    for write in _projections(structure):
        if write.name not in means:
            raise InvalidInput(
                f"calibrate: model must call {write.projection} in its forward, got one that never "
                "did; take wrapped forwards off, or call torch.compiler.reset()"
            )
    for name, total in (*means.items(), *products.items()):
        if not total.isfinite().all():
            raise InvalidInput(
                f"calibrate: batches must give finite activations, got others in {name}"
            )
    return Calibration(
        max(tokens.values(), default=0),
        {name: total / tokens[name] for name, total in means.items()},
        {name: total / tokens[name] for name, total in products.items()},
    )


@dataclass(frozen=True)
class Compensated:
    """What compensation did to one branch.

    Args:
        branch: its module path.
        lost: error of its output where units are cut and nothing else: root of the mean square over
            tokens and channels, as a share of that of the output itself.
        left: the same after compensation; both are NaN without grams.
    """

    branch: str
    lost: float
    left: float


@contextmanager
def compensate(
    model: nn.Module,
    plan: Plan,
    calibration: Calibration,
    how: Literal["mean", "least_squares"] = "least_squares",
    ridge: float = 1e-3,
) -> Iterator[list[Compensated]]:
    """Inside the context, the output projections make up for the units that ``plan`` drops.

    Deprecated: ``vp.prune(model, plan, calibration=batches)`` keeps more (it fits what a branch
    reads as well, and makes up for the cuts before it); this goes with the next release.

    ``mean``: a dropped unit is replaced by its mean, which goes into the bias
    (``b + W_r mean(a_r)``). ``least_squares``: the kept columns are fitted so that the output
    changes least over the calibration images, with a ridge towards the old ones:
    ``W_k + W_r S_rk (S_kk + ridge * mean(diag S_kk) I)^-1``, S the covariance of what is read; the
    bias then matches the means. Solved in float64::

        calibration = vp.calibrate(model, batches)
        with vp.compensate(model, plan, calibration) as report:
            small = vp.prune(model, plan)

    The error reported is that on the calibration images, for a branch that reads what it read in
    the dense model: cuts before it are not taken into account. A branch without a bias gets no
    means; one whose units pass a norm before the projection is left alone, as the norm will read
    fewer of them.

    Reference: layer-wise least squares as in He et al., "Channel Pruning for Accelerating Very Deep
    Neural Networks", ICCV 2017 (arXiv:1707.06168), equation 4, from Gram matrices as in Frantar and
    Alistarh, "Optimal Brain Compression", NeurIPS 2022 (arXiv:2208.11580).

    Args:
        model: the dense model; its tensors are exchanged, and on leaving it is bit for bit what it
            was, also after an exception.
        plan: made for it.
        calibration: of it.
        how: one of the two above.
        ridge: >= 0, a share of the mean variance of the kept units.

    Yields:
        What was gained, branch by branch, for those of which units go.

    Raises:
        InvalidInput: an argument has a value that cannot be used, the calibration is of another
            model or has no grams, a projection is tied, or the fit has no solution (then a larger
            ridge has).
    """
    warnings.warn(
        "compensate: calibrate and compensate go with the next release; "
        "vp.prune(model, plan, calibration=batches) keeps more",
        DeprecationWarning,
        stacklevel=3,
    )
    if how not in ("mean", "least_squares"):
        raise InvalidInput(f"compensate: how must be mean or least_squares, got {how!r}")
    if not (isinstance(ridge, (int, float)) and 0 <= ridge < math.inf):
        raise InvalidInput(f"compensate: ridge must be a finite number >= 0, got {ridge!r}")
    structure = describe(model)
    plan = plan.check(structure)
    reading = Reading(structure, plan)
    report: list[Compensated] = []
    with ExitStack() as restore:
        for write in _projections(structure):
            assert write.inner is not None
            kept = torch.from_numpy(reading.kept_positions(write.inner))
            size = write.inner.length()
            if write.name in plan.removed or len(kept) == size:
                continue
            path = write.projection
            refuse_tied("compensate", structure, f"{path}.weight", f"{path}.bias")
            linear = get(model, path)
            mean = calibration.means.get(write.name)
            if mean is None or len(mean) != size:
                raise InvalidInput(
                    f"compensate: calibration must hold {size} means for {write.name}, got "
                    f"{'none' if mean is None else len(mean)}; calibrate this model"
                )
            gram = calibration.grams.get(write.name)
            if gram is None and how == "least_squares":
                raise InvalidInput(
                    f"compensate: calibration must hold grams for least_squares, got none of "
                    f"{write.name}; calibrate with grams=True"
                )
            if gram is not None and gram.shape != (size, size):
                raise InvalidInput(
                    f"compensate: calibration must hold grams of shape {(size, size)} for "
                    f"{write.name}, got {tuple(gram.shape)}; calibrate this model"
                )
            weight, bias, found = _fitted(linear, kept, mean, gram, how, ridge, write.name)
            report.append(found)
            for tensor, value in ((linear.weight, weight), (linear.bias, bias)):
                if tensor is not None and value is not None:
                    restore.callback(setattr, tensor, "data", tensor.data)
                    tensor.data = value.to(tensor)
        yield report


def _projections(structure: Structure) -> Iterator[Write]:
    """The branches whose projection reads its units as they are."""
    for write in structure.writes():
        # a norm before the projection reads fewer units afterwards, so what comes out changes
        if write.inner not in structure.norms.values():
            yield write


def _fitted(
    linear: Any,
    kept: Tensor,
    mean: Tensor,
    gram: Tensor | None,
    how: str,
    ridge: float,
    name: str,
) -> tuple[Tensor, Tensor | None, Compensated]:
    """New weight (C, K) and bias (C,) in float64, and what they gain."""
    device = linear.weight.device
    kept, mean = kept.to(device), mean.to(device, torch.float64)
    weight = linear.weight.detach().double()
    bias = None if linear.bias is None else linear.bias.detach().double()
    is_kept = torch.zeros(weight.shape[1], dtype=torch.bool, device=device)
    is_kept[kept] = True
    fitted = torch.where(is_kept, weight, 0.0)
    second = None if gram is None else gram.to(device, torch.float64)
    if how == "least_squares":
        assert second is not None
        # with a bias the means are its business
        spread = second if bias is None else second - mean.outer(mean)
        rounding = _ROUNDING * float(second.diagonal()[kept].sum())
        told = _regression(spread, is_kept, ridge, rounding, name)
        fitted[:, kept] += weight[:, ~is_kept] @ told
    shift = None if bias is None else (weight - fitted) @ mean
    if second is None:
        return fitted, None if bias is None else bias + shift, Compensated(name, *[math.nan] * 2)
    cut = torch.where(is_kept, 0.0, -weight)
    size = _mean_square(weight, bias, second, mean)
    lost = _mean_square(cut, None, second, mean)
    left = _mean_square(fitted - weight, shift, second, mean)
    shares = [math.sqrt(max(0.0, error) / size) if size > 0 else 0.0 for error in (lost, left)]
    return fitted, None if bias is None else bias + shift, Compensated(name, *shares)


def _regression(
    spread: Tensor, is_kept: Tensor, ridge: float, rounding: float, name: str
) -> Tensor:
    """(dropped, kept): what a kept unit tells of a dropped one."""
    inner = spread[is_kept][:, is_kept]
    if not len(inner):
        return spread[~is_kept][:, is_kept]
    variance = float(inner.diagonal().sum())
    if variance <= rounding:
        # units that never change tell nothing, whatever the ridge
        return torch.zeros_like(spread[~is_kept][:, is_kept])
    inner.diagonal().add_(ridge * variance / len(inner))
    factor, failed = torch.linalg.cholesky_ex(inner)
    if failed or not factor.isfinite().all():
        raise InvalidInput(
            f"compensate: ridge must be large enough for a solution in {name}, got {ridge}; "
            "try ten times as much, or calibrate on more images"
        )
    return torch.cholesky_solve(spread[is_kept][:, ~is_kept], factor).T


def _mean_square(weight: Tensor, bias: Tensor | None, second: Tensor, mean: Tensor) -> float:
    """Mean square of ``weight a + bias`` over tokens, summed over channels."""
    total = ((weight @ second) * weight).sum()
    if bias is not None:
        total = total + 2 * (bias * (weight @ mean)).sum() + bias.square().sum()
    return float(total)
