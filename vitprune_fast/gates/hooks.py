"""How gates get into a model and out of it again, without a change of its source.

Units are gated where the Structure taps them: by a hook, or, for an MLP of a known class, by its
forward with the activation and the gates in one op. ``deepcopy`` of a gated model gives a plain
one, and no key of its ``state_dict`` changes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn

from .. import ops
from ..errors import InvalidInput
from ..modules.behaviour import LeftBehind
from ..modules.known import (
    activation_of,
    is_plain_attention,
    is_plain_mlp,
    masks_or_drops,
    run_attention,
    run_mlp,
)
from ..modules.modes import forget_compiled
from ..modules.swap import exchange_forward
from ..structure import Axis, Structure, families
from ..structure.paths import get
from ..structure.places import Place
from .columns import gate_columns


class Source(Protocol):
    """Where the hooks get gate values from."""

    structure: Structure
    axes: dict[str, Axis]
    kind: str

    def value(self, axis: str, training: bool = False) -> Tensor: ...

    def refresh(self, training: bool = False) -> None: ...


# models that are gated now, and how to undo it
_attached: WeakKeyDictionary[nn.Module, tuple[Source, Callable[[], None]]] = WeakKeyDictionary()


def gates_on(model: nn.Module) -> Any:
    """The gates attached to a model, or None."""
    found = _attached.get(model)
    return None if found is None else found[0]


def gated_by(gates: Source) -> list[nn.Module]:
    """The models that these gates are attached to."""
    return [model for model, (source, _) in _attached.items() if source is gates]


def attention_of(gates: Source) -> str:
    """How the gated models attend: ``masked``, ``gated``, ``multiplied`` or ``plain``.

    ``masked`` is our op over the live heads alone, for ``fixed`` gates, ``gated`` the same over all
    of them; ``multiplied`` is the models' own attention with the gates behind it, and ``plain``
    that without gates.
    """
    heads = [axis for axis in gates.axes.values() if axis.kind == "head"]
    if not heads:
        return "plain"
    owners = [gates.structure.taps[axis.name].module.rpartition(".")[0] for axis in heads]
    attentions: list[Any] = [get(model, path) for model in gated_by(gates) for path in owners]
    if not all("forward" in vars(attention) for attention in attentions):
        return "multiplied"
    return "masked" if gates.kind == "fixed" else "gated"


def install(model: nn.Module, gates: Source) -> None:
    """Put every gate in its place.

    Raises:
        InvalidInput: the model has gates already, or is another one than the gates were made for.
    """
    if model in _attached:
        raise InvalidInput(
            "gates.attach: model must have no gates yet, got one with gates; detach them first"
        )
    with ExitStack() as undo:
        own = [module for module in model.modules() if "forward" in vars(module)]
        undo.enter_context(families.opened(model, gates.structure))
        # paths of modules that run another forward meanwhile
        exchanged = [
            path
            for path, module in model.named_modules()
            if "forward" in vars(module) and module not in own
        ]
        # else what was compiled before would go on without the hooks
        forget_compiled()
        handle = model.register_forward_pre_hook(_Refresh(gates))
        undo.callback(handle.remove)
        added = [("", "_forward_pre_hooks", handle.id)]
        for axis in gates.axes.values():
            tap = gates.structure.taps[axis.name]
            module = get(model, tap.module)
            if not isinstance(module, nn.Module):
                raise InvalidInput(
                    f"gates.attach: model must be the one the gates were made for, got one without "
                    f"{tap.module!r}"
                )
            path = tap.module.rpartition(".")[0]
            owner = get(model, path)
            forward = _forward_with(axis, owner)
            if forward is not None:
                undo.callback(exchange_forward(owner, forward, owner, _Gate(gates, axis, tap)))
                exchanged.append(path)
                continue
            if tap.at == "input":
                handle = module.register_forward_pre_hook(_Before(gates, axis, tap))
                added.append((tap.module, "_forward_pre_hooks", handle.id))
            else:
                handle = module.register_forward_hook(_After(gates, axis, tap))
                added.append((tap.module, "_forward_hooks", handle.id))
            undo.callback(handle.remove)
        vars(model)["__deepcopy__"] = _PlainCopy(model, added, exchanged)
        undo.callback(_remove_copy, ref(model))
        # what undoes it holds no reference to the model itself, which may be freed with its gates
        _attached[model] = (gates, undo.pop_all().close)


def uninstall(model: nn.Module) -> None:
    """Take the gates out of a model that has some; it is bit for bit what it was."""
    _, undo = _attached.pop(model)
    undo()


def _remove_copy(model: Callable[[], nn.Module | None]) -> None:
    del vars(model())["__deepcopy__"]


def _remove(model: nn.Module, added: list[tuple[str, str, int]]) -> None:
    for path, kind, key in added:
        del getattr(get(model, path), kind)[key]


class _Unpicklable:
    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InvalidInput(
            "gates.attach: model must have no gates to be pickled, got one with gates; "
            "pickle copy.deepcopy(model), or detach them first"
        )


class _PlainCopy(_Unpicklable):
    """``deepcopy`` of a gated model: a copy of the model alone, with none of our hooks."""

    def __init__(self, model: nn.Module, added: list[tuple[str, str, int]], exchanged: list[str]):
        self.model, self.added, self.exchanged = ref(model), added, exchanged

    def __call__(self, memo: dict[int, Any]) -> nn.Module:
        model = self.model()
        assert model is not None
        # without this entry the copy is an ordinary one
        entry = vars(model).pop("__deepcopy__")
        try:
            copied = copy.deepcopy(model, memo)
        finally:
            vars(model)["__deepcopy__"] = entry
        _remove(copied, self.added)
        for path in self.exchanged:
            del get(copied, path).forward
        return copied


class _Shared(_Unpicklable, LeftBehind):
    """A hook; a copy of a part of a gated model shares it, and so the gates."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


class _Refresh(_Shared):
    def __init__(self, gates: Source):
        self.gates = gates

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.gates.refresh(module.training)


class _Gate(_Shared):
    """The gates of one axis, where they are tapped."""

    def __init__(self, gates: Source, axis: Axis, tap: Place):
        self.gates, self.axis, self.tap = gates, axis, tap
        self._live: tuple[Tensor, int, list[int]] | None = None
        self.group = tap.width(axis)
        self._scattered = tap.is_scattered(axis)

    def value(self, training: bool) -> Tensor:
        return self.gates.value(self.axis.name, training)

    def multiplied(self, x: Tensor, training: bool) -> Tensor:
        part = self.tap.columns
        self.check(x.shape[-1] if part is None else part[1] - part[0])
        value = self.value(training)
        if self._scattered:
            return gate_columns(x, self.tap.spread(self.axis, value), 1, part)
        return gate_columns(x, value, self.group, part)

    def check(self, columns: int) -> None:
        """Refuse a model of other sizes than the gates were made for."""
        if columns != self.axis.size * self.group:
            raise InvalidInput(
                f"gates.attach: model must give {self.tap.module} {self.axis.size} units of "
                f"{self.group} columns, as the gates have, got {columns} columns"
            )

    def live(self) -> list[int] | None:
        """The units whose gate is not 0, where gates are constants; else None, for all."""
        if self.gates.kind != "fixed":
            return None
        value = self.value(False)
        known = self._live
        if known is None or known[0] is not value or known[1] != value._version:
            # reading it waits for the device, so once per value
            known = self._live = value, value._version, value.nonzero().flatten().tolist()
        return known[2]


class _Before(_Gate):
    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.multiplied(inputs[0], module.training), *inputs[1:])


class _After(_Gate):
    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.multiplied(output, module.training)


def _forward_with(axis: Axis, owner: Any) -> Callable[..., Tensor] | None:
    """The forward that has the gates of an axis in its own op; None where a hook multiplies."""
    if "forward" in vars(owner):
        return None
    if axis.kind == "head" and is_plain_attention(owner):
        return _gated_attention
    return _gated_mlp if axis.kind == "neuron" and is_plain_mlp(owner) else None


def _gated_attention(attn: Any, gate: _Gate, x: Tensor, **mask: Any) -> Tensor:
    """timm's Attention without an inner norm; with a mask or dropout as it is, and multiplied."""
    if masks_or_drops(attn, mask):
        # what enters the projection is multiplied there
        handle = attn.proj.register_forward_pre_hook(_Before(gate.gates, gate.axis, gate.tap))
        try:
            return type(attn).forward(attn, x, **mask)
        finally:
            handle.remove()

    def attend(qkv_BN3HK: Tensor, scale: float | None) -> Tensor:
        gate.check(qkv_BN3HK.shape[3] * qkv_BN3HK.shape[4])
        value = gate.value(attn.training)
        return ops.gated_attention(qkv_BN3HK, value, live_heads=gate.live(), scale=scale)

    return run_attention(attn, x, attend)


def _gated_mlp(mlp: Any, gate: _Gate, x: Tensor) -> Tensor:
    """timm's Mlp, GluMlp and SwiGLU without an inner norm; gates and dropout may change places."""
    gate_F, name = gate.value(mlp.training), activation_of(mlp.act)
    assert name is not None
    return run_mlp(mlp, x, partial(ops.gated_unit, gate_F=gate_F, activation=name))
