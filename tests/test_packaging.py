"""sdist, wheel and the build switches, in a copy of the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from bench import table

ROOT = Path(__file__).parent.parent
SOURCES = ["csrc", "kernels", "vitprune_fast", "tests", "setup.py", "pyproject.toml", "MANIFEST.in"]


def copy_repository(target: Path) -> Path:
    """The files a build reads, without what an earlier build left behind."""
    target.mkdir()
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in [*SOURCES, "LICENSE"]:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(source, target / name)
    # the text on the project page is not what is tested here
    (target / "README.md").write_text("vitprune_fast\n")
    return target


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "VITPRUNE_BUILD_EXT": "", "VITPRUNE_WITH_CUDA": "", **environment}
    return subprocess.run(command, cwd=cwd, env=settings, capture_output=True, text=True)


def build(root: Path, **environment: str) -> tuple[set[str], Path]:
    """Names in the sdist (without its top folder), and the wheel built from that sdist."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."]
    result = run(command, root, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    (sdist,) = (root / "dist").glob("*.tar.gz")
    (wheel,) = (root / "dist").glob("*.whl")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    return names, wheel


@pytest.fixture(scope="module")
def pure(tmp_path_factory):
    """The repository built with VITPRUNE_BUILD_EXT=0."""
    root = copy_repository(tmp_path_factory.mktemp("packaging") / "repository")
    return build(root, VITPRUNE_BUILD_EXT="0")


def expected_modules() -> set[str]:
    package = (
        path for path in (ROOT / "vitprune_fast").rglob("*.py") if "kernels" not in path.parts
    )
    modules = {path.relative_to(ROOT).as_posix() for path in package}
    return modules | {
        f"vitprune_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")
    }


def test_wheel_holds_the_whole_package_and_no_tests(pure):
    _, wheel = pure
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "vitprune_fast/kernels/taylor_score.py" in names
    assert expected_modules() <= names
    stubs = {f"vitprune_fast/{name}" for name in ("py.typed", "_host.pyi", "__init__.pyi")}
    tables = {"vitprune_fast/data/imagenet_top1.csv", "vitprune_fast/splits/digits.json"}
    assert stubs | tables <= names
    assert not [name for name in names if "test_" in name or name.endswith("conftest.py")]
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"vitprune_fast"}
    assert wheel.name.endswith("-py3-none-any.whl")


def test_sdist_holds_the_sources_once(pure):
    names, _ = pure
    native = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*")}
    assert native <= names
    assert "kernels/taylor_score.py" in names
    assert not [name for name in names if name.startswith("vitprune_fast/kernels/")]
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_link_to_kernels_is_committed_as_a_link():
    link = ROOT / "vitprune_fast" / "kernels"
    # where git cannot make links it writes their target as text; the editable install still works
    assert link.is_symlink() or link.read_text() == "../kernels"


def test_without_native_code_everything_works_and_says_so_once(pure, tmp_path):
    zipfile.ZipFile(pure[1]).extractall(tmp_path)
    script = """
import logging, numpy, torch
logging.basicConfig(format="%(levelname)s %(message)s")
from vitprune_fast import ops
from vitprune_fast.errors import BackendUnavailable
x = torch.arange(24.0).reshape(2, 3, 4)
table = ops.GatherTable([ops.Selection((3, 4), numpy.array([2, -1]), numpy.array([1, 3]))])
for _ in range(3):
    assert torch.equal(ops.taylor_score(x, x, 2), (x * x).sum(1).unflatten(1, (2, 2)).sum(2))
    (picked,) = ops.gather_all([x[0]], table)
    assert torch.equal(picked, torch.tensor([[9.0, 11.0], [0.0, 0.0]]))
assert {c.backend for c in ops.backends() if c.device == "cpu"} == {"eager"}
try:
    ops.gather_all([x[0]], table, backend="cpu")
except BackendUnavailable as error:
    assert "not built" in str(error)
else:
    raise AssertionError("a named backend fell back")
compiled = torch.compile(lambda x: ops.taylor_score(x, x), fullgraph=True, backend="aot_eager")
assert torch.equal(compiled(x), ops.taylor_score(x, x))
from vitprune_fast.doctor import doctor
assert "not built" in str(doctor())
"""
    result = run([sys.executable, "-c", script], tmp_path)
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stderr.splitlines() if "plain torch form" in line]
    assert len(said) == 1 and said[0].startswith("WARNING"), result.stderr


def test_an_installed_wheel_benches_without_pytest_and_the_repository(pure, tmp_path):
    """What it writes has the keys of what benches here write, and makes the same tables."""
    zipfile.ZipFile(pure[1]).extractall(tmp_path)
    script = """
import sys
sys.modules.update(dict.fromkeys(("pytest", "pytest_benchmark", "bench", "tests")))
from vitprune_fast.cli.main import main
status = main(["bench", "kernels", "--quick", "--device", "cpu", "--out", "kernels.json"])
sizes = ["img_size=32", "embed_dim=48", "depth=2", "num_heads=3", "num_classes=10"]
model = ["--model", "vit_tiny_patch16_224", "--model-args", *sizes, "--device", "cpu"]
few = ["--batch-size", "2", "--rounds", "1", "--out", "scoring.json"]
sys.exit(status + main(["bench", "scoring", *model, *few]))
"""
    result = run([sys.executable, "-c", script], tmp_path)
    assert result.returncode == 0, result.stderr
    kernels, scoring = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("kernels", "scoring")
    )
    committed = table.newest(table.contents())
    assert committed.keys() == kernels.keys() == scoring.keys()
    for made, name in ((kernels, "records"), (scoring, "scoring")):
        (known, *_), (found, *_) = committed[name], made[name]
        assert known.keys() == found.keys()
    assert (
        committed["scoring"][0]["entries"][0].keys() == scoring["scoring"][0]["entries"][0].keys()
    )
    assert {r["op"] for r in kernels["records"]} == {r["op"] for r in committed["records"]}
    line = table.kernels(kernels).splitlines()[4]
    assert line.startswith("| `attention_score` | ViT-Ti heads (2, 5, 4, 16), fp32")
    assert table.table(kernels).count("| gather_all |") > 10
    assert "| vit_tiny_patch16_224, batch 2, float32 | vitprune_fast" in table.races(scoring)


@pytest.mark.slow
def test_wheel_with_native_code_runs(tmp_path):
    _, wheel = build(copy_repository(tmp_path / "repository"), VITPRUNE_WITH_CUDA="0")
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    assert (installed / "vitprune_fast" / "_C.abi3.so").is_file()
    script = """
import torch
from vitprune_fast import _extension, _host, ops
assert _extension.extension_status() == "loaded", _extension.extension_status()
assert set(_host.build_info()) >= {"compiler", "torch", "cuda_arch_list", "cpu_instructions"}
x = torch.ones(2, 3, 4)
assert torch.equal(ops.taylor_score(x, x, backend="cpu"), torch.full((2, 4), 3.0))
"""
    result = run([sys.executable, "-c", script], installed)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("switches", "sentence"),
    [
        ({"VITPRUNE_BUILD_EXT": "yes"}, "VITPRUNE_BUILD_EXT must be 0 or 1, got 'yes'"),
        ({"VITPRUNE_WITH_CUDA": "2"}, "VITPRUNE_WITH_CUDA must be 0 or 1, got '2'"),
        (
            {"VITPRUNE_WITH_CUDA": "1", "CUDA_HOME": "/nowhere"},
            "CUDA_HOME must be the directory that holds include/cuda_runtime.h, got /nowhere",
        ),
    ],
    ids=["build-ext", "with-cuda", "no-headers"],
)
def test_setup_refuses_in_one_sentence(tmp_path, switches, sentence):
    root = copy_repository(tmp_path / "repository")
    result = run([sys.executable, "setup.py", "build_ext"], root, **switches)
    assert result.returncode != 0
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
