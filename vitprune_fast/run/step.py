"""One step of a run: what it reads from the run folder, what it leaves there, and how."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vitprune_fast.config.run import RunConfig
from vitprune_fast.errors import InvalidInput

Facts = dict[str, Any]
"""What a step reports: plain values for its record, of which `text` is printed."""

SUMMARY = "summary.json"
REPORT = "report.html"
# what the folder holds whatever the steps
_OWN = ("run.json", "config.yaml", "metrics.jsonl", "stages", "checkpoints", "tensorboard")


class RunStopped(Exception):
    """The run stopped on request, with a checkpoint; the same call resumes there."""


@dataclass(frozen=True)
class Step:
    """One step of a run.

    A step reads nothing but its inputs, the images and the configuration, also when nothing was
    interrupted: a resumed run therefore computes with the same bits as an undisturbed one.

    Attributes:
        name: of its record, its checkpoints and its curves.
        function: called with the ``Job`` and, by role, the names of inputs and outputs; returns
            facts. All of its randomness comes from the seed and the name of the step.
        inputs: role -> file or folder in the run folder, made by an earlier step.
        outputs: role -> file or folder that is there when the step is done.
        settings: where the configuration differs in this step, as in its YAML file.
        shared: called in every process of a run with several, instead of in the first alone, which
            shares nothing then; what it writes through the ``Job`` is written by the first.
    """

    name: str
    function: Callable[..., Facts]
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    shared: bool = False

    @property
    def wiring(self) -> str:
        """Function, inputs and outputs as one line: ``scores.safetensors = score(dense)``."""
        called = f"{self.function.__name__}({', '.join(self.inputs.values())})"
        return " = ".join(part for part in (", ".join(self.outputs.values()), called) if part)


def made_by(wiring: str) -> list[str]:
    """The outputs that a ``wiring`` names."""
    outputs, made, _ = wiring.partition(" = ")
    return outputs.split(", ") if made else []


@dataclass(frozen=True)
class Recipe:
    """A way to a smaller model, as data: a list of steps, and the settings it comes with.

    Attributes:
        name: as `--recipe` takes it.
        steps: the list, for a configuration.
        settings: where the configuration that it starts from differs from the preset's, as in a
            YAML file; a user's file and flags win.
        presets: preset -> settings for that preset alone; or PRESET-VARIANT -> settings on top of
            those for the preset, which makes a preset of that name.
    """

    name: str
    steps: Callable[[RunConfig], Sequence[Step]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def check_steps(recipe: str, steps: Sequence[Step]) -> None:
    """Refuses a list whose steps cannot be done one after the other.

    Raises:
        InvalidInput: two steps have one name, an output is made twice, an input by no step before,
            or none makes the summary.
    """
    made: set[str] = set()
    names: set[str] = set()
    for step in steps:
        where = f"run: step {step.name!r} of recipe {recipe}"
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", step.name):
            raise InvalidInput(f"{where} must be named in lower case, digits, - and _")
        if step.name in names:
            raise InvalidInput(f"{where} must have a name of its own, got one twice")
        names.add(step.name)
        for name in step.inputs.values():
            if name not in made:
                raise InvalidInput(f"{where} must read what a step before it makes, got {name}")
        for name in step.outputs.values():
            free = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) and name not in _OWN
            if name in made or not free:
                raise InvalidInput(f"{where} must make files or folders of its own, got {name}")
            made.add(name)
    if SUMMARY not in made:
        raise InvalidInput(
            f"run: recipe {recipe} must have a step that makes {SUMMARY}, got none; add evaluate"
        )
