"""In which dtype a model computes: the names, what ``auto`` means on a device, and the casts.

Two ways, by purpose:

* What only looks at a model (``score``, ``evaluate``, ``latency``) computes with its weights and
  buffers cast to the dtype (:func:`computing_in`): that is what deployed inference in 16 bits is,
  and what the fast kernels take.
* What changes weights (``distill``, the sweep of ``prune``) leaves them as they are and computes
  under autocast (:func:`autocast`): updates and residual streams need the digits that 16 bits do
  not have. There float32 means the weights' own dtype.

Logits, losses, scores and sums of products are in float32 at least either way. Nothing here imports
torch before it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, get_args

from vitprune_fast.errors import InvalidInput

if TYPE_CHECKING:
    import torch
    from torch import nn

Precision = Literal["auto", "float32", "bfloat16", "float16"]
"""``auto`` is bfloat16 on a GPU that has it, and float32 anywhere else."""

NAMES: tuple[str, ...] = get_args(Precision)
HALF = ("bfloat16", "float16")
"""Those of 16 bits."""


def resolve(
    function: str, dtype: Precision | torch.dtype | None, device: torch.device | str
) -> torch.dtype | None:
    """The dtype that is meant on a device; None stays None, as the model is.

    Args:
        function: the caller's name, for the error sentence.
        dtype: a name, the dtype of that name, or None.
        device: where it will be computed.

    Raises:
        InvalidInput: another name or dtype.
    """
    import torch

    return None if dtype is None else getattr(torch, resolved_name(function, dtype, device))


def resolved_name(
    function: str, dtype: Precision | torch.dtype, device: torch.device | str
) -> Precision:
    """The name of the dtype that is meant on a device; arguments and errors of ``resolve``."""
    import torch

    name: Any = name_of(dtype) if isinstance(dtype, torch.dtype) else dtype
    if name not in NAMES:
        raise InvalidInput(f"{function}: dtype must be one of {', '.join(NAMES)}, got {dtype!r}")
    if name != "auto":
        return name
    return "bfloat16" if _has_bfloat16(torch.device(device)) else "float32"


def name_of(dtype: torch.dtype) -> Any:
    """``"bfloat16"`` of ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def is_half(dtype: torch.dtype | None) -> bool:
    """Whether a dtype has 16 bits; None is that of a model, of which nothing was asked."""
    return dtype is not None and name_of(dtype) in HALF


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters of a model are; one without any computes where its images are."""
    import torch

    return next((p.device for p in model.parameters()), torch.device("cpu"))


def dtype_of(model: nn.Module) -> torch.dtype:
    """In which dtype the floating parameters of a model are; without any it takes float32."""
    import torch

    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(floating, torch.float32)


@contextmanager
def computing_in(dtype: torch.dtype | None, *models: nn.Module | None) -> Iterator[None]:
    """Have models compute in a dtype: inside the block their modules hold cast tensors.

    Every floating parameter and buffer of another dtype is replaced by a cast of it, tied ones by
    one. The modules themselves stay, so hooks, wrappers and forwards of their own are honoured. The
    tensors are put back, the very objects, also after an error; their values are never touched.
    Until then nothing else may use the models. Takes the memory of the casts.

    Args:
        dtype: None changes nothing.
        models: those to cast; None is nobody.
    """
    import torch
    from torch import nn

    modules = [each for model in models if model is not None for each in model.modules()]
    places: list[tuple[dict[str, Any], str, torch.Tensor]] = [
        (held, name, tensor)
        for module in (modules if dtype is not None else ())
        for held in (module._parameters, module._buffers)
        for name, tensor in held.items()
        if tensor is not None and tensor.is_floating_point() and tensor.dtype != dtype
    ]
    casts: dict[int, Any] = {}
    try:
        for held, name, tensor in places:
            if id(tensor) not in casts:
                with torch.no_grad():
                    cast: Any = tensor.to(dtype)
                if isinstance(tensor, nn.Parameter):
                    cast = nn.Parameter(cast, requires_grad=tensor.requires_grad)
                casts[id(tensor)] = cast
            held[name] = casts[id(tensor)]
        yield
    finally:
        for held, name, tensor in places:
            held[name] = tensor


def autocast(
    dtype: torch.dtype | None, device: torch.device | str, *, keeps_casts: bool = True
) -> AbstractContextManager[Any]:
    """Have products computed in a dtype of 16 bits, with weights as they are.

    Args:
        dtype: another one, or None, changes nothing.
        device: of the model.
        keeps_casts: a weight is cast once in a block; False where weights change inside.
    """
    import torch

    if not is_half(dtype):
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype, cache_enabled=keeps_casts)


def _has_bfloat16(device: torch.device) -> bool:
    """Whether ``auto`` is bfloat16: a CPU is to keep the bits that it has in float32."""
    import torch

    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)
