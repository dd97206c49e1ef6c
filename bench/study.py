"""What is measured on the trained model of a digits run: opened here, and written down here."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import torch

import vitprune_fast as vp
from bench.conftest import commit
from vitprune_fast.data import ImageData
from vitprune_fast.doctor import doctor
from vitprune_fast.run.profile import versions

RESULTS = Path(__file__).parent / "results"


def opened(folder: str) -> tuple[Any, ImageData]:
    """The dense model of a run, in eval mode on one thread, and its data."""
    torch.set_num_threads(1)
    model = vp.load(folder).eval()
    size = vp.describe(model).input_size
    return model, vp.open_data("digits", image_size=size[1:], channels=size[0])


def write(name: str, **found: Any) -> None:
    """bench/results/<month>_<name>.json: what was found, and what it was found with."""
    now = datetime.datetime.now(datetime.timezone.utc)
    content = {
        "command": f"python -m bench.{name}",
        "date": f"{now:%Y-%m-%d}",
        "commit": commit(),
        "versions": versions(),
        "device": doctor().devices["cpu"].partition(",")[0],
        "model": "the dense model of `make prune` (digits, seed 0)",
        **found,
    }
    path = RESULTS / f"{now:%Y%m}_{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
