"""A run of several processes: one folder, which the first of them owns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

from tests.processes import outcomes, together
from tests.run.conftest import TINY, undrawn
from tests.run.same import assert_same_run, files_of, is_bitwise
from tests.small import NAME, SMALL, photographs
from vitprune_fast import files
from vitprune_fast.config.model import ModelConfig
from vitprune_fast.config.run import DataConfig
from vitprune_fast.errors import InvalidInput, RunFolderError, StageFailed
from vitprune_fast.recipes.by_name import named
from vitprune_fast.recipes.start import RunStopped, run
from vitprune_fast.run.report import figures


def share(rank: int, out: Path, seed: int, end: str) -> tuple[str, int]:
    """How the run ended in this process, and how many events it had."""
    figures.drawn = undrawn
    events: list[dict[str, Any]] = []

    def stop() -> bool:
        return any(e["event"] == "step" and e["stage"] == end for e in events)

    try:
        summary = run(replace(TINY, out=out, seed=seed), on_event=events.append, stop=stop)
    except RunStopped:
        return "stopped", len(events)
    return str(summary["after"]["top1_count"]), len(events)


def start(out: Path, *, seed: int = 0, end: str = "never") -> list[tuple[bool, Any]]:
    """What came of it in each of two processes, which meet where this one listens.

    As those of torchrun do: the port is free whatever else runs on the machine.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    address |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    return outcomes(2, share, out, seed, end, environment=address)


def one_shot(rank: int, out: Path, dense: str, shared: bool = True) -> dict[str, Any]:
    """What a run that trains nothing says of the model that it leaves.

    Without ``shared`` the first process does all steps, as of a list that does not say so.
    """
    figures.drawn = undrawn
    model = ModelConfig(dense)
    config, recipe = (
        replace(TINY, out=out, model=model, train_dense=False, allow_chance=True),
        named("one-shot"),
    )
    if not shared:
        steps = [replace(step, shared=False) for step in recipe.steps(config)]
        recipe = replace(recipe, steps=lambda config: steps)
    after = run(config, recipe=recipe)["after"]
    return {name: after[name] for name in after if "latency" not in name and "per_s" not in name}


@pytest.mark.slow
def test_a_run_without_training_leaves_the_same_for_any_number(
    finished: Path, tmp_path: Path
) -> None:
    found = []
    folders = []
    for world, shared in ((1, True), (2, True), (4, True), (2, False)):
        folders.append(tmp_path / f"run-{world}-{shared}")
        words = folders[-1], str(finished / "dense"), shared
        found += together(world, one_shot, *words, store=tmp_path / f"store-{world}-{shared}")
    assert found == [found[0]] * (1 + 2 + 4 + 2)
    for name in filter(is_bitwise, files_of(folders[0])):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1, name


def refused(rank: int, top: Path) -> str:
    """What a process is told that sees other images, or another folder for the run."""
    data = DataConfig(f"folder:{top / str(rank)}", batch_size=8)
    model = ModelConfig(NAME, {**SMALL, "num_classes": 2})
    with pytest.raises(InvalidInput) as images:
        run(replace(TINY, out=top / "run", data=data, model=model))
    return str(images.value)


def test_processes_that_see_other_images_are_refused(tmp_path: Path) -> None:
    for rank in range(2):
        photographs(tmp_path / str(rank), "train", "val", "test", count=4)
    odd = tmp_path / "1" / "val" / "ant"
    (odd / "3.png").rename(odd / "4.png")
    said = together(2, refused, tmp_path, store=tmp_path / "store")
    assert {*said} == {
        "data: every process must see the same images, got another validation split in process 1; "
        "give a folder that all of them read"
    }


def with_another_plan(rank: int, out: Path, dense: str) -> str:
    """What a process is told where the second reads another plan than the first wrote."""
    real = files.sha256
    if rank:
        files.sha256 = lambda path: "another" if str(path).endswith("plan.json") else real(path)
    with pytest.raises(StageFailed) as plan:
        one_shot(rank, out, dense)
    return str(plan.value)


@pytest.mark.slow
def test_processes_that_see_another_plan_are_refused(finished: Path, tmp_path: Path) -> None:
    words = tmp_path / "run", str(finished / "dense")
    said = together(2, with_another_plan, *words, store=tmp_path / "store")
    assert len({*said}) == 1
    rule = "run: step plan must leave the same plan.json for every process, got "
    assert said[0].startswith(rule) and "another in process 1; give a folder to --out" in said[0]


def test_two_processes_make_one_run_and_resume_it(tmp_path: Path) -> None:
    (_, first), (_, second) = start(tmp_path / "one")
    # the first speaks for both, and both know what came of it
    assert first[1] > 20 and second == (first[0], 0)
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert first[0] == str(summary["after"]["top1_count"])
    identity = json.loads((tmp_path / "one" / "run.json").read_text())["identity"]
    assert identity["processes"] == 2
    assert start(tmp_path / "two", end="score")[1] == (True, ("stopped", 0))
    assert start(tmp_path / "two")[1] == (True, second)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    # one process would train with other batches
    with pytest.raises(RunFolderError, match="processes: 2 -> absent"):
        run(replace(TINY, out=tmp_path / "two"))


@pytest.mark.slow
def test_what_the_first_process_refuses_all_refuse(tmp_path: Path) -> None:
    start(tmp_path / "run", end="dense")
    refused = start(tmp_path / "run", seed=1)
    assert all(not done and "RunFolderError" in said for done, said in refused), refused
