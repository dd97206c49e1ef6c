"""`vitprune-fast score` and `vitprune-fast bench scoring`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import vitprune_fast as vp
from vitprune_fast.cli import signals
from vitprune_fast.cli.main import main
from vitprune_fast.structure import UNIT_KINDS

MODEL = ["--model", "vit_tiny_patch16_224", "--model-args", "img_size=8", "patch_size=4"]
MODEL += ["in_chans=1", "embed_dim=24", "depth=2", "num_heads=3", "num_classes=10"]
DATA = ["--data", "digits", "--score-samples", "200"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model with fixed weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "m"
    args: Any = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 24, "depth": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_heads=3, num_classes=10, **args)
    vp.save(model.eval(), folder)
    return folder


def test_score_shows_the_rate_and_a_line_for_every_unit_kind(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "scores.safetensors"
    words = ["score", "--model", str(saved), *DATA, "--units", "all", "--out", str(out)]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "200 images, " in text and " images/s, taylor square" in text
    for kind in UNIT_KINDS:
        assert f"\n{kind} " in text
    assert {vp.describe(vp.load(saved)).axes[name].kind for name in vp.Scores.load(out)} == set(
        UNIT_KINDS
    )


@pytest.mark.parametrize(
    "options",
    [
        ("--criterion", "fisher", "--draws", "2"),
        ("--criterion", "kl", "--score-samples", "8", "--units", "head"),
        ("--criterion", "activation"),
        ("--criterion", "magnitude", "--reduction", "l1"),
        ("--reduction", "token_abs"),
    ],
    ids=" ".join,
)
def test_every_criterion_has_its_options(
    options: tuple[str, ...], saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.safetensors"
    assert main(["score", "--model", str(saved), *DATA, *options, "--out", str(out)]) == 0
    scores = vp.Scores.load(out)
    assert f"{scores.criterion} {scores.reduction}" in capsys.readouterr().out
    assert scores.criterion in (*options, "taylor")


def test_a_stopped_scoring_goes_on_with_the_same_bits(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["score", "--model", str(saved), *DATA, "--score-batch-size", "64", "--out"]
    whole, stopped = tmp_path / "whole.safetensors", tmp_path / "stopped.safetensors"
    assert main([*words, str(whole)]) == 0

    class Stopping(signals.Stopper):
        def watch(self, event: dict) -> None:
            super().watch(event)
            if event.get("step") == 128:
                self.number = signal.SIGINT

    with monkeypatch.context() as patch:
        patch.setattr(signals, "Stopper", Stopping)
        assert main([*words, str(stopped)]) == 128 + signal.SIGINT
    partial = stopped.with_suffix(".partial.safetensors")
    assert partial.is_file() and not stopped.exists()
    assert main([*words, str(stopped)]) == 0
    assert stopped.read_bytes() == whole.read_bytes() and not partial.exists()


def test_weights_that_nothing_gives_come_from_the_seed(tmp_path: Path) -> None:
    """A timm model by its name alone: the same command scores the same model again."""
    sizes = ["img_size=16", "patch_size=4", "embed_dim=24", "depth=1", "num_classes=10"]
    words = ["score", "--model", "vit_tiny_patch16_224", "--model-args", *sizes, "in_chans=1"]
    words += [*DATA, "--score-samples", "8"]
    files = [tmp_path / f"{k}.safetensors" for k in range(3)]
    for file, seed in zip(files, ("0", "0", "1"), strict=True):
        assert main([*words, "--seed", seed, "--out", str(file)]) == 0
    first, again, other = (file.read_bytes() for file in files)
    assert first == again != other


def test_stopped_scorings_side_by_side_have_a_file_each(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopping(signals.Stopper):
        def watch(self, event: dict) -> None:
            super().watch(event)
            self.number = signal.SIGINT

    words = ["score", "--model", str(saved), *DATA, "--score-batch-size", "64", "--out"]
    with monkeypatch.context() as patch:
        patch.setattr(signals, "Stopper", Stopping)
        for run, criterion in (("scores.1", "taylor"), ("scores.2", "fisher")):
            stopped = main([*words, str(tmp_path / run), "--criterion", criterion])
            assert stopped == 128 + signal.SIGINT
    assert len(list(tmp_path.iterdir())) == 2
    assert main([*words, str(tmp_path / "scores.2"), "--criterion", "fisher"]) == 0
    assert vp.Scores.load(tmp_path / "scores.2").criterion == "fisher"


def test_where_the_scores_go_is_looked_at_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["score", *MODEL, "--data", "nowhere", "--out", str(tmp_path)]) == 2
    assert f"out must be a file, got the folder {tmp_path}" in capsys.readouterr().err


def test_half_precision_needs_no_option_here(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vp.save(vp.load(saved).half(), tmp_path / "half")
    out = tmp_path / "scores.safetensors"
    assert main(["score", "--model", str(tmp_path / "half"), *DATA, "--out", str(out)]) == 0
    half = vp.Scores.load(out)
    full = tmp_path / "full.safetensors"
    assert main(["score", "--model", str(saved), *DATA, "--out", str(full)]) == 0
    for name, value in vp.Scores.load(full).items():
        assert half.skipped == 0 and (half[name] - value).norm() < 0.05 * value.norm()


def test_bench_scoring_prints_peers_and_the_share_of_the_limit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["bench", "scoring", *MODEL, "--batch-size", "2", "--rounds", "1"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("batch 2", "torch.float32", "of limit", "vitprune_fast", "Torch-Pruning", "bare"):
        assert words in text
    assert main(["bench", "scoring", *MODEL, "--batch-size", "0"]) == 2
    assert "batch_size must be at least 1, got 0" in capsys.readouterr().err
    assert main(["bench", "scoring", *MODEL, "--batch-size", str(10**13)]) == 2
    assert "batch_size must be one that fits into memory" in capsys.readouterr().err
