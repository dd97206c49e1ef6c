"""A pruned model, and the state of its optimizer pruned alike."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import InvalidInput
from ..structure import Structure
from ..structure.paths import get

# how a per-parameter state of known optimizers scales with the gradient: AdamW, SGD, Lion, LAMB,
# Muon, NAdam, Adan, Adamax, RMSprop, Adagrad
GRADIENT_POWER = {
    "momentum_buffer": 1,
    "exp_avg": 1,
    "exp_avg_diff": 1,
    "neg_pre_grad": 1,
    "exp_inf": 1,
    "grad_avg": 1,
    "exp_avg_sq": 2,
    "max_exp_avg_sq": 2,
    "square_avg": 2,
    "sum": 2,
}


Jobs = Sequence[tuple[str, Tensor]]


@dataclass
class Cut:
    """A pruned model, the new tensor of every old name, and the rows that were rescaled."""

    model: Any
    tensors: dict[str, Tensor]
    # name -> fp64 factor of every row, where a fold rescaled the weight
    factors: dict[str, Tensor] = field(default_factory=dict)
    # name of a bias -> the parameter it became, where a branch became a constant
    constants: dict[str, Tensor] = field(default_factory=dict)
    # path in the old model -> module of the new one, also where blocks move up
    modules: dict[str, nn.Module] = field(default_factory=dict)

    def rescale(self, name: str, rows: Tensor) -> None:
        """Multiply the rows of a tensor, where the model has it."""
        if name not in self.tensors:
            return
        tensor = self.tensors[name]
        shape = (-1, *(1,) * (tensor.ndim - 1))
        tensor.mul_(rows.to(tensor).view(shape))
        self.note_rescale(name, rows.double())

    def note_rescale(self, name: str, rows: Tensor) -> None:
        """Remember that the rows of a tensor now stand for old rows times ``rows``."""
        self.factors[name] = self.factors.get(name, 1) * rows.double()


class Moments:
    """The per-entry state of an optimizer, pruned with the parameters.

    Args:
        optimizer: over parameters of ``model`` (all or some of them).
        model: before pruning.
        structure: of ``model``.
        jobs: the tensors of the model that are cut, and the name each is cut by.

    Raises:
        InvalidInput: a parameter of the optimizer is not one of the model, or a state of it has
            another shape than its parameter.
    """

    def __init__(
        self, optimizer: Optimizer, model: nn.Module, structure: Structure, jobs: Jobs = ()
    ):
        self._optimizer = optimizer
        self._names = {id(get(model, name)): name for name in structure.tensors}
        # of the names of a tied parameter, the one it is cut by
        self._names |= {id(tensor): name for name, tensor in jobs}
        # the state tensors: name of the parameter, key, tensor
        self._places: list[tuple[str, str, Tensor]] = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in self._names:
                    raise InvalidInput(
                        "prune: optimizer must hold parameters of the model, got one of shape "
                        f"{tuple(parameter.shape)} that is none of them"
                    )
                name = self._names[id(parameter)]
                for key, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor) and value.numel() > 1:
                        self._places.append((name, key, _shaped(name, key, value, structure)))

    @property
    def jobs(self) -> list[tuple[str, Tensor]]:
        """What is to be cut, each with the name whose layout it has."""
        return [(name, value) for name, _, value in self._places]

    def carried(self, moved: list[Tensor], cut: Cut) -> Optimizer:
        """The same optimizer over the parameters of the pruned model, with the surviving moments.

        Args:
            moved: what is left of each of ``jobs``.
            cut: what pruning made of the model.

        Returns:
            A new optimizer of the same class, groups and settings; groups may be left empty.

        Raises:
            InvalidInput: a state cannot be rescaled with its parameter.
        """
        alive = {id(parameter) for parameter in cut.model.parameters()}
        memo: dict[int, Any] = {old: cut.tensors[name] for old, name in self._names.items()}
        for (name, key, old), new in zip(self._places, moved, strict=True):
            if id(cut.tensors[name]) in alive:
                memo[id(old)] = _rescaled(name, key, new, cut)
        carried = copy.deepcopy(self._optimizer, memo)
        for group in carried.param_groups:
            group["params"] = [p for p in group["params"] if id(p) in alive]
        for parameter in [p for p in carried.state if id(p) not in alive]:
            del carried.state[parameter]
        return carried


def _shaped(name: str, key: str, value: Tensor, structure: Structure) -> Tensor:
    if value.shape != tuple(dim.length() for dim in structure.tensors[name]):
        raise InvalidInput(
            f"prune: optimizer state {key!r} of {name} must have the shape of the parameter, "
            f"got {tuple(value.shape)}; this optimizer's state cannot be sliced"
        )
    return value


def _rescaled(name: str, key: str, moved: Tensor, cut: Cut) -> Tensor:
    if name not in cut.factors:
        return moved
    if key not in GRADIENT_POWER:
        raise InvalidInput(
            f"prune: optimizer state {key!r} of {name} must be one of "
            f"{', '.join(GRADIENT_POWER)} where the plan rescales weights, got an unknown one"
        )
    # the weight became f * w, so its gradient became gradient / f; where f is zero the gradient
    # was zero as well, and says nothing about the new weight
    factor = cut.factors[name].to(moved.device) ** -GRADIENT_POWER[key]
    factor = torch.where(factor.isfinite(), factor, 0.0)
    return moved.mul_(factor.view(-1, *(1,) * (moved.ndim - 1)).to(moved.dtype))
