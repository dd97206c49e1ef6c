"""What can the model do without: scores of its units."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..bare import bare
from ..batches import Numbered, Targets, check_whole, checked, classes_of
from ..errors import InvalidInput
from ..precision import Precision, computing_in, device_of, is_half, name_of, resolve
from ..ranks import Ranks
from ..sealed import fingerprint
from ..structure import UNIT_KINDS, Axis, Structure, describe, families
from ..structure.paths import get
from ..target_loss import LossLike, TargetLoss
from . import stream
from .agreement import rank_agreement, split_off
from .criterion import Asked, Criterion, criterion_named, criterion_names
from .resume import Checkpoint
from .scores import Accumulator, Scores
from .stream import OnEvent, ScoringStopped
from .taylor import LOSS_SCALE, PathChoice

__all__ = ["Scores", "ScoringStopped", "criterion_names", "score"]

Objective = Literal["logits", "features"]
Reduction = Literal["abs", "square", "signed", "token_abs", "mean", "l1", "l2", "group"]


@torch.inference_mode(False)
def score(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    criterion: str = "taylor",
    units: Sequence[str] | Literal["all"] = ("head", "neuron"),
    reduction: Reduction | None = None,
    per_sample: bool = False,
    *,
    loss: LossLike | None = None,
    objective: Objective = "logits",
    micro_batch: int | None = None,
    seed: int = 0,
    draws: int = 1,
    candidates: int = 32,
    loss_scale: float | None = None,
    path: PathChoice = "auto",
    cuda_graph: bool | Literal["auto"] = "auto",
    dtype: Precision | torch.dtype | None = None,
    structure: Structure | None = None,
    checkpoint: str | Path | None = None,
    on_event: OnEvent | None = None,
    stop: Callable[[], bool] | None = None,
) -> Scores:
    """How much the model would lose without each unit; larger always means keep.

    With ``g(b, u)`` the derivative of sample b's loss by a gate on unit u (``scoring/sites.py`` has
    the formula of every unit kind), exact for every sample from one batched backward with frozen
    weights:

    * ``taylor``: ``abs`` = mean |g|, ``square`` = mean g^2, ``signed`` = mean g, of the
      cross-entropy with the given labels (Michel et al. 2019, arXiv:1905.10650; Molchanov et al.
      2019, arXiv:1906.10771, equation 8 for the square). ``token_abs`` = mean over samples and
      tokens of |g of the token|, which is what the code of Michel et al. computes.
    * ``fisher``: mean g^2 with labels drawn from the model's own prediction: the diagonal of the
      Fisher information, and twice the second-order term of the KL divergence to the model without
      the unit (whose first-order term is zero).
    * ``loss``, ``kl``: exact, by leaving out every unit in turn: mean over samples of the rise of
      the cross-entropy, or of KL(model || model without the unit) (Yu & Wu 2021, arXiv:2111.15127).
      Thousands of times dearer; the ground truth for the others.
    * ``activation``: how much a unit puts out, forward only (``scoring/criteria/activation.py``).
    * ``magnitude``: norms of its weights, no data (``scoring/criteria/magnitude.py``).

    Only ``taylor`` and ``loss`` need labels; for the others batches may be images alone, and what
    stands in the place of labels is checked for its length.

    With ``objective="features"`` the model has no classifier, and its outputs f (pooled features,
    or all tokens; of transformers' models what they pool, or the last hidden state) stand for the
    normal distribution N(f, I). ``fisher`` draws targets from it, y = f + e: mean g^2 estimates
    |df/dgate|^2, twice the second-order term of the KL divergence ``1/2 |f - f_without|^2``, which
    ``kl`` measures (``scoring/taylor.py`` has the derivation). ``taylor`` takes its reductions of
    the same g, but ``signed``, whose mean is zero. None of them reads labels.

    Dropout and drop path are off. The model comes back exactly as it was, also after an error or an
    interrupt. Where torch.distributed is initialised, its processes share the work and all get the
    scores; each must be given the same stream.

    Args:
        model: a supported model; another one needs ``structure``.
        batches: yields (images (B, C, H, W) floating, labels: B integers, ...), or mappings that
            name them ``pixel_values`` or ``image``, ``labels`` or ``label``; images go to the
            device and dtype of the model. Not needed for ``magnitude``. Where no labels are read
            also images alone, or one tensor of them; with ``loss`` labels may be other targets.
        criterion: see above.
        units: unit kinds to score, or ``"all"`` that the model has.
        reduction: for ``taylor`` and ``magnitude`` (``group``, ``l1``, ``l2``); None is the first
            that the criterion has.
        per_sample: keep g itself, as ``.per_sample[axis]`` (samples, units) fp32.
        loss: for ``taylor`` and ``loss``, in place of cross-entropy: ``"bce"``, every class by
            itself (targets (B, C) floating, or labels), and ``"mse"`` (targets of the shape of the
            outputs) are means over the numbers of a sample; or a function of (outputs (B, ...) in
            fp32 at least, targets as the batch has them, (B, ...), on their device) to one loss per
            sample, (B,), each of its own sample alone.
        objective: ``"features"`` for a model without a classifier.
        micro_batch: samples at once; None takes the batches as they come. What does not fit into
            memory is halved and done again.
        seed: of the labels or features drawn for ``fisher``; what is drawn depends on it and on the
            place of its sample in the stream alone.
        draws: how often it is drawn per sample; g^2 is averaged over them.
        candidates: units left out at once for ``loss`` and ``kl``.
        loss_scale: for float16: the loss is multiplied and the scores divided by it; None is 1024
            where ``dtype`` says float16, whose gradients would underflow, and 1 elsewhere.
        path: ``fused`` exchanges the forward of known modules, ``taps`` uses hooks alone, ``auto``
            is fused where a module is known.
        cuda_graph: for ``taylor`` and ``fisher`` on a GPU: replay the step as a CUDA graph, one per
            shape of the micro-batches; worth it where launches take longer than kernels. ``auto``
            is off until committed results show that it wins.
        dtype: that the model computes in, by a copy of its weights (see ``precision.py``):
            ``auto`` is bfloat16 on a GPU that has it and float32 elsewhere; None is as the model
            is. ``magnitude`` reads the weights as they are. In 16 bits ``taylor`` and ``fisher``
            score the first samples (64 at most, of 2 batches) in float32 too, and ``.provenance``
            has ``rank_agreement``: Spearman's correlation inside each axis, averaged over axes.
        structure: where the units are, for a model of another library.
        checkpoint: a file that keeps the sums twice a minute; the same call goes on from it, and it
            is gone at the end.
        on_event: told ``{"event": "step", "step": samples done, "images_per_s": ...}``.
        stop: asked after every micro-batch; True writes the checkpoint and raises ScoringStopped,
            in all processes where it is said in one.

    Returns:
        Scores in fp32. Per sample in fp32 (fp64 in fp64 models), summed over the samples of a
        micro-batch and over micro-batches in fp64, in stream order: the same batches give the same
        bits. Samples with a score that is not finite are left out and counted in ``.skipped``; with
        ``dtype`` float16 they are an error as soon as one has a finite image, for those with the
        largest gradients would be missing.

    Raises:
        InvalidInput: an argument or a batch has a value that cannot be used, the model has no
            classifier of two classes or more and nothing else is asked for, or batches come from a
            DistributedSampler.
        NotEnoughMemory: not even one sample fits.
        ScoringStopped: ``stop`` said so.
        StageFailed: another process failed, or has other batches or another checkpoint.
        UnsupportedArchitecture: the model has no layout.
    """
    model = bare("score", model)
    if structure is None:
        structure = describe(model)
    else:
        _check_structure(model, structure)
    kind, axes = _criterion(criterion), scored_axes(structure, units)
    chosen = _reduction(criterion, kind, reduction)
    if empty := next((name for name, p in model.named_parameters() if p.is_meta), None):
        raise InvalidInput(f"score: model must hold its weights, got {empty} on the meta device")
    target_loss = TargetLoss.of("score", loss)
    _check_asked(model, criterion, kind, chosen, target_loss, objective)
    computed = resolve("score", dtype, device_of(model))
    provenance: dict[str, Any] = {"model": structure.family, "torch": torch.__version__}
    if kind.of_weights is not None:
        with families.opened(model, structure) as seen:
            by_axis = kind.of_weights(Asked(model, seen, axes, chosen))
        return Scores(by_axis, criterion, chosen, 0, provenance=provenance)
    assert kind.measure is not None
    if batches is None:
        raise InvalidInput(
            f"score: batches must be given for the criterion {criterion!r}, got None"
        )
    for name, value in (("micro_batch", micro_batch), ("draws", draws), ("candidates", candidates)):
        if not (value is None and name == "micro_batch") and (type(value) is not int or value < 1):
            raise InvalidInput(f"score: {name} must be a whole number >= 1, got {value!r}")
    if path not in get_args(PathChoice):
        names = ", ".join(get_args(PathChoice))
        raise InvalidInput(f"score: path must be one of {names}, got {path!r}")
    if loss_scale is not None and not (
        isinstance(loss_scale, (int, float)) and 0 < loss_scale < math.inf
    ):
        raise InvalidInput(f"score: loss_scale must be a finite number > 0, got {loss_scale!r}")
    if cuda_graph not in (True, False, "auto"):
        raise InvalidInput(f"score: cuda_graph must be True, False or 'auto', got {cuda_graph!r}")
    if type(seed) is not int:
        raise InvalidInput(f"score: seed must be a whole number, got {seed!r}")
    if per_sample and draws > 1:
        raise InvalidInput(f"score: draws must be 1 where samples are kept, got {draws}")
    if per_sample and kind.numbers > 1:
        raise InvalidInput(
            f"score: per_sample must be False for the criterion {criterion!r}, whose scores exist "
            "of all samples together only, got True"
        )
    features = objective == "features"
    targets: Targets = "none" if features or not kind.targets else target_loss.targets
    if criterion == "fisher" or (features and kind.gradients):
        provenance |= {"seed": seed, "draws": draws}
    if features:
        provenance["objective"] = objective
    if loss is not None:
        provenance["loss"] = target_loss.name
    check_whole("score", batches, Ranks.current())
    if computed is not None:
        provenance["dtype"] = name_of(computed)
    axis_sizes = {axis.name: kind.numbers * axis.size for axis in axes}
    source, scale = batches, loss_scale
    if scale is None and computed is torch.float16:
        scale = LOSS_SCALE

    @contextmanager
    def measuring(dtype: torch.dtype | None, *, replayed: bool) -> Iterator[stream.ScoreBatch]:
        """The criterion, computed in a dtype."""
        with computing_in(dtype, model), families.opened(model, structure) as seen:
            asked = Asked(
                *(model, seen, axes, chosen, seed, draws, candidates, scale, path, replayed),
                target_loss,
                features,
            )
            assert kind.measure is not None
            with kind.measure(asked) as ready:
                yield ready

    def refuse_overflow(samples: int) -> None:
        """Refuse float16, which does not hold the scores: the largest ones would be missing."""
        lower = f" or a loss_scale below {scale:g}" if kind.gradients else ""
        raise InvalidInput(
            "score: dtype must be one that holds all scores, got float16, in which those of "
            f"{samples:,} sample{'s' * (samples > 1)} with finite images are not finite; take "
            f"bfloat16{lower}"
        )

    def compared() -> dict[str, Any]:
        """How the dtype ranks the units of the first samples compared with float32."""
        nonlocal source
        numbered = isinstance(source, Numbered)
        first, source = split_off(
            source if numbered else checked("score", source, model, targets=targets)
        )
        found = [Accumulator(axis_sizes, chosen, combine=kind.combined) for _ in range(2)]
        for sums, each in zip(found, (torch.float32, computed), strict=True):
            with measuring(each, replayed=False) as score_batch:
                refuse = refuse_overflow if each is torch.float16 else None
                stream.run(
                    score_batch,
                    model,
                    first,
                    sums,
                    targets=targets,
                    micro_batch=micro_batch,
                    # others would all see all of the first samples
                    ranks=Ranks.current() if numbered else None,
                    on_overflow=refuse,
                )
        if not all(int(sums.counts[0]) for sums in found):
            return {}
        wide, half = (sums.result(criterion, {}) for sums in found)
        return {
            "rank_agreement": f"{rank_agreement(wide, half):.6f}",
            "rank_agreement_samples": wide.samples,
        }

    kept = None
    if checkpoint is not None:
        identity = {
            "weights": fingerprint(model),
            "criterion": criterion,
            "reduction": chosen,
            "axes": axis_sizes,
            "per_sample": per_sample,
            "micro_batch": micro_batch,
            "seed": seed,
            "draws": draws,
            "candidates": candidates,
            "loss_scale": scale,
            "path": path,
            "dtype": provenance.get("dtype"),
            "loss": target_loss.name,
            "objective": objective,
        }
        kept = Checkpoint(Path(checkpoint), identity)
    if is_half(computed) and kind.gradients:
        provenance |= compared() if kept is None else kept.remembered(compared)
    accumulator = Accumulator(axis_sizes, chosen, per_sample, combine=kind.combined)
    with measuring(computed, replayed=cuda_graph is True) as score_batch:
        stream.run(
            score_batch,
            model,
            source,
            accumulator,
            targets=targets,
            micro_batch=micro_batch,
            ranks=Ranks.current(),
            checkpoint=kept,
            on_event=on_event,
            stop=stop,
            on_overflow=refuse_overflow if computed is torch.float16 else None,
        )
    return accumulator.result(criterion, provenance)


def _check_structure(model: nn.Module, structure: Structure) -> None:
    """Refuse the structure of another model: scores of the wrong units look like scores."""
    for name, layout in structure.tensors.items():
        tensor, shape = get(model, name), tuple(dim.length() for dim in layout)
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else "none"
            raise InvalidInput(
                f"score: structure must be of the model, whose {name} it gives the shape {shape}, "
                f"got {got}"
            )


def _check_asked(
    model: nn.Module,
    criterion: str,
    kind: Criterion,
    reduction: str,
    loss: TargetLoss,
    objective: str,
) -> None:
    """Refuse a loss or an objective that the criterion or the model cannot have."""
    if objective not in get_args(Objective):
        names = ", ".join(get_args(Objective))
        raise InvalidInput(f"score: objective must be one of {names}, got {objective!r}")
    if loss.name != "ce" and not (kind.targets and objective == "logits"):
        which = [name for name in criterion_names() if criterion_named(name).targets]
        other = f"the criterion {criterion!r}" if objective == "logits" else "objective='features'"
        raise InvalidInput(
            f"score: loss must be None for {other}, which reads no targets, got {loss.name}; the "
            f"criteria {' and '.join(which)} take one"
        )
    if objective == "logits":
        if kind.classes:
            loss.check("score", model)
        return
    if not kind.features or reduction == "signed":
        which = [name for name in criterion_names() if criterion_named(name).features]
        raise InvalidInput(
            f"score: criterion must be one of {', '.join(which)} for objective='features', and "
            f"its reduction not 'signed', got {criterion!r} and {reduction!r}"
        )
    classes = classes_of(model)
    if isinstance(classes, int) and classes:
        raise InvalidInput(
            "score: objective must be 'logits' for a model with a classifier, got 'features' and "
            f"{classes} classes; take the classifier off, as model.reset_classifier(0) does"
        )


def _criterion(name: str) -> Criterion:
    try:
        return criterion_named(name)
    except KeyError:
        raise InvalidInput(
            f"score: criterion must be one of {', '.join(criterion_names())}, got {name!r}"
        ) from None


def _reduction(name: str, criterion: Criterion, reduction: str | None) -> str:
    allowed = criterion.reductions
    if reduction is None:
        return allowed[0]
    if reduction not in allowed:
        raise InvalidInput(
            f"score: reduction must be one of {', '.join(allowed)} for the criterion {name!r}, got "
            f"{reduction!r}"
        )
    return reduction


def scored_axes(structure: Structure, units: Sequence[str] | str) -> list[Axis]:
    """The axes of the asked unit kinds, in model order.

    Raises:
        InvalidInput: the model has none of the units.
    """
    if units in ("all", ("all",)):
        units = [kind for kind in UNIT_KINDS if structure.units(kind)]
    if isinstance(units, Iterable) and not isinstance(units, str):
        units = tuple(units)
    if not isinstance(units, tuple) or not units:
        raise InvalidInput(
            "score: units must be a list of unit kinds such as ('head', 'neuron'), or 'all', "
            f"got {units!r}"
        )
    if unknown := [kind for kind in units if kind not in UNIT_KINDS]:
        raise InvalidInput(
            f"score: units must be among {', '.join(UNIT_KINDS)}, got {unknown[0]!r}"
        )
    if missing := [kind for kind in units if not structure.units(kind)]:
        has = ", ".join(kind for kind in UNIT_KINDS if structure.units(kind))
        raise InvalidInput(
            f"score: units must be among {has} for this {structure.family}, got {missing[0]!r}"
        )
    axes = [axis for axis in structure.axes.values() if axis.kind in units and axis.size]
    if not axes:
        raise InvalidInput(
            f"score: model must have units of the kinds {', '.join(units)}, got one without any"
        )
    return axes
