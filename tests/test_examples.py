"""The programs of examples/ do what their first lines say, at sizes that take seconds."""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import load_checkpoint

import vitprune_fast as vp

EXAMPLES = Path(__file__).parent.parent / "examples"
SIZES: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
}
NAME = "vit_tiny_patch16_224"


def run(name: str, monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    """A program of ours, in this process."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    with warnings.catch_warnings():
        # Torch-Pruning warns of parameters that belong to no layer
        warnings.simplefilter("ignore", UserWarning)
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of two classes, as ImageNet is laid out."""
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 6)):
        for number, name in enumerate(("n01440764", "n01443537")):
            (root / split / name).mkdir(parents=True)
            for k in range(count):
                pixels = random.integers(0, 128, (40, 48, 3), dtype=np.uint8) + 100 * number
                Image.fromarray(pixels.astype(np.uint8)).save(
                    root / split / name / f"{k}.JPEG", "jpeg"
                )
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What timm's train.py leaves, with the arguments it was called with."""
    torch.manual_seed(0)
    model: Any = timm.create_model(NAME, num_classes=2, **SIZES)
    args = argparse.Namespace(model=NAME, num_classes=2, model_kwargs=SIZES, lr=1e-3)
    state = model.state_dict()
    average = {name: tensor + 0.01 for name, tensor in state.items()}
    path = tmp_path_factory.mktemp("checkpoint") / "model_best.pth.tar"
    made = {"epoch": 3, "arch": NAME, "state_dict": state, "state_dict_ema": average}
    torch.save({**made, "args": args}, path)
    return path


def test_every_example_is_run_here() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.iterdir():
        assert path.is_dir() or path.suffix == ".md" or f'"{path.name}"' in text, path


def test_a_plain_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("plain_loop.py", monkeypatch, "--epochs", 3, "--out", tmp_path / "pruned")
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["dense", "pruned", "fine-tuned", "saved"]
    dense, small = (int(rows[k].split()[2].replace(",", "")) for k in (0, 1))
    assert vp.cost(vp.load(tmp_path / "pruned")).macs == small <= dense / 2


def test_an_imagenet_folder(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model(NAME, num_classes=2, **SIZES).state_dict(), weights)
    sizes = [f"{name}={value}" for name, value in SIZES.items()]
    words = ["--model-args", *sizes, "--recipe", "one-shot", "--latency-seconds", "0.01"]
    words += ["--threads", "1", "--workers", "0", "--quiet"]
    environ = {**os.environ, "MODEL": NAME, "OMP_NUM_THREADS": "1"}
    environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    example = EXAMPLES / "imagenet_folder.sh"
    done = subprocess.run(
        ["sh", str(example), str(folder), str(weights), str(tmp_path / "run"), *words],
        env=environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    dense, small = (vp.load(tmp_path / "run" / name) for name in ("dense", "swept"))
    assert vp.cost(small).macs <= vp.cost(dense).macs / 2
    assert "of 12" in done.stdout


def test_a_checkpoint_of_timm(
    folder: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "pruned.pth.tar"
    words = (checkpoint, "--data", folder, "--images", 32, "--out", out)
    run("timm_checkpoint.py", monkeypatch, *words)
    costs, command = capsys.readouterr().out.splitlines()
    # as validate.py reads its words
    said = shlex.split(command)
    kwargs = dict(word.split("=") for word in said[said.index("--model-kwargs") + 1 :])
    numbers: dict[str, Any] = {name: float(v) if "." in v else int(v) for name, v in kwargs.items()}
    name, file = (said[said.index(flag) + 1] for flag in ("--model", "--checkpoint"))
    model: Any = timm.create_model(name, pretrained=False, **numbers)
    load_checkpoint(model, file)
    assert model.blocks[0].mlp.fc1.out_features == 96
    before, after = (int(text.replace(",", "")) for text in re.findall(r"[\d,]+(?= )", costs)[:2])
    assert vp.cost(model).macs == after < before
    # of the average, which is what validate would take
    head = torch.load(checkpoint, weights_only=False)["state_dict_ema"]["norm.weight"]
    assert torch.equal(model.norm.weight, head)


def test_the_scorer_in_torch_pruning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch_pruning")
    run("scorer_in_torch_pruning.py", monkeypatch)
    assert capsys.readouterr().out == "heads [2, 2, 2]\nneurons [384, 384, 384]\n"


def test_the_scorer_in_nn_prune(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("scorer_in_nn_prune.py", monkeypatch)
    silent = [int(n) for n in re.findall(r": (\d+) of 768", capsys.readouterr().out)]
    assert len(silent) == 3 and sum(silent) > 600
