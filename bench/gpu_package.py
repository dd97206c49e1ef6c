"""What to take to a machine with a GPU: `make gpu-package`, which fills build/gpu.

python -m bench.gpu_package [--python PYTHON] [--candidates DIR]

Native code is built here, where nothing is lost by waiting: the op library without its debugging
symbols, which every torch from 2.11 on loads, and the small host module for the Python that is
stated. Torch-Pruning lies next to them, where it is installed. `--candidates` adds kernels that are
tried against ours: a folder whose ``variants.py`` takes ``--out`` and ``--limit``, with CUDA
sources in ``gather/`` that are compiled here.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import lines
from bench.conftest import commit
from bench.gpu_steps import PACKAGE, ROOT

MOST_BYTES = 64 * 2**20
# as setup.py compiles it
HOST_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden")
WHERE = "import json, sysconfig as s; print(json.dumps([s.get_path('include'), "
WHERE += "s.get_config_var('EXT_SUFFIX'), s.get_python_version()]))"


def op_library(folder: Path) -> None:
    """Copy the library that `make ext` built, stripped."""
    found = sorted((ROOT / "vitprune_fast").glob("_C.*so"))
    if not found:
        raise SystemExit("gpu-package: the native code must be built first: `make ext`")
    built = found[0]
    subprocess.run(["strip", "-g", "-o", str(folder / built.name), str(built)], check=True)


def host_module(folder: Path, python: str) -> str:
    """Compile the host module for a Python; its version."""
    import pybind11

    from vitprune_fast._host import build_info

    try:
        done = subprocess.run([python, "-c", WHERE], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"gpu-package: --python must be one that runs, got {python}") from error
    include, suffix, version = json.loads(done.stdout)
    info = build_info()
    facts = {"TORCH": info["torch"], "CUDA": info["cuda"]}
    macros = [f'-DVP_{name}_VERSION="{value}"' for name, value in facts.items()]
    macros.append(f'-DVP_CUDA_ARCH_LIST="{info["cuda_arch_list"]}"')
    headers = [f"-I{path}" for path in (include, pybind11.get_include(), ROOT / "csrc")]
    made = folder / f"_host{suffix}"
    source = str(ROOT / "csrc" / "host.cpp")
    subprocess.run(["c++", *HOST_FLAGS, *macros, *headers, source, "-o", str(made)], check=True)
    subprocess.run(["strip", "-g", str(made)], check=True)
    return version


def peer(folder: Path) -> bool:
    """Copy Torch-Pruning from this environment; whether it is there."""
    found = importlib.util.find_spec("torch_pruning")
    if found is None or found.origin is None:
        return False
    hidden = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(found.origin).parent, folder / "torch_pruning", ignore=hidden)
    return True


def candidates(source: Path, folder: Path) -> None:
    """Copy kernels to try, and compile those in CUDA."""
    from vitprune_fast._toolkit import cuda_home

    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("__pycache__", "sass"))
    home = cuda_home()
    if home is None:
        return
    for header in sorted((folder / "gather").glob("*.h")):
        # the variants differ in how they move a tile, and have the rest from csrc
        with tempfile.TemporaryDirectory() as scratch:
            made = folder / "gather" / f"gather_{header.stem}.so"
            command = [str(home / "bin" / "nvcc"), "-O3", "-arch=sm_90", "-std=c++20", "-shared"]
            command += ["-Xcompiler", "-fPIC", f"-I{ROOT / 'csrc'}", f'-DHEADER="{header}"']
            command.append("--objdir-as-tempdir")
            command += ["-o", str(made), str(folder / "gather" / "gather_variants.cu")]
            subprocess.run(command, check=True, cwd=scratch)


def main() -> int:
    """Fill the folder and list it; 2 when it is more than can be taken along."""
    parser = argparse.ArgumentParser("gpu_package", description=__doc__)
    parser.add_argument("--python", default=sys.executable, help="the interpreter over there")
    parser.add_argument("--candidates", type=Path, help="kernels to try against ours")
    options = parser.parse_args()
    if options.candidates and PACKAGE in options.candidates.resolve().parents:
        raise SystemExit(f"gpu-package: --candidates must be outside of {PACKAGE}")
    shutil.rmtree(PACKAGE, ignore_errors=True)
    native = PACKAGE / "native"
    native.mkdir(parents=True)
    op_library(native)
    version = host_module(native, options.python)
    has_peer = peer(PACKAGE / "packages")
    if options.candidates is not None:
        candidates(options.candidates, PACKAGE / "candidates")
    lines.replace(PACKAGE / "package.json", {"commit": commit(), "python": version})
    files = [path for path in sorted(PACKAGE.rglob("*")) if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    for path in files:
        if "packages" not in path.parts:
            print(f"{path.stat().st_size / 2**20:8.2f} MiB  {path.relative_to(ROOT)}")
    print(f"{total / 2**20:8.2f} MiB  in all; take along {PACKAGE.relative_to(ROOT)}")
    print(f"for Python {version}, commit {commit()}")
    if not has_peer:
        print("without Torch-Pruning: `pip install torch-pruning` here adds its loop to the race")
    if total > MOST_BYTES:
        print(f"gpu-package: all must be at most {MOST_BYTES >> 20} MiB, got {total >> 20}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
