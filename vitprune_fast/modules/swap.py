"""What is done to modules for a while: their forward exchanged, hooks added, all put back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .modes import uncompiled

# how often each module is altered now
_altered: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


class Altered(ExitStack):
    """Modules that compute something else until this context is left, also by an exception.

    Inside it compiled code runs as it is written, because it does not look again at hooks after it
    was compiled. Contexts may be nested; each puts back what it found, and the last one in is the
    first that runs.
    """

    def __enter__(self) -> Altered:
        super().__enter__()
        self.enter_context(uncompiled())
        return self

    def exchange(self, module: nn.Module, forward: Callable, *first: Any) -> None:
        """Run ``forward(*first, ...)`` in place of the module's own; see `exchange_forward`."""
        self._until_left(module, exchange_forward(module, forward, *first))

    def before(self, module: nn.Module, hook: Callable) -> None:
        """Call ``hook(module, inputs)`` before every forward of a module; it may change them."""
        self._until_left(module, module.register_forward_pre_hook(hook).remove)

    def after(self, module: nn.Module, hook: Callable, *, first: bool = False) -> None:
        """Call ``hook(module, inputs, output)`` after every forward; it may change the output.

        Args:
            module: to watch.
            hook: what is called.
            first: before the hooks that are there.
        """
        self._until_left(module, module.register_forward_hook(hook, prepend=first).remove)

    def _until_left(self, module: nn.Module, undo: Callable[[], None]) -> None:
        _altered[module] = _altered.get(module, 0) + 1
        self.callback(_forget, module)
        self.callback(undo)


def silence(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """A hook after a branch: it writes zeros; what attention returns besides them stays."""
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)


def is_altered(module: nn.Module) -> bool:
    """Whether a module is inside an `Altered` that exchanged its forward or put hooks on it."""
    return module in _altered


def _forget(module: nn.Module) -> None:
    _altered[module] -= 1
    if not _altered[module]:
        del _altered[module]


def exchange_forward(module: nn.Module, forward: Callable, *first: Any) -> Callable[[], None]:
    """Let a module run ``forward(*first, ...)`` in place of its own.

    Compiled code sees it: it guards on the forwards of modules, unlike on their hooks.

    Args:
        module: of any class, with a forward of its own or without, which may stand in too.
        forward: called with ``first`` and what the module is called with.
        first: arguments that come first; a ``deepcopy`` of the module has those of the copy.

    Returns:
        What puts back the forward that was there. Exchanges of one module may be undone in any
        order; a forward that somebody else installed meanwhile goes with the one under it.
    """
    stand_in: Any = partial(forward, *first)
    stand_in.over = vars(module).get("forward")
    module.forward = stand_in
    return partial(_put_back, module, stand_in)


def _put_back(module: nn.Module, stand_in: Any) -> None:
    above: Any = None
    found: Any = vars(module).get("forward")
    while found is not None and found is not stand_in:
        above, found = found, getattr(found, "over", None)
    if found is stand_in and above is not None:
        above.over = stand_in.over
    elif stand_in.over is not None:
        module.forward = stand_in.over
    else:
        vars(module).pop("forward", None)
