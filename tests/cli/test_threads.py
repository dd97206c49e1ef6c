"""Every verb computes with the threads it is told, or else with OMP_NUM_THREADS."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

import vitprune_fast as vp
from tests.run.conftest import TINY
from vitprune_fast.cli.main import VERBS, main
from vitprune_fast.config.yamlfile import to_yaml
from vitprune_fast.files import read_json
from vitprune_fast.planning.waiting import Waits
from vitprune_fast.recipes.start import run

COMMANDS = {
    "run": "run --config tiny.yaml --out fresh",
    "describe": "describe --model dense",
    "score": "score --model dense --data digits --score-samples 8",
    "plan": "plan --model dense --scores s.safetensors --macs 0.8",
    "prune": "prune --model dense --plan p.json --data digits --calibration-images 50",
    "distill": "distill --model dense --teacher self --data digits --epochs 1 --warmup-epochs 0",
    "eval": "eval --model dense --data digits --split validation",
    "export": "export --model dense --to pt2 --out dense.pt2",
    "bench": "bench --model dense --batch-sizes 1 --seconds 0.01",
    "report": "report run",
    "search": "search --model dense --data digits --score-samples 8 --mode equal-macs --macs 0.8 "
    "--evaluations 2 --out searched",
    "doctor": "doctor",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("threads")
    model = timm.create_model(TINY.model.name, num_classes=10, **TINY.model.args)
    vp.save(model, top / "dense")
    scores = vp.score(model, None, criterion="magnitude")
    scores.save(top / "s.safetensors")
    vp.plan(model, scores, budget=vp.Budget(macs=0.8)).save(top / "p.json")
    (top / "tiny.yaml").write_text(to_yaml(TINY).replace("threads: 1\n", "threads: null\n"))
    run(replace(TINY, out=top / "run"))
    return top


def test_every_verb_is_tried() -> None:
    assert COMMANDS.keys() == VERBS.keys()


@pytest.mark.parametrize("verb", COMMANDS)
def test_threads_are_those_that_were_asked_for(
    verb: str, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    told: list[int] = []
    # how many threads really compute is torch's affair, and would slow the tests down
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    words = COMMANDS[verb].split()
    assert main(words) == 0
    assert told[0] == 3
    told.clear()
    again = [word.replace("fresh", "more") for word in words]
    assert main([*again, "--threads", "5"]) == 0
    assert told[0] == 5
    capsys.readouterr()
    assert main([*again, "--threads", "0"]) == 2
    assert "threads must be 1 to 1024, got 0" in capsys.readouterr().err


def test_latencies_measured_beside_other_work_say_so(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    monkeypatch.setattr(Waits, "share_since", lambda *_: 0.48)
    sentence = "the process waited for a core 48%"
    assert main(COMMANDS["bench"].split()) == 0
    assert sentence in capsys.readouterr().out
    run(replace(TINY, out=Path("loaded")))
    assert read_json("loaded/summary.json")["before"]["latency_waited"] == 0.48
    assert sentence in Path("loaded/report.html").read_text()
    monkeypatch.setattr(Waits, "share_since", lambda *_: 0.01)
    run(replace(TINY, out=Path("quiet")))
    assert "waited for a core" not in Path("quiet/report.html").read_text()


def test_a_run_goes_on_with_the_threads_it_began_with(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    words = ["run", "--config", "tiny.yaml", "--out", "begun"]
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert main(words) == 0
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    capsys.readouterr()
    assert main(words) == 0
    assert ", 3 threads, " in capsys.readouterr().out
    assert main([*words, "--threads", "5"]) == 2
    assert "belongs to another run (threads: 3 -> 5)" in capsys.readouterr().err
