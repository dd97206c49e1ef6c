"""`vitprune-fast bench data`: what it measures is what a loader does, and it says what waits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from vitprune_fast.cli import data_rates as rates
from vitprune_fast.cli.main import main
from vitprune_fast.data import open_data
from vitprune_fast.errors import InvalidInput

MODEL = ("--model-args", "img_size=32", "depth=1", "embed_dim=48", "num_classes=4")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    rates.make_photographs(folder, 24)
    return folder


def test_parts_loaders_and_device_are_measured_and_compared(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "data", "--data", f"folder:{photographs}", *MODEL, "--device", "cpu"]
    words += ["--batch-size", "4", "--workers", "1", "--seconds", "0.01"]
    assert main([*words, "--json", str(tmp_path / "found.json")]) == 0
    text = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["images"] == f"folder:{photographs}" and found["image_size"] == [32, 32]
    parts = {"read file", "decode", "crop, resize", "to a batch", "all of these", "hand-over"}
    assert {path: {*own} - parts for path, own in found["ms_per_image"].items()} == {
        "training": {"normalise"},
        "RandAugment": {"normalise", "policy"},
        "evaluation": {"normalise"},
    }
    for path, own in found["ms_per_image"].items():
        assert min(own[part] for part in parts) > 0
        together = 1e3 / (own["all of these"] + own["hand-over"])
        assert found["images_per_s_per_core"][path] == pytest.approx(together)
        assert found["images_per_s_of_processes"][path].keys() == {"0", "1"}
    assert min(found["images_per_s_of_device"].values()) > 0
    assert found["limit"] in text and text.count(" waits for ") == 3
    lines = text.splitlines()
    assert all(any(line.startswith(part) for line in lines) for part in (*parts, "1 loader"))


def test_what_is_slower_is_the_limit() -> None:
    read = {
        "training": {0: 100.0, 2: 190.0},
        "RandAugment": {0: 60.0, 2: 120.0},
        "evaluation": {0: 110.0, 2: 200.0},
    }
    said = rates.limit(read, {"forward": 5000.0, "scoring": 400.0, "distilling": 150.0})
    assert said == (
        "training waits for the device (190 images/s read, 150 taken by distilling), "
        "RandAugment waits for its images (120 images/s read, 150 taken by distilling), "
        "evaluation waits for its images (200 images/s read, 5,000 taken by forward)"
    )


def test_numbers_of_processes_end_with_the_one_asked_for() -> None:
    assert [rates.counts(workers) for workers in (0, 1, 2, 6)] == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 4, 6],
    ]


@pytest.mark.parametrize("with_photographs", [True, False])
def test_photographs_are_made_where_none_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_photographs: bool
) -> None:
    if not with_photographs:
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    what = rates.make_photographs(tmp_path / "one", 8)
    assert ("scikit-learn" in what) == with_photographs
    assert rates.make_photographs(tmp_path / "two", 8) == what
    made = sorted((tmp_path / "one").rglob("*.jpg"))
    assert len(made) == 8
    sizes = set()
    for file in made:
        same = tmp_path / "two" / file.relative_to(tmp_path / "one")
        assert same.read_bytes() == file.read_bytes()
        sizes.add(Image.open(file).size)
    assert sizes == {(500, 375), (375, 500)}


def test_images_are_spread_over_all_that_there_are(photographs: Path) -> None:
    data = open_data(f"folder:{photographs}", image_size=32, channels=3)
    assert rates.sample(data, 4).ids.tolist() == [0, 6, 12, 18]
    assert len(rates.sample(data, 99)) == 24


def test_digits_are_no_photographs() -> None:
    data = open_data("digits", image_size=8, channels=1)
    with pytest.raises(InvalidInput, match="data must be photographs, got digits"):
        rates.sample(data)


def test_a_loader_is_measured_over_normalised_images(photographs: Path) -> None:
    images = rates.sample(open_data(f"folder:{photographs}", image_size=16, channels=3))
    options = {"batch_size": 4, "seconds": 0.01}
    for workers in (0, 1):
        assert rates.delivered(images, None, workers, torch.device("cpu"), **options) > 0
