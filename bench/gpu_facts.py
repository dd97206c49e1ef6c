"""What a machine with a GPU is, and whether our native code runs on it: the first of `make gpu`.

python -m bench.gpu_facts FILE

The file is there within seconds, before torch is imported, and grows as more is known.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from bench import lines

PACKAGE = Path(__file__).resolve().parent.parent / "build" / "gpu" / "package.json"
QUERY = ("name", "driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
# what a machine may lack
PACKAGES = ("torch", "triton", "timm", "numpy", "scipy", "tyro", "datasets", "torch_pruning")


def gpu_facts() -> str:
    """Driver, clocks and power limit of the GPU in one line; empty where nobody can say."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader", "--id=0"]
    try:
        values = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    pairs = zip(QUERY, values.strip().split(", "), strict=True)
    return ", ".join(f"{name} {value}" for name, value in pairs)


def without_torch() -> dict:
    """What can be said at once."""
    packed = json.loads(PACKAGE.read_text()) if PACKAGE.is_file() else {}
    return {
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}",
        "commit": packed.get("commit", "unknown"),
        "gpu": gpu_facts(),
        "python": sys.version.split()[0],
        "system": platform.system(),
        "cores": os.cpu_count(),
        "installed": {name: importlib.util.find_spec(name) is not None for name in PACKAGES},
    }


def of_torch() -> dict:
    """Versions, devices, native code, and which form of every op runs."""
    import torch

    from bench.conftest import commit
    from vitprune_fast.benches.results import facts

    return facts("cuda" if torch.cuda.is_available() else "cpu", commit())


def main(path: Path) -> None:
    """Write the facts."""
    found = without_torch()
    lines.replace(path, found)
    # the package knows which commit was brought here; git over there may know another
    found = of_torch() | {name: fact for name, fact in found.items() if fact != "unknown"}
    lines.replace(path, found)
    from vitprune_fast._extension import extension_status
    from vitprune_fast.doctor import doctor

    print(doctor())
    found["native"] = extension_status()
    lines.replace(path, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
