"""Reading and writing parts of a model by dotted path (``blocks.3.attn.qkv.weight``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def get(root: Any, path: str) -> Any:
    """The module, tensor, attribute or list entry at ``path``; None where there is none."""
    for part in path.split(".") if path else ():
        if isinstance(root, (list, tuple)):
            root = root[int(part)]
        elif isinstance(root, dict):
            root = root.get(part)
        else:
            root = getattr(root, part, None)
    return root


def put(root: nn.Module, path: str, value: Any) -> None:
    """Set what is at ``path``; a tensor becomes a parameter unless a buffer stands there."""
    parent_path, _, leaf = path.rpartition(".")
    parent = get(root, parent_path)
    if isinstance(parent, dict):
        parent[leaf] = value
    elif isinstance(value, Tensor) and leaf in parent._buffers:
        # straight into the dictionary: register_buffer would lose a buffer's persistence
        parent._buffers[leaf] = value
    elif isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        old = getattr(parent, leaf)
        requires_grad = value.is_floating_point() if old is None else old.requires_grad
        parent.register_parameter(leaf, nn.Parameter(value, requires_grad=requires_grad))
    else:
        setattr(parent, leaf, value)
