"""Trained weights in a file, under whatever names, as the tensors of one model."""

from __future__ import annotations

import inspect
import mmap
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from vitprune_fast import files
from vitprune_fast.errors import DamagedFile, InvalidInput
from vitprune_fast.models.trained_as import HARMLESS, as_flags, trained_as
from vitprune_fast.stated import stated_config

States = Mapping[str, Mapping[str, Tensor]]
"""Where in a file tensors stand, as keys joined by dots -> their names -> the tensors."""

# of several equally complete states the first of these; timm and DINO advise so
_PREFERRED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "ema_model", "teacher")
# parts that only a pretraining needs
_PRETRAINING = (
    *("decoder", "mask_token", "lm_head", "dino_head", "ibot_head"),
    *("projector", "predictor", "last_layer"),
)
# what compiled, sharded and checkpointed modules put into names, wherever they stand
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# no name of ours lies deeper in another's
_DEEPEST = 8


@dataclass(frozen=True)
class Fitted:
    """The weights of a file under the names and in the shapes of a model.

    Attributes:
        tensors: by the model's names; without the head's where the file has none.
        classes: that its head tells apart; None without a head.
        heads: names of the tensors of the model's classifiers.
        changes: what was done to them, in words.
    """

    tensors: dict[str, Tensor]
    classes: int | None
    heads: tuple[str, ...]
    changes: tuple[str, ...]

    def headless(self) -> Fitted:
        """The same without the head."""
        rest = {name: tensor for name, tensor in self.tensors.items() if name not in self.heads}
        return replace(self, tensors=rest, classes=None)


def read_checkpoint(path: Path) -> States:
    """All states of a checkpoint: safetensors, or a torch file read with weights_only.

    Raises:
        InvalidInput: the file is missing.
        DamagedFile: the file holds pickled code (never executed), no tensors, or is damaged.
    """
    path = Path(path)
    if (path / "adapter_config.json").is_file():
        raise InvalidInput(
            f"model: checkpoint must be a file of whole weights, got the adapter folder {path}; "
            f"give --merge-lora {path} with --pretrained or the checkpoint that it was trained on"
        )
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise InvalidInput(f"model: checkpoint must be a file, got {path} ({found})")
    if path.suffix == ".safetensors":
        return {"": files.read_tensors(path)}
    _refuse_bombs(path)
    try:
        # timm's train script keeps its arguments
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # the unpickler refuses with many types; all of them mean the same to the user
        raise DamagedFile(
            f"model: checkpoint {path} is no plain tensor file ({type(error).__name__}); nothing "
            "in it was executed: convert it to .safetensors where you trust it"
        ) from None
    states = dict(_states(content, (), set()))
    if not states:
        raise DamagedFile(f"model: checkpoint {path} must hold named tensors, found none")
    return states


def _states(
    content: Any, keys: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every mapping that names tensors, by the keys that lead to it."""
    # a file can hold itself
    if not isinstance(content, Mapping) or id(content) in seen or len(keys) >= _DEEPEST:
        return
    seen.add(id(content))
    named = {key: value for key, value in content.items() if isinstance(key, str)}
    tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
    if tensors:
        yield ".".join(keys), tensors
    for key, value in named.items():
        yield from _states(value, (*keys, key), seen)


def _refuse_bombs(path: Path) -> None:
    """Refuse a torch file that asks for more memory than it has bytes.

    torch.save never compresses, and never writes a ``bytearray``, the one thing that torch's reader
    makes in any size a number asks for.
    """
    try:
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            bomb = content.find(b"bytearray") >= 0
            if content[:4] == b"PK\x03\x04":
                with zipfile.ZipFile(file) as archive:
                    entries = archive.infolist()
                bomb |= any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
                bomb |= sum(entry.file_size for entry in entries) > len(content)
    except Exception as error:
        # zipfile raises anything from BadZipFile to struct.error
        raise DamagedFile(
            f"model: checkpoint {path} must be a whole file, got {error}; download it again"
        ) from None
    if bomb:
        raise DamagedFile(
            f"model: checkpoint {path} must not unpack to more than its size; "
            "save it again with torch.save or as .safetensors"
        )


def fit(model: nn.Module, states: States, source: Path) -> Fitted:
    """The state of a file that fits a model best, made to fit.

    Wrappers' and outer modules' prefixes go, timm's own converter of the family translates names
    and resizes position embeddings and patches, and the first layer is adapted to other channels.

    Args:
        model: whose names and shapes are wanted; it need not have memory.
        states: of the file.
        source: the file, for messages.

    Raises:
        InvalidInput: something is missing, unknown or of another shape; or these are adapters.
    """
    wanted = model.state_dict()
    states = {keys: _unwrapped(state) for keys, state in states.items()}
    adapters = [name for state in states.values() for name in state if ".lora_" in name]
    if adapters:
        raise InvalidInput(
            f"model: checkpoint {source} must hold whole weights, got LoRA adapters "
            f"({adapters[0]}, ...); give --merge-lora DIR with their adapter_config.json, or save "
            "what peft's merge_and_unload() returns"
        )
    keys, prefix, others = _best(states, wanted)
    whole = states[keys]
    inner = {n.removeprefix(prefix): t for n, t in whole.items() if n.startswith(prefix)}
    # converters that know whole files of others find more in them than we do
    made = [_converted(tensors, model) for tensors in ([inner, whole] if prefix else [whole])]
    found = max(made, key=lambda tensors: len(tensors.keys() & wanted.keys()))
    changes = [f"takes {_label(keys, prefix)}, not {others}"] if others else []
    if prefix:
        changes.append(f"names without {prefix}")
    heads = _head_names(model, wanted)
    # next to the module that holds the rest
    parts = prefix.split(".")[:-1]
    for above in (".".join([*parts[:count], ""]) if count else "" for count in range(len(parts))):
        found |= {n: whole[above + n] for n in heads if n not in found and above + n in whole}
    found |= _adapted(model, found, wanted)
    changes += [
        f"{name} resized from {_shape(inner[name])} to {_shape(found[name])}"
        for name in found
        if name in inner and name in wanted and inner[name].shape != found[name].shape
    ]
    fitting = {name: tensor for name, tensor in found.items() if name in wanted}
    extra = [name for name in found if name not in wanted and name.startswith(_PRETRAINING)]
    outside = [n for n in whole if not n.startswith(prefix) and n not in heads] if prefix else []
    dropped = dict.fromkeys(name.partition(".")[0] for name in (*extra, *outside))
    # what a converter left out belongs to a pretraining as well
    dropped |= dict.fromkeys(n for n in inner if n.startswith("mask_token"))
    if dropped:
        more = f" and {len(dropped) - 6} more" if len(dropped) > 6 else ""
        changes.append(f"leaves out {', '.join([*dropped][:6])}{more}")
    unknown = [n for n in found if n not in wanted and n not in extra]
    missing = [n for n in wanted if n not in found]
    headless = bool(heads) and {*missing} == {*heads}
    if headless:
        missing = []
        changes.append("has no head, so the model's is new")
    _refuse_misfit(source, whole, wanted, fitting, missing, unknown, heads)
    first = next((n for n in heads if n.endswith("weight") and n in fitting), None)
    classes = None if first is None else len(fitting[first])
    return Fitted(fitting, classes, tuple(heads), tuple(changes))


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the words of wrappers."""
    return {
        ".".join(word for word in name.split(".") if word not in _WRAPPERS): tensor
        for name, tensor in state.items()
    }


def _best(states: States, wanted: Mapping[str, Tensor]) -> tuple[str, str, str]:
    """Keys and prefix of the state that holds most of the names, and which others hold as many."""
    counted: list[tuple[int, int, str, str]] = []
    for keys, state in states.items():
        hits: Counter[str] = Counter()
        for name in state:
            parts = name.split(".")
            for depth in range(min(len(parts), _DEEPEST)):
                hits[".".join([*parts[:depth], ""]) if depth else ""] += (
                    ".".join(parts[depth:]) in wanted
                )
        for prefix, count in hits.items():
            words = [*keys.split("."), *prefix.split(".")]
            ranks = [_PREFERRED.index(word) for word in words if word in _PREFERRED]
            counted.append((count, -min(ranks, default=len(_PREFERRED)), keys, prefix))
    # the first of equals: the names as they are come before those behind a prefix
    most, _, keys, prefix = max(counted, key=lambda each: each[:2])
    others = [
        _label(*each[2:])
        for each in counted
        if most and each[0] == most and each[2:] != (keys, prefix)
    ]
    return keys, prefix, ", ".join(others)


def _label(keys: str, prefix: str) -> str:
    return f"{keys}.{prefix}".strip(".") or "the names at the top"


def _converted(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Through timm's converter for the model's file; as they are where it cannot."""
    convert: Any = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    # the converters drop this layer, which the weights were trained with
    if convert is None or any("pre_logits" in name for name in tensors):
        return tensors
    takes = inspect.signature(convert).parameters
    options = {"adapt_layer_scale": True} if "adapt_layer_scale" in takes else {}
    try:
        return dict(convert(dict(tensors), model, **options))
    except Exception:
        # of tensors that it does not expect it raises anything; their names then say what is wrong
        return tensors


def _adapted(
    model: nn.Module, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """First layers for other channels, as timm makes them of its own weights."""
    first = stated_config(model).get("first_conv") or ()
    adapted = {}
    for name in (f"{each}.weight" for each in ([first] if isinstance(first, str) else first)):
        if name in found and name in wanted and found[name].ndim == 4 == wanted[name].ndim:
            ours, theirs = found[name].shape[1], wanted[name].shape[1]
            if ours != theirs and 1 in (ours, theirs):
                adapted[name] = adapt_input_conv(theirs, found[name], base_chans=ours)
    return adapted


def _head_names(model: nn.Module, wanted: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors of a model's classifiers."""
    stated = stated_config(model).get("classifier") or ()
    parts = tuple(f"{each}." for each in ([stated] if isinstance(stated, str) else stated))
    return [name for name in wanted if name.startswith(parts)]


def _refuse_misfit(
    source: Path,
    whole: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    missing: Sequence[str],
    unknown: Sequence[str],
    heads: Sequence[str],
) -> None:
    """Refuses what does not fit, with the first reason and how much does."""
    problems = [
        f"{name} must be {_shape(tensor)}, got {_shape(found[name])}"
        for name, tensor in wanted.items()
        # another number of classes is for who chooses it to judge
        if name in found
        and found[name].shape != tensor.shape
        and not (name in heads and found[name].shape[1:] == tensor.shape[1:])
    ]
    problems += [f"{name} is missing" for name in missing]
    problems += [f"{name} is unknown" for name in unknown]
    if not problems:
        return
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    share = f"{len(found)} of the model's {len(wanted)} names are in it"
    if 2 * len(found) < len(wanted):
        first = [*dict.fromkeys(name.partition(".")[0] for name in whole)]
        more_words = ", ..." if len(first) > 3 else ""
        share += f", and its own {len(whole)} begin with {', '.join(first[:3])}{more_words}"
    made = as_flags(trained_as(Path(source)))
    raise InvalidInput(
        f"model: checkpoint {source} does not fit the model: {problems[0]}{more}; {share}; "
        + (f"it was trained as {made}" if made else "check --model and --model-args")
    )


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
