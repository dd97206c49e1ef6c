"""Parameters and multiply-accumulates: in closed form from the table, or counted on a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

from ..bare import bare
from ..errors import InvalidInput
from ..modules.modes import attention_in_parts, evaluating
from ..ops.gated_attention import registered_op
from ..structure import Structure, describe
from ..structure.reading import Reading
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
    model = bare("cost", model)
    size = describe(model, input_size).input_size
    reference = next(model.parameters())
    image = torch.zeros(1, *size, device=reference.device, dtype=reference.dtype)
    with evaluating(model):
        macs = count_macs(lambda: model(image))
    return Cost(sum(p.numel() for p in model.parameters()), macs, macs)


def count_macs(run: Callable[[], Any]) -> int:
    """Multiply-accumulates of the products that ``run`` computes, without gradients."""
    return _counted(run).get_total_flops() // 2


def count_macs_by_module(model: nn.Module, run: Callable[[], Any]) -> dict[str, int]:
    """As :func:`count_macs`, of every module in which products are computed; ``""`` is the model.

    A module counts what it contains as well.
    """
    root = type(model).__name__
    return {
        path.removeprefix(root).removeprefix("."): sum(flops.values()) // 2
        for path, flops in _counted(run).get_flop_counts().items()
        if path.partition(".")[0] == root
    }


def _counted(run: Callable[[], Any]) -> FlopCounterMode:
    counter = FlopCounterMode(display=False, custom_mapping=_uncounted())
    detaching = register_module_forward_pre_hook(_detached)
    try:
        with torch.no_grad(), attention_in_parts(), counter:
            run()
    finally:
        detaching.remove()
    return counter


def _detached(_: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """What a module gets, as what needs no gradient where none is taken.

    There a view of a parameter says that it needs one, and the counter finds nothing that made it.
    """
    if torch.is_grad_enabled():
        return None
    # all others stay what they are: attention may ask whether its inputs are one tensor
    views = [isinstance(x, Tensor) and x.requires_grad for x in inputs]
    return tuple(x.detach() if view else x for x, view in zip(inputs, views, strict=True))


def _uncounted() -> dict[Any, Any]:
    """Attention that the flop counter passes over: PyTorch's on the CPU before 2.15, and ours."""

    def flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def of_live(qkv: Any, gate: Any, mask: Any, live: Any, *args: Any, **kwargs: Any) -> int:
        batch, tokens, _, _, width = qkv
        # two products, and a multiply-accumulate is two
        return 4 * batch * len(live) * tokens**2 * width

    packet = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    own = {registered_op(): of_live}
    return own if packet in flop_registry else {packet: flops, **own}


def predict_cost(structure: Structure, plan: Plan | Mapping[str, int] | None = None) -> Cost:
    """The cost of a model after pruning, in closed form from its table.

    Args:
        structure: of the unpruned model.
        plan: what is kept: a plan, or bare counts (axis name -> how many units stay; of dims of
            heads, how many in each head), which take a fortieth of the time; None keeps all.

    Returns:
        Exactly what :func:`cost` counts on the pruned model, and ``useful_macs``.

    Raises:
        InvalidInput: the plan or the counts are not of this model.
    """
    if plan is None or isinstance(plan, Plan):
        reading = Reading(structure, plan and plan.check(structure))
    elif isinstance(plan, Mapping):
        reading = Reading.of_counts(structure, plan)
    else:
        raise InvalidInput(
            "predict_cost: plan must be a Plan, or a mapping from axis names to counts, got "
            f"{type(plan).__name__}"
        )
    return Cost(reading.params, reading.macs, reading.useful_macs)
