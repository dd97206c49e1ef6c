"""LoRA of peft added to the weights it was trained for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitprune_fast import files
from vitprune_fast.errors import DamagedFile, InvalidInput

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# settings whose result is not W + (alpha/r) B A, and the values that ask for nothing of theirs
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    # the others change the weights that they are added to
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True)
class Adapter:
    """What an adapter adds to and puts in place of weights.

    Attributes:
        folder: where it was read.
        config: `adapter_config.json`.
        pairs: name of a module -> A ``(r, in, ...)`` and B ``(out, r, ...)``.
        whole: tensors that it brings whole, such as a head's, by their names in the model.
    """

    folder: Path
    config: Mapping[str, Any]
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    whole: Mapping[str, Tensor]

    def classes(self, head: str) -> int | None:
        """Outputs of the head of that name; None where the adapter brings none."""
        weight = self.whole.get(f"{head}.weight")
        return None if weight is None else len(weight)

    def merge(self, model: nn.Module) -> None:
        """Adds it to the weights of a model, in place, computed in fp32 at least.

        Hu et al. 2021, arXiv:2106.09685, equation 3; scaled by alpha / sqrt(r) where the adapter
        asks for that (Kalajdzievski 2023, arXiv:2312.03732).

        Raises:
            InvalidInput: the model lacks something, or has it in another shape.
        """
        state = model.state_dict()
        for name, tensor in self.whole.items():
            self._check(name, state, tensor.shape)
            state[name].copy_(tensor)
        for name, (a, b) in self.pairs.items():
            weight = f"{name}.weight"
            dtype = torch.promote_types(a.dtype, torch.float32)
            rows, columns = b.to(dtype).flatten(1), a.to(dtype).flatten(1)
            delta = (rows @ columns * self._scale(name, len(a))).reshape(len(b), *a.shape[1:])
            if self.config.get("fan_in_fan_out"):
                delta = delta.T
            self._check(weight, state, delta.shape)
            wide = torch.promote_types(state[weight].dtype, dtype)
            state[weight].copy_(state[weight].to(wide) + delta.to(wide))

    def _check(self, name: str, state: Mapping[str, Tensor], shape: torch.Size) -> None:
        got = tuple(state[name].shape) if name in state else "none"
        if got != tuple(shape):
            raise InvalidInput(
                f"model: merge-lora must fit the model, got {self.folder} with {tuple(shape)} for "
                f"{name}, where the model has {got}; take the model that it was trained on"
            )

    def _scale(self, name: str, rank: int) -> float:
        alpha = self._setting("alpha_pattern", "lora_alpha", name)
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _setting(self, pattern: str, default: str, name: str) -> float:
        """A number of the settings, which may differ from module to module."""
        by_module = self.config.get(pattern) or {}
        found = [key for key in by_module if re.fullmatch(rf"(.*\.)?({key})", name)]
        value = by_module[found[0]] if found else self.config.get(default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise DamagedFile(
                f"model: merge-lora must be a folder whose adapter_config.json has a number "
                f"{default}, got {value!r} in {self.folder}"
            )
        return value


def read_adapter(folder: Path) -> Adapter:
    """The adapter in a folder of peft: `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        InvalidInput: it is no such folder, or no plain LoRA.
        DamagedFile: one of the files is damaged.
    """
    folder = Path(folder)
    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            raise InvalidInput(
                f"model: merge-lora must be a folder with {name}, as peft's save_pretrained writes "
                f"it, got {folder}"
            )
    config = files.read_json(folder / "adapter_config.json")
    if not isinstance(config, dict):
        raise DamagedFile(f"model: merge-lora must have settings in {folder}, got {config!r:.40}")
    for setting, plain in _PLAIN.items():
        if config.get(setting) not in plain:
            raise InvalidInput(
                f"model: merge-lora must be a plain LoRA, got {setting}={config.get(setting)!r} in "
                f"{folder}; let peft merge it (merge_and_unload) and give what that returns as "
                "--checkpoint"
            )
    parts: dict[str, dict[str, Tensor]] = {}
    whole = {}
    for full, tensor in files.read_tensors(folder / "adapter_model.safetensors").items():
        name = full.removeprefix("base_model.model.").replace(".base_layer.", ".")
        found = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if found:
            parts.setdefault(found[1], {})[found[2]] = tensor
        elif "lora_" in name:
            raise InvalidInput(
                f"model: merge-lora must be a plain LoRA of layers, got {name} in {folder}; let "
                "peft merge it (merge_and_unload) and give the result as --checkpoint"
            )
        else:
            whole[name] = tensor
    for name, pair in parts.items():
        fits = {*pair} == {"A", "B"} and all(each.ndim >= 2 for each in pair.values())
        if not fits or pair["B"].shape[1] != len(pair["A"]):
            raise DamagedFile(
                f"model: merge-lora must have A (r, in) and B (out, r) for every layer, got "
                f"{ {key: tuple(each.shape) for key, each in pair.items()} } for {name} in {folder}"
            )
    return Adapter(folder, config, {name: (p["A"], p["B"]) for name, p in parts.items()}, whole)
