"""Putting gates into a model, and taking them out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..bare import bare
from ..errors import InvalidInput
from ..planning.plan import Plan
from ..structure import Axis, Structure, describe
from ..structure.paths import get
from . import hooks, kinds
from .module import GATED_UNITS, Gates, Kind, PerKind, keep_shares, per_kind


@torch.inference_mode(False)
def attach(
    model: nn.Module,
    units: Sequence[str] = ("head", "neuron"),
    kind: Kind = "l1",
    *,
    keep: PerKind | None = None,
    thresholds: Literal["global", "learned"] = "global",
    round_to: int = 1,
    init: float | Mapping[str, Tensor] | Plan | None = None,
    penalty: PerKind = 1e-4,
    seed: int = 0,
    structure: Structure | None = None,
) -> Gates:
    """Multiply units of ``model`` by gates, without changing it.

    A gate stands where the unit enters the map that reads it: what a head or v dim gives to the
    output projection, what a neuron gives to the second layer of its MLP, the query of a q/k dim.
    :func:`fold` writes it into that map. Unlike pruning, a gate of 0 changes no norm that runs
    over its axis, so only where there is none it is the same as a unit that was cut.

    What was compiled before is compiled again when it next runs, with the gates.

    ``l1``
        the gate is the score, from 1, held down by ``penalty * sum |s|`` (Zhu et al., "Vision
        Transformer Pruning", 2021, arXiv:2104.08500).
    ``ste``
        the gate is ``1[score >= t]`` and lets gradients pass as the identity would. ``t`` is
        ``"global"``, such that ``keep`` of all units of a kind stay, or ``"learned"`` for every
        axis, whose best ``sigmoid(t)`` units stay (Yu et al., "Width & Depth Pruning for Vision
        Transformers", AAAI 2022).
    ``hard_concrete``
        at random in [0, 1] while the model trains, with both ends reached; settled in evaluation
        (Louizos et al., ICLR 2018, arXiv:1712.01312). The draws are functions of the seed and of
        how many forwards there were, which is part of the gates' ``state_dict``.
    ``fixed``
        ``init``, and nothing is trained.

    Args:
        model: a supported model.
        units: unit kinds among ``GATED_UNITS``.
        kind: see above.
        keep: for ``ste`` with global thresholds: the share of units that stays, or by unit kind.
        thresholds: for ``ste``.
        round_to: for learned thresholds: kept counts are multiples of this.
        init: what the scores start as, one number or axis name -> (units,), such as ``Scores``;
            axes not named start as without it, so that the model computes what it did. A
            :class:`Plan` for ``fixed``: 1 for what it keeps.
        penalty: factor of ``Gates.penalty``, or by unit kind.
        seed: of ``hard_concrete``.
        structure: of the model, where it is at hand.

    Returns:
        The Gates: a module of its own, whose parameters an optimizer gets by
        ``gates.parameter_groups(lr=...)``. In fp32, or fp64 in a model of that dtype, on the
        devices of the adjacent weights. ``deepcopy`` of the model gives one without gates.

    Raises:
        InvalidInput: the model has gates already, or an argument has a value that cannot be used.
        UnsupportedArchitecture: the model has no layout.
    """
    op = "gates.attach"
    if kind not in kinds.KINDS:
        raise InvalidInput(f"{op}: kind must be one of {', '.join(kinds.KINDS)}, got {kind!r}")
    if thresholds not in ("global", "learned"):
        raise InvalidInput(f"{op}: thresholds must be 'global' or 'learned', got {thresholds!r}")
    if type(round_to) is not int or round_to < 1:
        raise InvalidInput(f"{op}: round_to must be a whole number >= 1, got {round_to!r}")
    if isinstance(units, str) or not units or not {*units} <= {*GATED_UNITS}:
        raise InvalidInput(
            f"{op}: units must be a list of kinds among {', '.join(GATED_UNITS)}, got {units!r}"
        )
    model = bare(op, model)
    structure = describe(model) if structure is None else structure
    axes = [a for a in structure.axes.values() if a.kind in units and a.name in structure.taps]
    if not axes:
        raise InvalidInput(f"{op}: model must have units of {', '.join(units)}, got none")
    present = tuple(dict.fromkeys(axis.kind for axis in axes))
    learned = kind == "ste" and thresholds == "learned"
    if kind == "ste" and not learned and keep is None:
        raise InvalidInput(f"{op}: keep must be given for 'ste' with global thresholds, got None")
    if keep is not None and (kind != "ste" or learned):
        raise InvalidInput(f"{op}: keep must be None but for 'ste' with global thresholds")
    gates = Gates(
        structure,
        axes,
        kind,
        _starts(model, structure, axes, kind, init),
        keep=None if keep is None else keep_shares(op, keep, present),
        learned=learned,
        round_to=round_to,
        penalty=per_kind(op, "penalty", penalty, present, math.inf, "number >= 0"),
        seed=seed,
    )
    return gates.attach(model)


def detach(model: nn.Module) -> Gates:
    """Take the gates out of a model, and return them; the model is bit for bit what it was.

    Raises:
        InvalidInput: the model has no gates.
    """
    model = bare("gates.detach", model)
    gates = hooks.gates_on(model)
    if gates is None:
        raise InvalidInput("gates.detach: model must have gates attached, got one without")
    gates.detach(model)
    return gates


def _starts(
    model: nn.Module,
    structure: Structure,
    axes: Sequence[Axis],
    kind: Kind,
    init: float | Mapping[str, Tensor] | Plan | None,
) -> dict[str, Tensor]:
    """The first scores of every axis, on the device of what they gate."""
    if isinstance(init, Plan):
        if kind != "fixed":
            raise InvalidInput(f"gates.attach: init must be a Plan for 'fixed' alone, got {kind!r}")
        init = _as_values(init.check(structure), axes)
    elif kind == "fixed" and init is None:
        raise InvalidInput("gates.attach: init must be given for 'fixed', got None")
    named = init if isinstance(init, Mapping) else {}
    if foreign := sorted(named.keys() - {axis.name for axis in axes}):
        raise InvalidInput(f"gates.attach: init must name axes that are gated, got {foreign[0]!r}")
    first = kinds.INITIAL_SCORE[kind] if init is None or isinstance(init, Mapping) else init
    if not isinstance(first, (int, float)) or not math.isfinite(first):
        raise InvalidInput(f"gates.attach: init must be a finite number, got {init!r}")
    return {axis.name: _start(model, structure, axis, named.get(axis.name), first) for axis in axes}


def _start(model: nn.Module, structure: Structure, axis: Axis, given: Any, first: float) -> Tensor:
    # a projection that is a bare weight of its module has no module of its own
    module: Any = get(model, structure.taps[axis.name].module) or model
    like = next((p for p in module.parameters()), next(model.parameters()))
    dtype = torch.promote_types(like.dtype, torch.float32)
    if given is None:
        return torch.full((axis.size,), float(first), dtype=dtype, device=like.device)
    if not isinstance(given, Tensor) or given.shape != (axis.size,):
        got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise InvalidInput(
            f"gates.attach: init of {axis.name} must be ({axis.size},), one number per unit, "
            f"got {got}"
        )
    if not given.isfinite().all():
        raise InvalidInput(f"gates.attach: init of {axis.name} must be finite, got NaN or Inf")
    return given.detach().to(like.device, dtype, copy=True)


def _as_values(plan: Plan, axes: Sequence[Axis]) -> dict[str, Tensor]:
    values = {axis.name: torch.zeros(axis.size) for axis in axes}
    for name, value in values.items():
        value[plan[name]] = 1
    return values
