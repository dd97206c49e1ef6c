from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from vitprune_fast.errors import DamagedFile, RunFolderError
from vitprune_fast.run.folder import read_metrics
from vitprune_fast.run.report import figures, write_report
from vitprune_fast.run.report.page import about_latency, budget_text, overlaid_curves, subject

PRE = re.compile(r"<pre>(.*?)</pre>", re.DOTALL)


class Page(HTMLParser):
    """Tags, addresses and text of a page."""

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href") and v]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style",):
            self.words.append(data)


def test_page_is_self_contained_and_well_formed(folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    # only references inside a picture
    assert all(address.startswith("#") for address in page.addresses)
    assert "url(" not in text.replace("url(#", "") and "@import" not in text
    assert "http" not in text
    assert page.tags.count("svg") == 10


def test_page_tells_what_a_stranger_asks(folder: Path) -> None:
    text = " ".join(" ".join(Page((folder / "report.html").read_text()).words).split())
    summary = json.loads((folder / "summary.json").read_text())
    assert "pruned to 50% of the multiply-accumulates" in text
    assert "vitprune-fast run --out 'a folder'" in text
    for value in (
        f"{summary['before']['macs']:,}",
        f"{summary['after']['params']:,}",
        f"{summary['after']['top1']:.2%}",
        f"{summary['after']['agreement']:.2%}",
        *(f"{summary[row]['file_bytes'] / 1e6:,.2f}" for row in ("before", "after")),
        f"{summary['after']['peak_memory_bytes'] / 1e6:,.2f}",
        f"{summary['after']['peak_memory_bytes_batch64'] / 1e6:,.2f}",
        "blocks 2 2 100.0%",
        f"gone {' '.join(f'{share:.1%}' for share in summary['ratios'].values())}",
        *summary["versions"].values(),
        *summary["split_hashes"].values(),
        summary["profile"]["hardware"],
    ):
        assert value in text
    for claim in summary["checks"]:
        assert claim["name"] in text
    assert "of 6 attention heads kept" in text
    for step in ("before", "cut", "swept", "after"):
        low, high = summary[step]["top1_interval"]
        assert f"{summary[step]['top1_count']} of 599 {low:.1%} to {high:.1%}" in text
    assert "One image is 0.17 points." in text


def test_the_title_names_what_was_pruned_and_not_another_size(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    title = re.search(r"<h1>(.*?)</h1>", text)
    assert title and title[1].startswith(
        "A ViT of 2 blocks, width 24, 4 x 4 patches, 8 x 8 pixels on digits"
    )
    shape = json.loads((folder / "summary.json").read_text())["shapes"]["before"]
    named = subject({"name": "deit_tiny_patch16_224", "args": {}}, shape)
    assert named == "deit_tiny_patch16_224 (2 blocks, width 24, 4 x 4 patches, 8 x 8 pixels)"


def test_page_tells_how_to_use_the_model(folder: Path) -> None:
    """What it says of loading is done here."""
    text = (folder / "report.html").read_text()
    ours, without, export = (html.unescape(block) for block in PRE.findall(text)[:3])
    found: dict[str, Any] = {}
    exec(ours, found)
    program = f"{without}\nimport torch\ntorch.manual_seed(0)\n"
    program += "print(model(torch.rand(2, 1, 8, 8)).argmax(1).tolist())"
    torch.manual_seed(0)
    image = torch.rand(2, 1, 8, 8)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(found["model"](image).argmax(1).tolist())
    assert export == f"vitprune-fast export --model {folder / 'model'} --to onnx --out model.onnx"
    pixels = json.loads((folder / "summary.json").read_text())["data"]["pixels"]
    assert f"mean {pixels['mean']['value'][0]:.4g}, over the deviation" in text
    assert f"({pixels['mean']['origin']})" in text


@pytest.mark.parametrize(
    ("single", "words"),
    [
        (0.9, ("50% of the MACs take 90% of the time", "alone 1.000 ms", "most of the 80%")),
        (0.5, ()),
    ],
)
def test_why_one_image_is_not_faster_by_what_the_macs_got_less(
    single: float, words: tuple[str, ...]
) -> None:
    before = {"macs": 100, "latency_ms": 1.0, "latency_ms_batch64": 12.8}
    after = {"macs": 50, "latency_ms": single, "latency_ms_batch64": 7.68}
    said = about_latency(before, after)
    assert bool(said) == bool(words) and all(each in said for each in words)


def test_validation_has_the_line_of_the_dense_model(folder: Path) -> None:
    record = json.loads((folder / "stages" / "dense.json").read_text())
    last = [e for e in read_metrics(folder / "metrics.jsonl") if e["stage"] == "dense"][-1]
    assert record["facts"]["validation_top1"] == last["val_top1"]
    text = (folder / "report.html").read_text()
    panels = dict(re.findall(r"<figcaption>(.*?)</figcaption>(<svg.*?</svg>)", text, re.DOTALL))
    lines = {name for name, svg in panels.items() if ">dense model</text>" in svg}
    assert lines == {"Distillation: validation top-1, %"}


def test_page_is_the_same_every_time(folder: Path) -> None:
    before = (folder / "report.html").read_bytes()
    assert write_report(folder).read_bytes() == before


def test_what_was_set_aside_is_said(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    summary = json.loads((copy / "summary.json").read_text())
    summary["set_aside"] = {"unreadable images": 3, "training steps (distill)": 2}
    (copy / "summary.json").write_text(json.dumps(summary))
    text = write_report(copy).read_text()
    assert "3 unreadable images left out wherever they were met" in text
    assert "2 training steps (distill) left out: not finite" in text
    assert "Nothing:" in (folder / "report.html").read_text()


def test_text_from_outside_is_escaped(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "<script>alert(1)</script>"
    shutil.copytree(folder, copy)
    assert "script" not in Page(write_report(copy).read_text()).tags


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"must be the folder of a finished run, .* run\.json"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({"macs": 0.5}, "50% of the multiply-accumulates"),
        ({"params": 3_000_000.0}, "3,000,000 parameters"),
        (
            {"keep": {"head": 0.5, "neuron": 0.75}},
            "50% of the attention heads and 75% of the MLP neurons",
        ),
    ],
)
def test_budget_in_words(budget: dict, words: str) -> None:
    assert budget_text(budget) == words


def test_picture_of_kept_heads_shows_each_head() -> None:
    axes = [
        {"kind": "head", "block": 0, "size": 4, "units": [1, 3], "scores": []},
        {"kind": "head", "block": 1, "size": 4, "units": [0], "scores": []},
    ]
    svg = figures.kept_units(axes, "kept heads")
    colours = re.findall(r"fill: (#\w{6})", svg)
    assert colours.count(figures.KEPT) == 3
    assert colours.count(figures.GONE) == 5


def test_a_curve_begins_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}
    monkeypatch.setattr(figures, "curves", lambda lines, label, *_: drawn.update({label: lines}))
    start = {"stage": "distill", "event": "start", "epoch": 0, "step": 0, "val_top1": 0.5}
    epochs = [
        {"stage": "distill", "event": "epoch", "epoch": epoch, "loss": 1.0, "val_top1": 0.75}
        for epoch in (0, 1)
    ]
    overlaid_curves([("", "black", [start, *epochs])])
    assert drawn["validation top-1, %"] == [("", "black", [0, 1, 2], [50, 75, 75])]
    assert drawn["training loss"] == [("", "black", [1, 2], [1, 1])]


def test_one_colour_is_that_of_kept_units_and_a_tick_is_at_100() -> None:
    for kind in ("head", "neuron", "embed"):
        axis = {"kind": kind, "block": 0, "size": 2, "units": [1], "scores": [1.0, 2.0]}
        for svg in (figures.kept_units([axis], "kept"), figures.score_spread([axis], "scores")):
            assert figures.KEPT in svg and figures.GONE in svg
    rows = [("dense", 98.0, 97.0, 99.5), ("after", 97.5, 96.0, 99.0)]
    assert ">100</text>" in figures.intervals(rows, "top-1, %", "top-1")
    costs = [("MACs", 4, 2, "2"), ("latency", 4, 5, "5")]
    assert ">100%</text>" in figures.bars(costs, "costs")


def test_thinned_scores_keep_the_ends() -> None:
    values = [float(v) for v in range(10_000)]
    thin = figures._thinned(values[::-1])
    assert len(thin) == figures.MOST_POINTS and (thin[0], thin[-1]) == (0.0, 9999.0)
    assert figures._thinned(values[:5]) == values[:5]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", b"{}"),
        ("summary.json", b"[1]"),
        ("run.json", b'{"identity": 3}'),
        ("sweep.json", b"{}"),
        ("sweep.json", b'{"fits": [3]}'),
        ("stages/plan.json", b'{"outputs": 3, "facts": 4}'),
        ("stages/plan.json", b'{"outputs": {}, "facts": {"axes": 4}}'),
    ],
)
def test_a_damaged_run_is_one_sentence(
    folder: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(content)
    with pytest.raises(DamagedFile):
        write_report(tmp_path / "run")


def test_a_run_of_another_version_is_refused_as_that(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "old")
    record = json.loads((tmp_path / "old" / "run.json").read_text())
    (tmp_path / "old" / "run.json").write_text(json.dumps({**record, "schema": 1}))
    with pytest.raises(RunFolderError, match="must be of this version of the program"):
        write_report(tmp_path / "old")


def test_metrics_that_are_no_text_are_left_out(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "ab") as metrics:
        metrics.write(b"\xff\xfe\n" + b'{"loss": NaN}\n' + b'{"torn": ')
    assert write_report(tmp_path / "run").is_file()
