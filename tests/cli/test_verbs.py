"""Every verb on files, one after the other, and the run itself through the command line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import vitprune_fast as vp
from vitprune_fast.cli.main import main
from vitprune_fast.config.yamlfile import from_yaml
from vitprune_fast.recipes.presets import preset
from vitprune_fast.recipes.start import RunStopped, run

TRAINING = [
    *("--dense.epochs", "1", "--dense.warmup-epochs", "0", "--distill.epochs", "1"),
    *("--distill.warmup-epochs", "0", "--score-samples", "100", "--threads", "1"),
    *("--latency-seconds", "0.01"),
]
TINY = [
    *("--model-args", "img_size=8", "patch_size=4", "in_chans=1", "embed_dim=24", "depth=2"),
    *("num_heads=3", *TRAINING, "--recipe", "standard"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run made by the command line."""
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["run", "--out", str(out), *TINY]) == 0
    return out


def test_run_prints_profile_stages_table_and_path(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--out", str(folder), *TINY]) == 0
    text = capsys.readouterr().out
    assert text.startswith("profile   cpu: ")
    assert text.count("done earlier") == 9
    assert re.search(r"^sweep     done earlier  1,019 images, \d+ of \d+ fits applied", text, re.M)
    steps = " -> ".join(rf"{name} [\d.]+%" for name in ("dense", "cut", "swept", "distilled"))
    assert re.search(rf"^top-1:  {steps}\n\Z", text, re.M)
    for row in ("parameters", "MACs", "top-1", "agreement", "latency, batch 1 (ms)"):
        assert row in text
    assert str(folder / "report.html") in text


def test_quiet_run_prints_the_table_only(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--out", str(folder), *TINY, "--quiet"]) == 0
    text = capsys.readouterr().out
    assert "profile" not in text and "top-1" in text


def same_weights(one: Path, other: Path) -> bool:
    """Whether two saved models have the same bits."""
    states = [vp.load(folder).state_dict() for folder in (one, other)]
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )


def test_verbs_make_the_chain(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, here = str(folder / "dense"), tmp_path
    scores, plan, pruned = here / "s.safetensors", here / "p.json", here / "pruned"

    def do(*words: object) -> str:
        assert main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    assert "blocks.1.attn.heads" in do("describe", "--model", dense)
    do("score", "--model", dense, "--data", "digits", "--score-samples", 100, "--out", scores)
    # the run scored the same images with the same seed
    assert scores.read_bytes() == (folder / "scores.safetensors").read_bytes()
    do("plan", "--model", dense, "--scores", scores, "--macs", 0.5, "--out", plan)
    assert json.loads(plan.read_text()) == json.loads((folder / "plan.json").read_text())
    text = do("prune", "--model", dense, "--plan", plan, "--out", here / "cut")
    assert "masked model equals pruned model" in text
    assert "plain cut: give --data to refit what stays\n" in text
    assert same_weights(here / "cut", folder / "pruned")
    text = do(
        *("prune", "--model", dense, "--plan", plan, "--data", "digits", "--batch-size", 32),
        *("--out", pruned),
    )
    assert "plain cut" not in text and "masked model equals pruned model" in text
    assert re.search(r"^sweep  .* s  1,019 images, .*median error .*% -> .*%", text, re.M)
    # the run refitted on the same images with the same seed
    assert same_weights(pruned, folder / "swept") and not same_weights(pruned, here / "cut")
    assert vp.cost(vp.load(pruned)) == vp.cost(vp.load(folder / "model"))
    training = ("--epochs", 1, "--warmup-epochs", 0, "--batch-size", 256)
    do(
        *("distill", "--model", pruned, "--teacher", dense, "--data", "digits", *training),
        *("--out", here / "taught"),
    )
    text = do("eval", "--model", here / "taught", "--data", "digits", "--teacher", dense)
    assert re.search(r"top-1 .*\(\d+ of 599\)", text) and "agreement" in text
    text = do("bench", "--model", pruned, "--batch-sizes", 1, 2, "--seconds", 0.01)
    assert "MACs" in text and "median ms" in text
    text = do("bench", "--model", pruned, "--against", dense, "--seconds", 0.01)
    assert f"model 1: {pruned}, " in text and f"model 2: {dense}, " in text
    assert re.findall(r"^(\d) +│ +(\d+) │", text, re.M) == [
        *(("1", "1"), ("1", "64"), ("2", "1"), ("2", "64"))
    ]
    assert str(folder / "report.html") in do("report", folder)
    assert "torch" in do("doctor")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_verbs_take_a_model_of_another_dtype(
    dtype: torch.dtype, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, plan, taught = tmp_path / "m", folder / "plan.json", tmp_path / "taught"
    vp.save(vp.load(folder / "dense").to(dtype), model)
    data, training = ("--data", "digits"), ("--epochs", 1, "--warmup-epochs", 0)
    for words in (
        ("score", "--model", model, *data, "--score-samples", 50, "--out", tmp_path / "s"),
        ("prune", "--model", model, "--plan", plan, *data, "--out", tmp_path / "pruned"),
        (
            *("distill", "--model", tmp_path / "pruned", "--teacher", model, *data, *training),
            *("--out", taught),
        ),
        ("eval", "--model", taught, *data, "--teacher", model),
        (
            *("run", "--preset", "images", "--model", model, *data, *TRAINING, "--quiet"),
            *("--out", tmp_path / "run"),
        ),
    ):
        assert main([str(word) for word in words]) == 0, capsys.readouterr().err
    for made in (taught, tmp_path / "run" / "model"):
        assert {tensor.dtype for tensor in vp.load(made).parameters()} == {dtype}


@pytest.mark.parametrize("verb", ["prune", "distill"])
def test_out_is_checked_before_the_work(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken, foreign = tmp_path / "file", tmp_path / "foreign"
    taken.write_text("mine")
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    more = {"prune": ["--plan", "none"], "distill": ["--teacher", "none", "--data", "digits"]}[verb]
    for out, sentence in ((taken, "is no folder"), (foreign, "is of something else")):
        # the model is missing too: the first complaint tells what was looked at first
        assert main([verb, "--model", "none", *more, "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert sentence in error and str(out) in error and error.count("\n") == 1


def test_eval_of_the_result_repeats_the_summary(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", "digits", "--teacher", str(folder / "dense")]
    assert main(["eval", "--model", str(folder / "model"), *words]) == 0
    after = json.loads((folder / "summary.json").read_text())["after"]
    text = capsys.readouterr().out
    assert f"({after['top1_count']} of 599)" in text
    assert f"agreement {after['agreement']:.2%}" in text


@pytest.mark.parametrize(
    ("number", "when"),
    [
        pytest.param(signal.SIGTERM, "distill", id="SIGTERM-in-training"),
        pytest.param(signal.SIGINT, "dense", id="SIGINT-in-training"),
    ],
)
@pytest.mark.slow
def test_a_signal_ends_the_run_with_one_line_and_it_resumes(
    number: signal.Signals, when: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "vitprune_fast.cli.main", "run", "--out", str(out), *TINY]
    # long enough to be met inside training, short enough to wait for
    command += [f"--{when}.epochs", "400"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    steps = out / "checkpoints" / when
    while process.poll() is None and not list(steps.glob("*.json")):
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 128 + number, err
    assert err == f"stopped by {number.name}; the same command resumes the run\n"
    events: list[dict] = []
    with pytest.raises(RunStopped):
        run(
            from_yaml(out / "config.yaml", preset("digits")),
            on_event=events.append,
            stop=lambda: any(event["event"] == "resume" for event in events),
        )
    resumed = [e["step"] for e in events if e["event"] == "resume" and e["stage"] == when]
    assert resumed and resumed[0] > 0
