"""`vitprune-fast run`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitprune_fast.cli.options import PresetFlags, parse
from vitprune_fast.config.model import ModelConfig
from vitprune_fast.config.run import BudgetConfig, RunConfig
from vitprune_fast.config.yamlfile import read_yaml
from vitprune_fast.errors import InvalidInput
from vitprune_fast.recipes.by_name import DEFAULT
from vitprune_fast.recipes.presets import preset

# what is asked for comes instead of these settings of a preset, not in addition to them
_INSTEAD: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "plan": (("macs", "params", "keep"), vars(BudgetConfig())),
    "distill": (("distill.loss",), {"loss_weights": (), "loss_weights_end": ()}),
}


def _default(chosen: Namespace) -> RunConfig:
    digits = chosen.data in (None, "digits")
    in_file = {} if chosen.config is None else read_yaml(Path(chosen.config))
    recipe = _recipe(chosen, in_file)
    options = preset(chosen.preset or ("digits" if digits else "images"), recipe)
    for part, (flags, unset) in _INSTEAD.items():
        given = in_file.get(part)
        # what is no mapping is refused where the file is read for good
        names = given.keys() if isinstance(given, Mapping) else ()
        if any(getattr(chosen, flag) is not None or flag.split(".")[-1] in names for flag in flags):
            options = replace(options, **{part: replace(getattr(options, part), **unset)})
    # the arguments of a preset belong to its own model, not to one that was asked for by name
    return replace(options, model=ModelConfig()) if chosen.model else options


def _recipe(chosen: Namespace, in_file: Mapping[str, Any]) -> str:
    """The recipe whose settings come before those of the file and the flags."""
    named = in_file.get("recipe")
    if not isinstance(named, str):
        return chosen.recipe or DEFAULT
    if chosen.recipe not in (None, named):
        raise InvalidInput(
            f"run: recipe must be {named} with {chosen.config}, whose settings are those of that "
            f"recipe, got {chosen.recipe}; take the line `recipe` out of the file for its own"
        )
    return named


def main(words: list[str]) -> None:
    """Parses the options and runs the chain, showing its progress."""
    options = parse("run", words, _default, PresetFlags, outputs=lambda run: {"out": run.out})
    from vitprune_fast.cli.display import Display
    from vitprune_fast.cli.signals import stoppable
    from vitprune_fast.recipes.start import RunStopped, run

    with (
        Display(quiet=options.quiet) as display,
        stoppable(display, RunStopped) as (on_event, stop),
    ):
        run(options, on_event=on_event, stop=stop, command=["vitprune-fast", "run", *words])
