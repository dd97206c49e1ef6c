"""The public names that users, docs and benches rely on, and those that are promised only."""

from __future__ import annotations

import importlib
import inspect
from functools import reduce
from typing import Any

import pytest

from vitprune_fast.cli.main import VERBS

# path below vitprune_fast -> the arguments that may be relied on, in the order of those that may
# be given by position
BUILT = {
    "describe": "model input_size",
    "score": "model batches criterion units reduction per_sample",
    "plan": "model scores budget allocation normalization min_units round_to units protect include",
    "search": "model scores validation mode units",
    "mask": "model plan",
    "prune": "model plan optimizer ema calibration",
    "check_structure": "model structure",
    "register_family": "model_class family",
    "gates.attach": "model units kind",
    "gates.to_plan": "model gates budget",
    "distill": "student teacher train val config",
    "cost": "model input_size",
    "predict_cost": "structure plan",
    "latency": "model batch_size input_size",
    "peak_memory_bytes": "model batch_size input_size device",
    "evaluate": "model batches",
    "planning.latency.latencies": "models batch_size seconds",
    "save": "model folder results",
    "export": "model format path",
    "load": "folder",
    "modeling_pruned.load": "folder",
    "open_data": "spec image_size channels",
    "Loader": "images batch_size workers",
    "DistillConfig": "epochs warmup_epochs loss alpha",
    "run": "config recipe",
    "doctor": "",
    "Budget": "macs params keep",
    "Plan.of": "structure kept",
    "Plan.save": "self path",
    "Plan.load": "path",
    "Structure.units": "self kind",
    "integrations.torch_pruning.TaylorImportance": "",
    "integrations.torch_pruning.FisherImportance": "",
    "integrations.torch_pruning.repair": "model pruner",
    "VitpruneError": "",
}
# what documents speak of and nobody can use yet: whoever builds one moves it up
PROMISED = {
    "describe": "example",
    "Budget": "latency_ms memory batch_size dtype",
    "shrink": "model images budget",
    "heal": "model",
}
PROMISED_VERBS = ("shrink",)
BUILT_VERBS = [
    *("run", "describe", "score", "plan", "search", "prune", "distill"),
    *("eval", "bench", "export", "report", "doctor"),
]


def found(path: str) -> Any:
    """What has this path below the package, or None."""
    home, _, name = path.rpartition(".")
    if home and home[0].islower():
        return getattr(importlib.import_module(f"vitprune_fast.{home}"), name, None)
    start: Any = importlib.import_module("vitprune_fast")
    return reduce(lambda value, part: getattr(value, part, None), path.split("."), start)


def arguments(value: Any) -> list[str]:
    """The names of all its arguments."""
    return list(inspect.signature(value).parameters)


@pytest.mark.parametrize("path", BUILT)
def test_what_is_built_stays(path: str) -> None:
    if path.startswith("integrations.torch_pruning"):
        pytest.importorskip("torch_pruning")
    wanted = BUILT[path].split()
    assert found(path) is not None
    if not wanted:
        return
    names = arguments(found(path))
    assert {*wanted} <= {*names}
    by_position = inspect.signature(found(path)).parameters
    positional = [n for n in names if by_position[n].kind is not inspect.Parameter.KEYWORD_ONLY]
    assert [name for name in wanted if name in positional] == [
        name for name in positional if name in wanted
    ]


@pytest.mark.parametrize("path", PROMISED)
def test_what_is_promised_is_not_there_yet(path: str) -> None:
    value = found(path)
    assert value is None or not {*PROMISED[path].split()} & {*arguments(value)}


def test_verbs() -> None:
    assert [*VERBS] == BUILT_VERBS
    assert not {*PROMISED_VERBS} & {*VERBS}
