"""No file of ours unpickles, evaluates or runs what it reads; a planted call is found."""

from __future__ import annotations

from pathlib import Path

import pytest
from source_check import violations

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    [
        *ROOT.glob("vitprune_fast/**/*.py"),
        *ROOT.glob("kernels/**/*.py"),
        *ROOT.glob("bench/**/*.py"),
        ROOT / "setup.py",
    ]
)


def test_no_source_runs_what_it_reads() -> None:
    assert len(SOURCES) > 50
    found = [
        line
        for path in SOURCES
        for line in violations(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle\npickle.load(f)",
        "import pickle as p\np.loads(b)",
        "from pickle import loads as read\nread(b)",
        "import pickle\nread = pickle.loads",
        "import pickle\nclass R(pickle.Unpickler): pass",
        "import dill",
        "from cloudpickle import load",
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "import torch\ntorch.load(f, weights_only=flag)",
        "from torch import load\nload(f, 'cpu')",
        "import timm\ntimm.models.load_checkpoint(m, f, weights_only=False)",
        "eval(text)",
        "def innocent(run=eval): return run(1)",
        "def other(compile=False): return compile\ncompile(text, 'x', 'exec')",
        "class Config:\n    run: Any = eval",
        "exec(text)",
        "compile(text, 'x', 'exec')",
        "import builtins\nbuiltins.eval(text)",
        "import yaml\nyaml.load(f, Loader=yaml.SafeLoader)",
        "from yaml import unsafe_load\nunsafe_load(f)",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import subprocess as s\ns.check_output(x, shell=flag)",
        "import os\nos.system('ls')",
        "from os import popen\npopen('ls')",
        "import transformers\ntransformers.AutoModel.from_pretrained(x, trust_remote_code=True)",
        "import numpy\nnumpy.load(f, allow_pickle=True)",
        "import torch.distributed.checkpoint as dcp\ndcp.load(state)",
        "from torch.distributed import checkpoint\ncheckpoint.load(state)",
        "import torch\ntorch.distributed.checkpoint.load(state)",
        "import torch\ntorch.hub.load('a/b', 'c')",
        "import torch\ntorch.jit.load(f)",
    ],
)
def test_planted_calls_are_found(planted: str) -> None:
    line = len(planted.splitlines())
    (found, *_) = violations(f"def innocent():\n    return 1\n\n{planted}\n", "x.py")
    assert found.startswith(f"x.py:{3 + line}: ")


@pytest.mark.parametrize(
    "harmless",
    [
        "'pickle.load'  # eval(x)",
        "model.eval()",
        "import torch\ntorch.load(f, weights_only=True)",
        "import torch\ntorch.compile(model)",
        "def fit(model, compile=False):\n    return torch.compile(model) if compile else model",
        "class Config:\n    compile: bool = False",
        "import re\nre.compile('x')",
        "import yaml\nyaml.safe_load(f)",
        "import json\njson.load(f)",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
        "from safetensors.torch import load\nload(b)",
        "from .files import load\nload(b)",
    ],
)
def test_harmless_calls_are_not(harmless: str) -> None:
    assert violations(harmless, "x.py") == []
