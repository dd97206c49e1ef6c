"""The ``README.md`` of a saved model: what it is, what it costs, how it opens without us."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .batches import classes_of
from .errors import InvalidInput
from .stated import caveats, derived_from, stated_config
from .structure import Structure, describe, families
from .structure.reading import Reading

CARD = "README.md"
Results = Mapping[str, Mapping[str, float]]

# figure -> what it is called, and how it is written
FIGURES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "params": ("parameters", "{:,}".format),
    "macs": ("MACs per image", "{:,}".format),
    "file_bytes": ("bytes of weights", "{:,}".format),
    "top1": ("top-1", "{:.2%}".format),
    "top5": ("top-5", "{:.2%}".format),
    "latency_ms": ("latency of one image, ms", "{:.3f}".format),
    "images_per_s": ("images per second in batches of 64", "{:,.1f}".format),
    "peak_memory_bytes": ("peak memory for one image, bytes", "{:,}".format),
    "peak_memory_bytes_batch64": ("peak memory for 64 images, bytes", "{:,}".format),
}
# unit kind -> what people call several of them
UNITS = {"head": "heads", "qk_dim": "q/k dims", "v_dim": "v dims", "neuron": "neurons"}
_PIXELS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


def check_results(function: str, results: Results) -> None:
    """Refuse figures that a card has no row for.

    Args:
        function: the caller's name, for the error sentence.
        results: column -> figure of :data:`FIGURES` -> number.

    Raises:
        InvalidInput: as said.
    """
    columns = [*results.values()] if isinstance(results, Mapping) else [results]
    if odd := [each for each in columns if not isinstance(each, Mapping)]:
        raise InvalidInput(
            f"{function}: results must be a mapping of columns to mappings of figures to numbers, "
            f"got {odd[0]!r:.80}"
        )
    for column, figures in results.items():
        for name, value in figures.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            known = number and math.isfinite(value)
            if name not in FIGURES or not known:
                raise InvalidInput(
                    f"{function}: results must hold finite numbers of {', '.join(FIGURES)}, got "
                    f"{name}={value!r:.40} for {column!r:.40}"
                )


def card(model: nn.Module, results: Results, file_bytes: int, opens_alone: bool) -> str:
    """The text of the card.

    Args:
        model: a supported one.
        results: column -> figure -> number, as far as they are known. The last column is of the
            model itself: its size and cost are filled in; without any it is the only one.
        file_bytes: size of the weights.
        opens_alone: whether the model's own library opens the folder.
    """
    structure = describe(model)
    reading = Reading(structure, None)
    own = {"params": reading.params, "macs": reading.macs, "file_bytes": file_bytes}
    columns = {name: dict(figures) for name, figures in (results or {"this model": {}}).items()}
    last = [*columns][-1]
    columns[last] = {**own, **columns[last]}
    known = [name for name in FIGURES if any(name in figures for figures in columns.values())]
    rows = [
        [
            FIGURES[name][0],
            *(FIGURES[name][1](c[name]) if name in c else "" for c in columns.values()),
        ]
        for name in known
    ]
    library, _, name = families.qualified(type(model)).partition(".")
    leaf = name.rpartition(".")[2]
    architecture = _word(stated_config(model).get("architecture")) or leaf
    source = derived_from(model)
    weights = _word(source.get("weights"))
    license = _word(source.get("license"))
    task = "image-classification" if classes_of(model) != 0 else "image-feature-extraction"
    front = {
        "library_name": library if opens_alone else "vitprune_fast",
        "pipeline_tag": task,
        "tags": [task, "vision-transformer", "vitprune_fast"],
        **({"license": license} if license else {}),
        # an address is no name of a model
        **({"base_model": weights} if weights and "://" not in weights else {}),
    }
    came = f"`{weights}`" if weights else "not recorded"
    if caveats(model).get("weights") == "random":
        came = "random"
    parts = [
        "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items()) + "---",
        f"# {architecture}, as vitprune_fast saved it",
        _table(["", *map(_flat, columns)], rows),
        f"- Architecture: `{architecture}` (`{leaf}` of {library}).\n"
        f"- Weights come from: {came}. License: {license or 'not recorded'}.\n"
        f"- Images: {_pixels(model)}.",
        "## Open it",
        _how_to_open(library, leaf, opens_alone),
        "## What is in each block",
        _blocks(model, structure),
    ]
    return "\n\n".join(parts) + "\n"


def _pixels(model: nn.Module) -> str:
    stated = stated_config(model)
    said = [f"{name} `{_flat(stated[name])}`" for name in _PIXELS if stated.get(name) is not None]
    if stated.get("mean") is None or stated.get("std") is None:
        said.append("mean and std not recorded")
    guess = caveats(model).get("pixels")
    return ", ".join(said) + (f" (a guess: {_flat(guess)})" if guess else "")


def _how_to_open(library: str, leaf: str, opens_alone: bool) -> str:
    if not opens_alone:
        alone = "import sys\nsys.path.insert(0, FOLDER)\nfrom modeling_pruned import load\n\n"
        alone += "model = load(FOLDER)  # `classes=[...]` where the model is of a class of yours\n"
    elif library == "timm":
        alone = 'import timm\n\nmodel = timm.create_model(f"local-dir:{FOLDER}", pretrained=True)\n'
    else:
        alone = f"from {library} import {leaf}\n\nmodel = {leaf}.from_pretrained(FOLDER)\n"
    return (
        "`FOLDER` is the folder of this file.\n\n"
        "```python\nimport vitprune_fast as vp\n\nmodel = vp.load(FOLDER)\n```\n\n"
        f"Without vitprune_fast, by torch, safetensors and {library}:\n\n```python\n{alone}```\n\n"
        "As ONNX, checked against the model:\n\n"
        "```bash\nvitprune-fast export --model FOLDER --to onnx --out model.onnx\n```"
    )


def _blocks(model: nn.Module, structure: Structure) -> str:
    """A row for each block; dims are those of one head."""
    kinds = [kind for kind in UNITS if structure.units(kind)]
    axes = [axis for axis in structure.axes.values() if axis.kind in kinds]
    paths = families.of(model).block_paths(model)
    rows = []
    for path in paths:
        sizes = {axis.kind: axis.width for axis in axes if axis.name.startswith(f"{path}.")}
        rows.append([f"`{path}`", *(f"{sizes[k]:,}" if k in sizes else "gone" for k in kinds)])
    widths = ", ".join(f"{axis.size:,}" for axis in structure.units("embed"))
    return f"Channels: {widths}.\n\n" + _table(["block", *map(UNITS.__getitem__, kinds)], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _word(text: Any) -> str:
    """A name as others write it; empty for what could be anything else in a page."""
    return text if isinstance(text, str) and re.fullmatch(r"[\w.+:/-]{1,200}", text) else ""


def _flat(value: Any) -> str:
    """A text or a list on one line, without what means something in a page."""
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return " ".join(re.sub(r"[|`<>\[\]]", " ", text).split())[:300]
