"""The gates of a model: scores that can be trained, and what they say of every unit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import InvalidInput
from ..structure import Axis, Structure
from ..transfer import sent
from . import hooks, kinds

GATED_UNITS = ("head", "neuron", "qk_dim", "v_dim")
Kind = Literal["l1", "ste", "hard_concrete", "fixed"]
PerKind = float | Mapping[str, float]


class Gates(nn.Module):
    """One gate per unit of some axes of a model.

    Made by :func:`attach`. The model does not know of it: gates are no parameters of the model and
    have a ``state_dict`` of their own. Dots of axis names are slashes in its keys.

    As a context manager it is detached from its models on leaving.

    Args:
        structure: of the model.
        axes: the axes to gate, each with a tap.
        kind: see :func:`attach`.
        scores: axis name -> (units,) what the gates start as.
        keep: share of the units of each kind that stays, for ``ste`` with global thresholds.
        learned: whether ``ste`` learns a threshold for every axis.
        round_to: kept counts are multiples of this, for learned thresholds.
        penalty: factor of :meth:`penalty` by unit kind.
        seed: of the draws of ``hard_concrete``.
    """

    def __init__(
        self,
        structure: Structure,
        axes: Sequence[Axis],
        kind: Kind,
        scores: Mapping[str, Tensor],
        *,
        keep: Mapping[str, float] | None = None,
        learned: bool = False,
        round_to: int = 1,
        penalty: Mapping[str, float] | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.structure, self.kind, self.seed = structure, kind, seed
        self.axes = {axis.name: axis for axis in axes}
        self.keep = dict(keep or {})
        self.round_to = round_to
        self.penalties = dict(penalty or {})
        self.draws = 0
        learns = kind != "fixed"
        self.scores = nn.ParameterDict(
            {_key(name): nn.Parameter(scores[name], requires_grad=learns) for name in self.axes}
        )
        self.thresholds = nn.ParameterDict()
        if learned:
            for name in self.axes:
                start = scores[name].new_tensor(kinds.INITIAL_THRESHOLD)
                self.thresholds[_key(name)] = nn.Parameter(start)
        elif kind == "ste":
            first = next(iter(scores.values()))
            for unit in self.units:
                self.register_buffer(f"least_{unit}", first.new_tensor(-math.inf))
        elif kind == "hard_concrete":
            for name, score in scores.items():
                # drawn again for every forward, from what is saved
                self.register_buffer(f"noise/{_key(name)}", torch.zeros_like(score), False)
        self.refresh()

    @property
    def units(self) -> tuple[str, ...]:
        """The unit kinds that have gates."""
        return tuple(dict.fromkeys(axis.kind for axis in self.axes.values()))

    def score(self, axis: str) -> Tensor:
        """What is trained, (units,): larger means keep (by magnitude for ``l1``)."""
        return self.scores[_key(axis)]

    def threshold(self, axis: str) -> Tensor:
        """The learned threshold of one axis, 0-dimensional: ``sigmoid`` of it is what stays."""
        return self.thresholds[_key(axis)]

    def value(self, axis: str, training: bool = False) -> Tensor:
        """The gates of one axis, (units,); at random for ``hard_concrete`` in training."""
        score = self.score(axis)
        if self.kind == "hard_concrete":
            noise = self.get_buffer(f"noise/{_key(axis)}") if training else None
            return kinds.hard_concrete(score, noise)
        if self.kind == "ste" and self.thresholds:
            return kinds.top_share(score, self.threshold(axis), self.round_to)
        if self.kind == "ste":
            return kinds.at_least(score, self.get_buffer(f"least_{self.axes[axis].kind}"))
        return score

    def values(self, training: bool = False) -> dict[str, Tensor]:
        """axis name -> its gates, with thresholds that follow the scores as they are now."""
        self.refresh()
        return {name: self.value(name, training) for name in self.axes}

    def openness(self) -> dict[str, Tensor]:
        """axis name -> (units,) how much of each unit counts as kept, in [0, 1], differentiable.

        The gate itself for ``ste``; ``min(|gate|, 1)`` for ``l1``, with the gradient of ``|gate|``
        also above 1; the probability that the gate is not 0 for ``hard_concrete``; whether it is
        not 0 for ``fixed``.
        """
        if self.kind == "hard_concrete":
            return {name: kinds.probability_open(self.score(name)) for name in self.axes}
        if self.kind == "l1":
            return {name: kinds.saturated(self.score(name)) for name in self.axes}
        if self.kind == "fixed":
            return {name: (gate != 0).to(gate.dtype) for name, gate in self.values().items()}
        return self.values()

    def penalty(self) -> Tensor:
        """What to add to the loss, 0-dimensional.

        ``penalty * sum |s|`` for ``l1`` and ``penalty * sum P(gate != 0)`` for ``hard_concrete``,
        over the units of each kind; 0 for ``ste`` and ``fixed``, which a :class:`BudgetLoss` or
        ``keep`` holds down.
        """
        total = next(iter(self.scores.values())).new_zeros(())
        if self.kind not in ("l1", "hard_concrete"):
            return total
        for name, axis in self.axes.items():
            score = self.score(name)
            share = score.abs() if self.kind == "l1" else kinds.probability_open(score)
            total = total + self.penalties[axis.kind] * share.sum()
        return total

    @torch.no_grad()
    def alive(self) -> dict[str, tuple[int, int]]:
        """unit kind -> how many gates are not 0, and of how many. Waits for the device."""
        count = {unit: [0, 0] for unit in self.units}
        for name, gate in self.values().items():
            count[self.axes[name].kind][0] += int(gate.count_nonzero())
            count[self.axes[name].kind][1] += len(gate)
        return {unit: (on, total) for unit, (on, total) in count.items()}

    @property
    def attention(self) -> str:
        """How the models attend that these gates are attached to, see ``hooks.attention_of``."""
        return hooks.attention_of(self)

    def set_keep(self, keep: PerKind) -> None:
        """Change the share of units that stay, for ``ste`` with global thresholds.

        Raises:
            InvalidInput: another kind of gates, a share outside [0, 1] or of a unit without gates.
        """
        if self.kind != "ste" or self.thresholds:
            raise InvalidInput(
                "gates.set_keep: gates must be of kind 'ste' with global thresholds, got "
                f"{self.kind!r}{' with learned ones' if self.thresholds else ''}"
            )
        self.keep = keep_shares("gates.set_keep", keep, self.units)
        self.refresh()

    def set_step(self, step: int) -> None:
        """Say which draw of ``hard_concrete`` comes next; else every forward takes the next one."""
        self.draws = step

    @torch.no_grad()
    def refresh(self, training: bool = False) -> None:
        """What is settled once per forward of the model: thresholds, and the draw of the noise.

        Called before every forward of a gated model. The threshold of a unit kind is the score of
        the last of the units that stay; units that tie with it stay too.
        """
        if self.kind == "hard_concrete" and training:
            for name, axis in self.axes.items():
                noise = kinds.logistic_noise(axis.size, self.seed, self.draws, name)
                buffer = self.get_buffer(f"noise/{_key(name)}")
                buffer.copy_(sent(noise.to(buffer.dtype), buffer.device))
            self.draws += 1
        if self.kind == "ste" and not self.thresholds:
            for unit in self.units:
                scores = [self.score(n) for n, axis in self.axes.items() if axis.kind == unit]
                ranked = torch.cat(scores).sort(descending=True).values
                count = round(self.keep[unit] * len(ranked))
                least = ranked[count - 1] if count else ranked.new_full((), math.inf)
                self.get_buffer(f"least_{unit}").copy_(least)

    def parameter_groups(
        self, lr: float, threshold_lr: float | None = None
    ) -> list[dict[str, Any]]:
        """Groups for an optimizer, without weight decay; none for gates that are fixed.

        Args:
            lr: of the scores.
            threshold_lr: of learned thresholds; None is ``lr``.
        """
        groups = [
            (self.scores, lr),
            (self.thresholds, lr if threshold_lr is None else threshold_lr),
        ]
        return [
            {"params": list(parameters.values()), "lr": rate, "weight_decay": 0.0}
            for parameters, rate in groups
            if self.kind != "fixed" and len(parameters)
        ]

    def attach(self, model: nn.Module) -> Gates:
        """Gate another model of the same layout too, such as an average of the weights.

        Raises:
            InvalidInput: the model has gates already, or another layout.
        """
        hooks.install(model, self)
        return self

    def detach(self, model: nn.Module | None = None) -> None:
        """Take the gates out of one model, or of all that have them; it is what it was before."""
        for one in hooks.gated_by(self) if model is None else [model]:
            if hooks.gates_on(one) is not self:
                raise InvalidInput("gates.detach: model must have these gates, got one without")
            hooks.uninstall(one)

    def __enter__(self) -> Gates:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def get_extra_state(self) -> Tensor:
        """How many times noise was drawn: with the seed all there is to go on from."""
        return torch.tensor(self.draws)

    def set_extra_state(self, state: Tensor) -> None:
        """Go on from there."""
        self.draws = int(state)


def keep_shares(op: str, keep: PerKind, units: Sequence[str]) -> dict[str, float]:
    """The share to keep of every unit kind."""
    return per_kind(op, "keep", keep, units, 1, "share in [0, 1]")


def per_kind(
    op: str, argument: str, value: PerKind, units: Sequence[str], most: float, rule: str
) -> dict[str, float]:
    """A number from 0 to ``most`` of every unit kind, given as one for all or one for each."""
    found: dict[str, float] = (
        {**value} if isinstance(value, Mapping) else dict.fromkeys(units, value)
    )
    if not found.keys() >= {*units}:
        raise InvalidInput(
            f"{op}: {argument} must name the unit kinds {', '.join(units)}, got {', '.join(found)}"
        )
    for unit, number in found.items():
        if not isinstance(number, (int, float)) or not (0 <= number <= most and number < math.inf):
            raise InvalidInput(f"{op}: {argument} of {unit} must be a {rule}, got {number!r}")
    return found


def _key(axis: str) -> str:
    """A name that a parameter may have."""
    return axis.replace(".", "/")
