"""What is supported, found by trying it: every family, verb and unit kind.

``python -m tests.support`` writes ``support.json`` next to this file, of which ``bench/table.py``
makes the table of the README; ``test_support.py`` tries a part of it again, and all of it slowly.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vitprune_fast as vp
from vitprune_fast.structure import UNIT_KINDS, Axis, Structure
from vitprune_fast.testing import PVT_IMAGE, SMALL, random_cait, random_pvt, random_vit

from .integrations import huggingface, test_torchvision

FILE = Path(__file__).with_suffix(".json")
FORMATS = ("onnx", "pt2", "hf", "timm")

FAMILIES: dict[str, Callable[[], Any]] = {
    "timm ViT, DeiT, DINOv2": lambda: random_vit("plain", dtype=torch.float32),
    "with q/k norm": lambda: random_vit("qk_norm", dtype=torch.float32),
    "with SwiGLU": lambda: random_vit("swiglu", dtype=torch.float32),
    "DeiT-distilled": lambda: random_vit("deit_distilled", dtype=torch.float32),
    "timm PVTv2": lambda: random_pvt(dtype=torch.float32),
    "timm CaiT": lambda: random_cait(dtype=torch.float32),
    "transformers ViT": lambda: huggingface.model_of("vit", torch.float32),
    "transformers DeiT": lambda: huggingface.model_of("deit", torch.float32),
    "transformers DINOv2": lambda: huggingface.model_of("dinov2", torch.float32),
    "torchvision ViT": lambda: test_torchvision.model_of(dtype=torch.float32),
}
Batch = tuple[Tensor, Tensor]


def batch_for(family: str) -> Batch:
    """Four images that the family's small model takes, with labels."""
    shape = PVT_IMAGE if family == "timm PVTv2" else (3, SMALL["img_size"], SMALL["img_size"])
    images = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    return images, torch.arange(4) % SMALL["num_classes"]


def kept_of(axis: Axis) -> list[int]:
    """The first half of an axis, of every parent its first half; of branches and blocks one."""
    if axis.kind in ("attn_branch", "mlp_branch", "block"):
        return [0]
    few = max(1, axis.width // 2)
    parents = range(axis.size // axis.width)
    return [parent * axis.width + unit for parent in parents for unit in range(few)]


def cut(structure: Structure, *kinds: str) -> vp.Plan:
    """A plan that keeps half of all units of some kinds."""
    axes = [axis for kind in kinds for axis in structure.units(kind)]
    return vp.Plan.of(structure, {axis.name: kept_of(axis) for axis in axes})


def scores(model: Any, kind: str, batch: Batch) -> None:
    vp.score(model, [batch], units=(kind,))


def masks(model: Any, kind: str, batch: Batch) -> None:
    with torch.no_grad(), vp.mask(model, cut(vp.describe(model), kind)):
        model(batch[0])


def prunes(model: Any, kind: str, batch: Batch) -> None:
    small = vp.prune(model, cut(vp.describe(model), kind))
    assert vp.cost(small).params < vp.cost(model).params
    with torch.no_grad():
        small(batch[0])


def gates(model: Any, kind: str, batch: Batch) -> None:
    attached = vp.gates.attach(model, units=(kind,))
    with torch.no_grad():
        model(batch[0])
    vp.gates.to_plan(model, attached)


def distils(model: Any, kind: str, batch: Batch) -> None:
    small = vp.prune(model, cut(vp.describe(model), kind))
    config = vp.DistillConfig(epochs=1, warmup_epochs=0, loss=("soft", "hidden"))
    vp.distill(small, model, [batch], None, config)


def saves(model: Any, kind: str, batch: Batch) -> None:
    small = vp.prune(model, cut(vp.describe(model), kind)).eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        vp.save(small, folder)
        assert same(vp.load(folder), small, batch[0])


def exports(model: Any, to: str, batch: Batch) -> None:
    """Of a model with half of its heads and neurons everywhere, which a constructor can say."""
    kinds = {"head", "neuron"} & {axis.kind for axis in vp.describe(model).axes.values()}
    small = vp.prune(model, cut(vp.describe(model), *kinds)).eval()
    with tempfile.TemporaryDirectory() as folder:
        vp.export(small, to, Path(folder) / f"exported.{to}")


def same(one: nn.Module, other: nn.Module, images: Tensor) -> bool:
    given, wanted = one(images), other(images)
    return torch.equal(getattr(given, "logits", given), getattr(wanted, "logits", wanted))


VERBS: dict[str, Callable[[Any, str, Batch], None]] = {
    "score": scores,
    "mask": masks,
    "prune": prunes,
    "gates": gates,
    "distill": distils,
    "save": saves,
}


def works(function: Callable[[Any, str, Batch], None], family: str, what: str) -> bool:
    """Whether a verb takes it; what it does not take it must refuse, and nothing else."""
    try:
        function(FAMILIES[family](), what, batch_for(family))
    except vp.VitpruneError:
        return False
    return True


def found(family: str) -> dict[str, list[str]]:
    """What one family can do: verb -> unit kinds, and "export" -> formats."""
    structure = vp.describe(FAMILIES[family]())
    kinds = [kind for kind in UNIT_KINDS if structure.units(kind)]
    able = {
        verb: [kind for kind in kinds if works(function, family, kind)]
        for verb, function in VERBS.items()
    }
    return {**able, "export": [to for to in FORMATS if works(exports, family, to)]}


def main() -> None:
    """Write what all families can do."""
    FILE.write_text(json.dumps({family: found(family) for family in FAMILIES}, indent=1) + "\n")


if __name__ == "__main__":
    main()
