"""pyproject.toml names what is imported, and nothing else; without triton everything still runs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable
from itertools import chain

from packaging.requirements import Requirement

from tests.declared import BUILD, EXTRAS, PROJECT, ROOT, TEST

# where the package that is installed and the module that is imported differ in more than a hyphen
MODULES = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}
OURS = {"vitprune_fast", "kernels", "tests", "bench"}
# extras of which other packages import the module for us, and where we count on it
THROUGH = {
    "tensorboard": ("vitprune_fast/run/tensorboard.py", "torch.utils.tensorboard"),
    # a model of it is known by the home of its class
    "transformers": ("vitprune_fast/structure/families/__init__.py", '"transformers.models.'),
    # torch's exporter writes with these
    "onnx": ("vitprune_fast/export/onnx.py", 'needed("onnx", "onnx"'),
    "onnxscript": ("vitprune_fast/export/onnx.py", '"onnxscript"'),
}


def modules(requirements: Iterable[str]) -> set[str]:
    """The modules that requirements bring."""
    names = (Requirement(each).name for each in requirements)
    return {MODULES.get(name, name.replace("-", "_")) for name in names}


def imported(*folders: str) -> dict[str, str]:
    """Top module -> one file of the folders that imports it, not ours and not of Python."""
    found = {}
    for folder in folders:
        # a module next to a test is imported by its bare name
        siblings = {path.stem for path in (ROOT / folder).iterdir()}
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                    names = [node.module]
                else:
                    continue
                for top in {name.partition(".")[0] for name in names} - siblings - OURS:
                    if top not in sys.stdlib_module_names:
                        found[top] = str(path.relative_to(ROOT))
    return found


def test_what_is_imported_is_declared() -> None:
    declared = modules([*PROJECT["dependencies"], *chain(*EXTRAS.values())])
    for folders, more in (
        (("vitprune_fast", "kernels"), []),
        (("tests", "bench"), [*TEST, *BUILD]),
    ):
        declared |= modules(more)
        assert not [found for found in imported(*folders).items() if found[0] not in declared]


def test_what_is_declared_is_imported() -> None:
    used = set(imported("vitprune_fast", "kernels"))
    for module, (path, sign) in THROUGH.items():
        assert sign in (ROOT / path).read_text()
        assert module not in used
        used.add(module)
    assert not modules([*PROJECT["dependencies"], *chain(*EXTRAS.values())]) - used


def test_the_oldest_torch_is_the_same_everywhere() -> None:
    building, running = (
        {each.name: each.specifier for each in map(Requirement, requirements)}
        for requirements in (BUILD, PROJECT["dependencies"])
    )
    (oldest,) = running["torch"]
    assert oldest.operator == ">=" and building["torch"] == running["torch"]
    major, minor = map(int, oldest.version.split("."))
    # the highest two bytes of the version whose stable interface the native code asks for
    assert f"TORCH_TARGET_VERSION=0x{major:02x}{minor:02x}" in (ROOT / "setup.py").read_text()


WITHOUT_TRITON = """
import sys
# what imports raise for; "is it installed?" is answered with no
sys.modules["triton"] = None
import importlib, pkgutil
import torch
import vitprune_fast as vp
from vitprune_fast import _extension
from vitprune_fast.cli.main import main
from vitprune_fast.errors import BackendUnavailable
from vitprune_fast.testing import random_images, random_vit

for name in vp.__all__:
    getattr(vp, name)
for module in pkgutil.walk_packages(vp.__path__, "vitprune_fast."):
    # the kernels are written in it; _C is no module but a library of ops
    if not module.name.startswith(("vitprune_fast.kernels", "vitprune_fast._C")):
        importlib.import_module(module.name)
model = random_vit(dtype=torch.float32)
batches = [(random_images(model, 4), torch.arange(4))]
scores = vp.score(model, batches)
plan = vp.plan(model, scores, vp.Budget(macs=0.5))
small = vp.prune(model, plan)
config = vp.DistillConfig(epochs=1, warmup_epochs=0, log_steps=1)
result = vp.distill(small, model, batches, None, config)
assert result.history[0]["step"] == 1
x = torch.rand(2, 3, 4)
for backend in ("auto", "eager", *(["cpu"] if _extension.OBSTACLE is None else [])):
    torch.testing.assert_close(vp.ops.taylor_score(x, x, backend=backend), (x * x).sum(1))
try:
    vp.ops.taylor_score(x, x, backend="triton")
except BackendUnavailable as error:
    assert "the package triton is not installed" in str(error)
else:
    raise AssertionError("triton runs")
assert main(["doctor"]) == 0
"""


def test_without_triton_everything_runs_on_a_cpu() -> None:
    command = [sys.executable, "-c", WITHOUT_TRITON]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "not triton: the package triton is not installed" in result.stdout
