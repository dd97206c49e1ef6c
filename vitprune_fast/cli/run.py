"""`vitprune-fast run`."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

from vitprune_fast.cli.options import PresetFlags, parse
from vitprune_fast.models.config import ModelConfig
from vitprune_fast.recipes.config import RunConfig
from vitprune_fast.recipes.presets import preset


def _default(chosen: Namespace) -> RunConfig:
    digits = chosen.data in (None, "digits")
    options = preset(chosen.preset or ("digits" if digits else "images"))
    # the arguments of a preset belong to its own model, not to one that was asked for by name
    return replace(options, model=ModelConfig()) if chosen.model else options


def main(words: list[str]) -> int:
    """Parses the options and runs the chain, showing its progress."""
    options = parse("run", words, _default, PresetFlags, outputs=lambda run: {"out": run.out})
    if options is None:
        return 0
    from vitprune_fast.cli.display import Display
    from vitprune_fast.cli.signals import stoppable
    from vitprune_fast.recipes.chain import RunStopped, run

    with (
        Display(quiet=options.quiet) as display,
        stoppable(display, RunStopped) as (on_event, stop),
    ):
        run(options, on_event=on_event, stop=stop, command=["vitprune-fast", "run", *words])
    return 0
