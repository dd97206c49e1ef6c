"""`vitprune-fast run`."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

from vitprune_fast.cli.options import PresetFlags, parse
from vitprune_fast.config.model import ModelConfig
from vitprune_fast.config.run import RunConfig
from vitprune_fast.errors import InvalidInput
from vitprune_fast.recipes.by_name import DEFAULT
from vitprune_fast.recipes.presets import preset


def _default(chosen: Namespace) -> RunConfig:
    digits = chosen.data in (None, "digits")
    options = preset(chosen.preset or ("digits" if digits else "images"), _recipe(chosen))
    # the arguments of a preset belong to its own model, not to one that was asked for by name
    return replace(options, model=ModelConfig()) if chosen.model else options


def _recipe(chosen: Namespace) -> str:
    """The recipe whose settings come before those of the file and the flags."""
    named = chosen.in_file.get("recipe")
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
