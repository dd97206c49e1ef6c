"""Exact rewritings of a model: numbers move from one tensor into the next, the outputs stay."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import InvalidInput
from ..structure import Axis, Structure, describe
from ..structure.axes import Dim
from ..structure.index import Index
from ..structure.paths import get


@torch.no_grad()
def fold_gates(model: nn.Module, gates: Mapping[str, Tensor]) -> None:
    """Multiply gate values of units into the tensors beside the gates, in place.

    The model then computes without gates what it computed with them: a head's or a neuron's gate
    goes into the columns of the map that reads it, a q/k dim's into the rows that write the query.

    Args:
        model: a supported model.
        gates: axis name -> one value per unit, ``(units,)``, of axes of heads, q/k dims, v dims or
            neurons.

    Raises:
        InvalidInput: an axis is not one of the model or has no gate, or values have another shape
            or are not finite, or a tensor beside a gate is tied; nothing was changed then.
        UnsupportedArchitecture: the model has no layout.
    """
    structure = describe(model)
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
        refuse_tied("fold_gates", structure, f"{module}.weight", f"{module}.bias")
    index = Index(structure, {})
    for name, values in gates.items():
        tap, axis = structure.taps[name], structure.axes[name]
        owners = torch.from_numpy(index.owners(tap.dim, axis))
        module = get(model, tap.module)
        part = slice(None) if tap.part is None else slice(*tap.part)
        if tap.side == "input":
            module.weight[:, part] *= values.detach().cpu()[owners].to(module.weight)
            continue
        for tensor in (module.weight, getattr(module, "bias", None)):
            if tensor is not None:
                factor = values.detach().cpu()[owners].to(tensor)
                tensor[part] *= factor.view(-1, *(1,) * (tensor.ndim - 1))


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
    structure = describe(model)
    idle = 0
    for axis in structure.axes.values():
        if axis.kind not in ("qk_dim", "v_dim"):
            continue
        attention = axis.name.rpartition(".")[0]
        for name, layout in structure.tensors.items():
            if not name.startswith(f"{attention}.") or len(layout) != 1 or structure.is_tied(name):
                continue
            parts = _parts_of(layout[0], axis)
            # queries come first, then keys; a norm's weight has one part for each of them alone
            if axis.kind == "qk_dim" and len(parts) == 2 and not _normed(structure, attention):
                idle += _silence(get(model, name), parts[1])
            elif axis.kind == "v_dim" and len(layout[0].parts) == 3 and len(parts) == 1:
                idle += _pass_through(model, structure, axis, get(model, name), parts[0])
    return idle


def refuse_tied(function: str, structure: Structure, *names: str) -> None:
    """Raise where a tensor to be rewritten for one place also serves at another."""
    for name in names:
        if structure.is_tied(name):
            raise InvalidInput(
                f"{function}: {name} must have no other name, got a tied one; untie it first"
            )


def _parts_of(dim: Dim, axis: Axis) -> list[slice]:
    """Where the parts of a dimension lie that run over an axis."""
    found, start = [], 0
    for part in dim.parts:
        length = Dim((part,)).length()
        if axis in part:
            found.append(slice(start, start + length))
        start += length
    return found


def _normed(structure: Structure, attention: str) -> bool:
    return f"{attention}.k_norm.normalized_shape" in structure.attrs


def _silence(bias: Tensor, part: slice) -> int:
    bias[part] = 0
    return bias[part].numel()


def _pass_through(
    model: nn.Module, structure: Structure, axis: Axis, bias: Tensor, part: slice
) -> int:
    tap = structure.taps[axis.name]
    attention, projection = axis.name.rpartition(".")[0], get(model, tap.module)
    between = f"{attention}.norm.normalized_shape" in structure.attrs
    between |= f"{attention}.gate.weight" in structure.tensors
    if between or projection.bias is None or structure.is_tied(f"{tap.module}.bias"):
        return 0
    wide = torch.promote_types(bias.dtype, torch.float32)
    projection.bias += (projection.weight.to(wide) @ bias[part].to(wide)).to(projection.bias)
    return _silence(bias, part)
