"""The README and the page of the command line are run: every snippet and every command."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

from vitprune_fast import files
from vitprune_fast.cli.main import VERBS, main
from vitprune_fast.config.run import RunConfig
from vitprune_fast.recipes import presets

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "the-command-line.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT + PAGE, re.DOTALL)
SNIPPETS = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    line.partition(" #")[0].strip()
    for language, code in BLOCKS
    if language == "bash"
    for line in code.splitlines()
    if line.strip()
]
# a figure: a number with what it counts behind it
FIGURE = re.compile(r"\d[\d.,]*\s?(?:%|x\b|ms\b|s\b|MiB|GB|points|images|times)")
# what makes the long commands short here; everything else runs as it is written
SHORTER = {
    "run --out": (
        *("--model-args", "img_size=8", "patch_size=4", "in_chans=1", "embed_dim=24", "depth=2"),
        *("num_heads=3", "--dense.epochs", "1", "--dense.warmup-epochs", "0"),
        *("--distill.epochs", "1", "--distill.warmup-epochs", "0", "--latency-seconds", "0.01"),
    ),
    "run --model": ("--distill.epochs", "1", "--latency-seconds", "0.01"),
    "distill --model pruned": ("--epochs", "1", "--warmup-epochs", "0"),
    "distill --model runs": (*("--epochs", "1", "--warmup-epochs", "0", "--gate-epochs", "1"),),
    "bench --model": ("--seconds", "0.05"),
    "bench scoring": ("--rounds", "1", "--batch-size", "2"),
}


def test_it_is_short_and_in_the_order_a_reader_wants() -> None:
    assert len(TEXT.splitlines()) <= 150
    headings = re.findall(r"^## (.*)$", TEXT, re.MULTILINE)
    assert headings == [
        *("Install", "Prune your checkpoint", "Use the result", "Choose", "Support and limits"),
        *("How it works", "Results", "Cite"),
    ]


def test_every_figure_is_made_of_committed_results() -> None:
    """What stands between marks is (tests/test_results.py); nothing else is a figure."""
    made = r"<!-- (\w+):begin -->.*?<!-- \1:end -->|```.*?```"
    written = re.sub(made, "", TEXT, flags=re.DOTALL)
    assert written.count("<!--") == 0 and not FIGURE.findall(written)
    assert FIGURE.findall("keeps 97.6 % at 2.5x") == ["97.6 %", "2.5x"]


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", TEXT):
        assert (ROOT / target).exists(), target


def test_quick_start_runs_and_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line for line in SNIPPETS[0].splitlines() if line and "import" not in line]
    assert len(lines) <= 15
    # what comes after it goes on with what it left
    done = subprocess.run(
        [sys.executable, "-c", SNIPPETS[0] + SNIPPETS[1]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    costs, *_ = done.stdout.splitlines()
    before, after = map(int, costs.split("->"))
    assert after <= before / 2
    assert (tmp_path / "small.pt2").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_python_job_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = presets.preset

    def short(name: str) -> RunConfig:
        """The job with shorter trainings: the whole one is run by `make prune`."""
        job, few = whole(name), {"epochs": 2, "warmup_epochs": 0}
        return replace(job, dense=replace(job.dense, **few), distill=replace(job.distill, **few))

    monkeypatch.setattr(presets, "preset", short)
    exec(compile(SNIPPETS[2], "the-command-line.md", "exec"), {})
    assert (tmp_path / "runs/digits-seed1/summary.json").exists()


def test_every_command_is_covered() -> None:
    """What is run below is what the pages show; the two make targets are run by CI itself."""
    assert [c for c in COMMANDS if c.startswith("make ")] == ["make prune", "make test"]
    verbs = [shlex.split(c)[1] for c in COMMANDS if c.startswith("vitprune-fast ")]
    assert len(verbs) + 2 == len(COMMANDS)
    assert {*VERBS} <= {*verbs}


@pytest.mark.slow
def test_every_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for label, name in enumerate(("ant", "bee")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(12):
            image = Image.new("RGB", (40, 30), (120 * label, 15 * index, 0))
            image.save(tmp_path / "photos" / name / f"{index}.jpg")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_classes": 2, "img_size": 32}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    files.write_tensors("dense.safetensors", model.state_dict())
    for command in COMMANDS:
        program, *words = shlex.split(command)
        if program != "vitprune-fast":
            continue
        if words[:2] == ["run", "--model"]:
            words += ["--model-args", *(f"{key}={value}" for key, value in sizes.items())]
        extra = next((v for k, v in SHORTER.items() if " ".join(words).startswith(k)), ())
        assert main([*words, *extra]) == 0, f"{command}: {capsys.readouterr().err}"
