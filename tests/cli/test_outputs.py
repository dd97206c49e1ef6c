"""No output of a verb destroys an input: refused before any work, and the input is as it was."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest
import timm

import vitprune_fast as vp
from tests.refused import is_one_sentence
from tests.small import NAME, SMALL, photographs
from vitprune_fast.cli.main import VERBS, main
from vitprune_fast.config.model import ModelConfig
from vitprune_fast.config.run import RunConfig
from vitprune_fast.data import open_data
from vitprune_fast.errors import InvalidInput
from vitprune_fast.recipes.start import run
from vitprune_fast.run.outputs import refuse_overwriting


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model for two classes of photographs, its scores, a plan and the photographs."""
    top = tmp_path_factory.mktemp("made")
    photographs(top / "photos")
    model = timm.create_model(NAME, num_classes=2, **SMALL)
    vp.save(model, top / "dense")
    scores = vp.score(model, None, criterion="magnitude")
    scores.save(top / "scores.safetensors")
    vp.plan(model, scores, budget=vp.Budget(macs=0.8)).save(top / "plan.json")
    (top / "options.yaml").write_text("{}")
    (top / "linked").symlink_to("dense")
    return top


def contents(top: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in top.rglob("*") if path.is_file()}


COMMANDS = {
    "score": "score --model dense --data folder:photos --score-samples 4 --config options.yaml",
    "plan": "plan --model dense --scores scores.safetensors --macs 0.8 --config options.yaml",
    "prune": "prune --model dense --plan plan.json --data folder:photos --config options.yaml",
    "distill": "distill --model dense --teacher dense --data folder:photos --config options.yaml",
    "run": "run --preset images --model dense --data folder:photos",
}
# what a verb reads -> outputs that are it or lie in it
PLACES = {
    "dense": ("dense", "dense/model.safetensors", "dense/new", "linked"),
    "photos": ("photos", "photos/ant/model", "photos/new"),
    "scores.safetensors": ("scores.safetensors",),
    "plan.json": ("plan.json", "plan.json/new"),
    "options.yaml": ("options.yaml",),
}


@pytest.fixture(autouse=True)
def _here(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)


def refusal(words: str, made: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence that a command is refused with, having changed nothing."""
    before = contents(made)
    assert main(words.split()) == 2
    assert contents(made) == before
    error = capsys.readouterr().err
    assert is_one_sentence(error)
    return error


@pytest.mark.parametrize(
    ("verb", "out"),
    [
        pytest.param(verb, out, id=f"{verb}-{out}")
        for verb, command in COMMANDS.items()
        for read, places in PLACES.items()
        for out in places
        if read in command
    ],
)
def test_an_output_may_not_be_an_input_or_lie_in_one(
    verb: str, out: str, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refusal(f"{COMMANDS[verb]} --out {out}", made, capsys)
    assert f"{verb}: out must not " in error and f"got {out} where " in error


@pytest.mark.parametrize("verb", [verb for verb in COMMANDS if verb != "run"])
def test_an_output_may_not_contain_an_input(
    verb: str, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "out must not contain an input" in refusal(f"{COMMANDS[verb]} --out .", made, capsys)


def test_every_output_of_distill_is_looked_at(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"{COMMANDS['distill']} --out new --checkpoints"
    assert "checkpoints must not be an input" in refusal(f"{words} dense", made, capsys)
    assert "out and checkpoints must differ" in refusal(f"{words} new", made, capsys)


def test_the_sums_of_a_stopped_scoring_are_an_output_too(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = made / "s.partial.safetensors"
    weights.write_bytes((made / "dense" / "model.safetensors").read_bytes())
    words = COMMANDS["score"].replace("dense", "vit_tiny_patch16_224")
    error = refusal(f"{words} --checkpoint {weights.name} --out s.safetensors", made, capsys)
    assert "the partial sums of out must not be an input" in error


def test_a_comparison_may_not_replace_a_file_of_a_run(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refusal("report dense photos --out dense/config.json", made, capsys)
    assert "report: out must not lie inside an input" in error


def test_every_path_of_a_verb_is_an_input_unless_it_is_an_output() -> None:
    """A new option is protected although nobody lists it."""
    for verb in VERBS:
        kind = getattr(importlib.import_module(f"vitprune_fast.cli.{verb}"), verb.title(), None)
        for field in dataclasses.fields(kind) if kind else ():
            if "Path" in str(field.type) and field.name not in (
                *("out", "checkpoints", "folders"),
            ):
                options: Any = dataclasses.make_dataclass("Options", [(field.name, Path)])
                with pytest.raises(InvalidInput, match=f"{field.name} is here"):
                    refuse_overwriting(verb, options(Path("here")), {"out": Path("here")})


def test_a_run_goes_on_in_its_own_folder_with_its_own_configuration(made: Path) -> None:
    words = f"{COMMANDS['run']} --out run --threads 1 --latency-seconds 0.01 --distill.epochs 1"
    words += " --distill.warmup-epochs 0 --quiet"
    assert main(words.split()) == 0
    assert main(["run", "--config", "run/config.yaml", "--preset", "images", "--quiet"]) == 0


def test_a_new_run_does_not_replace_the_configuration_it_is_given(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine").mkdir()
    Path("mine/config.yaml").write_text("# my notes\n")
    error = refusal(f"{COMMANDS['run']} --config mine/config.yaml --out mine", made, capsys)
    assert "run: out must not contain an input" in error


def test_a_run_on_opened_images_does_not_write_among_them() -> None:
    data = open_data("folder:photos", image_size=16, channels=3)
    config = RunConfig(out=Path("photos/run"), model=ModelConfig(name="dense"))
    with pytest.raises(InvalidInput, match="out must not lie inside an input"):
        run(config, data=data)


def test_the_report_of_one_run_goes_into_its_folder(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refusal("report dense --out page.html", made, capsys)
    assert "report: out must be unset for one run" in error
