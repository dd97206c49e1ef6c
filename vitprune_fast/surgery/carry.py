"""What goes with a model through surgery: the optimizer and its moments."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import InvalidInput
from ..structure import Structure
from ..structure.index import Index
from ..structure.paths import get
from .gather import gather_tensor

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


@dataclass
class Cut:
    """A pruned model, the new tensor of every old name, and the rows that were rescaled."""

    model: Any
    tensors: dict[str, Tensor]
    # name -> fp64 factor of every row, where a fold rescaled the weight
    factors: dict[str, Tensor] = field(default_factory=dict)

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


def carry_optimizer(
    optimizer: Optimizer, model: nn.Module, structure: Structure, index: Index, cut: Cut
) -> Optimizer:
    """The same optimizer over the parameters of the pruned model, with the surviving moments.

    Args:
        optimizer: over parameters of ``model`` (all or some of them).
        model: before pruning.
        structure: of ``model``.
        index: of the plan.
        cut: what pruning made of ``model``.

    Returns:
        A new optimizer of the same class, groups and settings; groups may be left empty.

    Raises:
        InvalidInput: a parameter of the optimizer is not one of the model, or a state of it cannot
            be sliced or rescaled.
    """
    names = {id(get(model, name)): name for name in structure.tensors}
    alive = {id(parameter) for parameter in cut.model.parameters()}
    memo: dict[int, Any] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise InvalidInput(
                    "prune: optimizer must hold parameters of the model, got one of shape "
                    f"{tuple(parameter.shape)} that is none of them"
                )
            name = names[id(parameter)]
            memo[id(parameter)] = cut.tensors[name]
            if id(cut.tensors[name]) not in alive:
                continue
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.numel() > 1:
                    memo[id(value)] = _sliced(name, key, value, structure, index, cut)
    carried = copy.deepcopy(optimizer, memo)
    for group in carried.param_groups:
        group["params"] = [p for p in group["params"] if id(p) in alive]
    for parameter in [p for p in carried.state if id(p) not in alive]:
        del carried.state[parameter]
    return carried


def _sliced(
    name: str, key: str, value: Tensor, structure: Structure, index: Index, cut: Cut
) -> Tensor:
    layout = structure.tensors[name]
    if value.shape != tuple(dim.length() for dim in layout):
        raise InvalidInput(
            f"prune: optimizer state {key!r} of {name} must have the shape of the parameter, "
            f"got {tuple(value.shape)}; this optimizer's state cannot be sliced"
        )
    sliced = gather_tensor(value, index, layout)
    if name not in cut.factors:
        return sliced
    if key not in GRADIENT_POWER:
        raise InvalidInput(
            f"prune: optimizer state {key!r} of {name} must be one of "
            f"{', '.join(GRADIENT_POWER)} where the plan rescales weights, got an unknown one"
        )
    # the weight became f * w, so its gradient became gradient / f; where f is zero the gradient
    # was zero as well, and says nothing about the new weight
    factor = cut.factors[name].to(value.device) ** -GRADIENT_POWER[key]
    factor = torch.where(factor.isfinite(), factor, 0.0)
    return sliced.mul_(factor.view(-1, *(1,) * (value.ndim - 1)).to(value.dtype))
