"""What a command takes for granted is printed, one line each, recorded and reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import resolve_model_data_config  # pyright: ignore[reportAttributeAccessIssue]

import vitprune_fast as vp
from tests.small import NAME, SMALL, photographs, words
from vitprune_fast import files
from vitprune_fast.cli.main import main
from vitprune_fast.config.model import ModelConfig
from vitprune_fast.data import open_data
from vitprune_fast.run.assumptions import about_size

SIZES = {**SMALL, "num_classes": 2}
MODEL = words(SIZES)
TRAINING = ["--distill.epochs", "1", "--distill.warmup-epochs", "0", "--latency-seconds", "0.01"]
RUN = ["run", "--recipe", "standard", "--data", "folder:photos", *TRAINING, "--threads", "1"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def checkpoint() -> list[str]:
    """Options of a trained model whose training nobody here knows."""
    files.write_tensors("dense.safetensors", untrained().state_dict())
    return [*MODEL, "--checkpoint", "dense.safetensors"]


def untrained() -> Any:
    return timm.create_model(NAME, **SIZES)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    """Topic -> text of the lines a command prints before its result."""
    assert main([str(word) for word in words]) == 0
    lines = (line.partition(" ") for line in capsys.readouterr().out.splitlines())
    return {topic: text.strip() for topic, _, text in lines}


@pytest.mark.parametrize(
    ("parts", "train", "validation", "test"),
    [
        pytest.param(
            ("",),
            "the rest of photos (28)",
            "10% of photos (4)",
            "20% of photos (8)",
            id="one-folder",
        ),
        pytest.param(
            ("train", "val"),
            "the rest of photos/train (36)",
            "10% of photos/train (4)",
            "photos/val, the only part held out (40)",
            id="train-and-val",
        ),
        pytest.param(
            ("train", "val", "test"),
            "photos/train (40)",
            "photos/val (40)",
            "photos/test (40)",
            id="all-three",
        ),
    ],
)
def test_a_run_says_which_folder_or_share_became_what(
    parts: tuple[str, ...],
    train: str,
    validation: str,
    test: str,
    checkpoint: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    photographs(Path("photos"), *parts, count=20)
    lines = said(capsys, *RUN, *checkpoint, "--out", "run")
    assert lines["splits"] == f"train: {train}; validation: {validation}; test: {test}"
    summary = files.read_json("run/summary.json")
    splits = summary["data"]["splits"]
    assert {name: f"{part['origin']} ({part['images']})" for name, part in splits.items()} == {
        "train": train,
        "validation": validation,
        "test": test,
    }
    # neither do we know what the checkpoint has seen, nor do we keep quiet about it
    assert "whether dense.safetensors was trained on images of the test split" in lines["unknown"]
    assert splits["test"]["origin"] in lines["unknown"]
    assert lines["budget"].startswith("half of the MACs, the default")
    assert "timm's for vit_tiny_patch16_224, which the checkpoint need not share" in lines["pixels"]
    assert summary["weights"] == {"origin": "checkpoint", "source": "dense.safetensors"}
    assert set(summary["assumptions"]) == {"splits", "pixels", "unknown", "budget"}
    page = Path("run/report.html").read_text()
    for text in ("dense.safetensors", splits["test"]["origin"], "half of the MACs, the default"):
        assert text in page


def test_what_was_said_is_not_assumed(
    checkpoint: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    photographs(Path("photos"), count=20)
    statistics = ("--mean", ".1", ".2", ".3", "--std", "1", "1", "1", "--crop-share", "0.8")
    statistics += ("--crop-mode", "border", "--interpolation", "bilinear")
    words = [*RUN, *checkpoint, "--macs", "0.6", *statistics]
    lines = said(capsys, *words, "--out", "run")
    assert "budget" not in lines
    assert lines["pixels"] == (
        "mean 0.1 0.2 0.3, std 1 1 1, crop_share 0.8, crop_mode border, interpolation bilinear "
        "(given)"
    )
    # the model carries them from here on, and says so
    lines = said(capsys, "eval", "--model", "run/model", "--data", "folder:photos")
    assert lines["pixels"] == (
        "mean 0.1 0.2 0.3, std 1 1 1, crop_share 0.8, crop_mode border, interpolation bilinear "
        "(of the saved model)"
    )
    assert "whether run/model was trained on images of the test split" in lines["unknown"]
    lines = said(
        capsys, "eval", "--model", "run/model", "--data", "folder:photos", "--split", "train"
    )
    assert "unknown" not in lines


def test_random_weights_are_named_by_every_verb_that_uses_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    photographs(Path("photos"), count=20)
    model, data = MODEL, ["--data", "folder:photos"]
    random = f"{NAME} has random weights (seed 0)"
    lines = said(capsys, "score", *model, *data, "--out", "s.safetensors")
    assert lines["weights"].startswith(random)
    lines = said(capsys, "plan", *model, "--scores", "s.safetensors", "--out", "p.json")
    assert lines["scores"].startswith("those of random weights")
    assert lines["budget"].startswith("half of the MACs, the default")
    lines = said(capsys, "prune", *model, "--plan", "p.json", "--out", "pruned")
    assert lines["weights"].startswith(random)
    # a saved model is not laundered by being saved, but by being trained
    lines = said(capsys, "eval", "--model", "pruned", *data)
    assert lines["weights"] == "pruned has random weights, as it was saved"
    assert said(capsys, "eval", *model, *data)["weights"].startswith(random)
    lines = said(
        *(capsys, "distill", *model, *data, "--teacher", "self", "--epochs", "1"),
        *("--warmup-epochs", "0", "--out", "taught"),
    )
    assert lines["weights"].startswith(random)
    assert "weights" not in said(capsys, "eval", "--model", "taught", *data)


def test_weights_of_a_name_are_the_same_for_score_and_prune(
    capsys: pytest.CaptureFixture[str],
) -> None:
    photographs(Path("photos"), count=20)
    plan = vp.Plan.of(vp.describe(untrained()), {})
    plan.save("keep.json")
    for folder in ("one", "two"):
        torch.manual_seed(len(folder) + ord(folder[0]))
        said(capsys, "prune", *MODEL, "--plan", "keep.json", "--out", folder)
    one, two = (vp.load(folder).state_dict() for folder in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_scores_of_a_trained_model_say_nothing_of_random_weights(
    checkpoint: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    photographs(Path("photos"), count=20)
    assert "weights" not in said(
        *(capsys, "score", *checkpoint, "--data", "folder:photos", "--out", "s.safetensors")
    )
    words = ("plan", *checkpoint, "--scores", "s.safetensors", "--macs", "0.7")
    assert {"scores", "budget"}.isdisjoint(said(capsys, *words))


def test_interpolation_decides_the_pixels() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    for name in ("ant", "bee"):
        Path("noise", name).mkdir(parents=True)
        for index in range(10):
            Image.fromarray(noise).save(Path("noise", name, f"{index}.png"))
    wanted = {"bilinear": Image.Resampling.BILINEAR, None: Image.Resampling.BICUBIC}
    for name, resampling in wanted.items():
        data = open_data(
            *("folder:noise",),
            image_size=16,
            channels=3,
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            interpolation=name,
        )
        image, _ = data.split("train")[0]
        resized = np.asarray(Image.fromarray(noise).resize((16, 16), resampling))
        assert torch.equal(image, torch.from_numpy(resized.copy()).permute(2, 0, 1) / 255)


@pytest.mark.parametrize("heads", [[0, 1, 2], [0]], ids=["plain-timm", "standalone"])
def test_a_saved_model_says_how_its_images_are_prepared(heads: list[int]) -> None:
    model = untrained()
    model.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "crop_pct": 0.8}
    plan = vp.Plan.of(vp.describe(model), {"blocks.0.attn.heads": heads})
    vp.save(vp.prune(model, plan), "saved")
    config = json.loads(Path("saved/config.json").read_text())
    opened: list[Any] = [vp.load("saved")]
    if len(heads) == 3:
        assert config["architecture"] == NAME
        opened.append(timm.create_model("local-dir:saved", pretrained=True))
    else:
        space: dict[str, Any] = {"__name__": "modeling_pruned"}
        exec(Path("saved/modeling_pruned.py").read_text(), space)
        opened.append(space["load"]("saved"))
    for each in opened:
        prepared = resolve_model_data_config(each)
        assert tuple(prepared["input_size"]) == (3, 16, 16)
        assert tuple(prepared["mean"]) == (0.1, 0.2, 0.3) and prepared["crop_pct"] == 0.8
        assert each.pretrained_cfg["architecture"] == NAME
        assert each.pretrained_cfg["num_classes"] == 2
        timm.models.save_for_hf(each, "hub")
        assert json.loads(Path("hub/config.json").read_text())["architecture"] == NAME


@pytest.mark.parametrize(
    ("option", "value"),
    [("crop_share", 0.5), ("crop_mode", "center"), ("interpolation", "bicubic")],
    ids=str,
)
def test_the_digits_take_no_settings_of_photographs(option: str, value: Any) -> None:
    options: Any = {option: value}
    with pytest.raises(vp.VitpruneError, match=f"{option} must be unset for the digits"):
        open_data("digits", image_size=8, channels=1, **options)


def test_distil_saves_the_pixel_statistics_it_trained_with(
    checkpoint: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    photographs(Path("photos"), count=20)
    data = ["--data", "folder:photos"]
    plan = vp.Plan.of(vp.describe(untrained()), {})
    plan.save("keep.json")
    said(capsys, "prune", *checkpoint, "--plan", "keep.json", "--out", "pruned")
    # a guess stays a guess on the disk
    guess = f"(timm's for {NAME}, which the checkpoint need not share)"
    assert guess in said(capsys, "eval", "--model", "pruned", *data)["pixels"]
    statistics = ("--mean", ".1", ".2", ".3", "--std", "1", "1", "1", "--crop-share", "0.5")
    training = ("--teacher", "self", "--epochs", "1", "--warmup-epochs", "0")
    trained = said(
        *(capsys, "distill", "--model", "pruned", *data, *training, *statistics),
        *("--crop-mode", "squash", "--interpolation", "nearest", "--out", "taught"),
    )
    used = said(capsys, "eval", "--model", "taught", *data)
    assert used["pixels"] == trained["pixels"].replace("(given)", "(of the saved model)")


def test_a_way_to_prepare_images_that_is_not_ours_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    photographs(Path("photos"), count=20)
    model = untrained()
    model.pretrained_cfg |= {"crop_mode": "fit", "interpolation": "random"}
    vp.save(model, "odd")
    lines = said(capsys, "eval", "--model", "odd", "--data", "folder:photos")
    assert lines["caution"] == (
        "the model asks for crop_mode fit (ours is center) and interpolation random (ours is "
        "bicubic)"
    )
    words = ("--teacher", "self", "--epochs", "1", "--warmup-epochs", "0", "--out", "taught")
    said(capsys, "distill", "--model", "odd", "--data", "folder:photos", *words)
    assert "caution" not in said(capsys, "eval", "--model", "taught", "--data", "folder:photos")


def test_a_model_of_the_published_size_is_tested_as_published(
    capsys: pytest.CaptureFixture[str],
) -> None:
    photographs(Path("photos"), count=20)
    model = untrained()
    model.pretrained_cfg |= {
        **{"test_input_size": (3, 24, 24), "crop_pct": 0.9, "test_crop_pct": 0.95},
        "crop_mode": "squash",
    }
    vp.save(model, "trained")
    evaluated = ("eval", "--model", "trained", "--data", "folder:photos")
    assert "crop_share 0.9, crop_mode squash" in said(capsys, *evaluated)["pixels"]
    larger = timm.create_model(NAME, **{**SIZES, "img_size": 24})
    larger.pretrained_cfg |= model.pretrained_cfg
    vp.save(larger, "trained")
    assert "crop_share 0.95, crop_mode squash" in said(capsys, *evaluated)["pixels"]
    data = open_data("folder:photos", image_size=16, channels=3)
    config = ModelConfig(NAME, pretrained=True)
    assert about_size(config, larger, replace(data, image_size=(24, 24))) == {}
    assert about_size(config, model, data) == {
        "size": f"{NAME} is published at 24 x 24 pixels (--model-args img_size=24), and here it "
        "sees 16 x 16"
    }


def test_a_saved_model_claims_no_weights_of_timm() -> None:
    model = untrained()
    assert {"tag", "license"} <= model.pretrained_cfg.keys()
    # timm has an object for it, too
    model.pretrained_cfg = timm.models.PretrainedCfg(**model.pretrained_cfg)
    vp.save(model, "saved")
    saved: Any = vp.load("saved")
    stated = saved.pretrained_cfg
    assert stated["architecture"] == NAME and not {"tag", "license", "url"} & stated.keys()


def test_a_line_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    photographs(Path("two\nlines"), count=20)
    vp.save(untrained(), "model")
    lines = said(capsys, "eval", "--model", "model", "--data", "folder:two\nlines")
    assert lines["splits"].startswith("train: the rest of two lines (28); validation")
