"""Peers of our scoring that `vitprune-fast bench scoring` leaves out: slow ones, compiled ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitprune_fast import describe
from vitprune_fast.benches.scoring import Form, streamed
from vitprune_fast.timing import measure

GRAPHED = "vitprune_fast: heads, neurons, replayed as a CUDA graph"
HESSIAN = "Torch-Pruning Hessian, per sample"
GATES = "plain gates, one for each sample and unit"
COMPILED = "torch.compile of plain gates"
PEERS = (GRAPHED, GATES, HESSIAN, COMPILED)
# batches of two streams, whose difference in time is that of replays alone
FEW, MANY = 3, 11
# backwards of a per-sample loop that are timed; the others cost the same
TIMED_BACKWARDS = 2


def peers(
    model: nn.Module, images: Tensor, labels: Tensor, names: Collection[str] = PEERS
) -> list[Form]:
    """Those of the named forms that this machine and the installed packages can run."""
    device, timed = images.device, min(len(images), TIMED_BACKWARDS)

    def replayed() -> float:
        # the capture of the graph is the same in both, and does not count
        few, many = (
            streamed(model, images, labels, batches, cuda_graph=True) for batches in (FEW, MANY)
        )
        return (many - few) / (MANY - FEW)

    def loop() -> float:
        forward, *backwards = hessian_loop(model, images, labels, timed)
        return forward + len(images) * sum(backwards) / timed

    def gated(name: str, compiler: Callable | None = None) -> Form:
        call = plain_gates(model, images, labels, compiler)
        return Form(name, lambda: measure(call, device))

    found = []
    if GRAPHED in names and images.is_cuda:
        found.append(Form(GRAPHED, replayed, arithmetic=True))
    if GATES in names:
        found.append(gated(GATES))
    if HESSIAN in names and find_spec("torch_pruning"):
        note = f"{timed} of {len(images)} backwards timed" if timed < len(images) else ""
        found.append(Form(HESSIAN, loop, note))
    if COMPILED in names and images.is_cuda:
        found.append(gated(COMPILED, torch.compile))
    return found


def hessian_loop(model: nn.Module, images: Tensor, labels: Tensor, backwards: int) -> list[float]:
    """Torch-Pruning's per-sample loop: one forward, then a whole backward for every sample.

    Returns:
        Seconds of the forward, and of each of the ``backwards`` timed.
    """
    import torch_pruning

    importance: Any = torch_pruning.importance.GroupHessianImportance()
    model.eval().requires_grad_(True)
    importance.zero_grad()
    losses: list[Tensor] = []

    def forward() -> None:
        losses.append(F.cross_entropy(model(images).float(), labels, reduction="none"))

    def backward(loss: Tensor) -> None:
        model.zero_grad()
        loss.backward(retain_graph=True)
        importance.accumulate_grad(model)

    with torch.enable_grad():
        seconds = [measure(forward, images.device)]
        for loss in losses[0][:backwards]:
            seconds.append(measure(partial(backward, loss), images.device))
    return seconds


def plain_gates(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    compiler: Callable[[Callable], Callable] | None = None,
) -> Callable[[], dict[str, Tensor]]:
    """Per-sample scores of heads and neurons as one would write them for a compiler.

    Every unit is multiplied by a gate that is 1, one per sample; the gates are differentiated.

    Args:
        model: is copied.
        images: (B, C, H, W).
        labels: (B,).
        compiler: such as ``torch.compile``.
    """
    gated, gates = copy.deepcopy(model).eval().requires_grad_(False), {}
    structure = describe(model)

    def gate(name: str, units: int, columns: int) -> Callable:
        ones = torch.ones(len(images), units, device=images.device, dtype=images.dtype)
        gates[name] = ones.requires_grad_()

        def multiply(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            each = gates[name].repeat_interleave(columns // units, dim=1)
            return (inputs[0] * each[:, None], *inputs[1:])

        return multiply

    for kind in ("head", "neuron"):
        for axis in structure.units(kind):
            module: Any = gated.get_submodule(structure.taps[axis.name].module)
            module.register_forward_pre_hook(gate(axis.name, axis.size, module.in_features))

    def loss(images: Tensor) -> Tensor:
        return F.cross_entropy(gated(images).float(), labels, reduction="sum")

    compiled = compiler(loss) if compiler else loss

    def run() -> dict[str, Tensor]:
        with torch.enable_grad():
            gradients = torch.autograd.grad(compiled(images), list(gates.values()))
        return dict(zip(gates, gradients, strict=True))

    return run
