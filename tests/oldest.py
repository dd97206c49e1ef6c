"""The tests on the oldest Python, torch, timm and so on that are supported: ``make oldest``.

Run by the interpreter of ``.venv``. The versions are the lower bounds of pyproject.toml; they get
an environment of their own, `.venv-oldest`, which is made again when a bound changes. Everything
runs in a copy of the repository: native code that is built in place would take that of ``.venv``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from .declared import BUILD, EXTRAS, PROJECT, ROOT, TEST, oldest, oldest_python

VENV = ROOT / ".venv-oldest"
PYTHON = VENV / "bin" / "python"
COPY = ROOT / "build" / "oldest"
# what the versions matter to: ops and kernels, what hooks into timm's and transformers' modules,
# torch.compile, building and installing, and one run through the command line
TESTS = [
    "tests/ops",
    "tests/scoring",
    "tests/gates",
    "tests/structure",
    "tests/integrations",
    "tests/cli/test_verbs.py",
    "tests/test_canary.py",
    "tests/test_saved_models.py",
    "tests/test_dependencies.py",
    "tests/test_doctor.py",
    "tests/test_import.py",
    "tests/test_packaging.py",
]
# long, and hardly decided by versions: the same sums again, fp16 besides fp32, hundreds of tokens
# besides a few, and many models one mask at a time
LEFT_OUT = [
    *("-k", "not same_bits and not fp16 and not N197 and not N257"),
    "--ignore=tests/scoring/test_ablation.py",
    # models of transformers before 5.9 and 5.18 are scored, and refused by prune
    "--ignore=tests/structure/test_hf.py",
]


def interpreters() -> Iterator[Path]:
    """Where the oldest Python may be, the likeliest first."""
    version = oldest_python()
    named = os.environ.get("PYTHON_OLDEST")
    if named:
        # nothing takes the place of what was asked for
        yield Path(shutil.which(named) or named)
        return
    on_path = shutil.which(f"python{version}")
    if on_path:
        yield Path(on_path)
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    # where pyenv made the Python that runs this, the others lie next to it
    for folder in dict.fromkeys([pyenv / "versions", Path(sys.base_prefix).parent]):
        yield from sorted(folder.glob(f"{version}.*/bin/python{version}"))


def interpreter() -> Path:
    """An interpreter of the oldest Python.

    Raises:
        SystemExit: there is none.
    """
    version = oldest_python()
    found = []
    for path in interpreters():
        # one that pyenv has on the PATH runs only where its version is chosen
        says = "import sys; print('%d.%d' % sys.version_info[:2])"
        try:
            result = subprocess.run([path, "-c", says], capture_output=True, text=True)
        except OSError as error:
            found.append(f"{path} ({error.strerror})")
            continue
        if result.stdout.strip() == version:
            return path
        found.append(f"{path} ({result.stdout.strip() or 'does not run'})")
    raise SystemExit(
        f"make oldest: PYTHON_OLDEST must be a Python {version}, got {', '.join(found) or 'none'}; "
        f"install Python {version} (`pyenv install {version}`), or export PYTHON_OLDEST"
    )


def run(*command: object, **environment: str) -> None:
    """Run a command in the copy; ends this process with its status when that is not 0."""
    print("oldest:", *command, flush=True)
    # the bounds decide here, not what somebody constrained for other environments
    inherited = {name: text for name, text in os.environ.items() if name != "PIP_CONSTRAINT"}
    result = subprocess.run(
        [str(word) for word in command], cwd=COPY, env={**inherited, **environment}
    )
    if result.returncode:
        raise SystemExit(result.returncode)


def copy_repository() -> None:
    """Make the copy again, but for what was compiled in it."""
    COPY.mkdir(parents=True, exist_ok=True)
    for path in COPY.iterdir():
        if path.is_dir() and path.name != "build":
            shutil.rmtree(path)
    built = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__")
    for path in ROOT.iterdir():
        if path.name.startswith(".") or path.name in ("build", "dist", "runs"):
            continue
        if path.is_dir() and not path.name.endswith(".egg-info"):
            shutil.copytree(path, COPY / path.name, symlinks=True, ignore=built)
        elif path.is_file():
            shutil.copy2(path, COPY)


def install() -> None:
    """Make the environment, unless it stands and has these versions."""
    listed = chain(BUILD, PROJECT["dependencies"], *EXTRAS.values(), TEST)
    python, pins = interpreter(), oldest(listed)
    stamp, stands = VENV / "pins.txt", "\n".join([str(python), *pins])
    if stamp.is_file() and stamp.read_text() == stands:
        return
    run(python, "-m", "venv", "--clear", VENV)
    # the one that came with an old Python downloads every package to read its requirements
    run(PYTHON, "-m", "pip", "install", "-q", "--upgrade", "pip")
    run(PYTHON, "-m", "pip", "install", "-q", *pins)
    # the native code is built apart, and again only when it changed
    link = ("install", "-q", "--no-deps", "--no-build-isolation", "-e", ".")
    run(PYTHON, "-m", "pip", *link, VITPRUNE_BUILD_EXT="0")
    run(PYTHON, "-m", "pip", "check")
    stamp.write_text(stands)


def build() -> None:
    """The native code, with the CUDA sources where there is a toolkit."""
    command = [PYTHON, "vitprune_fast/_toolkit.py"]
    toolkit = subprocess.run(command, cwd=COPY, capture_output=True, text=True, check=True)
    home = toolkit.stdout.strip()
    with_cuda = {"CUDA_HOME": home} if home else {"VITPRUNE_WITH_CUDA": "0"}
    # forced: only ninja sees that flags changed; it compiles again what is old and nothing else
    run(PYTHON, "setup.py", "-q", "build_ext", "--inplace", "--force", **with_cuda)


def main() -> None:
    """Install, build and test; ``--install`` does not test."""
    copy_repository()
    install()
    build()
    if sys.argv[1:] == ["--install"]:
        return
    run(VENV / "bin" / "vitprune-fast", "doctor")
    chosen = sys.argv[1:] or ["-n", "2", "-m", "not slow and not gpu", *TESTS, *LEFT_OUT]
    run(PYTHON, "-m", "pytest", "-q", *chosen, OMP_NUM_THREADS="1")
    if not sys.argv[1:]:
        # for the GPU that the speed is claimed for, and what once did not compile
        wanted = "sm_90 or manifold_loss-sm_100"
        compiled = ("-m", "slow", "-k", wanted, "tests/test_kernels_compile.py")
        run(PYTHON, "-m", "pytest", "-q", "-n", "2", *compiled, OMP_NUM_THREADS="1")


if __name__ == "__main__":
    main()
