"""How much memory one forward pass takes at its fullest moment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from vitprune_fast.bare import check_module
from vitprune_fast.errors import InvalidInput
from vitprune_fast.modules.modes import attention_in_parts, evaluating
from vitprune_fast.planning.latency import image_shape
from vitprune_fast.precision import Precision, computing_in, device_of, dtype_of, resolve


def peak_memory_bytes(
    model: nn.Module,
    batch_size: int = 1,
    input_size: int | tuple[int, ...] | None = None,
    device: torch.device | str | None = None,
    *,
    dtype: Precision | torch.dtype | None = None,
) -> int:
    """The most bytes that one forward pass holds at a time, without gradients, in evaluation mode.

    Counted are parameters and buffers in the dtype computed in, those that share memory once; the
    images; and the activations that are alive together at the fullest moment.

    On CUDA activations are what the allocator hands out (``torch.cuda.max_memory_allocated``): in
    whole blocks, and with what kernels ask for to work in. What a first pass leaves behind, as the
    workspaces of libraries, is not counted, and neither is what else lies on the device.

    Elsewhere there is no such counter, and the tensors that operations of torch return are added
    up, each until it is freed; what an operation allocates inside is not seen. So the number is
    the same in every run, on every machine and with any number of threads, for the same versions
    of torch and of the model's library.

    The model comes back with the modes and on the device it had.

    Args:
        model: maps images to anything.
        batch_size: images per pass.
        input_size: side, (height, width) or (channels, height, width) in pixels; default: what
            the model says of itself.
        device: where to measure; default: where the model is.
        dtype: of weights and images (see ``precision.py``): ``auto`` is bfloat16 on a GPU that has
            it and float32 elsewhere; None is as the model is.

    Raises:
        InvalidInput: ``batch_size`` below 1, an unknown ``dtype``, or an input size that cannot be
            told.
    """
    function = "peak_memory_bytes"
    if batch_size < 1:
        raise InvalidInput(f"{function}: batch_size must be at least 1, got {batch_size}")
    check_module(function, model)
    home = device_of(model)
    target = home if device is None else torch.device(device)
    computed = resolve(function, dtype, target)
    shape = (batch_size, *image_shape(function, model, input_size))
    images = torch.zeros(shape, device=target, dtype=computed or dtype_of(model))
    with ExitStack() as undo:
        undo.callback(model.to, home)
        model.to(target)
        undo.enter_context(computing_in(computed, model))
        undo.enter_context(evaluating(model))
        undo.enter_context(torch.no_grad())
        alive = _Alive([*model.parameters(), *model.buffers(), images])
        if target.type == "cuda":
            return alive.peak + _allocated(lambda: model(images), target)
        with attention_in_parts(), alive:
            model(images)
    return alive.peak


def _allocated(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes that the allocator of CUDA hands out at most above what is there before."""
    with torch.cuda.device(device):
        # what libraries keep for all later passes
        run()
        # a larger block of the cache would be handed out, and counted, whole
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before


class _Alive(TorchDispatchMode):
    """Adds up the memory of tensors that are alive; views share that of their base.

    Args:
        held: tensors that are there before.

    Attributes:
        peak: the most bytes so far.
    """

    def __init__(self, held: Sequence[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        # an entry goes when the last tensor on its storage does
        self._bytes = WeakIdKeyDictionary()
        self._add(held)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        self._add(made)
        return made

    def _add(self, made: Any) -> None:
        for each in tree_leaves(made):
            if isinstance(each, Tensor):
                storage = each.untyped_storage()
                self._bytes[storage] = storage.nbytes()
        self.peak = max(self.peak, sum(self._bytes.values()))
