"""`vitprune-fast distill` on the digits: losses, a CNN that is trained first, gates, masks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import vitprune_fast as vp
from tests.refused import is_one_sentence
from vitprune_fast.cli.main import main

SHORT = ("--data", "digits", "--epochs", "2", "--warmup-epochs", "0", "--batch-size", "64")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that has seen the digits for a moment."""
    folder = tmp_path_factory.mktemp("distill")
    sizes = ("img_size=8", "patch_size=4", "in_chans=1", "embed_dim=24", "num_heads=3", "depth=2")
    model = ("--model", "vit_tiny_patch16_224", "--model-args", *sizes, "num_classes=10")
    words = (*SHORT, "--alpha", "0", "--lr", "5e-3", "--epochs", "6", "--batch-size", "32")
    assert main(["distill", *model, *words, "--out", str(folder / "dense")]) == 0
    return folder / "dense"


def distilled(dense: Path, out: Path, *words: str) -> float:
    """Top-1 on the test digits of what the verb saves."""
    command = ["distill", "--model", str(dense), *SHORT, "--lr", "2e-3", "--out", str(out), *words]
    assert main(command) == 0
    from vitprune_fast.data import Loader, open_data

    data = open_data("digits", image_size=8, channels=1)
    return vp.evaluate(vp.load(out), Loader(data.split("test"), 256)).top1


def test_the_manifold_is_learnt(dense: Path, tmp_path: Path) -> None:
    words = ("--teacher", str(dense), "--loss", "manifold", "--loss-weights", "2")
    assert distilled(dense, tmp_path / "out", *words) > 0.4


def test_a_cnn_is_trained_first_and_teaches(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--teacher", "test_resnet", "--no-teacher-pretrained", "--teacher-epochs", "2")
    more = ("--checkpoints", str(tmp_path / "checkpoints"), "--loss", "soft", "hard")
    assert distilled(dense, tmp_path / "out", *words, *more) > 0.4
    assert {folder.name for folder in (tmp_path / "checkpoints").iterdir()} == {
        "distill",
        "teacher-0",
    }
    capsys.readouterr()
    # the same command finds both trainings done
    assert distilled(dense, tmp_path / "again", *words, *more) > 0.4
    text = capsys.readouterr().out
    assert "teacher-0 resumes at step" in text and "distill   resumes at step" in text
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert same[0] == same[1]


@pytest.mark.parametrize("kind", ["l1", "ste", "hard_concrete"])
def test_gates_choose_what_goes(kind: str, dense: Path, tmp_path: Path) -> None:
    words = ("--teacher", "self", "--gates", kind, "--gate-epochs", "1", "--gate-macs", "0.6")
    assert distilled(dense, tmp_path / "out", *words) > 0.4
    share = vp.cost(vp.load(tmp_path / "out")).macs / vp.cost(vp.load(dense)).macs
    assert 0.4 < share <= 0.6


def test_what_was_stopped_goes_on_beside_its_output_and_tells_its_accuracy(
    dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from vitprune_fast.cli.display import Display

    events, bars = [], []
    hear = Display.__call__
    monkeypatch.setattr(Display, "_show_bar", lambda self, name: bars.append(name))
    monkeypatch.setattr(Display, "__call__", lambda self, e: (events.append(e), hear(self, e)))
    command = ["distill", "--model", str(dense), *SHORT, "--teacher", "self"]
    command += ["--out", str(tmp_path / "out")]
    with monkeypatch.context() as broken:
        broken.setattr(vp, "save", lambda *_: (_ for _ in ()).throw(vp.DamagedFile("no: room")))
        assert main(command) == 2
    assert (tmp_path / "out.partial" / "distill").is_dir() and not (tmp_path / "out").exists()
    # with a bar that knows how far it is, of steps and of epochs
    assert bars == ["distill"]
    steps = [event for event in events if event["event"] == "step"]
    assert steps and all(event["epochs"] == 2 for event in steps)
    capsys.readouterr()
    assert main([*command, "--lr", "1e-5"]) == 2
    assert "or remove it to start over" in capsys.readouterr().err
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "distill   resumes at step" in said
    assert not (tmp_path / "out.partial").exists()
    from vitprune_fast.data import Loader, open_data

    data = open_data("digits", image_size=8, channels=1)
    found = vp.evaluate(vp.load(tmp_path / "out"), Loader(data.split("validation"), 256))
    last = f"out: validation top-1 {found.top1:.2%} ({found.top1_count} of {found.samples})"
    assert said.splitlines()[-1].endswith(last)


def test_a_signal_writes_a_checkpoint_and_the_command_goes_on(dense: Path, tmp_path: Path) -> None:
    words = [*("distill", "--model", str(dense), "--teacher", "self"), *SHORT]
    words += ["--epochs", "400", "--out", str(tmp_path / "out")]
    words += ["--checkpoints", str(tmp_path / "checkpoints")]
    process = subprocess.Popen(
        [sys.executable, "-m", "vitprune_fast.cli.main", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    steps = tmp_path / "checkpoints" / "distill"
    while process.poll() is None and not list(steps.glob("*.json")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 128 + signal.SIGINT, error
    assert error == "stopped by SIGINT; the same command resumes the run\n"
    assert not (tmp_path / "out").exists() and len(list(steps.glob("*.json"))) >= 1


def test_masks_grow_while_training(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--teacher", "self", "--mask-macs", "0.6", "--mask-every", "2", "--mask-samples", "64")
    assert distilled(dense, tmp_path / "out", *words) > 0.4
    assert "60% of the MACs left, heads" in capsys.readouterr().out
    share = vp.cost(vp.load(tmp_path / "out")).macs / vp.cost(vp.load(dense)).macs
    assert 0.4 < share <= 0.6


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "teacher must be given, got none"),
        (("--teacher", "self", "--gates", "l1", "--mask-macs", "0.5"), "gates must be none with"),
        (("--teacher", "self", "--loss", "warmth"), "loss must hold names among features"),
        (
            ("--teacher", "self", "--policy", "rand-m9-mstd0.5-inc1"),
            "crop_scale and color_jitter must be unset for digits",
        ),
        (("--teacher", "self", "--teacher-weights", "1", "2"), "one number per teacher"),
        (("--teacher", "no_such_model"), "no_such_model"),
        (
            ("--teacher", "self", "--gates", "l1", "--gate-units", "embed"),
            "gate-units must be head, neuron or both",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(
    words: tuple[str, ...],
    sentence: str,
    dense: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["distill", "--model", str(dense), *SHORT, "--out", str(tmp_path / "out"), *words]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert sentence in error and is_one_sentence(error), error
    assert not (tmp_path / "out").exists()


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of every launch of our attention: how many heads it computes, and of how many."""
    from vitprune_fast import ops

    seen: list[tuple[int, int]] = []
    attend = ops.gated_attention

    def counted(qkv: Any, *rest: Any, live_heads: Any = None, **options: Any) -> Any:
        seen.append((qkv.shape[3] if live_heads is None else len(live_heads), qkv.shape[3]))
        return attend(qkv, *rest, live_heads=live_heads, **options)

    monkeypatch.setattr(ops, "gated_attention", counted)
    return seen


MASKS = (
    *("--mask-macs", "0.2", "--mask-shape", "one_shot"),
    *("--mask-every", "4", "--mask-samples", "64"),
)


@pytest.mark.parametrize("attention", ["masked", "compact", "auto"])
def test_dead_heads_are_skipped_where_masked_attention_runs(
    attention: str,
    dense: Path,
    tmp_path: Path,
    heads: list,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--alpha", "0", *MASKS, "--attention", attention)
    distilled(dense, tmp_path / "out", *words)
    said = capsys.readouterr().out
    if attention == "masked":
        assert any(live < whole for live, whole in heads) and "masked attention" in said
    elif attention == "compact":
        assert not heads and "compact attention" in said


def test_a_run_under_masks_skips_dead_heads(
    dense: Path, tmp_path: Path, heads: list, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "run",
        "--recipe",
        "standard",
        "--model",
        str(dense),
        *MASKS,
        "--attention",
        "masked",
    ]
    more = ["--distill.epochs", "2", "--distill.warmup-epochs", "0", "--threads", "1"]
    assert main([*command, *more, "--data", "digits", "--out", str(tmp_path / "run")]) == 0
    assert any(live < whole for live, whole in heads)
    assert "masked attention" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["distill", "run"])
def test_fixed_gates_skip_dead_heads(
    verb: str, dense: Path, tmp_path: Path, heads: list, capsys: pytest.CaptureFixture[str]
) -> None:
    gates = [
        "--gates",
        "fixed",
        "--gate-epochs",
        "1",
        "--gate-macs",
        "0.85",
        "--gate-units",
        "head",
    ]
    epochs = ["--epochs", "1", "--warmup-epochs", "0", "--alpha", "0", "--log-steps", "1"]
    if verb == "run":
        epochs = [w.replace("--", "--distill.", 1) for w in epochs] + ["--threads", "1"]
        epochs += ["--recipe", "standard"]
    command = [verb, "--model", str(dense), "--data", "digits", *gates, *epochs]
    status = main([*command, "--out", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert status == 0, said.err
    assert any(live < whole for live, whole in heads)
