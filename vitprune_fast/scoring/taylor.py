"""First-order Taylor scores of every sample from one batched backward.

With ``g(b, u)`` the sum over tokens and the unit's dims of activation x gradient, for the loss
summed over samples, ``g`` is the derivative of sample b's loss by a gate on unit u at 1 (Michel et
al. 2019, arXiv:1905.10650, section 4.1; Molchanov et al. 2017, arXiv:1611.06440, section 2.2). No
operation of a ViT mixes samples, so one backward of the summed loss gives it for every sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..batches import as_input, check_logits, checked
from ..errors import InvalidInput
from ..modes import evaluating
from ..structure import Structure
from ..structure.axes import Axis
from ..structure.paths import get
from .scores import Accumulator


def accumulate(
    model: nn.Module,
    structure: Structure,
    batches: Iterable[Sequence[Any]],
    axes: Sequence[Axis],
    accumulator: Accumulator,
) -> None:
    """Add the per-sample scores of every batch to ``accumulator``.

    Raises:
        InvalidInput: a batch or the logits cannot be used, or gradients cannot exist here.
    """
    if torch.is_inference_mode_enabled():
        raise InvalidInput(
            "score: the criterion 'taylor' must be called outside torch.inference_mode(), which "
            "records no gradients even where they are asked for; leave it, torch.no_grad() is fine"
        )
    with scoring_mode(model), taps(model, structure, axes) as captured, torch.enable_grad():
        for images, labels in checked("score", batches, model):
            logits = model(as_input(model, images))
            check_logits("score", logits, labels)
            # summed, so that the score of a sample does not depend on the batch it came in
            loss = F.cross_entropy(logits.float(), labels.to(logits.device), reduction="sum")
            if not logits.requires_grad:
                raise InvalidInput(
                    "score: model must have a unit of the asked kinds left, got one without any"
                )
            loss.backward()
            accumulator.add({axis.name: captured[axis.name] for axis in axes})
            captured.clear()


@contextmanager
def scoring_mode(model: nn.Module) -> Iterator[None]:
    """Weights frozen, dropout and drop path off; everything as before afterwards, also on errors.

    Frozen weights mean that no weight gradient exists at any time: forward and input gradients are
    all that is computed.
    """
    requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with evaluating(model):
        try:
            model.requires_grad_(False)
            yield
        finally:
            for parameter, flag in requires_grad.items():
                parameter.requires_grad_(flag)


@contextmanager
def taps(
    model: nn.Module, structure: Structure, axes: Sequence[Axis]
) -> Iterator[dict[str, Tensor]]:
    """Hooks that reduce activation x gradient to per-sample unit scores as the backward passes.

    Yields:
        A dictionary the backward fills: axis name -> (samples, units), fp32 (fp64 in fp64 models).
    """
    captured: dict[str, Tensor] = {}
    by_module: dict[str, list[Axis]] = {}
    for axis in axes:
        by_module.setdefault(structure.taps[axis.name].module, []).append(axis)

    def watch(units: list[Axis]):
        def before_forward(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            activation = inputs[0]
            if not activation.requires_grad:
                # the first tap is the leaf of the graph: nothing below it needs a backward
                activation = activation.detach().requires_grad_()
            value = activation.detach()

            def reduce(gradient: Tensor) -> None:
                for axis in units:
                    group = value.shape[-1] // axis.size
                    captured[axis.name] = ops.taylor_score(value, gradient, group)

            activation.register_hook(reduce)
            return (activation, *inputs[1:])

        return before_forward

    handles = []
    try:
        for path, units in by_module.items():
            handles.append(get(model, path).register_forward_pre_hook(watch(units)))
        yield captured
    finally:
        for handle in handles:
            handle.remove()
