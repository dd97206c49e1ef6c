"""A device that is none: its tensors lie on the CPU, and every look at one of them is noted.

``use()`` makes it, once per process. Inside ``Far()`` tensors may be on ``FAR``; what would make
the host wait for a GPU is in ``waits``: values that are read, results whose size depends on values,
and copies that are not both asynchronous and out of pinned memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)
from torch.utils.weak import WeakIdKeyDictionary

# what reads values, besides copies; on a GPU each of these synchronises
READS = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::repeat_interleave",
}
FAR = "far"
waits: list[str] = []
_pinned = WeakIdKeyDictionary()


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def use() -> torch.device:
    """Make the device known to torch."""
    _setup_privateuseone_for_python_backend(FAR, _Module())

    def pin_memory(tensor: Tensor, *_: Any) -> Tensor:
        pinned = tensor.clone()
        _pinned[pinned] = True
        return pinned

    generator = torch.Generator

    def near_generator(device: Any = "cpu") -> torch.Generator:
        return generator("cpu" if torch.device(device).type == FAR else device)

    tensor = torch.tensor

    def far_tensor(data: Any, *, device: Any = "cpu", **options: Any) -> Tensor:
        made = tensor(data, **options)
        return made if torch.device(device).type != FAR else made.to(device)

    # what torch has for its own devices alone is exchanged for all of this process
    for owner, name, stand_in in (
        (torch, "tensor", far_tensor),
        (torch, "Generator", near_generator),
        (Tensor, "pin_memory", pin_memory),
    ):
        setattr(owner, name, stand_in)
    return torch.device(FAR, 0)


class FarTensor(Tensor):
    """One on the device; ``near`` holds its values."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> FarTensor:
        # torch documents it for such subclasses, and leaves it out of its type stubs
        make: Any = getattr(Tensor, "_make_wrapper_subclass")  # noqa: B009
        made = make(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=torch.device(FAR, 0),
        )
        made.near = near
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def untyped_storage(self) -> Any:
        return self.near.untyped_storage()

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **options})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class Far(TorchDispatchMode):
    """Where tensors are made on the device too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def sent_there(model: nn.Module) -> nn.Module:
    """A model with its parameters and buffers there."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            far = nn.Parameter(FarTensor(parameter.detach()), parameter.requires_grad)
            setattr(module, name, far)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = FarTensor(buffer)
    return model


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    far = {id(each.near): each for each in tensors if isinstance(each, FarTensor)}
    device = kwargs.get("device")
    to_far = bool(far) if device is None else torch.device(device).type == FAR
    if not far and not to_far:
        return func(*args, **kwargs)
    near = [each for each in tensors if not isinstance(each, FarTensor)]
    if name in ("aten::_to_copy", "aten::copy_"):
        free = kwargs.get("non_blocking") or (name == "aten::copy_" and args[2:3] == (True,))
        leaves = not to_far or (name == "aten::copy_" and not isinstance(args[0], FarTensor))
        if leaves or (near and not (free and all(each in _pinned for each in near))):
            waits.append(f"{name} {'to the host' if leaves else 'from the host'}")
    elif name in READS or (
        name in ("aten::index", "aten::index_put_", "aten::_index_put_impl_")
        and any(each.dtype == torch.bool for each in args[1] if each is not None)
    ):
        waits.append(name)
    elif any(each.ndim or name.startswith(("aten::_fused", "aten::_foreach")) for each in near):
        raise RuntimeError(f"{name}: tensors must be on one device")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map_only(FarTensor, lambda each: each.near, (args, kwargs))
    result = func(*args, **kwargs)
    if not to_far:
        return result
    # what was changed in place stays the tensor it is
    return tree_map_only(
        Tensor, lambda each: far[id(each)] if id(each) in far else FarTensor(each), result
    )
