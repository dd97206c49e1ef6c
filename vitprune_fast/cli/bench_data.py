"""`vitprune-fast bench data`."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from vitprune_fast.cli.options import parse
from vitprune_fast.config.model import ModelConfig
from vitprune_fast.config.rules import Positive, PositiveInt, check
from vitprune_fast.config.run import Computed, Count, Threads


@dataclass(frozen=True)
class BenchData:
    """Measure how fast photographs are read, part by part and in all, and what a device takes.

    Files are read once before they are timed, so they come out of memory where it holds them.
    """

    source: Annotated[str, arg(name="data", metavar="folder:PATH|tar:PATH|wds:PATH|hfds:NAME")] = ""
    """Photographs; unset: 64 that are made in a temporary folder."""
    model: Annotated[ModelConfig, arg(name="")] = field(
        default_factory=lambda: ModelConfig(name="deit_tiny_patch16_224")
    )
    image_size: Annotated[int | None, arg(metavar="PIXELS")] = None
    """Height and width of what the model gets; unset: the model's own."""
    batch_size: Annotated[PositiveInt, arg(metavar="N")] = 64
    """Images of a batch."""
    workers: Count = None
    """Most loader processes; unset: one per core."""
    seconds: Annotated[Positive, arg(metavar="SECONDS")] = 2.0
    """How long each number of processes, and each thing the device does, is measured."""
    json: Annotated[Path | None, arg(metavar="FILE")] = None
    """Also write what was found here."""
    device: Annotated[str, arg(metavar="auto|cpu|cuda")] = "auto"
    """Where to compute."""
    dtype: Computed = "auto"
    threads: Threads = None

    def __post_init__(self) -> None:
        check("bench data", self)


def main(words: list[str]) -> None:
    """Measures and prints the tables."""
    options = parse(
        "bench data", words, lambda chosen: BenchData(), outputs=lambda own: {"json": own.json}
    )
    with tempfile.TemporaryDirectory(prefix="vitprune-") as folder:
        found = measured(options, Path(folder))
    if options.json is not None:
        from vitprune_fast import files

        files.write_json(options.json, found)


def measured(options: BenchData, folder: Path) -> dict[str, Any]:
    """Prints what is found, and returns it as plain values.

    Args:
        options: of the verb.
        folder: for photographs where none are given.
    """
    import torch

    from vitprune_fast.cli import data_rates as rates
    from vitprune_fast.cli.display import print_table
    from vitprune_fast.data import open_data
    from vitprune_fast.errors import NotEnoughMemory
    from vitprune_fast.hardware import processor
    from vitprune_fast.models.open import open_model
    from vitprune_fast.run.cores import available_cores
    from vitprune_fast.run.profile import applied, choose_profile, versions
    from vitprune_fast.scoring.stream import is_out_of_memory
    from vitprune_fast.structure import describe

    profile = choose_profile(options.device, options.threads, options.workers, options.dtype)
    workers = available_cores() if options.workers is None else options.workers
    config = options.model
    if options.image_size is not None:
        config = replace(config, args={**config.args, "img_size": options.image_size})
    model: Any = open_model(config)
    channels, *size = describe(model).input_size
    what = options.source or rates.make_photographs(folder)
    data = open_data(
        options.source or f"folder:{folder}", image_size=(size[0], size[1]), channels=channels
    )
    images, device = rates.sample(data), torch.device(profile.device)
    print(f"images    {what}")
    print(f"read by   {processor()}, {available_cores()} cores, {rates.decoders()}")
    shown = f"{size[0]} x {size[1]} pixels"
    print(f"taken by  {profile.hardware}, {profile.dtype}, {config.name} at {shown}")
    parts = rates.parts(images, device)
    print_table(("ms per image", *parts), rates.rows(parts))
    cores = {path: rates.per_core(found) for path, found in parts.items()}
    delivered = {
        path: {
            count: rates.delivered(
                images,
                augment,
                count,
                device,
                batch_size=options.batch_size,
                seconds=options.seconds,
            )
            for count in rates.counts(workers)
        }
        for path, augment in rates.PATHS.items()
    }
    dtype = getattr(torch, profile.dtype)
    batch = torch.randn(options.batch_size, channels, *size).to(device, dtype)
    try:
        with applied(profile):
            taken = rates.taken(model.to(device, dtype), batch, device, options.seconds)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise NotEnoughMemory(
            f"bench data: batch_size must be one that fits into memory, got {options.batch_size}"
        ) from None
    asked = [taken[rates.TAKEN_BY[path]] for path in parts]
    print_table(
        ("images/s", *parts),
        [
            ("a core that only reads", *(f"{rate:,.0f}" for rate in cores.values())),
            *(
                (f"{count} loader processes", *(f"{own[count]:,.0f}" for own in delivered.values()))
                for count in rates.counts(workers)
            ),
            ("the device", *(f"{rate:,.0f}" for rate in asked)),
            (
                "cores that would feed it",
                *(f"{math.ceil(m / c):,}" for m, c in zip(asked, cores.values(), strict=True)),
            ),
        ],
    )
    sentence = rates.limit(delivered, taken)
    print(f"limit     {sentence}; scoring would take {taken[rates.SCORE]:,.0f}")
    return {
        "images": what,
        "processor": processor(),
        "decoders": rates.decoders(),
        "device": profile.hardware,
        "dtype": profile.dtype,
        "model": config.name,
        "image_size": size,
        "batch_size": options.batch_size,
        "versions": versions(),
        "ms_per_image": {
            path: {part: 1e3 * seconds for part, seconds in found.items()}
            for path, found in parts.items()
        },
        "images_per_s_per_core": cores,
        "images_per_s_of_processes": {
            path: {str(count): rate for count, rate in found.items()}
            for path, found in delivered.items()
        },
        "images_per_s_of_device": taken,
        "limit": sentence,
    }
