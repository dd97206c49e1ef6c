"""The README is run: its snippets, each of its commands, and the script behind its table."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from PIL import Image

from vitprune_fast import files
from vitprune_fast.cli.main import main
from vitprune_fast.config.run import RunConfig
from vitprune_fast.recipes import presets

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)
SNIPPETS = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    line.partition(" #")[0].strip()
    for language, code in BLOCKS
    if language == "bash"
    for line in code.splitlines()
    if line.strip()
]
# what makes the long commands short here; everything else runs as it is written
SHORTER = {
    "run --out": (
        *("--model-args", "img_size=8", "patch_size=4", "in_chans=1", "embed_dim=24", "depth=2"),
        *("num_heads=3", "--dense.epochs", "1", "--dense.warmup-epochs", "0"),
        *("--distill.epochs", "1", "--distill.warmup-epochs", "0", "--latency-seconds", "0.01"),
    ),
    "run --model": ("--distill.epochs", "1", "--latency-seconds", "0.01"),
    "bench --model": ("--seconds", "0.05"),
    "bench scoring": ("--rounds", "1", "--batch-size", "2"),
}


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits_seeds", ROOT / "bench/digits_seeds.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sections_come_in_the_order_a_reader_wants() -> None:
    headings = re.findall(r"^## (.*)$", TEXT, re.MULTILINE)
    assert headings == [
        *("Measured", "Install", "Example", "Support", "How it works", "Limits", "Cite")
    ]


def test_table_is_the_one_made_from_the_committed_results() -> None:
    digits = script()
    results = files.read_json(digits.newest_results())
    assert results["seeds"] == list(digits.SEEDS) == [run["seed"] for run in results["runs"]]
    assert digits.filled(TEXT, digits.table(results)) == TEXT


def test_table_script_refuses_a_readme_without_its_marks() -> None:
    with pytest.raises(SystemExit, match="once, found 0"):
        script().filled("no marks", "rows")


def test_quick_start_runs_and_is_short(tmp_path: Path) -> None:
    snippet = SNIPPETS[0]
    lines = [line for line in snippet.splitlines() if line and "import" not in line]
    assert len(lines) <= 10
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split("->"))
    assert after <= before / 2


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
    exec(compile(SNIPPETS[1], "README.md", "exec"), {})
    assert (tmp_path / "runs/digits-seed1/summary.json").exists()


def test_every_command_is_covered() -> None:
    """What is run below is what the README shows; the two make targets are run by CI itself."""
    assert [c for c in COMMANDS if c.startswith("make ")] == ["make prune", "make test"]
    verbs = [shlex.split(c)[1] for c in COMMANDS if c.startswith("vitprune-fast ")]
    assert len(verbs) + 2 == len(COMMANDS)
    assert {"run", "describe", "score", "plan", "prune", "distill", "eval", "bench"} <= {*verbs}


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
