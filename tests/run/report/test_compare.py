from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.run.conftest import TINY
from tests.run.report.test_report import Page
from vitprune_fast.cli.main import main
from vitprune_fast.config.run import PlanConfig
from vitprune_fast.errors import InvalidInput, RunFolderError
from vitprune_fast.recipes.start import run
from vitprune_fast.run.report import write_comparison
from vitprune_fast.run.report.compare import names_of, settings_that_differ


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Runs of the tiny job with half and with a third of the MACs."""
    here = tmp_path_factory.mktemp("compare")
    run(replace(TINY, out=here / "half"))
    shutil.copytree(here / "half", here / "third")
    # the dense model is the same; what comes after it is done again
    for stage in ("plan", "prune", "sweep", "distill", "evaluate", "report"):
        (here / "third" / "stages" / f"{stage}.json").unlink()
    for name in ("checkpoints/distill", "model", "pruned"):
        shutil.rmtree(here / "third" / name)
    third = replace(TINY, out=here / "third", plan=PlanConfig(macs=0.33), allow_config_change=True)
    run(third)
    return here / "half", here / "third"


def test_the_page_has_one_table_and_overlaid_curves(two: tuple[Path, Path], tmp_path: Path) -> None:
    text = write_comparison(two, tmp_path / "page.html").read_text()
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "http" not in text and "url(" not in text.replace("url(#", "")
    words = " ".join(" ".join(page.words).split())
    for folder in two:
        after = json.loads((folder / "summary.json").read_text())["after"]
        for step, heading in (("cut", "right after the cut"), ("swept", "after the sweep")):
            assert f"top-1 {heading}" in words
            assert f"{json.loads((folder / 'summary.json').read_text())[step]['top1']:.2%}" in words
        for value in (f"{after['macs']:,}", f"{after['top1']:.2%}", f"{after['latency_ms']:.2f}"):
            assert value in words
        assert f"{after['file_bytes'] / 1e6:.2f}" in words
        assert f"{after['peak_memory_bytes'] / 1e6:.2f}" in words
    assert "33% of the multiply-accumulates" in words
    assert "config.plan.macs unset 0.33" in words and "config.seed" not in words
    # loss and validation top-1 of both trainings, each with both runs in it
    assert page.tags.count("svg") == 4
    for svg in text.split("<svg")[1:]:
        assert "half" in svg.split("</svg>")[0] and "third" in svg.split("</svg>")[0]


def test_the_command_compares_when_it_gets_two_folders(
    two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    assert main(["report", *map(str, two), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.exists()


def test_folders_that_cannot_be_compared(two: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="must be the folder of a finished run"):
        write_comparison((two[0], tmp_path), tmp_path / "page.html")
    with pytest.raises(InvalidInput, match="different folders"):
        write_comparison((two[0], two[0]), tmp_path / "page.html")
    with pytest.raises(InvalidInput, match="at least two runs, got 1"):
        write_comparison(two[:1], tmp_path / "page.html")


def test_names_are_as_short_as_tells_them_apart() -> None:
    assert names_of([Path("/x/runs/a"), Path("/x/runs/b")]) == ["a", "b"]
    assert names_of([Path("/x/a/run"), Path("/x/b/run")]) == ["a/run", "b/run"]


def test_only_what_differs_is_listed() -> None:
    one = {"config": {"seed": 0, "plan": {"macs": 0.5}}, "threads": 1}
    other = {"config": {"seed": 0, "plan": {"macs": None}, "new": True}, "threads": 1}
    assert settings_that_differ([one, other]) == [
        ("config.plan.macs", ["0.5", "unset"]),
        ("config.new", ["", "True"]),
    ]
