"""`--dtype` of every verb that computes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import vitprune_fast as vp
from tests.refused import is_one_sentence
from vitprune_fast.cli.main import main
from vitprune_fast.distill.training_checkpoints import read_newest
from vitprune_fast.evaluation import evaluate_beside
from vitprune_fast.run import actions
from vitprune_fast.run.folder import RunFolder

HALF = ["--dtype", "bfloat16"]
DIGITS = ["--data", "digits", "--threads", "1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model of fixed weights and a plan for it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("made")
    args: Any = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 24, "depth": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_heads=3, num_classes=10, **args).eval()
    vp.save(model, folder / "m")
    vp.plan(model, vp.score(model, criterion="magnitude"), vp.Budget(macs=0.6)).save(
        folder / "plan.json"
    )
    return folder


def test_score_prints_and_keeps_how_16_bits_rank(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.safetensors"
    words = ["score", "--model", str(made / "m"), *DIGITS, "--out", str(out)]
    words += ["--score-samples", "100"]
    found = {}
    for dtype in ("auto", "float32", "bfloat16", "float16"):
        assert main([*words, "--dtype", dtype]) == 0
        text, found[dtype] = capsys.readouterr().out, vp.Scores.load(out)
        kept = found[dtype].provenance.get("rank_agreement")
        said = re.search(r"^rank agreement of (\w+) with float32 ([\d.]+) \(.*64 im", text, re.M)
        if dtype in ("auto", "float32"):
            assert kept is None and said is None
            assert found[dtype].provenance["dtype"] == "float32"
        else:
            assert said and kept
            assert said.groups() == (dtype, f"{float(kept):.4f}")
    for name, value in found["auto"].items():
        assert torch.equal(found["float32"][name], value)
        assert not torch.equal(found["bfloat16"][name], value)


def test_scoring_takes_a_graph_where_it_is_asked_for_alone(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["score", "--model", str(made / "m"), *DIGITS, "--out", str(tmp_path / "s.safetensors")]
    words += ["--score-samples", "10", "--cuda-graph"]
    assert main([*words, "auto"]) == main([*words, "never"]) == 0
    assert main([*words, "always"]) == 2
    assert "score: cuda_graph must be False for a model that is not on a GPU" in (
        capsys.readouterr().err
    )


def test_eval_and_bench_compute_in_it(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def latencies(models: Any, **options: Any) -> list[Any]:
        seen.append(options["dtype"])
        return [vp.Latency(1, 1.0, 1.0, 1.0, 1) for _ in models]

    original = evaluate_beside

    def evaluate(*args: Any, **options: Any) -> Any:
        seen.append(options["dtype"])
        return original(*args, **options)

    monkeypatch.setattr(actions, "latencies", latencies)
    monkeypatch.setattr("vitprune_fast.evaluation.evaluate_beside", evaluate)
    model = ["--model", str(made / "m")]
    assert main(["bench", *model, *HALF, "--batch-sizes", "1"]) == 0
    assert re.search(r"^profile cpu: .*, bfloat16, ", capsys.readouterr().out)
    assert main(["eval", *model, *DIGITS, *HALF]) == 0
    assert main(["eval", *model, *DIGITS]) == 0
    assert seen == ["bfloat16", "bfloat16", "float32"]


def test_bench_scoring_takes_float16(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "scoring", "--model", str(made / "m"), "--batch-size", "2", "--rounds", "1"]
    assert main([*words, "--dtype", "float16"]) == 0
    assert "torch.float16, cpu" in capsys.readouterr().out


def test_prune_refits_in_it_and_the_model_stays_wide(made: Path, tmp_path: Path) -> None:
    words = ["prune", "--model", str(made / "m"), "--plan", str(made / "plan.json")]
    images = [*DIGITS, "--calibration-images", "64"]
    kept = []
    for number, more in enumerate((images, [*images, *HALF])):
        out = tmp_path / str(number)
        assert main([*words, *more, "--out", str(out)]) == 0
        kept.append(vp.load(out).state_dict())
    assert any(not torch.equal(tensor, kept[1][name]) for name, tensor in kept[0].items())
    assert {tensor.dtype for tensor in kept[1].values()} == {torch.float32}


def test_distill_computes_in_it_and_the_model_stays_wide(made: Path, tmp_path: Path) -> None:
    words = ["distill", "--model", str(made / "m"), *DIGITS, "--teacher", "self", "--epochs", "1"]
    kept = []
    for number, more in enumerate(([], HALF, [*HALF, "--teacher-dtype", "bfloat16"])):
        out = tmp_path / str(number)
        assert main([*words, *more, "--warmup-epochs", "0", "--out", str(out)]) == 0
        taught: Any = vp.load(out)
        kept.append(taught.head.weight)
    assert len({tuple(weight.flatten().tolist()) for weight in kept}) == 3
    assert {weight.dtype for weight in kept} == {torch.float32}


TINY = [
    *("--model-args", "img_size=8", "patch_size=4", "in_chans=1", "embed_dim=24", "depth=2"),
    *("num_heads=3", "--dense.epochs", "1", "--distill.epochs", "1", "--distill.warmup-epochs"),
    *("0", "--score-samples", "100", "--calibration-images", "64", "--threads", "1"),
    *("--latency-seconds", "0.01", "--recipe", "standard"),
]


def test_run_does_all_of_it_and_goes_on_in_it_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["run", "--out", str(out), *TINY]
    assert main([*words, *HALF]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^profile   cpu: .*, bfloat16, ", text, re.M)
    said = re.search(r"^score  .*, rank agreement of bfloat16 with float32 ([\d.]+) \(", text, re.M)
    assert said
    scores = vp.Scores.load(out / "scores.safetensors").provenance
    assert f"{float(scores['rank_agreement']):.4f}" == said[1]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["profile"]["dtype"] == "bfloat16"
    assert summary["rank_agreement"] == scores["rank_agreement"]
    assert json.loads((out / "sweep.json").read_text())["dtype"] == "bfloat16"
    assert RunFolder(out).record()["identity"]["dtype"] == "bfloat16"
    newest = read_newest(out / "checkpoints" / "distill", lambda error: None)
    assert newest and newest.state["config"]["dtype"] == "bfloat16"
    model: Any = vp.load(out / "model")
    assert model.head.weight.dtype == torch.float32
    data = vp.open_data("digits", image_size=(8, 8), channels=1).split("test")
    counted = vp.evaluate(model, vp.Loader(data, 32), dtype="bfloat16")
    assert counted.top1_count == summary["after"]["top1_count"]
    # on a CPU the default is another
    for other, shown in (([], "float32"), (["--dtype", "float16"], "float16")):
        assert main([*words, *other]) == 2
        assert f"(dtype: bfloat16 -> {shown})" in capsys.readouterr().err


def test_auto_on_a_cpu_is_a_run_in_fp32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "--out", str(tmp_path / "run"), *TINY]
    assert main(words) == 0
    assert "rank agreement" not in capsys.readouterr().out
    assert main([*words, "--dtype", "float32"]) == 0
    assert capsys.readouterr().out.count("done earlier") == 9


@pytest.mark.parametrize("verb", ["score", "prune", "eval", "bench", "distill", "run"])
def test_another_name_is_refused_by_every_verb(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "--dtype", "bf16"]) == 2
    error = capsys.readouterr().err
    assert "--dtype must be one of auto, bfloat16, float16, float32, got 'bf16'" in error


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("dtype: bf16", "config.dtype must be one of auto, float32, bfloat16, float16, got 'bf16'"),
    ],
)
def test_a_file_with_another_name_is_one_sentence(
    text: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert main(["run", "--config", str(tmp_path / "c.yaml")]) == 2
    error = capsys.readouterr().err
    assert sentence in error and is_one_sentence(error)
