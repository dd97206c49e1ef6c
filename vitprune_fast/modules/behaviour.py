"""What a model computes besides its classes and tensors, which neither a copy nor a file holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from ..errors import InvalidInput
from .swap import is_altered

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_BACKWARD_HOOKS = ("_backward_pre_hooks", "_backward_hooks")
# what compile() left, and what deepcopy() calls, are no part of what a module computes
_INNER = ("_compiled_call_impl", "__deepcopy__")


# hooks that a library puts on a model when it first needs them, on a copy as well as on this one
_OF_LIBRARIES = ("transformers.utils.output_capturing",)


class LeftBehind:
    """Base of our hooks and of arguments of our forwards, which copies of a model do not have."""


def check_behaviour(model: nn.Module, verb: str, *, written: bool = False) -> None:
    """Refuse a model whose copy would not compute what it computes.

    A function that was put in place of a method is copied by reference, and so goes on running
    what it captured of the first model; so does a hook that captured a part of it. A bound method
    of one of the modules is that of the copy, and a hook that captured none is kept.

    Args:
        model: to be copied, or written.
        verb: for the error.
        written: it is written to files, which hold no method of an instance and no hooks at all.

    Raises:
        InvalidInput: the model is such a one, or is inside `vitprune_fast.mask` or the like.
    """
    parts = {id(module) for module in model.modules()}
    parts |= {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    lost = "the files would not hold" if written else "a copy would share with the original"
    for path, module in model.named_modules():
        if is_altered(module):
            raise InvalidInput(
                f"{verb}: model must be as it is outside vp.mask and vp.score, got one that they "
                f"hold at {path or 'its top'}; leave them first"
            )
        prefix = f"{path}." if path else ""
        for name, value in _replaced(module, parts, written):
            raise InvalidInput(
                f"{verb}: model must compute by its classes alone, got {prefix}{name} replaced by "
                f"{_kind(value)}, which {lost}; put it back, or subclass the module"
            )
        for hook in _hooks(module, _HOOKS if written else (*_HOOKS, *_BACKWARD_HOOKS)):
            if not _is_passing(hook) if written else _is_shared(hook, parts):
                raise InvalidInput(
                    f"{verb}: model must compute by its classes alone, got a hook on "
                    f"{path or 'its top'} ({_kind(hook)}), which {lost}; remove it, or subclass "
                    "the module"
                )


def _replaced(module: nn.Module, parts: set[int], written: bool) -> Iterator[tuple[str, Any]]:
    """Attributes that are called and are not what the class says, nor ours."""
    for name, value in vars(module).items():
        if not callable(value) or isinstance(value, type) or name in _INNER:
            continue
        own = getattr(type(module), name, None)
        if not callable(own):
            if not written and _is_shared(value, parts):
                yield name, value
        elif isinstance(value, MethodType) and id(value.__self__) in parts:
            if written and (value.__func__ is not own or value.__self__ is not module):
                yield name, value
        elif not any(isinstance(given, LeftBehind) for given in getattr(value, "args", ())):
            yield name, value


def _hooks(module: nn.Module, kinds: Sequence[str]) -> Iterator[Any]:
    for kind in kinds:
        yield from getattr(module, kind).values()


def _is_passing(hook: Any) -> bool:
    """Whether a hook is for the time it is needed: of this package, or of the model's library."""
    home = str(getattr(hook, "__module__", None))
    return home.partition(".")[0] == __name__.partition(".")[0] or home in _OF_LIBRARIES


def _is_shared(value: Any, parts: set[int]) -> bool:
    """Whether a deep copy goes on with parts of the first model: functions are not copied."""
    if isinstance(value, partial):
        return _is_shared(value.func, parts)
    return isinstance(value, FunctionType) and _captures(value, parts, set())


def _captures(value: Any, parts: set[int], seen: set[int]) -> bool:
    if id(value) in seen:
        return False
    seen.add(id(value))
    if isinstance(value, (nn.Module, Tensor)):
        return id(value) in parts
    inside: list[Any] = []
    if isinstance(value, FunctionType):
        inside += value.__defaults__ or ()
        for cell in value.__closure__ or ():
            try:
                inside.append(cell.cell_contents)
            except ValueError:
                # not bound yet, so nothing was captured
                continue
    elif isinstance(value, MethodType):
        inside += [value.__self__, value.__func__]
    elif isinstance(value, partial):
        inside += [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        inside += value
    elif isinstance(value, dict):
        inside += value.values()
    return any(_captures(one, parts, seen) for one in inside)


def _kind(value: Any) -> str:
    return "a function" if isinstance(value, FunctionType) else f"a {type(value).__name__}"
