"""The names of the ops that run."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class OpNames(TorchDispatchMode):
    """Notes ``names``, in order, of the ops that run inside; changes nothing else.

    An op of ours with a form on several backends runs it out of sight, and is told with that
    backend: ``vitprune_fast::gated_unit_triton``. C++ is the one that has no such ending.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(zip((each.name for each in func._schema.arguments), args, strict=False))
        form = given.get("backend", "cpu")
        self.names.append(func._schema.name + ("" if form == "cpu" else f"_{form}"))
        return func(*args, **(kwargs or {}))
