"""Twenty cases whose scores, plans, costs and pruned models stay what they were, bit for bit.

What comes out the same on every machine (plans of given scores, predicted costs, the tensors of
pruned models) is committed next to this file and checked by ``test_golden.py``. Measured scores and
logits are sums whose order depends on the processor: a commit is compared with another one on one
machine by

    python -m tests.golden --against COMMIT

which runs this file on the package of that commit as well. ``--write`` writes the committed file.

Only public names are used here, so that commits far apart can run it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vitprune_fast as vp
from vitprune_fast.testing import VITS

FILE = Path(__file__).with_suffix(".json")
ROOT = Path(__file__).resolve().parent.parent
# the same on every machine; the others on the same machine alone
EVERYWHERE = ("plan", "cost", "pruned")


@dataclass(frozen=True)
class Case:
    """One model, how its units are scored and planned, and which of them a drawn plan cuts.

    Args:
        config: of the model, see ``vitprune_fast.testing``.
        cut: unit kinds that the drawn plan cuts, whole branches and blocks among them.
        score: arguments of ``vp.score``.
        plan: arguments of ``vp.plan``, with the arguments of its budget.
    """

    config: str
    cut: tuple[str, ...]
    score: dict[str, Any]
    plan: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What it is called in the file."""
        return f"{self.config} / {'+'.join(self.cut)} / {self.score['criterion']}"


def _taylor(**options: Any) -> dict[str, Any]:
    return {"criterion": "taylor", "units": "all", **options}


SMALLER = {"budget": {"macs": 0.75}}
CASES = (
    Case("plain", ("head", "neuron"), _taylor(), SMALLER),
    Case("plain", ("embed",), _taylor(reduction="square"), SMALLER),
    Case("plain", ("qk_dim", "v_dim"), _taylor(reduction="signed"), {"budget": {"params": 0.6}}),
    Case("plain", ("no heads", "no neurons"), {"criterion": "kl", "units": "all"}, SMALLER),
    Case(
        "plain", ("attn_branch", "mlp_branch"), {"criterion": "magnitude", "units": "all"}, SMALLER
    ),
    Case(
        "layerscale-registers-no_embed_class",
        ("head", "neuron", "embed"),
        _taylor(),
        {"budget": {"macs": 0.4}, "units": ("head", "neuron", "embed"), "round_to": {"embed": 4}},
    ),
    Case("layerscale-registers-no_embed_class", ("no heads", "qk_dim"), _taylor(path="taps")),
    Case("pre_norm-avg-fc_norm-no_qkv_bias", ("head", "block"), {"criterion": "fisher"}, SMALLER),
    Case(
        "no_class_token-no_pos_embed",
        ("neuron", "no heads"),
        {"criterion": "loss"},
        {"budget": {"keep": {"head": 0.5, "neuron": 0.25}}},
    ),
    Case("qk_norm", ("head", "neuron"), _taylor(), {"budget": {"macs": 0.5}, "min_units": 0}),
    Case(
        "qk_norm-rms",
        ("head", "embed"),
        _taylor(reduction="square"),
        {"budget": {"macs": 0.3}, "min_units": 0},
    ),
    Case(
        "scale_attn_norm-scale_mlp_norm",
        ("head", "neuron", "embed"),
        {"criterion": "activation", "units": ("head", "neuron")},
        {**SMALLER, "normalization": "mean_per_group"},
    ),
    Case("swiglu_packed-layerscale", ("neuron", "v_dim"), _taylor(), {**SMALLER, "round_to": 8}),
    Case("swiglu_packed-layerscale", ("no neurons", "no heads"), _taylor(path="fused")),
    Case("swiglu", ("neuron", "mlp_branch"), _taylor(), {**SMALLER, "allocation": "uniform"}),
    Case("no_proj_bias", ("no heads", "neuron"), _taylor(), {**SMALLER, "normalization": "lamp"}),
    Case("res_post_norm", ("head", "embed"), _taylor(), {**SMALLER, "normalization": "per_mac"}),
    Case("res_post_norm-rms", ("neuron", "attn_branch"), _taylor(), SMALLER),
    Case("deit_distilled", ("head", "neuron", "embed", "block"), _taylor(), SMALLER),
    Case("tied", ("head", "neuron"), {"criterion": "magnitude"}, {"budget": {"params": 0.7}}),
)


def build(config: str) -> Any:
    """The model, with weights that are the same on every machine."""
    model: Any = VITS["plain" if config == "tied" else config]().double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            steps = torch.randint(-256, 257, tensor.shape, generator=generator)
            scale = 2.0**-9 if tensor.ndim < 2 else 2.0**-9 * 3 / max(tensor.shape[-1], 1) ** 0.5
            shift = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            tensor.copy_(steps * scale + shift)
    if config == "tied":
        model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    return model


def drawn(structure: vp.Structure, cut: tuple[str, ...], tied: bool) -> vp.Plan:
    """A plan that cuts some units of the kinds, and all units of one axis for ``no ...``."""
    rng = random.Random(0)
    kept: dict[str, list[int]] = {}
    for kind in cut:
        if kind.startswith("no "):
            kept[structure.units(kind.removeprefix("no ").removesuffix("s"))[1].name] = []
            continue
        axes = structure.units(kind)
        for axis in axes:
            few = max(1, axis.size // 2)
            same = axes[0].name if tied else axis.name
            kept[axis.name] = kept.get(same) or sorted(rng.sample(range(axis.size), few))
    return vp.Plan.of(structure, kept)


def outcome(case: Case) -> dict[str, str]:
    """Digests and costs of all that the case computes."""
    torch.set_num_threads(1)
    model = build(case.config)
    structure = vp.describe(model)
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(-8, 9, (6, 3, 16, 16), generator=generator).double() / 4
    batches = [(images[:4], torch.tensor([0, 1, 2, 3])), (images[4:], torch.tensor([4, 0]))]
    scores = vp.score(model, batches, **case.score)
    plan = drawn(structure, case.cut, case.config == "tied")
    plans = [plan]
    if case.plan:
        options = {**case.plan}
        units = options.get("units", ("head", "neuron"))
        steps = {
            axis.name: torch.randint(1, 1000, (axis.size,), generator=generator).float()
            for kind in units
            for axis in structure.units(kind)
        }
        ranked = vp.Scores(steps, "drawn", "mean", 1)
        plans.append(vp.plan(structure, ranked, vp.Budget(**options.pop("budget")), **options))
    pruned = [vp.prune(model, one) for one in plans]
    with torch.no_grad():
        logits = [one(images) for one in pruned]
    return {
        "scores": _digest(dict(scores.items())),
        "logits": _digest({str(number): one for number, one in enumerate(logits)}),
        "plan": _text([one.to_json() for one in plans]),
        "cost": str([tuple(asdict(vp.predict_cost(structure, one)).values()) for one in plans]),
        "pruned": _text([_digest(_state(one)) for one in pruned]),
    }


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def _text(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def outcomes() -> dict[str, dict[str, str]]:
    """Of all cases, by their names."""
    return {case.name: outcome(case) for case in CASES}


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What is not the same, in words."""
    return [
        f"{name}: {part} differ"
        for name in {**ours, **theirs}
        for part in ours.get(name, {"the cases": ""})
        if ours.get(name, {}).get(part) != theirs.get(name, {}).get(part)
    ]


def of_commit(commit: str) -> dict[str, Any]:
    """The outcomes of another commit, in a checkout of it with the native code of this one."""
    with tempfile.TemporaryDirectory() as folder:
        run = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*run, "add", "--detach", "-q", folder, commit], check=True)
        try:
            for library in (ROOT / "vitprune_fast").glob("*.so"):
                (Path(folder) / "vitprune_fast" / library.name).symlink_to(library)
            printed = subprocess.run(
                [sys.executable, str(Path(__file__).resolve()), "--print"],
                env={**os.environ, "PYTHONPATH": folder, "PYTHONSAFEPATH": "1"},
                cwd=folder,
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        finally:
            subprocess.run([*run, "remove", "--force", folder], check=True)
    return json.loads(printed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--against", metavar="COMMIT", help="compare with another commit")
    what.add_argument("--write", action="store_true", help=f"write {FILE.name}")
    what.add_argument("--print", action="store_true", help="print all outcomes as JSON")
    chosen = parser.parse_args()
    found = outcomes()
    if chosen.print:
        print(json.dumps(found))
        return 0
    if chosen.write:
        kept = {name: {part: one[part] for part in EVERYWHERE} for name, one in found.items()}
        FILE.write_text(json.dumps(kept, indent=1) + "\n")
        return 0
    other = differences(found, of_commit(chosen.against))
    print("\n".join(other) or f"{len(found)} cases are the same, bit for bit")
    return len(other) > 0


if __name__ == "__main__":
    sys.exit(main())
