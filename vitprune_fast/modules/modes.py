"""How modules run: training or evaluation, put back as it was; compiled or as written."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import InvalidInput


@contextmanager
def evaluating(*models: nn.Module | None) -> Iterator[None]:
    """Put models in evaluation mode; after the block every module has the mode it had."""
    with keeping_modes(*models):
        for model in models:
            if model is not None and any(module.training for module in model.modules()):
                model.eval()
        yield


@contextmanager
def keeping_modes(*models: nn.Module | None) -> Iterator[None]:
    """Put the mode of every module back after the block, also after an exception."""
    modules = [module for model in models if model is not None for module in model.modules()]
    modes = [module.training for module in modules]
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            # writing takes 30 times as long as looking, and a training step may come here
            if module.training != mode:
                module.training = mode


@contextmanager
def attention_in_parts() -> Iterator[None]:
    """Have torch's own attention call the operations it is made of, so that modes see them.

    Without gradients it may run as one operation that no mode looks into.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def compiled(model: nn.Module, backend: bool | str = True) -> Any:
    """Compile a model for itself, with the hooks that it has when it first runs."""
    options: dict[str, Any] = {} if backend is True else {"backend": backend}
    # else code that was compiled for a model of the same class and shape, without hooks, would run
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        options["isolate_recompiles"] = True
    return torch.compile(model, **options)


def check_recordable(verb: str, model: nn.Module) -> None:
    """Refuse a model whose tensors autograd can keep nothing of.

    Raises:
        InvalidInput: one was made inside ``torch.inference_mode()``.
    """
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise InvalidInput(
            f"{verb}: model must be built outside torch.inference_mode(), whose tensors take part "
            "in no gradient, got one built inside; copy its state_dict into a new one"
        )


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run what was compiled as it is written: a compiled module does not look at its hooks."""
    if "torch._dynamo" not in sys.modules:
        # nothing was compiled, and the import takes longer than many a score run
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def forget_compiled() -> None:
    """Let all that was compiled be compiled again when it next runs, with the hooks of then.

    Compiled code guards on the hooks that it found, and not on there being none.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
