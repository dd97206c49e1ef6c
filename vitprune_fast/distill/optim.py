"""The optimizer of a training, its learning rate, and settings of the model while it trains."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from timm.layers import DropPath
from torch import nn

from vitprune_fast.bare import inside
from vitprune_fast.config.distill import DistillConfig
from vitprune_fast.distill.hidden_states import block_names
from vitprune_fast.errors import InvalidInput
from vitprune_fast.structure import families


def make_optimizer(
    student: nn.Module,
    named: Mapping[str, nn.Parameter],
    others: Sequence[dict[str, Any]],
    config: DistillConfig,
) -> torch.optim.Optimizer:
    """Over the parameters of the student, by depth where ``layer_decay`` says so, and of others.

    Matrices decay; biases, norms and scales do not. A group's learning rate is the schedule's times
    its ``lr_scale``. It is fused where all parameters are on GPUs, see :func:`can_fuse`.

    Args:
        student: says which parameter lies how deep.
        named: its parameters that learn.
        others: groups of other parameters, with ``lr_scale`` and ``weight_decay``.
        config: which optimizer.

    Raises:
        InvalidInput: ``layer_decay`` with a model that does not say how deep its parameters lie.
    """
    below = _blocks_above(student) if config.layer_decay < 1 else {}
    own: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for parameter in named.values():
        key = below.get(id(parameter), 0), parameter.ndim >= 2
        own.setdefault(key, []).append(parameter)
    groups = [
        {
            "params": parameters,
            "lr_scale": config.layer_decay**above,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (above, decays), parameters in own.items()
    ]
    groups = [group for group in (*groups, *others) if group["params"]]
    # every step sets the rate
    fused = can_fuse({p.device.type for group in groups for p in group["params"]})
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=fused)
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, fused=fused)
    if fused and config.momentum:
        # after a skipped first step torch's own buffers would be uninitialised memory
        for group in optimizer.param_groups:
            for p in group["params"]:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def can_fuse(device_types: Set[str]) -> bool:
    """Whether the optimizer of parameters on such devices is fused.

    A fused one updates in few launches, and skips a step by a flag that it reads on the device.
    """
    return device_types == {"cuda"}


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer of :func:`make_optimizer` is fused, with step counts on the device."""
    return bool(optimizer.defaults["fused"])


def _blocks_above(student: nn.Module) -> dict[int, int]:
    """Id of each parameter -> how many layers are above its own.

    As in BEiT: what comes before the blocks is the lowest layer, each block is one, and what comes
    after them (final norm, heads) the highest. What lies between two goes with the first of them.
    """
    # a compiled module has other names
    model = inside(student)
    try:
        blocks = _blocks_of(model) if families.find(model) else block_names(model)
    except InvalidInput:
        raise InvalidInput(
            "distill: layer_decay must be 1 for a student without blocks that follow one another, "
            f"got one below for {type(model).__name__}"
        ) from None
    above, place = {}, len(blocks) + 1
    for name, parameter in model.named_parameters():
        number = next((n for n, block in enumerate(blocks) if name.startswith(f"{block}.")), None)
        if number is not None:
            place = len(blocks) - number
        elif place == 1:
            # behind the last
            place = 0
        above[id(parameter)] = place
    return above


def _blocks_of(model: nn.Module) -> list[str]:
    """Paths of the blocks of a model of a known family, in order; none of another one."""
    family = families.find(model)
    return family.block_paths(model) if family else []


def learning_rate(step: int, steps_per_epoch: int, config: DistillConfig, peak: float) -> float:
    """Learning rate of a step: linear warm-up to ``peak``, half a cosine, then ``min_lr``."""
    first = min(config.warmup_lr, peak)
    last = min(peak / 100, 1e-5) if config.min_lr is None else min(config.min_lr, peak)
    epochs = config.epochs - config.cooldown_epochs
    warmup = min(config.warmup_epochs, epochs / 2) * steps_per_epoch
    total = epochs * steps_per_epoch
    if step < warmup:
        share = (step + 1) / (math.floor(warmup) + 1)
        return first + (peak - first) * share
    share = min((step - warmup) / max(total - 1 - warmup, 1), 1.0)
    return last + (peak - last) * (1 + math.cos(math.pi * share)) / 2


@contextmanager
def as_trained(model: nn.Module, config: DistillConfig, *, two_heads: bool) -> Iterator[None]:
    """Set drop path, checkpointing and the heads of a distillation token; restore them afterwards.

    Args:
        model: a model of timm, or any other where the config asks for nothing.
        config: ``drop_path`` and ``grad_checkpointing``.
        two_heads: let a model with a distillation token return both heads' logits in training.

    Raises:
        InvalidInput: the model has no place for what is asked.
    """
    with ExitStack() as undo:
        if config.drop_path is not None:
            known = [model.get_submodule(path) for path in _blocks_of(model)]
            blocks: Any = known or getattr(model, "blocks", ())
            kept = [
                (block, name, module, config.drop_path * (i / max(len(blocks) - 1, 1)))
                for i, block in enumerate(blocks)
                for name, module in block.named_children()
                if name.startswith("drop_path")
            ]
            if not kept:
                raise InvalidInput(
                    "distill: drop_path must be unset for a student without blocks that have it, "
                    f"got {config.drop_path} for {type(model).__name__}"
                )
            for block, name, module, rate in kept:
                undo.callback(setattr, block, name, module)
                setattr(block, name, DropPath(rate))
        if config.grad_checkpointing:
            if not hasattr(model, "set_grad_checkpointing"):
                raise InvalidInput(
                    "distill: grad_checkpointing must be off for a student without "
                    f"set_grad_checkpointing, got {type(model).__name__}"
                )
            undo.enter_context(checkpointing(model, True))
        heads: Any = getattr(model, "set_distilled_training", None) if two_heads else None
        if heads is not None:
            undo.callback(heads, getattr(model, "distilled_training", False))
            heads(True)
        yield


@contextmanager
def checkpointing(model: nn.Module, on: bool) -> Iterator[None]:
    """Switch activation checkpointing in a model that has it, and back after."""
    # stages have it each for itself
    before = any(getattr(module, "grad_checkpointing", False) for module in model.modules())
    switch: Any = getattr(model, "set_grad_checkpointing", None) if before != on else None
    if switch is None:
        yield
        return
    switch(on)
    try:
        yield
    finally:
        switch(before)
