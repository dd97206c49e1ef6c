from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from vitprune_fast.cli.main import VERBS, main
from vitprune_fast.cli.usage import as_typed
from vitprune_fast.config.yamlfile import to_plain
from vitprune_fast.recipes.presets import preset


def test_overview_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0 == main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {verb} " in text for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_explains_every_option(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: vitprune-fast {verb}" in text
    assert "--print-config" in text
    # an option whose help is its default only has lost its docstring
    bare = [line for line in text.splitlines() if line.strip().startswith("--(default")]
    assert not bare


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    return " ".join(capsys.readouterr().out.split())


def test_help_begins_with_what_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    required = {"plan": "--scores, --model", "distill": "--model, --data", "report": "DIR"}
    for verb, flags in required.items():
        text = shown(capsys, verb)
        assert f"Required: {flags}. " in text
        assert text.index("Required: ") < text.index("options ")
    assert "Required: " not in shown(capsys, "run")


def test_help_has_the_defaults_of_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--batch-size N Images per step. (default: 32)" in shown(capsys, "run").replace("│ ", "")
    other = shown(capsys, "run", "--preset", "cifar").replace("│ ", "")
    assert "--batch-size N Images per step. (default: 128)" in other


@pytest.mark.parametrize("verb", ["score", "eval", "prune", "search"])
def test_what_trains_nothing_has_no_options_of_training(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, verb)
    assert "--max-bad" in text
    for flag in ("--augment", "--policy", "--crop-scale", "--color-jitter", "--repeats"):
        assert flag not in text and flag in shown(capsys, "distill")


def test_parsing_needs_nothing_heavy() -> None:
    """What `import vitprune_fast` costs is paid once; the options add next to nothing to it."""
    code = (
        "import sys\n"
        "import vitprune_fast\n"
        "from vitprune_fast.cli.main import main\n"
        "try: main(['run', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = ('matplotlib', 'jinja2', 'sklearn', 'vitprune_fast.run.chain')\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("chosen", "spins", "block_ms"),
    [
        pytest.param({}, "'3000'", "1", id="nothing"),
        pytest.param({"GOMP_SPINCOUNT": "77"}, "'77'", "1", id="spins"),
        pytest.param({"KMP_BLOCKTIME": "50"}, "'3000'", "50", id="blocktime"),
        # the library's own numbers for those who want to spin, and for those who do not
        pytest.param({"OMP_WAIT_POLICY": "ACTIVE"}, "'30000000000'", "None", id="active"),
        pytest.param({"OMP_WAIT_POLICY": "PASSIVE"}, "'0'", "None", id="passive"),
    ],
)
def test_threads_that_wait_sleep_soon_unless_the_user_chose(
    chosen: dict, spins: str, block_ms: str
) -> None:
    """GNU's OpenMP, when torch loads it, tells what it read."""
    ours = ("OMP_", "GOMP_", "KMP_")
    others = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environ = {**others, **chosen, "OMP_DISPLAY_ENV": "VERBOSE"}
    code = (
        "import os\n"
        "from vitprune_fast.cli.main import main\n"
        "main(['--version'])\n"
        "import torch\n"
        "print('blocktime', os.environ.get('KMP_BLOCKTIME'))\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert f"GOMP_SPINCOUNT = {spins}" in done.stderr
    assert f"blocktime {block_ms}\n" in done.stdout


def test_a_program_that_has_loaded_torch_keeps_its_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "torch" in sys.modules
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert main(["--version"]) == 0
    assert "GOMP_SPINCOUNT" not in os.environ


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("prunes", "vitprune-fast: no verb 'prunes'; did you mean prune or run?"),
        ("compare a b", "vitprune-fast: no verb 'compare'; did you mean report?"),
        ("report", "report: DIR must be given, a run folder or several, got none"),
        (
            "run --distil.epochs 3",
            "run: options must be known, got --distil.epochs; did you mean --distill.epochs or "
            "--distill.eps or --distill.warmup-epochs?",
        ),
        # what a part has is named with the part
        (
            "run --epochs=3",
            "run: options must be known, got --epochs; did you mean --dense.epochs or "
            "--distill.epochs or --gate-epochs?",
        ),
        (
            "run --budget 0.5",
            "run: options must be known, got --budget; did you mean --macs or --params or --keep?",
        ),
        ("doctor --zzz", "doctor: options must be known, got --zzz"),
        ("run 3", "run: words must be options and their values, got 3 without an option"),
        ("plan", "plan: --scores FILE and --model NAME|DIR must be given, got none"),
        (
            "plan --scors x --model y",
            "plan: options must be known, got --scors; did you mean --scores or --macs?",
        ),
        ("describe --model", "describe: --model must have a value, got none"),
        ("run --seed x", "run: --seed must be a whole number, got 'x'"),
        ("run --seed=1.5", "run: --seed must be a whole number, got '1.5'"),
        ("run --distill.lr x", "run: --distill.lr must be a number, got 'x'"),
        ("run --macs half", "run: --macs must be SHARE|NUMBER, got 'half'"),
        ("run --model-args depth", "run: --model-args must look like KEY=VALUE, got 'depth'"),
        (
            "run --crop resizd",
            "run: --crop must be one of resized, simple, got 'resizd'; did you mean resized?",
        ),
    ],
)
def test_a_usage_error_is_a_sentence_and_where_to_look(
    words: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    verb = words.split()[0]
    assert main(words.split()) == 2
    asked = f"{verb} " if verb in VERBS else ""
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {sentence}\nsee vitprune-fast {asked}--help\n")


@pytest.mark.parametrize(
    ("sentence", "typed"),
    [
        ("run: out must not be an input", "run: out must not be an input"),
        ("open_data: the folder must exist", "--data: the folder must exist"),
        ("model: no such name", "--model: no such name"),
        ("model: checkpoint must be a file", "--checkpoint: checkpoint must be a file"),
        ("model: merge-lora must fit", "--merge-lora: merge-lora must fit"),
        ("Teacher: checkpoint must fit", "--teacher-checkpoint: checkpoint must fit"),
        ("Teacher: small must fit", "--teacher: small must fit"),
        ("describe: model must be a ViT", "run: model must be a ViT"),
        ("Plan.load: file must be a plan", "run: file must be a plan"),
        ("file a.json: it must be JSON", "file a.json: it must be JSON"),
        ("vitprune-fast: it", "vitprune-fast: it"),
        ("a sentence", "a sentence"),
    ],
)
def test_errors_begin_with_what_was_typed(sentence: str, typed: str) -> None:
    assert as_typed(sentence, "run") == typed


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What `run` prints as its options."""
    with pytest.raises(SystemExit) as end:
        main(["run", *words, "--print-config"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_print_config_is_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--macs", "0.3", "--distill.epochs", "7")
    plain = yaml.safe_load(text)
    assert (plain["plan"]["macs"], plain["distill"]["epochs"]) == (0.3, 7)
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    again = yaml.safe_load(printed(capsys, "--config", str(path), "--seed", "5"))
    assert again == {**plain, "seed": 5}


def test_data_chooses_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    photographs = yaml.safe_load(printed(capsys, "--data", "folder:somewhere"))
    digits = yaml.safe_load(printed(capsys))
    assert digits == to_plain(preset("digits"))
    assert photographs["data"]["source"] == "folder:somewhere"
    assert photographs["model"]["name"] == "vit_tiny_patch16_224"
    assert photographs["train_dense"] is False


def test_a_budget_comes_instead_of_all_of_the_presets(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ("--recipe", "unified", "--preset", "smoke")
    unset = {"macs": None, "params": None, "keep": {}}
    whole = {"head": 0.5, "neuron": 0.5, "embed": 0.5, "block": 0.5}

    def budget(*more: str) -> dict[str, Any]:
        plan = yaml.safe_load(printed(capsys, *words, *more))["plan"]
        return {name: plan[name] for name in unset}

    assert budget() == {**unset, "keep": whole}
    assert budget("--macs", "0.4") == {**unset, "macs": 0.4}
    assert budget("--keep", "head=0.25") == {**unset, "keep": {"head": 0.25}}
    path = tmp_path / "run.yaml"
    path.write_text("plan: {params: 0.3}", encoding="utf-8")
    assert budget("--config", str(path)) == {**unset, "params": 0.3}
    # a flag comes instead of the file's as well
    assert budget("--config", str(path), "--macs", "0.4") == {**unset, "macs": 0.4}
    both = ("--macs", "0.4", "--params", "0.3")
    assert budget(*both) == {**unset, "macs": 0.4, "params": 0.3}
    # what unsets one asks for no other
    assert budget("--macs", "None") == {**unset, "keep": whole}
    path.write_text("plan: {macs: null}", encoding="utf-8")
    assert budget("--config", str(path)) == {**unset, "keep": whole}
    path.write_text("plan: {allocation: uniform}", encoding="utf-8")
    assert budget("--config", str(path)) == {**unset, "keep": whole}


def test_losses_come_instead_of_the_presets_and_their_weights(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def weighed(*more: str) -> tuple[list[str], list[float]]:
        words = ("--recipe", "width-depth", *more)
        distill = yaml.safe_load(printed(capsys, *words))["distill"]
        return distill["loss"], distill["loss_weights"]

    assert weighed() == (["soft", "hidden"], [1.0, 0.1])
    assert weighed("--distill.loss", "soft") == (["soft"], [])
    path = tmp_path / "run.yaml"
    path.write_text("distill: {loss: [manifold]}", encoding="utf-8")
    assert weighed("--config", str(path)) == (["manifold"], [])
    words = ("--distill.loss", "soft", "manifold", "--distill.loss-weights", "1", "2")
    assert weighed(*words) == (["soft", "manifold"], [1.0, 2.0])


def test_flags_given_in_words_reach_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model-args", "img_size=32", "patch_size=[4,4]")
    assert yaml.safe_load(printed(capsys, *words))["model"]["args"] == {
        "img_size": 32,
        "patch_size": [4, 4],
    }


def test_a_model_asked_for_by_name_takes_no_arguments_of_the_preset() -> None:
    from argparse import Namespace

    from vitprune_fast.cli.run import _default

    unset = {"preset": None, "recipe": None, "data": None, "model": None, "in_file": {}}
    assert _default(Namespace(**unset)).model.args["embed_dim"] == 64
    assert _default(Namespace(**{**unset, "model": "folder"})).model.args == {}
    assert _default(Namespace(**{**unset, "data": "tar:photos.tar"})).data.source != "digits"
