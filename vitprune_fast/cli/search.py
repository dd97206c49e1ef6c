"""`vitprune-fast search`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from vitprune_fast.cli.options import parse, partial_of, required_images, required_model
from vitprune_fast.config.model import ModelConfig
from vitprune_fast.config.run import (
    Computed,
    ConstraintConfig,
    ScoreConfig,
    ShownConfig,
    Threads,
)
from vitprune_fast.config.search import SearchConfig
from vitprune_fast.config.yamlfile import to_plain


@dataclass(frozen=True)
class Search:
    """Find how many heads and how many neurons may go, by evaluating the model without them.

    Nothing is cut: units are masked. Accuracy is that on the validation split; training images are
    scored, and test images are not read. The same command goes on with a search that was stopped.
    """

    model: Annotated[ModelConfig, arg(name="")] = field(default_factory=required_model)
    data: Annotated[ShownConfig, arg(name="")] = field(default_factory=required_images)
    out: Annotated[Path, arg(metavar="DIR")] = Path("search")
    """Folder for plan.json, search.json (all candidates) and search.png."""
    search: Annotated[SearchConfig, arg(name="")] = field(default_factory=SearchConfig)
    plan: Annotated[ConstraintConfig, arg(name="")] = field(default_factory=ConstraintConfig)
    score: Annotated[ScoreConfig, arg(name="")] = field(default_factory=ScoreConfig)
    seed: Annotated[int, arg(metavar="N")] = 0
    """Chooses which training images are scored, and the order of the validation images."""
    device: Annotated[str, arg(metavar="auto|cpu|cuda")] = "auto"
    """Where to compute."""
    dtype: Computed = "auto"
    threads: Threads = None


def main(words: list[str]) -> None:
    """Searches, prints every candidate, and saves what was chosen."""
    options = parse("search", words, lambda chosen: Search(), outputs=_outputs)
    from vitprune_fast import files
    from vitprune_fast.cli.display import Display, print_assumptions, print_set_aside, print_table
    from vitprune_fast.run import actions
    from vitprune_fast.run.inputs import open_both
    from vitprune_fast.run.profile import applied
    from vitprune_fast.search.result import table_of

    # found out before the work whose result goes there
    files.probe_folder(options.out)
    opened = open_both(
        options.model,
        options.data,
        options.seed,
        options.device,
        options.threads,
        options.dtype,
    )
    print_assumptions(opened.assumptions)
    with applied(opened.setting.profile), Display() as display:
        with _stage(display, "score") as on_event:
            scores = actions.score(
                opened.model, opened.data, options.score, opened.setting, on_event=on_event
            )
        with _stage(display, "search") as on_event:
            result = actions.search(
                opened.model,
                scores,
                opened.data,
                options.score,
                options.search,
                options.plan,
                opened.setting,
                checkpoint=partial_of(options.out),
                on_event=on_event,
            )
    found = result.to_json()
    headings, *rows = table_of(found)
    print_table(headings, rows)
    files.make_folder(options.out)
    result.plan.save(options.out / "plan.json")
    files.write_json(
        options.out / "search.json",
        {
            "model": to_plain(options.model),
            "data": to_plain(options.data),
            "search": to_plain(options.search),
            "plan": to_plain(options.plan),
            "score": to_plain(options.score),
            "seed": options.seed,
            "dtype": opened.setting.profile.dtype,
            **found,
        },
    )
    _draw(found, options.out / "search.png")
    print_set_aside(opened.data)
    ratios = ", ".join(f"{ratio:.1%} ({kind})" for kind, ratio in result.ratios.items())
    print(
        f"{options.out}: without {ratios} {result.macs:,} of {result.baseline.macs:,} MACs, "
        f"top-1 {result.baseline.top1:.2%} -> {result.top1:.2%} on {result.chosen.images:,} "
        "validation images"
    )


def _outputs(options: Search) -> dict[str, Path | None]:
    return {"out": options.out, "the evaluated candidates of out": partial_of(options.out)}


@contextmanager
def _stage(display: Any, name: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Shows a stage; yields what takes its events."""
    event = {"event": "stage", "stage": name}
    display({**event, "state": "start"})
    started = time.perf_counter()
    yield lambda more: display({**more, "stage": name})
    display({**event, "state": "done", "seconds": time.perf_counter() - started})


def _draw(found: dict[str, Any], path: Path) -> None:
    """Draws the candidates, where what draws is installed."""
    from vitprune_fast import files

    try:
        from vitprune_fast.run.report.search import search_picture
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "jinja2"):
            raise
        print(f"no picture: it needs {error.name}; install vitprune_fast[report]")
        return
    files.write_bytes(path, search_picture(found))
