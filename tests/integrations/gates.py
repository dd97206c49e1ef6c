"""Real gates on every unit of other libraries' models, by hooks and autograd alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from scoring.gates import weighted_norm
from torch import Tensor, nn
from torch.nn import functional as F


class Gates:
    """One gate per sample and unit, all at 1; fill it with the methods, then differentiate."""

    def __init__(self, batch: int):
        self.batch = batch
        self.leaves: dict[str, Tensor] = {}
        self._hooks: list[Callable[[], Any]] = []

    def leaf(self, name: str, *sizes: int) -> Tensor:
        leaf = torch.ones(self.batch, *sizes, dtype=torch.float64, requires_grad=True)
        self.leaves[name] = leaf
        return leaf

    def before(self, module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        """What enters the module."""
        self._hooks.append(
            lambda: module.register_forward_pre_hook(
                lambda _, inputs: (function(inputs[0]), *inputs[1:])
            )
        )

    def after(self, module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        """What leaves the module, or the first of it."""

        def hook(_: nn.Module, inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (function(output[0]), *output[1:])
            return function(output)

        self._hooks.append(lambda: module.register_forward_hook(hook))

    def attention(self, path: str, out: nn.Linear, heads: int) -> Tensor:
        """Heads and v dims at the output projection; hands back the gates of the q/k dims."""
        width = out.in_features // heads
        head = self.leaf(f"{path}.heads", heads)
        v_dim = self.leaf(f"{path}.v_dims", heads, width)
        self.before(out, lambda x: x * (head[:, :, None] * v_dim).flatten(1)[:, None])
        return self.leaf(f"{path}.qk_dims", heads, width)

    def neurons(self, path: str, out: nn.Linear) -> None:
        neuron = self.leaf(f"{path}.neurons", out.in_features)
        self.before(out, lambda x: x * neuron[:, None])

    def norm(self, module: nn.Module, embed: Tensor) -> None:
        """Removal of channels from a norm whose output is read."""
        self._hooks.append(
            lambda: module.register_forward_hook(
                lambda norm, inputs, _: weighted_norm(norm, inputs[0], embed, output=True)
            )
        )

    def branches(self, attentions: list[nn.Module], mlps: list[nn.Module]) -> None:
        depth = len(attentions)
        block = self.leaf("blocks", depth)
        for name, modules in (("attn_branches", attentions), ("mlp_branches", mlps)):
            gate = self.leaf(name, depth)
            for i, module in enumerate(modules):
                both = (gate[:, i], block[:, i])
                self.after(module, lambda y, g=both: y * (g[0] * g[1])[:, None, None])

    def derivatives(
        self, logits_of: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """axis name -> (samples, units): d(loss of the sample) / d(gate)."""
        loss = self._losses(logits_of, images, labels).sum()
        gradients = torch.autograd.grad(loss, list(self.leaves.values()))
        return {n: g.flatten(1) for n, g in zip(self.leaves, gradients, strict=True)}

    @torch.no_grad()
    def damage(
        self, logits_of: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """axis name -> (samples, units): loss of the sample with the gate at 0, less that at 1."""
        full = self._losses(logits_of, images, labels)
        found = {}
        for name, leaf in self.leaves.items():
            flat, columns = leaf.view(self.batch, -1), []
            for unit in range(flat.shape[1]):
                flat[:, unit] = 0
                columns.append(self._losses(logits_of, images, labels) - full)
                flat[:, unit] = 1
            found[name] = torch.stack(columns, 1)
        return found

    def _losses(
        self, logits_of: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor
    ) -> Tensor:
        with ExitStack() as stack:
            for register in self._hooks:
                stack.callback(register().remove)
            return F.cross_entropy(logits_of(images), labels, reduction="none")
