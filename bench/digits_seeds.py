"""The main job over five seeds fixed in advance, and the README table made from its results.

python bench/digits_seeds.py                 run the five jobs, write the JSON, fill the README
python bench/digits_seeds.py --table-only    fill the README again from the committed JSON
"""

from __future__ import annotations

import argparse
import platform
import re
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
SEEDS = (0, 1, 2, 3, 4)
BEGIN, END = "<!-- digits:begin -->", "<!-- digits:end -->"
COMMAND = "python bench/digits_seeds.py"
STEPS = ("before", "cut", "swept", "after")


def run_seeds(folder: Path) -> dict[str, Any]:
    """Runs the digits preset once per seed, each in its own folder; finished ones are kept."""
    from vitprune_fast.cli.display import Display
    from vitprune_fast.recipes.presets import preset
    from vitprune_fast.recipes.start import run

    config = preset("digits")
    runs = []
    for seed in SEEDS:
        print(f"seed {seed}", flush=True)
        started = time.perf_counter()
        with Display() as display:
            summary = run(
                replace(config, seed=seed, out=folder / f"seed{seed}"),
                on_event=display,
                command=["vitprune-fast", "run", "--seed", str(seed)],
            )
        runs.append({"wall_s": round(time.perf_counter() - started, 1), **summary})
    return {"command": COMMAND, "seeds": list(SEEDS), "platform": platform.platform(), "runs": runs}


def table(results: dict[str, Any]) -> str:
    """The Markdown between the README's marks, from one results file."""
    runs = results["runs"]
    profile, versions = runs[0]["profile"], runs[0]["versions"]
    lines = [
        "| seed | top-1 dense | cut | swept | distilled | agreement | MACs | params "
        "| latency b1 | images/s b64 |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|---|",
    ]
    for run in runs:
        before, after = run["before"], run["after"]
        top1s = [run[step]["top1"] for step in STEPS]
        lines.append(
            f"| {run['seed']} | {' | '.join(f'{top1:.2%}' for top1 in top1s)} "
            f"| {after['agreement']:.2%} "
            f"| {after['macs'] / before['macs']:.1%} | {after['params'] / before['params']:.1%} "
            f"| {before['latency_ms']:.2f} → {after['latency_ms']:.2f} ms "
            f"| {before['images_per_s']:,.0f} → {after['images_per_s']:,.0f} |"
        )

    def mean(value: Any) -> float:
        return statistics.fmean(value(run) for run in runs)

    def top1_of(step: str) -> float:
        return mean(lambda run: run[step]["top1"])

    lines.append(
        f"| mean | {' | '.join(f'{top1_of(step):.2%}' for step in STEPS)} "
        f"| {mean(lambda r: r['after']['agreement']):.2%} "
        f"| {mean(lambda r: r['after']['macs'] / r['before']['macs']):.1%} "
        f"| {mean(lambda r: r['after']['params'] / r['before']['params']):.1%} "
        f"| {mean(lambda r: r['before']['latency_ms'] / r['after']['latency_ms']):.2f}x faster "
        f"| {mean(lambda r: r['after']['images_per_s'] / r['before']['images_per_s']):.2f}x |"
    )
    samples = runs[0]["after"]["samples"]
    lines += [
        "",
        f"Real 8x8 digit images, {samples} of them for the test; {len(runs)} seeds fixed in "
        f"advance. {profile['hardware']}, {profile['threads']} "
        f"thread{'s' if profile['threads'] != 1 else ''}, {profile['dtype']}, torch "
        f"{versions['torch']}, timm {versions['timm']}. Made by `{results['command']}`.",
    ]
    return "\n".join(lines)


def newest_results() -> Path:
    """The newest committed results file of this script."""
    found = sorted(RESULTS.glob("[0-9]*_digits.json"))
    if not found:
        raise SystemExit(f"error: no results in {RESULTS}; run `{COMMAND}` first")
    return found[-1]


def filled(readme: str, rows: str) -> str:
    """The README's text with the table between its marks replaced."""
    pattern = re.compile(f"({re.escape(BEGIN)}\n).*?({re.escape(END)})", re.DOTALL)
    text, count = pattern.subn(lambda match: f"{match[1]}{rows}\n{match[2]}", readme)
    if count != 1:
        raise SystemExit(f"error: README must have {BEGIN} and {END} once, found {count}")
    return text


def main() -> None:
    """Runs what is asked and fills the README."""
    from vitprune_fast.files import read_json, write_json

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table-only", action="store_true", help="only fill the README")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "seeds", help="run folders")
    arguments = parser.parse_args()
    if not arguments.table_only:
        path = RESULTS / f"{time.strftime('%Y%m')}_digits.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, run_seeds(arguments.folder))
    results = newest_results()
    README.write_text(
        filled(README.read_text(encoding="utf-8"), table(read_json(results))), encoding="utf-8"
    )
    print(f"README table from {results.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
