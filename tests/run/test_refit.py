"""What is said of a refit, and which images it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.small import photographs
from vitprune_fast.data import ImageData, open_data
from vitprune_fast.errors import InvalidInput
from vitprune_fast.run.folder import SCHEMA
from vitprune_fast.run.refit import left_out_lines, refit_text, refuse_test_images
from vitprune_fast.surgery import Fit, SweepReport


def fit(place: str, *errors: float, why: str = "") -> Fit:
    before, after, held_out = errors
    return Fit(place, "writer", before, after, held_out, 1e-3, why)


def report(*fits: Fit) -> SweepReport:
    return SweepReport(1024, 103, 5120, fits, ())


def test_a_refit_in_one_line() -> None:
    fits = [fit("a", 0.4, 0.2, 0.3), fit("b", 0.2, 0.1, 0.1), fit("c", 0.3, 0.1, 0.2)]
    assert refit_text(report(*fits, fit("d", 9, 9, 9, why="a norm"))) == (
        "1,024 images, 3 of 4 fits applied, median error 30.0% -> 10.0% (20.0% on images held out)"
    )
    assert refit_text(report()) == "1,024 images, 0 of 0 fits applied"


def test_fits_left_out_for_one_reason_share_a_line() -> None:
    fits = [fit(f"blocks.{k}.mlp", 1, 1, 1, why="a norm") for k in range(5)]
    fits += [fit("head", 1, 1, 1, why="no gain"), fit("blocks.5.mlp", 1, 0, 0)]
    assert left_out_lines(report(*fits)) == [
        "left out: writer of blocks.0.mlp, blocks.1.mlp, blocks.2.mlp and 2 more: a norm",
        "left out: writer of head: no gain",
    ]


def opened(spec: str) -> ImageData:
    return open_data(spec, image_size=16, channels=3)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the model of a run on photos/train and photos/test lies."""
    monkeypatch.chdir(tmp_path)
    photographs(Path("photos"), "train", "test", count=12)
    recorded({"schema": SCHEMA, "identity": {"data": {"name": "folder:photos"}}})
    return Path("run/dense")


def recorded(content: object) -> None:
    Path("run").mkdir(exist_ok=True)
    Path("run/run.json").write_text(json.dumps(content))


@pytest.mark.parametrize("spec", ["folder:photos/test", "folder:linked"])
def test_the_test_images_of_the_run_are_refused_by_any_name(spec: str, model: Path) -> None:
    Path("linked").symlink_to("photos/test")
    data = opened(spec)
    with pytest.raises(InvalidInput, match=r"prune: data must not hold test images of the run in"):
        refuse_test_images(data, data.split_ids["train"], [model])
    # it is the images that are read that count
    assert refuse_test_images(data, data.split_ids["train"][:0], [model]) == ""


def test_other_images_are_not_refused(model: Path) -> None:
    for spec in ("folder:photos", "folder:photos/train", "digits"):
        data = opened(spec) if spec != "digits" else open_data(spec, image_size=8, channels=1)
        assert refuse_test_images(data, data.split_ids["train"], [model]) == ""
    data = opened("folder:photos/test")
    assert refuse_test_images(data, data.split_ids["train"], [Path("elsewhere/dense")]) == ""


@pytest.mark.parametrize(
    "content",
    [
        {"schema": SCHEMA, "identity": {"data": {"name": "folder:gone"}}},
        {"schema": SCHEMA - 1, "identity": {"data": {"name": "folder:photos"}}},
        {"schema": SCHEMA, "identity": {}},
    ],
    ids=["data-gone", "other-version", "no-data"],
)
def test_what_cannot_be_known_is_said(content: object, model: Path) -> None:
    recorded(content)
    data = opened("folder:photos/test")
    unknown = refuse_test_images(data, data.split_ids["train"], [model])
    assert unknown.startswith("whether folder:photos/test holds test images of the run in")
