"""What a user gets wrong: one sentence on stderr, exit code 2, nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch

from tests import small
from tests.refused import is_one_sentence
from tests.small import NAME, SMALL, words
from vitprune_fast import files
from vitprune_fast.cli.main import main
from vitprune_fast.run import actions

MODEL = words(SMALL)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Three classes of ten 20 x 20 images."""
    return small.photographs(tmp_path / "photos", classes=("ant", "bee", "cat"), size=(20, 20))


@pytest.fixture
def sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Runs a command that must fail, and returns the one sentence it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> str:
        assert main([str(word) for word in words]) == 2
        err = capsys.readouterr().err
        assert is_one_sentence(err)
        return err

    return run


def test_missing_data_folder(sentence: Callable[..., str]) -> None:
    text = sentence("run", *MODEL, "--data", "folder:nowhere", "--train-dense", "--out", "r")
    assert "nowhere" in text


def test_empty_data_folder(sentence: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    text = sentence("run", *MODEL, "--data", "folder:empty", "--train-dense", "--out", "r")
    assert "empty" in text


def test_one_class(sentence: Callable[..., str], photographs: Path) -> None:
    for name in ("bee", "cat"):
        for path in (photographs / name).iterdir():
            path.unlink()
        (photographs / name).rmdir()
    text = sentence("run", *MODEL, "--data", "folder:photos", "--train-dense", "--out", "r")
    assert "class" in text


def test_head_of_another_size(sentence: Callable[..., str], photographs: Path) -> None:
    model = timm.create_model(NAME, num_classes=7, **SMALL)
    files.write_tensors("dense.safetensors", model.state_dict())
    text = sentence(
        *("run", *MODEL, "num_classes=7", "--data", "folder:photos"),
        *("--checkpoint", "dense.safetensors", "--out", "r"),
    )
    assert "must have 3 classes" in text and "got 7" in text


def test_checkpoint_of_another_size(sentence: Callable[..., str], photographs: Path) -> None:
    model = timm.create_model(NAME, num_classes=7, **SMALL)
    files.write_tensors("dense.safetensors", model.state_dict())
    text = sentence(
        *("run", *MODEL, "num_classes=3", "--data", "folder:photos"),
        *("--checkpoint", "dense.safetensors", "--out", "r"),
    )
    assert "trained for 7 classes, but 3 are needed" in text


def test_image_smaller_than_the_patch(sentence: Callable[..., str]) -> None:
    text = sentence("run", "--model-args", "img_size=8", "patch_size=16", "in_chans=1")
    assert "patch" in text and "8" in text and "16" in text


def test_no_weights_and_no_wish_to_train(sentence: Callable[..., str], photographs: Path) -> None:
    text = sentence("run", *MODEL, "--data", "folder:photos", "--out", "r")
    assert "give --checkpoint FILE or --pretrained, or --train-dense" in text


def test_missing_checkpoint(sentence: Callable[..., str], photographs: Path) -> None:
    text = sentence(
        "run", *MODEL, "--data", "folder:photos", "--checkpoint", "no.pth", "--out", "r"
    )
    assert "checkpoint must be a file, got no.pth" in text


def test_pickle_with_code_in_it(sentence: Callable[..., str], photographs: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return Path.touch, (Path("executed"),)

    torch.save({"model": Payload()}, "evil.pth")
    text = sentence(
        *("run", *MODEL, "num_classes=3", "--data", "folder:photos"),
        *("--checkpoint", "evil.pth", "--out", "r"),
    )
    assert "nothing in it was executed" in text and not Path("executed").exists()


def test_unknown_model(sentence: Callable[..., str]) -> None:
    assert "did you mean" in sentence("run", "--model", "vit_tiny_patch16_22", "--model-args")


def test_unsupported_family(sentence: Callable[..., str]) -> None:
    text = sentence("run", "--model", "resnet18", "--model-args")
    assert "must be one of" in text and "ResNet" in text
    assert not Path("runs").exists()


def test_budget_that_cannot_be_met(sentence: Callable[..., str]) -> None:
    training = ("--dense.epochs", "1", "--dense.warmup-epochs", "0", "--batch-size", "512")
    model = (*MODEL[3:], "in_chans=1")
    text = sentence("run", "--macs", "0.001", *training, "--threads", "1", "--model-args", *model)
    assert "smallest" in text


def test_constraints_that_nothing_can_meet(sentence: Callable[..., str]) -> None:
    for typed, said in (
        (("--protect", "blocks.9.*"), "protect must match axes, branches or blocks of the model"),
        (("--bounds", "neuron=half"), "bounds must look like neuron=LEAST..MOST, got neuron=half"),
        (("--bounds", "neuron=0.9..0.5"), "bounds must leave 'blocks.0.mlp.neurons' a number"),
        (("--cut-units", "neurons"), "units must be among head, qk_dim"),
        (
            ("--recipe", "standard", "--round-masks", "--rounds", "2"),
            "round-masks must come with round-epochs",
        ),
        (
            ("--recipe", "standard", "--round-shape", "cubic"),
            "round-shape must come with rounds of at least 2",
        ),
    ):
        assert said in sentence("run", *typed)


def test_setting_out_of_range(sentence: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("distill: {lr: -1}\n")
    assert "lr must be unset or above 0, got -1" in sentence("run", "--config", "run.yaml")


def test_folder_that_holds_no_run(sentence: Callable[..., str], tmp_path: Path) -> None:
    assert "must be the folder of a finished run" in sentence("report", tmp_path)


def test_no_gpu(sentence: Callable[..., str]) -> None:
    if not torch.cuda.is_available():
        assert "torch sees no GPU" in sentence("run", "--device", "cuda")
    assert "device must be auto, cpu or cuda" in sentence("run", "--device", "tpu")


def test_a_pair_that_is_no_yaml_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "--model", NAME, "--model-args", "img_size=["]) == 2
    assert "YAML value after img_size=" in capsys.readouterr().err


def test_scores_that_cannot_be_written_are_not_computed(
    sentence: Callable[..., str], photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actions, "score", lambda *_, **__: pytest.fail("ran"))
    words = ("score", *MODEL, "--data", f"folder:{photographs}", "--out")
    Path("file").touch()
    assert "must be a folder" in sentence(*words, "file/scores.safetensors")
    Path("folder").mkdir()
    assert "out must be a file" in sentence(*words, "folder")
