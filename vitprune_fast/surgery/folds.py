"""Exact rewritings of a model: numbers move from one tensor into the next, the outputs stay."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..bare import bare
from ..errors import InvalidInput
from ..structure import Axis, Structure, describe, families
from ..structure.paths import get
from ..structure.table import Rows


@torch.inference_mode(False)
@torch.no_grad()
def fold_gates(model: nn.Module, gates: Mapping[str, Tensor]) -> None:
    """Multiply gate values of units into the adjacent weights, in place.

    The model then computes without gates what it computed with them: a head's or a neuron's gate
    goes into the columns of the map that reads it, a q/k dim's into the rows that write the query.

    Args:
        model: a supported model.
        gates: axis name -> one value per unit, ``(units,)``, of axes of heads, q/k dims, v dims or
            neurons.

    Raises:
        InvalidInput: an axis is not one of the model or has no gate, or values have another shape
            or are not finite, or an adjacent tensor is tied; nothing was changed then.
        UnsupportedArchitecture: the model has no layout.
    """
    model = bare("fold_gates", model)
    with families.opened(model, describe(model)) as structure:
        for name, values in gates.items():
            if name not in structure.taps:
                raise InvalidInput(
                    f"fold_gates: gates must be of axes of heads, dims or neurons of this model, "
                    f"got {name!r}"
                )
            size = structure.axes[name].size
            if not isinstance(values, Tensor) or values.shape != (size,):
                got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise InvalidInput(f"fold_gates: gates of {name} must be ({size},), got {got}")
            if not values.isfinite().all():
                raise InvalidInput(f"fold_gates: gates of {name} must be finite, got others")
            module = structure.taps[name].module
            for tensor in (f"{module}.weight", f"{module}.bias"):
                if structure.is_tied(tensor):
                    raise InvalidInput(
                        f"fold_gates: {tensor} must have no other name, got a tied one; untie it "
                        "first"
                    )
        for name, values in gates.items():
            _fold_gate(model, structure, structure.axes[name], values.detach().cpu())


def _fold_gate(model: nn.Module, structure: Structure, axis: Axis, values: Tensor) -> None:
    tap = structure.taps[axis.name]
    owners = tap.owners(axis)
    module = get(model, tap.module)
    part = slice(None) if tap.columns is None else slice(*tap.columns)
    if tap.at == "input":
        module.weight[:, part] *= values[owners].to(module.weight)
        return
    for tensor in (module.weight, getattr(module, "bias", None)):
        if tensor is not None:
            factor = values[owners].to(tensor)
            tensor[part] *= factor.view(-1, *(1,) * (tensor.ndim - 1))


@torch.inference_mode(False)
@torch.no_grad()
def fold_attention_biases(model: nn.Module) -> int:
    """Do without the biases of keys and values, in place; the outputs stay, up to rounding.

    A bias of all keys moves every logit of a query alike, which softmax does not see: it becomes
    zero. The rows of the attention matrix add up to one, so the bias of the values passes through
    it and joins the bias of the projection: ``b_o + W_o b_v``. Scores of heads change with it
    (their share of the constant moves): fold before scoring, or not at all.

    Where a norm or a gate stands between (q/k norm for keys; sub-norm or output gate for values),
    or the projection has no bias, or a bias is tied, that part is left alone. With attention
    dropout in training the rows no longer add up to one; the outputs are those of before in eval
    mode.

    Args:
        model: a supported model.

    Returns:
        How many parameters are zero now that need not be stored.

    Raises:
        UnsupportedArchitecture: the model has no layout.
    """
    model = bare("fold_attention_biases", model)
    structure, idle = describe(model), 0
    projections = {write.name: write.projection for write in structure.writes()}
    for attention in structure.attentions:
        for rows in (attention.key_bias, attention.value_bias):
            if rows is None or structure.is_tied(rows[0]):
                continue
            bias = get(model, rows[0])[_slice(structure, rows)]
            if rows is attention.key_bias or _pass_through(
                model, structure, projections[attention.module], bias
            ):
                bias.zero_()
                idle += bias.numel()
    return idle


def _slice(structure: Structure, rows: Rows) -> slice:
    """Where a part of the first dimension of a tensor lies."""
    dim = structure.tensors[rows[0]][0]
    lengths = [dim.part(number).length() for number in range(rows[1] + 1)]
    return slice(sum(lengths[:-1]), sum(lengths))


def _pass_through(model: nn.Module, structure: Structure, path: str, bias: Tensor) -> bool:
    """Add what a bias of the values makes of the projection's output to its bias, if it has one."""
    projection = get(model, path)
    if projection.bias is None or structure.is_tied(f"{path}.bias"):
        return False
    wide = torch.promote_types(bias.dtype, torch.float32)
    projection.bias += (projection.weight.to(wide) @ bias.to(wide)).to(projection.bias)
    return True
