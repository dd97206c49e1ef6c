"""The instruction sets of this processor, and a child process for each that has no more than that.

``ATEN_CPU_CAPABILITY`` lowers what torch and our C++ kernels use; a process reads it once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

_ORDER = ["DEFAULT", "AVX2", "AVX512"]
_HERE = torch.backends.cpu.get_cpu_capability()
# of another architecture only its own is known
CAPABILITIES = _ORDER[: _ORDER.index(_HERE) + 1] if _HERE in _ORDER else [_HERE]

_CHILD = """
import json, sys, torch
assert torch.backends.cpu.get_cpu_capability() == sys.argv[1], torch.__config__.show()
torch.set_num_threads(1)
for line in sys.stdin:
    script, inputs, out = json.loads(line)
    names = {"inputs": torch.load(inputs, weights_only=True)}
    exec(script, names)
    torch.save(names["found"], out)
    print("done", flush=True)
"""


class Processors:
    """Runs scripts here and on each lower instruction set; a context, whose children are kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.children: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Processors:
        return self

    def __exit__(self, *error: object) -> None:
        for child in self.children.values():
            child.kill()
            child.communicate()

    def assert_same_bits(self, script: str, inputs: Any) -> None:
        """The tensors that the script makes of ``inputs`` and calls ``found`` are the same."""
        if not self.children:
            self.children = {name: self._start(name) for name in CAPABILITIES[:-1]}
        torch.save(inputs, self.folder / "inputs.pt")
        for name, child in self.children.items():
            request = [script, str(self.folder / "inputs.pt"), str(self.folder / f"{name}.pt")]
            print(json.dumps(request), file=child.stdin, flush=True)
        names: dict[str, Any] = {"inputs": inputs}
        exec(script, names)
        assert names["found"]
        # all have answered before anything is judged: an answer left over would be the next one's
        answers = [child.stdout and child.stdout.readline() for child in self.children.values()]
        for answer, child in zip(answers, self.children.values(), strict=True):
            assert answer == "done\n", child.stderr and child.stderr.read()
        for name in self.children:
            found = torch.load(self.folder / f"{name}.pt", weights_only=True)
            assert len(found) == len(names["found"])
            assert all(map(torch.equal, found, names["found"])), name

    def _start(self, capability: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", _CHILD, capability],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "ATEN_CPU_CAPABILITY": capability.lower()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
