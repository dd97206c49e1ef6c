"""Parameters and multiply-accumulates: in closed form from the table, or counted on a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

from ..modes import evaluating
from ..ops.gated_attention import gated_attention_ops
from ..structure import Structure, describe
from ..structure.axes import Dim, Write
from ..structure.index import Index
from .plan import Plan


@dataclass(frozen=True)
class Cost:
    """Size of a model.

    Args:
        params: number of parameters.
        macs: multiply-accumulates of one image in linear, convolution and attention products.
        useful_macs: the same without the zero rows that fill ragged head dims (equal to ``macs``
            unless heads keep different numbers of dims).
    """

    params: int
    macs: int
    useful_macs: int


def cost(model: nn.Module, input_size: int | tuple[int, ...] | None = None) -> Cost:
    """Count the cost of a model by running it once on zeros (batch 1).

    Args:
        model: any model :func:`vitprune_fast.describe` accepts.
        input_size: as for ``describe``.

    Returns:
        Its Cost. Multiply-accumulates are half the FLOPs that PyTorch's flop counter sees, which
        counts matrix products, convolutions and attention. Nothing random is drawn.
    """
    size = describe(model, input_size).input_size
    reference = next(model.parameters())
    image = torch.zeros(1, *size, device=reference.device, dtype=reference.dtype)
    with evaluating(model):
        macs = count_macs(lambda: model(image))
    return Cost(sum(p.numel() for p in model.parameters()), macs, macs)


def count_macs(run: Callable[[], Any]) -> int:
    """Multiply-accumulates of the products that ``run`` computes, without gradients."""
    counter = FlopCounterMode(display=False, custom_mapping=_uncounted())
    with torch.no_grad(), counter:
        run()
    return counter.get_total_flops() // 2


def _uncounted() -> dict[Any, Any]:
    """Attention that the flop counter passes over: PyTorch's on the CPU before 2.15, and ours."""

    def flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def of_live(qkv: Any, gate: Any, mask: Any, live: Any, *args: Any, **kwargs: Any) -> int:
        batch, tokens, _, _, width = qkv
        # two products, and a multiply-accumulate is two
        return 4 * batch * len(live) * tokens**2 * width

    packet = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    own = dict.fromkeys(gated_attention_ops(), of_live)
    return own if packet in flop_registry else {packet: flops, **own}


def predict_cost(structure: Structure, plan: Plan | None = None) -> Cost:
    """The cost of a model after pruning, in closed form from its table.

    Args:
        structure: of the unpruned model.
        plan: what is kept; None keeps everything.

    Returns:
        Exactly what :func:`cost` counts on the pruned model, with ``useful_macs`` beside it.
    """
    plan = Plan.of(structure) if plan is None else plan.check(structure)
    index = Index(structure, plan, plan.removed)
    params, macs = count(structure, index.extent, gone(index))
    for name, (fate, _) in index.fates.items():
        if fate == "constant":
            params += index.length(constant_dim(structure, index.dead[name]))
    useful = sum(
        work.positions * math.prod(len(index.kept_positions(dim)) for dim in work.dims)
        for work in structure.work
        if not f"{work.module}.".startswith(gone(index))
    )
    return Cost(params, macs, useful)


def count(
    structure: Structure, extent: Mapping[str, int], gone: tuple[str, ...] = ()
) -> tuple[int, int]:
    """Parameters and multiply-accumulates when axes are stored at the widths of ``extent``.

    Args:
        structure: of the unpruned model.
        extent: axis name -> stored width; axes not named keep theirs.
        gone: path prefixes (ending in a dot) of modules that are no longer there.
    """
    # tied parameters are stored once, under any of their names that is left
    layouts = {
        structure.ties.get(name, name): layout
        for name, layout in structure.tensors.items()
        if name not in structure.buffers and not name.startswith(gone)
    }
    params = sum(math.prod(dim.length(extent) for dim in layout) for layout in layouts.values())
    macs = sum(
        work.positions * math.prod(dim.length(extent) for dim in work.dims)
        for work in structure.work
        if not f"{work.module}.".startswith(gone)
    )
    return params, macs


def gone(index: Index) -> tuple[str, ...]:
    """Path prefixes of the modules that pruning takes out."""
    prefixes = []
    for name, write in index.dead.items():
        fate, _ = index.fates[name]
        # a constant that no writer can take over keeps its norm, LayerScale and drop path
        helpers = () if fate == "constant" else write.helpers
        prefixes += [f"{path}." for path in (name, *helpers)]
    return tuple(prefixes)


def constant_dim(structure: Structure, write: Write) -> Dim:
    """The dimension of the vector an emptied branch writes: that of the stream."""
    bias = write.tail[0] if write.tail else write.bias[0]
    matrix = f"{bias.removesuffix('bias')}weight"
    return structure.tensors[bias if bias in structure.tensors else matrix][0]
