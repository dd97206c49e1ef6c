"""Separate pruning ratios for attention heads, MLP neurons and other units, found by evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..bare import bare
from ..config.search import SearchConfig
from ..errors import InfeasibleBudget, InvalidInput
from ..evaluation import standard_error
from ..planning import Budget, Plan, plan, predict_cost
from ..precision import Precision
from ..ranks import Ranks
from ..scoring.scores import Scores
from ..sealed import fingerprint
from ..structure import Structure, describe
from ..surgery.mask import masked_by
from ..target_loss import TargetLoss
from .candidate import Candidate, Evaluate, Measured
from .candidates import Candidates, OnEvent, SearchStopped
from .evaluations import Evaluations, OnBatches
from .noise import check_images
from .result import CHECK, SearchResult
from .strategies import ONE_RATIO, Iterative, by_cost, equal_macs, fixed, fixed_within, grid

__all__ = ["Candidate", "Measured", "SearchResult", "SearchStopped", "search"]

# ten evaluations tell 143 counts of the kind that is free apart
_PER_LINE = 10


def search(
    model: nn.Module | Structure,
    scores: Scores,
    validation: Iterable[Sequence[Any]] | None = None,
    *,
    mode: Literal["iterative", "grid", "equal-macs", "fixed"] = "iterative",
    units: Sequence[str] = ("head", "neuron"),
    tolerance: float = 0.005,
    macs: float | int | None = None,
    values: Sequence[float] = SearchConfig.values,
    rounds: int = 4,
    step: float = 0.01,
    round_cut: float = 0.5,
    objective: Literal["top1", "loss"] = "top1",
    images: int | None = None,
    evaluations: int | None = None,
    scorer: Callable[[nn.Module], Scores] | None = None,
    evaluate: Evaluate | None = None,
    evaluate_all: Evaluate | None = None,
    dtype: Precision | torch.dtype | None = None,
    plan_options: Mapping[str, Any] | None = None,
    checkpoint: str | Path | None = None,
    on_event: OnEvent | None = None,
    stop: Callable[[], bool] | None = None,
) -> SearchResult:
    """Find how many units of each kind may go, by evaluating the model behind masks.

    A candidate is a count of units for every kind; scores and ``vp.plan`` say which ones stay. None
    is cut: each costs one pass over the validation images. The idea is that of Feng et al. (PRAI
    2023); ``search/strategies.py`` has what is ours.

    * ``grid``: every combination of ``values``.
    * ``iterative``: in each of ``rounds`` another part of the tolerance is spent; the kind that
      saves most for a point lost goes first, each as deep as bisection finds. After a cut the model
      is scored again, as it is then, where a ``scorer`` is given.
    * ``equal-macs``: all candidates have the ``macs`` given, first with one ratio for all kinds;
      chosen is the most accurate.
    * ``fixed``: one ratio for all kinds, by bisection the largest that the tolerance allows; where
      ``macs`` is given, the smallest that meets it, evaluated once.

    Of all candidates of ``grid``, ``iterative`` and ``fixed`` that is chosen which has the fewest
    multiply-accumulates, and a top-1 of at least the unpruned model's less the tolerance. With
    fewer ``images`` than there are, one standard error less passes as well; then it has to pass on
    all of them without that, and if it does not, the next cheapest has to, or of ``fixed`` a ratio
    that is a step smaller. Where ``macs`` is given to ``iterative``, all that have so few are
    equally cheap, and the most accurate is chosen.

    Args:
        model: a supported model, which comes back as it was; its Structure alone where ``evaluate``
            is given.
        scores: of the units that may go, as for ``vp.plan``.
        validation: images (B, C, H, W) and labels to evaluate on, never those of the final test;
            anything that can be iterated again with the same images in the same order, or an
            iterator, which is kept in memory.
        mode: see above.
        units: kinds to search, each with a ratio of its own; units of other kinds stay.
        tolerance: top-1 that may be lost, 0.005 for half a point. Where one standard error of so
            many images is larger, the search is refused (``search/noise.py`` has the rule).
        macs: multiply-accumulates of one image, a share up to 1.0 or a number, as for ``Budget``:
            what candidates of ``equal-macs`` and ``fixed`` have at most, and where ``iterative``
            stops.
        values: ratios of ``grid``, shares in [0, 1) of the units of a kind that go.
        rounds: of ``iterative``.
        step: smallest cut of ``iterative``, a share of the units left of a kind, one unit at least;
            the ratio of ``fixed`` is a multiple of it.
        round_cut: largest cut of one kind in a round of ``iterative``, a share of the units left.
        objective: what is best in ``equal-macs``: ``top1``, by loss among equals, or the mean
            cross-entropy ``loss``, which is less noisy.
        images: validation images that a candidate is evaluated on, the first ones; None is all.
        evaluations: most candidates to evaluate besides the unpruned model and the final checks;
            ``iterative`` stops there with what it has. None is what the mode takes: all
            combinations of ``grid``, for ``iterative`` ``rounds * kinds * (1 +
            ceil(log2(round_cut / step)))``, for ``fixed`` ``2 + ceil(log2(1 / step))``, for
            ``equal-macs`` 11, and 10 for each kind beyond two.
        scorer: gives scores of the model, which is behind masks then.
        evaluate: measures the model as if it were cut by a plan, instead of ``validation``.
        evaluate_all: the same on more images, for what is checked in the end; None is ``evaluate``.
        dtype: that the model computes in, as for ``vp.evaluate``.
        plan_options: arguments of ``vp.plan`` besides budget and units, such as ``allocation``.
        checkpoint: a file that keeps what was measured, written after every evaluation; the same
            call goes on from it, and it is gone at the end.
        on_event: told of every candidate: ``{"event": "search", "step": its number, "steps": most,
            "candidate": what it is tried for, "share": of the MACs, "top1": ...}``.
        stop: asked after every candidate; True ends the search, in one of several processes that
            of all.

    Where torch.distributed is initialised, all processes call, and get the same. They share the
    batches of a ``data.Loader``; of another ``validation`` each evaluates all.

    Returns:
        The plan, its ratios, cost and accuracy, and the table of all candidates. The same inputs
        give the same table, also when the search was killed and called again.

    Raises:
        InfeasibleBudget: no candidate has as few multiply-accumulates as ``macs``.
        InvalidInput: an argument has a value that cannot be used, scores are not finite or of
            another model, there are no images, too few for the tolerance, or other ones in another
            iteration, or too few evaluations for the mode.
        CheckpointRefused: the checkpoint is damaged, or of another search.
        SearchStopped: ``stop`` said so.
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InvalidInput(f"search: values must be a list of shares, got {values!r}")
    for name, number in (("rounds", rounds), ("images", images), ("evaluations", evaluations)):
        if number is not None and type(number) is not int:
            raise InvalidInput(f"search: {name} must be a whole number, got {number!r}")
    own = {*signature(plan).parameters} - {"model", "scores", "budget", "units"}
    if plan_options is not None and not (
        isinstance(plan_options, Mapping) and plan_options.keys() <= own
    ):
        raise InvalidInput(
            f"search: plan_options must map names among {', '.join(sorted(own))}, "
            f"got {plan_options!r}"
        )
    config = SearchConfig(
        mode=mode,
        tolerance=tolerance,
        macs=macs,
        values=tuple(values),
        rounds=rounds,
        step=step,
        round_cut=round_cut,
        objective=objective,
        images=images,
        evaluations=evaluations,
    )
    if isinstance(units, str) or not units or len({*units}) < len(units):
        raise InvalidInput(f"search: units must be a list of different kinds, got {units!r}")
    if evaluate is not None and images is not None:
        raise InvalidInput(f"search: images must be unset where evaluate is given, got {images}")
    if scorer is not None and isinstance(model, Structure):
        raise InvalidInput("search: model must be given where scorer is, got its Structure")
    if not isinstance(model, Structure):
        model = bare("search", model)
    structure = model if isinstance(model, Structure) else describe(model)
    if evaluate is None:
        if isinstance(model, Structure) or validation is None:
            raise InvalidInput(
                "search: model and validation must be given where evaluate is not, got "
                f"{type(model).__name__} and {type(validation).__name__}"
            )
        TargetLoss.of("search", None).check("search", model)
        if isinstance(validation, Iterator):
            validation = list(validation)
        evaluate_all = OnBatches(model, structure, validation, dtype)
        if images is not None:
            evaluate = OnBatches(model, structure, validation, dtype, images)

    def rescore(plan: Plan) -> Scores:
        assert scorer is not None and isinstance(model, nn.Module)
        with masked_by(model, structure, plan):
            return scorer(model)

    ranks = Ranks.current()
    known = Evaluations(
        None if checkpoint is None else Path(checkpoint),
        {
            "weights": None if isinstance(model, Structure) else fingerprint(model),
            "dtype": str(dtype),
            "images": images,
        },
    )
    on_all = evaluate_all or evaluate
    assert on_all is not None
    tried = Candidates(
        structure,
        scores,
        tuple(units),
        plan_options or {},
        known,
        on_all,
        most_evaluations(config, len(units)),
        on_event,
        None if scorer is None else rescore,
        lambda: ranks.any(stop is not None and stop()),
    )
    whole = predict_cost(structure)
    limit = None if macs is None else Budget(macs=macs).limits(whole)["macs"]
    if limit is not None and tried.smallest > limit:
        raise InfeasibleBudget(
            f"search: macs must be at least {tried.smallest:,} ({tried.smallest / whole.macs:.3f} "
            "of the model), the smallest candidate with these units and plan_options, got "
            f"{limit:,} ({limit / whole.macs:.3f})"
        )
    result = _found(config, tried, evaluate, limit)
    known.remove()
    return result


def most_evaluations(config: SearchConfig, kinds: int) -> int:
    """Evaluations that a search over so many kinds may make.

    Raises:
        InvalidInput: fewer are asked for than the mode has a use for.
    """
    cut = 1 + math.ceil(math.log2(config.round_cut / config.step))
    least, usual = {
        "grid": (len(config.values) ** kinds, 0),
        # a probe of each kind, and a cut
        "iterative": (kinds + 1, config.rounds * kinds * cut),
        "fixed": (1, 2 + math.ceil(math.log2(1 / config.step))),
        # one ratio for all, and a line of each kind that is free
        "equal-macs": (kinds, 1 + _PER_LINE * (kinds - 1)),
    }[config.mode]
    most = max(least, usual) if config.evaluations is None else config.evaluations
    if most < least:
        raise InvalidInput(
            f"search: evaluations must be at least {least:,} for {config.mode} over {kinds} unit "
            f"kind{'s' * (kinds > 1)}, got {most:,}"
        )
    return most


def _found(
    config: SearchConfig, tried: Candidates, evaluate: Evaluate | None, limit: int | None
) -> SearchResult:
    """Tries candidates, and checks on all images what comes out of them."""
    baseline = dense = tried.unpruned()
    if config.mode == "fixed" and limit is not None:
        chosen = tried.measure(fixed_within(tried, limit), ONE_RATIO)
        return SearchResult(config.mode, chosen, baseline, tuple(tried.table))
    if evaluate is not None and (config.images or 0) < baseline.images:
        tried.evaluate = evaluate
        dense = tried.unpruned()
    if config.mode == "equal-macs":
        assert limit is not None
        best = equal_macs(tried, limit, _worth_by(config.objective))[-1]
        chosen = tried.check(best.plan, CHECK)
        return SearchResult(config.mode, chosen, baseline, tuple(tried.table))
    for each in (baseline, dense):
        check_images(each.top1, each.images, config.tolerance)
    # what is lost to the last image of the tolerance passes, however the difference rounds
    tolerance = config.tolerance + 1e-12
    margin = 0.0 if dense is baseline else standard_error(dense.top1, dense.images)
    enough = dense.top1 - tolerance - margin
    if config.mode == "fixed":
        ratios = fixed(tried, config.step, enough)
        cheapest_last = [baseline.plan, *(tried.planned(counts) for counts in ratios)]
    else:
        if config.mode == "grid":
            grid(tried, config.values, enough)
        else:
            steps = (config.rounds, config.step, config.round_cut)
            Iterative(tolerance, margin, *steps, limit).run(tried, dense)
        found = by_cost(tried.table[tried.table.index(dense) :], enough, limit)
        cheapest_last = [each.plan for each in found]
    needed = baseline.top1 - tolerance
    # step by step back, in the end to the unpruned model
    checked = (tried.check(plan, CHECK, needed) for plan in reversed(cheapest_last))
    chosen = next(each for each in checked if each.top1 >= needed)
    return SearchResult(config.mode, replace(chosen, feasible=True), baseline, tuple(tried.table))


def _worth_by(objective: str) -> Callable[[Candidate], tuple[float, float]]:
    """What is larger for a better candidate."""

    def worth(candidate: Candidate) -> tuple[float, float]:
        low_loss = -math.inf if candidate.loss is None else -candidate.loss
        return (low_loss, candidate.top1) if objective == "loss" else (candidate.top1, low_loss)

    return worth
