"""`vitprune-fast run`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vitprune_fast.cli.options import RunFlags, parse_both
from vitprune_fast.config.model import ModelConfig
from vitprune_fast.config.run import RunConfig
from vitprune_fast.errors import InvalidInput
from vitprune_fast.recipes.by_name import DEFAULT, named
from vitprune_fast.recipes.presets import IMAGENET, preset

if TYPE_CHECKING:
    from vitprune_fast.run.estimate import Machine, StepEstimate

GPUS = (1, 8)
"""How many a dry run is estimated for."""
SPLITS = {"train": "train", "validation": "val.", "test": "test"}
"""Of the data, and what their columns are called."""


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
    """Parses the options and runs the chain, showing its progress, or says what it would do."""
    options, files = parse_both(
        "run", words, _default, RunFlags, outputs=lambda run: {"out": run.out}
    )
    if files.dry_run:
        return dry_run(options, imagenet=(files.preset or "").partition("-")[0] == "imagenet")
    from vitprune_fast.cli.display import Display
    from vitprune_fast.cli.signals import stoppable
    from vitprune_fast.recipes.start import RunStopped, run

    with (
        Display(quiet=options.quiet) as display,
        stoppable(display, RunStopped) as (on_event, stop),
    ):
        run(options, on_event=on_event, stop=stop, command=["vitprune-fast", "run", *words])


def dry_run(config: RunConfig, *, imagenet: bool = False) -> None:
    """Prints what every step of a run would read and compute; nothing is written.

    Args:
        config: of the run.
        imagenet: what stands where no data is named is ImageNet, which need not be there.
    """
    import torch

    from vitprune_fast.cli.display import print_assumptions, print_table
    from vitprune_fast.planning import cost, peak_memory_bytes
    from vitprune_fast.run import assumptions, chain
    from vitprune_fast.run.estimate import DataSizes, Machine, estimate, kept_for_backward
    from vitprune_fast.run.inputs import open_model_data
    from vitprune_fast.structure import describe

    steps, dense = chain.checked(config, named(config.recipe))
    channels, *size = input_size = describe(dense).input_size
    if imagenet and config.data.source == IMAGENET.data.source:
        sizes = DataSizes.of_imagenet(channels, (size[0], size[1]), config.data.validation)
        chain.check_plans(config, steps, dense)
    else:
        data = open_model_data(config.data, dense, config.model)
        dense = chain.fitted(config, steps, dense, data)
        sizes = DataSizes.of(data)
        print_assumptions(assumptions.of_run(config, steps, data, dense))
    found, machine = estimate(config, steps, dense, sizes), Machine.assumed()
    titles = [f"{count} GPU{'s' * (count > 1)}" for count in GPUS]
    print_table(
        ("step", "GMACs", "params", *SPLITS.values(), *titles, "limit"),
        [*(_row(step, machine) for step in found), _totals(found, machine)],
    )
    params, batch = cost(dense).params, config.data.batch_size
    peak = peak_memory_bytes(dense, batch, dtype="bfloat16")
    kept = batch * kept_for_backward(dense, input_size, torch.bfloat16)
    averaged = bool(config.distill.ema)
    counts = ", ".join(f"{count:,} {split}" for split, count in sizes.images.items())
    read = sum(step.images(split) for step in found for split in SPLITS)
    print_assumptions(
        {
            "data": f"{counts} images {sizes.origin}, "
            f"{_bytes(sizes.image_bytes * sum(sizes.images.values()))} of files; the run reads "
            f"{read:,} images, of which each of several processes reads its own",
            "memory": f"of a training of the dense model with {batch} images on a GPU: "
            f"{_bytes((16 + 4 * averaged) * params)} of weights, gradients"
            f"{', moments and their average' if averaged else ' and moments'}, "
            f"{_bytes(kept)} that a forward in bfloat16 keeps for its backward; without one it "
            f"holds {_bytes(peak)} at most",
            **machine.words(),
        }
    )


def _row(step: StepEstimate, machine: Machine) -> tuple[str, ...]:
    """What one step comes to, as text."""
    if not step.known:
        return (step.name, *["?"] * (4 + len(SPLITS)), "")
    model = (f"{step.model.macs / 1e9:.3g}", _short(step.model.params)) if step.model else ("", "")
    images = (_short(step.images(split)) for split in SPLITS)
    hours = (_time(step.hours(machine, count)) for count in GPUS)
    return (step.name, *model, *images, *hours, step.waits_for(machine))


def _totals(steps: Sequence[StepEstimate], machine: Machine) -> tuple[str, ...]:
    """Images and hours of all steps together."""
    images = (_short(sum(step.images(split) for step in steps)) for split in SPLITS)
    hours = (_time(sum(step.hours(machine, count) for step in steps)) for count in GPUS)
    return ("all", "", "", *images, *hours, "")


def _short(count: int) -> str:
    """In millions where there are many; nothing for none."""
    if count < 100_000:
        return f"{count:,}" if count else ""
    return f"{count / 1e6:,.{0 if count >= 1e8 else 1}f} M"


def _time(hours: float) -> str:
    """In the unit that suits it; nothing for none."""
    for unit, part in (("h", 1.0), ("min", 1 / 60)):
        if hours >= part:
            return f"{hours / part:,.{1 if unit == 'h' else 0}f} {unit}"
    return f"{hours * 3600:.0f} s" if hours else ""


def _bytes(count: float) -> str:
    """In the unit that suits it."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
