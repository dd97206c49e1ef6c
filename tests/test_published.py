"""The published accuracy beside a measured one: where it is known, and nowhere else."""

from __future__ import annotations

import csv
import html
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from timm.data import ImageNetInfo
from timm.models import get_pretrained_cfg

from tests.small import photographs
from vitprune_fast import describe
from vitprune_fast.cli.main import main
from vitprune_fast.config.model import ModelConfig
from vitprune_fast.data.published import TABLE, published_accuracy
from vitprune_fast.files import read_json
from vitprune_fast.models.open import open_model
from vitprune_fast.run.published import published

NAME = "test_vit.r160_in1k"
IMAGENET = tuple(ImageNetInfo().label_names())
FIGURES = (
    "top-1 40.98%, top-5 67.38% (timm's results-imagenet.csv at 4e5207c, 160 px, "
    "crop_share 0.95, bicubic)"
)


def rows() -> list[dict[str, str]]:
    lines = TABLE.read_text().splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def test_the_table_is_of_models_that_can_be_pruned() -> None:
    assert len({(row["model"], row["img_size"]) for row in rows()}) == len(rows()) > 100
    for row in rows():
        stated: Any = get_pretrained_cfg(row["model"])
        assert f"{stated.architecture}.{stated.tag}" == row["model"] and stated.num_classes == 1000
        # shown as the weights say, at the size they are trained for or published at
        shares = {stated.input_size[1]: stated.crop_pct}
        if stated.test_input_size:
            shares[stated.test_input_size[1]] = stated.test_crop_pct or stated.crop_pct
        assert shares[int(row["img_size"])] == pytest.approx(float(row["crop_pct"]), abs=5e-4)
        assert stated.interpolation == row["interpolation"]
        assert 0 < float(row["top1"]) < float(row["top5"]) < 100


@pytest.mark.slow
def test_every_model_of_the_table_is_described() -> None:
    for row in rows():
        size = int(row["img_size"])
        stated: Any = get_pretrained_cfg(row["model"])
        options: Any = {} if stated.input_size[1] == size else {"img_size": size}
        with torch.device("meta"):
            assert describe(timm.create_model(row["model"], **options)).input_size[1] == size


def test_no_row_is_no_figure() -> None:
    assert published_accuracy(NAME, (160, 160)) is not None
    for name, size in ((NAME, (160, 176)), (NAME, (224, 224)), ("test_vit", (160, 160))):
        assert published_accuracy(name, size) is None


@pytest.fixture
def _own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded."""
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained=False, **sizes: create(name, **sizes)
    )


def data_of(**changes: Any) -> Any:
    facts = {"classes": IMAGENET, "image_size": (160, 160), "own_splits": {"train", "test"}}
    return SimpleNamespace(**{**facts, **changes})


@pytest.mark.usefixtures("_own_weights")
@pytest.mark.parametrize(
    ("changes", "known"),
    [
        pytest.param({}, True, id="imagenet"),
        pytest.param({"own_splits": {"train"}}, False, id="a-test-split-cut-from-train"),
        pytest.param({"image_size": (128, 128)}, False, id="another-size"),
        pytest.param({"classes": tuple(map(str, range(1000)))}, False, id="other-classes"),
    ],
)
def test_a_figure_is_of_timm_s_weights_on_imagenet(changes: dict[str, Any], known: bool) -> None:
    for name in (NAME, "test_vit"):
        config = ModelConfig(name, pretrained=True)
        model = open_model(config)
        assert (published(config, model, data_of(**changes)) is not None) == known
        altered = ModelConfig(name, {"global_pool": "avg"}, pretrained=True)
        random = ModelConfig(name)
        assert published(altered, model, data_of(**changes)) is None
        assert published(random, open_model(random), data_of(**changes)) is None


@pytest.mark.usefixtures("_own_weights")
def test_it_stands_beside_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    photographs(Path("photos"), "train", classes=IMAGENET, count=2)
    photographs(Path("photos"), "val", classes=IMAGENET[:5], count=1)
    words = ["--model", NAME, "--pretrained", "--data", "folder:photos", "--validation", "50"]
    assert main(["eval", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"published {FIGURES}" and lines[-3].startswith("top-1 ")
    splits = next(line for line in lines if line.startswith("splits"))
    assert "validation: 50 images of photos/train (50)" in splits
    assert main(["eval", *words, "--split", "validation"]) == 0
    assert "published" not in capsys.readouterr().out
    few = ["--score-samples", "2", "--no-compensate", "--latency-seconds", "0.01"]
    command = ["run", "--recipe", "one-shot", *words, *few, "--out", "run"]
    # these weights know nothing, and 50 images show it before anything is done with them
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "right of the validation images, no more than chance" in error, error
    assert main([*command, "--allow-chance"]) == 0
    said = capsys.readouterr().out
    assert "of 50) (published, of the test split: 40.98%)" in said, said
    assert said.index("validation top-1") < said.index("score ")
    summary = read_json("run/summary.json")
    assert summary["weights"]["published"]["top1"] == 0.40982
    assert "weights" not in summary["assumptions"]
    assert f"published {FIGURES}" in html.unescape(Path("run/report.html").read_text())
