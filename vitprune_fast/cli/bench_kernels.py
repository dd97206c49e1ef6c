"""`vitprune-fast bench kernels`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from vitprune_fast import registry
from vitprune_fast.cli.options import parse
from vitprune_fast.errors import InvalidInput, StageFailed

RACES = "benches/ops"


@dataclass(frozen=True)
class BenchKernels:
    """Race every op against what one would write without it.

    Results are checked to be equal before anything is timed, forms take turns, and a plain copy of
    as many bytes is the limit. On a CPU the processor time of one thread counts, on a GPU the time
    on its stream.
    """

    ops: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ()
    """Only these; unset: all."""
    quick: bool = False
    """The smallest sizes and two rounds: shows that all runs, and says nothing about speed."""
    device: Annotated[str, arg(metavar="auto|cpu|cuda")] = "auto"
    """Where to compute."""
    out: Annotated[Path | None, arg(metavar="FILE")] = None
    """Also write what was found here, as the files of bench/results in the repository are."""

    def __post_init__(self) -> None:
        known = registry.names(RACES)
        if unknown := [name for name in self.ops if name not in known]:
            raise InvalidInput(
                f"bench kernels: --ops must be among {', '.join(known)}, got {unknown[0]!r}"
            )


def main(words: list[str]) -> None:
    """Runs the races and prints a line for every form."""
    options = parse(
        "bench kernels", words, lambda chosen: BenchKernels(), outputs=lambda own: {"out": own.out}
    )
    from vitprune_fast import ops
    from vitprune_fast.benches.harness import keep_freed_memory
    from vitprune_fast.benches.place import Place
    from vitprune_fast.benches.race import Race
    from vitprune_fast.benches.results import Results
    from vitprune_fast.run.profile import choose_profile

    keep_freed_memory()
    device = choose_profile(options.device, 1).device
    place = Place(device, "triton" if device == "cuda" else "auto", tiny=options.quick)
    results = Results(options.out, shlex.join(["vitprune-fast", "bench", "kernels", *words]))
    names = options.ops or registry.names(RACES)
    for choice in ops.backends():
        if choice.op in names and choice.device == device:
            print(f"{choice.op:<17} runs as {choice.backend} ({choice.why})")

    def note(record: dict[str, Any]) -> None:
        results.add("record", record)
        print(_line(record), flush=True)

    race, failed = Race(note, tiny=options.quick), []
    for name in names:
        for case, run in registry.named(RACES, name, "cases")(place).items():
            try:
                run(race)
            except AssertionError:
                # each form that disagrees was told
                failed.append(f"{name} ({case})")
    if failed:
        raise StageFailed(
            f"bench kernels: all forms must give the same, got others in {', '.join(failed)}; "
            "these were not timed"
        )


def _line(record: dict[str, Any]) -> str:
    """One form, for people."""
    if "disagrees" in record:
        return record["disagrees"]
    return (
        f"{record['op']:<17} {record['min_us']:>11,.1f} us {record['times_ours']:>6.2f} times ours "
        f"{record['of_copy']:>5.0%} of copy  spread {record['spread']:.0%}  {record['form']}: "
        f"{record['case']}"
    )
