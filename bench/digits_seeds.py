"""The main job over five seeds fixed in advance, as JSON: ``python bench/digits_seeds.py``."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SEEDS = (0, 1, 2, 3, 4)
COMMAND = "python bench/digits_seeds.py"


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


def main() -> None:
    """Run the seeds."""
    from vitprune_fast.files import write_json

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "seeds", help="run folders")
    path = RESULTS / f"{time.strftime('%Y%m')}_digits.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, run_seeds(parser.parse_args().folder))
    print(f"{path.relative_to(ROOT)}; now `python bench/table.py`")


if __name__ == "__main__":
    sys.exit(main())
