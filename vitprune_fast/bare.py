"""The model itself: looked for inside what wraps it, and refused where it is not what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from vitprune_fast.errors import InvalidInput, UnsupportedArchitecture

# classes that run one module, and the attribute that holds it
_WRAPPERS = {
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.optim.swa_utils.AveragedModel": "module",
    "timm.utils.model_ema.ModelEmaV2": "module",
    "timm.utils.model_ema.ModelEmaV3": "module",
}
# where models keep what gives their logits, if no get_classifier() says it
_HEADS = ("classifier", "cls_classifier", "distillation_classifier", "heads")


def inside(model: Any) -> Any:
    """The model inside DataParallel, DistributedDataParallel, ``torch.compile`` and averages of
    weights, or itself."""
    while name := next(filter(None, map(_holds, type(model).__mro__)), None):
        model = getattr(model, name)
    return model


def bare(verb: str, model: Any) -> Any:
    """The model inside its wrappers, which compute what it computes.

    Every verb asks for it first, so that all of them take and refuse the same.

    Args:
        verb: the caller's name, for the error sentence.
        model: of any class.

    Raises:
        UnsupportedArchitecture: it holds adapters, whose part is in no weight of the model.
        InvalidInput: it is no module, or its head has other classes than it says.
    """
    model = inside(model)
    check_module(verb, model)
    if (found := adapter_of(model)) is not None:
        path, kind = found
        raise UnsupportedArchitecture(
            f"{verb}: model must compute by its own weights, got {kind} at {path or 'its top'}; "
            "pass what merge_and_unload() of the PeftModel hands back"
        )
    stated, real = stated_classes(model), head_width(model)
    # timm and transformers build their heads by what they say; torchvision never asks again
    says = callable(getattr(model, "get_classifier", None)) or hasattr(model, "num_labels")
    if says and isinstance(stated, int) and real is not None and stated != real:
        name = "num_classes" if hasattr(model, "num_classes") else "num_labels"
        raise InvalidInput(
            f"{verb}: model must have a head of the classes that it says, got "
            f"{f'one of {real}' if real else 'none'} and {name}={stated}; {_remedy(model, real)}"
        )
    return model


def check_module(verb: str, model: Any) -> None:
    """Refuse what is no module, such as the name of a model or its weights.

    Args:
        verb: the caller's name, for the error sentence.
        model: of any class.

    Raises:
        InvalidInput: as said.
    """
    if not isinstance(model, nn.Module):
        given = f" {model!r:.60}" if isinstance(model, (str, Path)) else ""
        raise InvalidInput(
            f"{verb}: model must be a torch.nn.Module, got {type(model).__name__}{given}; open it "
            "first, as vp.load(FOLDER) or timm.create_model(NAME) do"
        )


def adapter_of(model: nn.Module) -> tuple[str, str] | None:
    """(path, class) of the first adapter in a model, or around it, as of LoRA; None without one."""
    for path, module in model.named_modules():
        kind = type(module)
        # what is around a layer answers with the weight of that layer
        if kind.__module__.partition(".")[0] == "peft" or hasattr(module, "base_layer"):
            return path, f"{kind.__module__}.{kind.__qualname__}"
    return None


def stated_classes(model: Any) -> Any:
    """How many classes a model says it tells apart; None where it does not say."""
    return getattr(model, "num_classes", getattr(model, "num_labels", None))


def heads_of(model: Any) -> tuple[nn.Module, ...]:
    """What gives the logits of a model, two of a distilled one; an Identity where there is none.

    Nothing where nothing says what it is: timm's models have a ``get_classifier()``, those of
    transformers and torchvision known names.
    """
    if callable(getattr(model, "get_classifier", None)):
        found = model.get_classifier()
        found = found if isinstance(found, (tuple, list)) else (found,)
    else:
        found = [getattr(model, name, None) for name in _HEADS]
    return tuple(each for each in found if isinstance(each, nn.Module))


def head_width(model: Any) -> int | None:
    """How many numbers the head of a model puts out: 0 without a head, None where it is unknown."""
    head = next(iter(heads_of(model)), None)
    if head is None:
        return 0 if _is_backbone(model) else None
    sizes = [getattr(m, "out_features", getattr(m, "out_channels", None)) for m in head.modules()]
    known = [size for size in sizes if isinstance(size, int)]
    if known:
        return known[-1]
    return None if [*head.parameters()] else 0


def _is_backbone(model: Any) -> bool:
    """Whether this is what transformers put its heads on, and says of no classes: `ViTModel`."""
    named = getattr(model, "base_model_prefix", "")
    return bool(named) and model.base_model is model and stated_classes(model) is None


def _holds(kind: type) -> str | None:
    return _WRAPPERS.get(f"{kind.__module__}.{kind.__qualname__}")


def _remedy(model: Any, classes: int) -> str:
    if hasattr(model, "reset_classifier"):
        return (
            f"call model.reset_classifier({classes}), or set model.num_classes = {classes} to keep "
            "the head"
        )
    return f"set model.num_labels = model.config.num_labels = {classes}"
