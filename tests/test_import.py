"""What importing costs: no second copy of the kernels, nothing heavy, no CUDA."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run_fresh(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a new interpreter at the root of the repository."""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_kernels_refuse_a_second_name():
    for script in ("import kernels.taylor_score", "from kernels import taylor_score"):
        result = run_fresh(script)
        assert result.returncode != 0
        assert "ImportError" in result.stderr or "ModuleNotFoundError" in result.stderr
    result = run_fresh("import kernels; kernels.taylor_score")
    assert "import vitprune_fast.kernels, not kernels" in result.stderr


def test_transformers_can_be_used_from_the_root_of_a_clone():
    """It looks for Hugging Face's package ``kernels``, and meets our folder of that name."""
    pytest.importorskip("transformers")
    result = run_fresh("from transformers import ViTForImageClassification as V; print(V.__name__)")
    assert result.stdout.strip() == "ViTForImageClassification", result.stderr


def test_kernels_are_one_package():
    pytest.importorskip("triton")
    script = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import vitprune_fast.kernels.taylor_score as kernel
print(kernel.__name__)
"""
    result = run_fresh(script)
    assert result.stdout.strip() == "vitprune_fast.kernels.taylor_score", result.stderr


def test_scoring_pruning_and_training_need_only_the_core_dependencies():
    script = """
import sys
# what imports raise for; unlike a raising finder it still answers "is it installed?" with no
for name in ("tyro", "rich", "yaml", "matplotlib", "sklearn", "jinja2", "pybind11"):
    sys.modules[name] = None
import torch
import vitprune_fast as vp
from vitprune_fast.testing import random_images, random_vit
model = random_vit(dtype=torch.float32)
scores = vp.score(model, [(random_images(model), torch.tensor([0, 1]))])
small = vp.prune(model, vp.plan(model, scores, vp.Budget(macs=0.5)))
assert vp.cost(small).macs <= 0.5 * vp.cost(model).macs
assert "torch" in str(vp.doctor())
assert callable(vp.distill)
x = torch.ones(2, 3, 4)
assert vp.ops.taylor_score(x, x).sum() == 24
"""
    result = run_fresh(script)
    assert result.returncode == 0, result.stderr


def test_public_names_keep_their_meaning_whatever_is_imported_first():
    script = """
import sys
import vitprune_fast.config.distill
import vitprune_fast as vp
assert "torch" not in sys.modules
import vitprune_fast.doctor
import vitprune_fast.run.folder
for name in vp.__all__:
    value = getattr(vp, name)
    assert callable(value) or name in ("gates", "ops"), name
assert vp.distill.__module__ == "vitprune_fast.distill.loop"
assert vp.run.__module__ == "vitprune_fast.recipes.start"
assert {name for name in dir(vp) if not name.startswith("__")} == set(vp.__all__)
"""
    result = run_fresh(script)
    assert result.returncode == 0, result.stderr


def test_importing_ops_leaves_triton_and_cuda_alone():
    script = """
import sys
import torch
def refuse(*args, **kwargs):
    raise AssertionError("importing must not touch CUDA")
torch.cuda.init = torch.cuda._lazy_init = refuse
before = set(sys.modules)
import vitprune_fast
import vitprune_fast.ops
added = {name.partition(".")[0] for name in set(sys.modules) - before}
assert "triton" not in added, added
assert "torch._dynamo" not in set(sys.modules) - before
assert not torch.cuda.is_initialized()
"""
    result = run_fresh(script)
    assert result.returncode == 0, result.stderr
