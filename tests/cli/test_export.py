"""`vitprune-fast export`: a saved folder, or any model with options, and what it tells."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from small import NAME

import vitprune_fast as vp
from vitprune_fast.cli.main import main
from vitprune_fast.testing import random_images, random_vit

TINY = ["--model", NAME, "--model-args", "img_size=16", "patch_size=8", "embed_dim=24", "depth=1"]


def test_a_saved_folder_is_exported_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = random_vit(dtype=torch.float32, depth=1)
    vp.save(model, tmp_path / "saved")
    out = tmp_path / "m.pt2"
    assert (
        main(["export", "--model", str(tmp_path / "saved"), "--to", "pt2", "--out", str(out)]) == 0
    )
    said = capsys.readouterr().out
    gap = re.search(r"m.pt2: read back, .* sizes 1 and 5 differ by at most (\S+) \(allowed", said)
    assert gap and float(gap[1]) <= 1e-4
    images = random_images(model)
    again = torch.export.load(out).module()
    assert torch.allclose(again(images), model(images), atol=1e-4)


def test_a_model_of_timm_is_exported_with_its_assumptions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "folder"
    assert main(["export", *TINY, "num_heads=3", "--to", "timm", "--out", str(out)]) == 0
    assert "has random weights (seed 0)" in capsys.readouterr().out
    assert "Weights come from: random." in (out / "README.md").read_text()
    assert vp.load(out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "onxx"], "error: export: format must be one of hf, onnx, pt2, timm, got 'onxx'"),
        (
            ["--to", "hf"],
            "error: export: model must be of transformers for format hf, got a Vision",
        ),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", *TINY, "num_heads=3", *words, "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith(message) and not out.exists()


def test_the_model_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vp.save(random_vit(dtype=torch.float32, depth=1), tmp_path)
    words = ["--model", str(tmp_path), "--to", "timm", "--out", str(tmp_path)]
    assert main(["export", *words]) == 2
    assert "export: out must not be an input" in capsys.readouterr().err
