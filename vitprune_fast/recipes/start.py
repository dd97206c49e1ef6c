"""`run`: a recipe, done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vitprune_fast.config.run import RunConfig
from vitprune_fast.data import ImageData
from vitprune_fast.recipes.by_name import DEFAULT, named
from vitprune_fast.recipes.presets import preset
from vitprune_fast.run.actions import OnEvent
from vitprune_fast.run.chain import execute
from vitprune_fast.run.step import Recipe, RunStopped

__all__ = ["RunStopped", "run"]


def run(
    config: RunConfig | str = "digits",
    *,
    recipe: Recipe | str | None = None,
    data: ImageData | None = None,
    on_event: OnEvent | None = None,
    stop: Callable[[], bool] | None = None,
    command: list[str] | None = None,
) -> dict[str, Any]:
    """Makes a model smaller by the steps of a recipe, in a folder that a killed run resumes from.

    Where torch.distributed is initialised, or `torchrun` starts the processes, they share scoring,
    search, sweep, training and evaluation; the first one owns the folder and does all else.

    Args:
        config: the settings, or the name of a preset.
        recipe: a list of steps or its name, with its settings where `config` is a preset's name;
            None is the one that the settings name, and `fast` for a preset's name.
        data: an opened data set to use instead of `config.data.source`.
        on_event: called with a dict for every step and epoch, in the first process.
        stop: asked after every step of a training and of the run; True ends it with a checkpoint.
        command: the words that started the run, recorded for the report.

    Returns:
        The contents of `summary.json`: "before", "cut", "swept" and "after" (None for what the
        recipe does not make) and any others that it makes, with params, macs, depth, file_bytes,
        peak_memory_bytes, top1 (fraction), its 95 % interval, latency_ms (batch 1, median) and
        images_per_s, plus ratios (unit kind -> share that is gone), recipe, steps, teachers, seed,
        split hashes, versions, checks.

    Raises:
        InvalidInput: an argument, the data or the checkpoint cannot be used.
        RunFolderError: the folder is in use, is another run's, or cannot be written.
        StageFailed: a step's own check did not hold; nothing after it was done.
        RunStopped: `stop` said so.
    """
    if isinstance(config, str):
        config = preset(config, DEFAULT if recipe is None else recipe)
    if recipe is None:
        recipe = config.recipe
    if isinstance(recipe, str):
        recipe = named(recipe)
    return execute(
        replace(config, recipe=recipe.name),
        recipe,
        data=data,
        on_event=on_event,
        stop=stop,
        command=command,
    )
