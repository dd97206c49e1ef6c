"""Replay of a whole scoring step as one CUDA graph, for models whose kernels are shorter than their
launches (ViT-Ti and ViT-S, small batches)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# runs before the capture: kernels are compiled and libraries choose their algorithms there
WARM_UPS = 2


class Replayed:
    """A function of device tensors, captured once per shape of its inputs and then replayed.

    The function must not wait for the device, and must give tensors of the same shapes for inputs
    of the same shapes. What a call returns is overwritten by the next one.

    Args:
        function: takes device tensors, returns rows of tensors.
    """

    def __init__(self, function: Callable[..., Sequence[Mapping[str, Tensor]]]):
        self._function = function
        self._captured: dict[Any, tuple[Callable[[], None], list[Tensor], Any]] = {}

    def __call__(self, *inputs: Tensor) -> Sequence[Mapping[str, Tensor]]:
        key = tuple((tuple(x.shape), x.dtype) for x in inputs)
        if key not in self._captured:
            self._captured[key] = self._capture(inputs)
        replay, places, rows = self._captured[key]
        for place, given in zip(places, inputs, strict=True):
            place.copy_(given)
        replay()
        return rows

    def _capture(self, inputs: Sequence[Tensor]) -> tuple[Callable[[], None], list[Tensor], Any]:
        places = [x.clone() for x in inputs]
        replay, rows = captured(lambda: self._function(*places))
        return replay, places, rows


def captured(call: Callable[[], Any], calls: int = 1) -> tuple[Callable[[], None], Any]:
    """Capture a call, or several in a row, as one CUDA graph.

    Args:
        call: must not wait for the device.
        calls: how often it is captured.

    Returns:
        What replays the graph, and the results of the last call, which every replay overwrites.

    Raises:
        RuntimeError: the call does what a graph cannot hold.
    """
    current = torch.cuda.current_stream()
    # warm-ups on a stream of their own, as capturing asks for
    stream = torch.cuda.Stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            call()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        # other threads, such as that of a data loader, may use the device meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(calls):
                result = call()
    except BaseException:
        # a capture that fails leaves its stream the current one, and random numbers to a graph
        torch.cuda.set_stream(current)
        random = torch.cuda.default_generators[current.device_index]
        random.graphsafe_set_state(torch.Generator(current.device).graphsafe_get_state())
        raise
    return graph.replay, result
