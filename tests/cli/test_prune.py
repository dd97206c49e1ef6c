"""`vitprune-fast prune`: with images what stays is refitted, without them it is a plain cut."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import vitprune_fast as vp
from tests.refused import is_one_sentence
from tests.small import NAME, SMALL, photographs
from vitprune_fast.cli.main import main
from vitprune_fast.run import actions

STATISTICS = ["--mean", ".1", ".2", ".3", "--std", "1", "1", "2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model, a plan and photographs."""
    top = tmp_path_factory.mktemp("made")
    photographs(top / "photos", count=20)
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=2, **SMALL)
    vp.save(model, top / "dense")
    scores = vp.score(model, None, criterion="magnitude")
    scores.save(top / "scores.safetensors")
    vp.plan(model, scores, budget=vp.Budget(macs=0.6)).save(top / "plan.json")
    return top


@pytest.fixture
def prune(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Runs the verb into ``out``; exit code and what it printed."""
    monkeypatch.chdir(made)

    def do(*words: object) -> tuple[int, str, str]:
        here = ["prune", "--model", "dense", "--plan", "plan.json", "--out", tmp_path / "out"]
        code = main([str(word) for word in (*here, *words)])
        out, err = capsys.readouterr()
        return code, out, err

    return do


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return vp.load(folder).state_dict()


def test_without_images_it_is_a_plain_cut_and_says_so(prune: Any, tmp_path: Path) -> None:
    code, out, _ = prune()
    assert code == 0 and out.startswith("plain cut: give --data to refit what stays\n")
    wanted = vp.prune(vp.load("dense"), vp.Plan.load("plan.json")).state_dict()
    found = weights(tmp_path / "out")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_scores_and_a_budget_stand_in_for_a_plan(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(made)
    words = ["prune", "--model", "dense", "--out", str(tmp_path / "out")]
    budget = ["--macs", "0.7", "--cut-units", "neuron", "v_dim", "--bounds", "neuron=..0.5"]
    assert main([*words, "--scores", "scores.safetensors", *budget]) == 0
    dense, found = vp.load("dense"), vp.load(tmp_path / "out")
    options: Any = {"units": ["neuron", "v_dim"], "bounds": {"neuron": (None, 0.5)}}
    plan = vp.plan(dense, vp.Scores.load("scores.safetensors"), 0.7, **options)
    wanted = vp.prune(dense, plan).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in found.state_dict().items())
    capsys.readouterr()
    for more, said in (
        ([], "plan or scores must be given, got none"),
        (["--scores", "scores.safetensors", "--plan", "plan.json"], "got plan and scores"),
        (["--plan", "plan.json", "--macs", "0.5"], "scores must be given with macs, got a plan"),
    ):
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err


def test_with_images_what_stays_is_refitted(prune: Any, tmp_path: Path) -> None:
    code, out, _ = prune("--data", "folder:photos", *STATISTICS)
    assert code == 0 and "plain cut" not in out
    # 28 of the 40 are the training part
    assert re.search(r"^sweep  .* s  28 images, \d+ of \d+ fits applied", out, re.M)
    assert "the cut was checked: predicted cost equals counted cost" in out
    assert "masked model equals pruned model" in out
    plain = vp.prune(vp.load("dense"), vp.Plan.load("plan.json"))
    assert vp.cost(vp.load(tmp_path / "out")) == vp.cost(plain)
    # printed as `score` prints them, and remembered
    assert "mean 0.1 0.2 0.3, std 1 1 2 (given)" in out and "28)" in out
    stated: Any = vp.load(tmp_path / "out").pretrained_cfg
    assert tuple(stated["mean"]) == (0.1, 0.2, 0.3) and tuple(stated["std"]) == (1.0, 1.0, 2.0)


def test_the_cut_alone_can_be_asked_for(prune: Any, tmp_path: Path) -> None:
    code, out, _ = prune("--data", "folder:photos", "--no-compensate")
    assert code == 0 and "plain cut: --no-compensate leaves what stays as it is\n" in out
    plain = vp.prune(vp.load("dense"), vp.Plan.load("plan.json")).state_dict()
    found = weights(tmp_path / "out")
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_few_images_are_said_to_be_few(prune: Any) -> None:
    _, out, _ = prune("--data", "folder:photos", "--calibration-images", 10)
    assert "sweep     refits on 10 of 28 training images, fewer than the 512" in out
    _, out, _ = prune("--data", "folder:photos")
    assert "fewer than" not in out.replace("tokens are fewer than", "")


def test_what_was_left_out_and_warned_is_printed(
    prune: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitprune_fast.surgery import Fit, SweepReport

    original = actions.sweep
    fits = (Fit("head", "classifier", 0.5, 0.5, 0.5, 0.1, "no gain"),)

    def sweep(*args: Any, **options: Any) -> Any:
        return original(*args, **options)[0], SweepReport(28, 3, 140, fits, ("few tokens",))

    monkeypatch.setattr(actions, "sweep", sweep)
    _, out, _ = prune("--data", "folder:photos")
    assert "28 images, 0 of 1 fits applied\n" in out
    assert "note      few tokens\nnote      left out: classifier of head: no gain\n" in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("--mean", ".5", "--calibration-images", "600", "--batch-size", "8"),
            "prune: data must be given with batch-size, mean, calibration-images, got none",
        ),
        (("--calibration-images", "1"), "prune: calibration-images must be at least 2, got 1"),
        (("--data", "folder:nowhere"), "the data folder must exist, got nowhere"),
        (("--data", "photos"), "spec must be `digits`, `folder:PATH`"),
        (("--data", "digits"), "must have 10 classes like digits, got 2"),
    ],
    ids=["no-data", "one-image", "no-folder", "no-kind", "other-classes"],
)
def test_bad_input_is_one_sentence(
    words: tuple[str, ...], sentence: str, prune: Any, tmp_path: Path
) -> None:
    code, out, err = prune(*words)
    assert code == 2 and is_one_sentence(err)
    assert sentence in err and "sweep  " not in out
    assert not (tmp_path / "out").exists()


def test_images_that_test_the_run_of_the_plan_are_refused(
    prune: Any, made: Path, tmp_path: Path
) -> None:
    from vitprune_fast import files
    from vitprune_fast.run.folder import SCHEMA

    photographs(made / "parts", "train", "test", count=20)
    (made / "run").mkdir()
    (made / "run" / "plan.json").write_bytes((made / "plan.json").read_bytes())
    identity = {"data": {"name": "folder:parts"}}
    files.write_json(made / "run" / "run.json", {"schema": SCHEMA, "identity": identity})
    words = ("--plan", "run/plan.json", "--data")
    code, _, err = prune(*words, "folder:parts/test")
    assert code == 2 and "prune: data must not hold test images of the run in" in err
    assert not (tmp_path / "out").exists()
    assert prune(*words, "folder:parts")[0] == 0


def test_a_stopped_refit_goes_on_with_the_same_bits(
    prune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, places = actions.sweep, []

    def sweep(*args: Any, on_event: Any, **options: Any) -> Any:
        def told(event: dict[str, Any]) -> None:
            on_event(event)
            places.append(event["place"])
            if len(places) == 2:
                os.kill(os.getpid(), signal.SIGINT)

        return original(*args, on_event=told, **options)

    monkeypatch.setattr(actions, "sweep", sweep)
    words = ("--data", "folder:photos")
    code, _, err = prune(*words)
    assert code == 128 + signal.SIGINT
    assert err == "stopped by SIGINT; the same command resumes the run\n"
    partial = tmp_path / "out.partial.safetensors"
    assert partial.is_file() and not (tmp_path / "out").exists()
    assert prune(*words)[0] == 0 and not partial.exists()
    # none was fitted twice
    assert len(places) > 2 and len(set(places)) == len(places)
    assert prune(*words, "--out", tmp_path / "whole")[0] == 0
    assert all(
        map(torch.equal, weights(tmp_path / "out").values(), weights(tmp_path / "whole").values())
    )


def test_a_damaged_partial_refit_is_refused(prune: Any, tmp_path: Path) -> None:
    (tmp_path / "out.partial.safetensors").write_bytes(b"something else")
    code, _, err = prune("--data", "folder:photos")
    assert code == 2 and "out.partial.safetensors" in err and err.count("\n") == 1
    assert prune()[0] == 0


def test_a_second_signal_ends_it_and_leaves_nothing(
    prune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = actions.sweep

    def sweep(*args: Any, on_event: Any, **options: Any) -> Any:
        def told(event: dict[str, Any]) -> None:
            on_event(event)
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

        return original(*args, on_event=told, **options)

    monkeypatch.setattr(actions, "sweep", sweep)
    code, _, err = prune("--data", "folder:photos")
    assert code == 128 + signal.SIGINT and err == "stopped by SIGINT\n"
    assert not (tmp_path / "out").exists()
