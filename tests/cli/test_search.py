"""`vitprune-fast search`: a plan, all candidates and a picture, also when it was stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import vitprune_fast as vp
from tests.refused import is_one_sentence
from vitprune_fast.cli.main import main
from vitprune_fast.data import ImageData
from vitprune_fast.distill import DistillConfig
from vitprune_fast.run.report import figures
from vitprune_fast.search.evaluations import OnBatches

SMALL: dict[str, Any] = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10}
FILES = ("plan.json", "search.json", "search.png")
MODES = {
    "grid": ("--mode", "grid", "--values", "0", "0.5"),
    "iterative": ("--rounds", "1", "--step", "0.1"),
    "equal-macs": ("--mode", "equal-macs", "--macs", "0.7", "--objective", "loss"),
}
each_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model that has learnt the digits for a second."""
    torch.manual_seed(0)
    data = vp.open_data("digits", image_size=8, channels=1)
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=24, depth=2, num_heads=3, **SMALL)
    loader = vp.Loader(data.split("train"), 128, shuffle=True)
    config = DistillConfig(epochs=4, lr=5e-3, warmup_epochs=0)
    vp.distill(model, None, loader, vp.Loader(data.split("validation"), 256), config)
    folder = tmp_path_factory.mktemp("trained") / "model"
    vp.save(model, folder)
    return folder


@pytest.fixture
def search(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> Callable[..., tuple[int, str, str]]:
    """Runs the verb into ``out``; exit code and what it printed."""
    monkeypatch.chdir(tmp_path)

    def do(*words: str, out: str = "out") -> tuple[int, str, str]:
        here = ("search", "--model", str(trained), "--data", "digits", "--score-samples", "64")
        more = ("--tolerance", "0.2", "--threads", "1", "--out", out)
        code = main([*here, *more, *words])
        printed, err = capsys.readouterr()
        return code, printed, err

    return do


@each_mode
def test_it_writes_a_plan_all_candidates_and_a_picture(
    mode: str, search: Any, trained: Path, tmp_path: Path
) -> None:
    code, out, _ = search(*MODES[mode])
    assert code == 0 and sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES)
    found = json.loads(Path("out/search.json").read_text())
    plan, model = vp.Plan.load("out/plan.json"), vp.load(trained)
    chosen, baseline = found["chosen"], found["baseline"]
    assert vp.cost(vp.prune(model, plan)).macs == chosen["macs"] < baseline["macs"]
    assert baseline["macs"] == vp.cost(model).macs and baseline["images"] == 179
    assert found["search"]["mode"] == found["mode"] == mode
    # a line for each, and one for what was chosen
    assert len([line for line in out.splitlines() if " │ " in line]) == len(found["table"]) + 1
    ratios = ", ".join(f"{share:.1%} ({kind})" for kind, share in chosen["ratios"].items())
    assert f"out: without {ratios} {chosen['macs']:,} of {baseline['macs']:,} MACs" in out
    assert f"{baseline['top1']:.2%} -> {chosen['top1']:.2%} on 179 validation images" in out
    assert Path("out/search.png").read_bytes().startswith(b"\x89PNG")
    # what was measured is what the pruned model does on the same images
    data = vp.open_data("digits", image_size=8, channels=1)
    again = vp.evaluate(vp.prune(model, plan), vp.Loader(data.split("validation"), 64))
    assert again.top1 == chosen["top1"]


def test_test_images_are_not_read(search: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original, read = ImageData.split, set[str]()

    def split(self: ImageData, name: str) -> Any:
        read.add(name)
        return original(self, name)

    monkeypatch.setattr(ImageData, "split", split)
    assert search(*MODES["iterative"])[0] == 0
    assert read == {"train", "validation"}


@each_mode
def test_a_stopped_search_goes_on_to_the_same_files(
    mode: str, search: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "picture", lambda height, draw: b"")
    original, asked = OnBatches.__call__, list[vp.Plan]()

    def stopping(self: OnBatches, plan: vp.Plan) -> vp.Measured:
        asked.append(plan)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, plan)

    monkeypatch.setattr(OnBatches, "__call__", stopping)
    code, _, err = search(*MODES[mode])
    assert code == 128 + signal.SIGINT
    assert err == "stopped by SIGINT; the same command resumes the run\n"
    partial = tmp_path / "out.partial.safetensors"
    assert partial.is_file() and not (tmp_path / "out").exists()
    assert search(*MODES[mode])[0] == 0 and not partial.exists()
    # the one that was stopped is the only one that was asked for again, beside the unpruned model
    assert len(asked) == len({*asked}) + 2
    assert search(*MODES[mode], out="whole")[0] == 0
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_without_matplotlib_there_is_no_picture(
    search: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("vitprune_fast.run.report")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, _ = search(*MODES["grid"])
    assert code == 0
    assert "no picture: it needs matplotlib; install vitprune_fast[report]\n" in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES[:2])


def test_units_options_and_scoring_can_be_chosen(search: Any, trained: Path) -> None:
    words = ("--units", "neuron", "--allocation", "uniform", "--images", "100", "--no-rescore")
    assert search(*MODES["iterative"], *words, "--criterion", "magnitude")[0] == 0
    found = json.loads(Path("out/search.json").read_text())
    assert [*found["chosen"]["ratios"]] == ["neuron"]
    assert {row["images"] for row in found["table"]} == {100, 179}
    kept = vp.Plan.load("out/plan.json")
    assert len({len(kept[name]) for name in kept if name.endswith("neurons")}) == 1
    # what a plan takes, every candidate takes
    words = ("--protect", "blocks.0.*", "--round-to", "neuron=16", "--bounds", "head=2..")
    assert search(*MODES["grid"], *words)[0] == 0
    kept, whole = vp.Plan.load("out/plan.json"), vp.Plan.of(vp.describe(vp.load(trained)))
    assert all(kept[name] == whole[name] for name in whole if name.startswith("blocks.0"))
    found = json.loads(Path("out/search.json").read_text())
    assert {row["kept"]["neuron"] % 16 for row in found["table"]} == {0}
    assert min(row["kept"]["head"] for row in found["table"]) >= 2 + 3
    assert found["plan"]["round_to"] == {"neuron": 16}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--tolerance", "0"), "search: tolerance must be above 0, got 0.0"),
        (("--mode", "equal-macs"), "search: macs must be given for equal-macs, got None"),
        (("--mode", "equal-macs", "--macs", "0.001"), "search: macs must be at least "),
        (("--tolerance", "0.001"), " images for a tolerance of 0.001 at a top-1 of "),
        (("--evaluations", "1"), "search: evaluations must be at least 3 for iterative"),
        (("--units", "heads"), "search: units must be among head, qk_dim"),
        (("--protect", "block.0"), "search: protect must match "),
    ],
    ids=["tolerance", "no-cost", "small-cost", "few-images", "evaluations", "kind", "pattern"],
)
def test_bad_input_is_one_sentence(
    words: tuple[str, ...], sentence: str, search: Any, tmp_path: Path
) -> None:
    code, _, err = search(*words)
    assert code == 2 and is_one_sentence(err)
    assert sentence in err and not [*tmp_path.iterdir()]


def test_where_the_result_goes_is_looked_at_first(search: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, _, err = search("--model", "nowhere", out="file")
    assert code == 2 and "got file, which is no folder" in err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_the_same_command_ends_with_the_same_files(
    number: signal.Signals, trained: Path, tmp_path: Path
) -> None:
    def command(out: str) -> list[str]:
        words = ("search", "--mode", "iterative", "--model", str(trained), "--data", "digits")
        more = ("--tolerance", "0.05", "--threads", "1", "--batch-size", "4", "--out", out)
        return [sys.executable, "-m", "vitprune_fast.cli.main", *words, *more]

    options: Any = {
        "cwd": tmp_path,
        "env": {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    partial = tmp_path / "out.partial.safetensors"
    process = subprocess.Popen(command("out"), **options)
    while process.poll() is None and not partial.exists():
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 128 + number, err
    assert err == f"stopped by {number.name}; the same command resumes the run\n"
    assert partial.exists() and not (tmp_path / "out").exists()
    for out in ("out", "whole"):
        done = subprocess.run(command(out), **options)
        assert done.returncode == 0, done.stderr
    assert not partial.exists()
    for name in FILES[:2]:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
