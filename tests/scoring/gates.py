"""Real gates on every unit of a timm ViT: what the scores are the derivatives of.

Written with hooks and autograd alone, without the table of the structure and without our ops.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn
from torch.nn import functional as F


def gate_derivatives(
    model: Any, images: Tensor, labels: Tensor, gates_of: Callable[[Any, int], Gates]
) -> dict[str, Tensor]:
    """axis name -> (samples, units): d(loss of the sample) / d(gate) at gate 1."""
    gates = gates_of(model, len(images))
    with gates.attached(model):
        loss = F.cross_entropy(model(images), labels, reduction="sum")
        gradients = torch.autograd.grad(loss, list(gates.leaves.values()))
    return {
        name: gradient.flatten(1) for name, gradient in zip(gates.leaves, gradients, strict=True)
    }


class Gates:
    """One gate per sample and unit of every unit kind, all at 1."""

    def __init__(self, model: Any, batch: int):
        self.batch = batch
        self.leaves: dict[str, Tensor] = {}
        self._before: list[tuple[nn.Module, Callable]] = []
        self._after: list[tuple[nn.Module, Callable]] = []
        self._norms: list[tuple[nn.Module, bool]] = []
        width = model.embed_dim
        self.embed = self._leaf("embed", width)
        for name in ("patch_embed.norm", "norm_pre"):
            self._norm(model.get_submodule(name), output=False)
        depth = len(model.blocks)
        attn = self._leaf("attn_branches", depth)
        mlp = self._leaf("mlp_branches", depth)
        block = self._leaf("blocks", depth)
        for i, each in enumerate(model.blocks):
            self._block(f"blocks.{i}", each)
            last = (
                (each.norm1, each.norm2)
                if isinstance(each, ResPostBlock)
                else (each.attn, each.mlp)
            )
            for module, of_branch in zip(last, (attn, mlp), strict=True):
                gate = of_branch[:, i], block[:, i]
                self._after.append((module, lambda y, g=gate: y * (g[0] * g[1])[:, None, None]))
        self._norm(model.norm, output=True)
        self._norm(model.fc_norm, output=True)

    def _leaf(self, name: str, *sizes: int) -> Tensor:
        leaf = torch.ones(self.batch, *sizes, dtype=torch.float64, requires_grad=True)
        self.leaves[name] = leaf
        return leaf

    def _block(self, path: str, block: Any) -> None:
        attn, mlp = block.attn, block.mlp
        heads, width = attn.num_heads, attn.head_dim
        head = self._leaf(f"{path}.attn.heads", heads)
        v_dim = self._leaf(f"{path}.attn.v_dims", heads, width)
        shared = not isinstance(attn.q_norm, nn.Identity)
        qk_dim = self._leaf(f"{path}.attn.qk_dims", 1 if shared else heads, width)
        neuron = self._leaf(f"{path}.mlp.neurons", mlp.fc2.in_features)
        self._before.append(
            (attn.proj, lambda x: x * (head[:, :, None] * v_dim).flatten(1)[:, None])
        )
        self._after.append((attn.q_norm, lambda q: q * qk_dim[:, :, None]))
        self._before.append((mlp.fc2, lambda x: x * neuron[:, None]))
        if isinstance(block, ResPostBlock):
            for reader in (attn, mlp):
                self._before.append((reader, lambda x: x * self.embed[:, None]))
            for norm in (block.norm1, block.norm2):
                self._norm(norm, output=False)
        else:
            for norm in (block.norm1, block.norm2):
                self._norm(norm, output=True)

    def _norm(self, norm: nn.Module, *, output: bool) -> None:
        if not isinstance(norm, nn.Identity):
            self._norms.append((norm, output))

    def attached(self, model: Any) -> ExitStack:
        """Context in which the model is gated."""
        stack = ExitStack()
        # before the others: it computes the output again
        for norm, output in self._norms:
            hook = norm.register_forward_hook(
                lambda n, inputs, y, o=output: weighted_norm(n, inputs[0], self.embed, output=o)
            )
            stack.callback(hook.remove)
        for module, before in self._before:
            hook = module.register_forward_pre_hook(partial(_entered, before))
            stack.callback(hook.remove)
        for module, after in self._after:
            hook = module.register_forward_hook(partial(_applied, after))
            stack.callback(hook.remove)
        return stack


def _entered(function: Callable, _: nn.Module, inputs: Any) -> Any:
    return (function(inputs[0]), *inputs[1:])


def _applied(function: Callable, _: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return function(output)


def weighted_norm(norm: Any, x: Tensor, z: Tensor, *, output: bool) -> Tensor:
    """LayerNorm or RMSNorm whose statistics weigh channels by ``z``; removal is ``z[c] = 0``."""
    z = z if x.ndim == 2 else z[:, None]
    share = z / z.sum(-1, keepdim=True)
    if isinstance(norm, nn.LayerNorm):
        x = x - (share * x).sum(-1, keepdim=True)
    x = x * (share * x * x).sum(-1, keepdim=True).add(norm.eps).rsqrt() * norm.weight
    bias = getattr(norm, "bias", None)
    x = x if bias is None else x + bias
    return x * z if output else x
