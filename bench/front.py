"""What the README says in figures: the headline, a line per claim, and what is supported.

All of it is made of committed JSON by ``python bench/table.py``.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.evidence import page as evidence

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SUPPORT = ROOT / "tests" / "support.json"
PAGE = "bench/results/README.md"
STEPS = {
    "before": "dense",
    "cut": "half cut",
    "swept": "refitted, without labels or training",
    "after": "distilled",
}
# a letter for every unit kind
LETTERS = {
    "head": "h",
    "qk_dim": "q",
    "v_dim": "v",
    "neuron": "n",
    "embed": "e",
    "attn_branch": "a",
    "mlp_branch": "m",
    "block": "b",
}
# the criterion and normalisation of `vp.plan`
DEFAULT = ("taylor square", "per_mac")
Content = Mapping[str, Any]


def newest(name: str) -> Content:
    """The newest committed results of one measurement."""
    return json.loads(sorted(RESULTS.glob(f"[0-9]*_{name}.json"))[-1].read_text())


def headline(content: Content) -> str:
    """The default job over its seeds, a row per step."""
    runs, profile = content["runs"], content["runs"][0]["profile"]
    lines = ["| | top-1 | MACs | parameters | images/s |", "|---|--:|--:|--:|--:|"]
    for step, title in STEPS.items():
        top1 = evidence.mean_text([run[step]["top1"] for run in runs])
        macs, params = (
            statistics.fmean(run[step][name] / run["before"][name] for run in runs)
            for name in ("macs", "params")
        )
        rate = statistics.fmean(run[step]["images_per_s"] for run in runs)
        lines.append(f"| {title} | {top1} % | {macs:.0%} | {params:.0%} | {rate:,.0f} |")
    images, seeds = runs[0]["after"]["samples"], len(runs)
    lines += [
        "",
        "`make prune`: a small ViT on the digits that come with scikit-learn, means of "
        f"{seeds} seeds, ± half of the 95 % interval, {images} test images; {profile['hardware']}, "
        f"one thread, batch 64.",
    ]
    return "\n".join(lines)


def claims(timed: Content) -> str:
    """A line for each claim, with the figures and where they are from."""
    lines = [_scores(timed["scoring"]), _masked(timed["training"][0]), _kept()]
    lines += [_compared(), _reading(newest("data"))]
    return "\n".join(f"- {line}" for line in lines)


def _entry(race: Content, begins: str) -> Content:
    return next(entry for entry in race["entries"] if entry["name"].startswith(begins))


def _scores(races: Sequence[Content]) -> str:
    small, large = (race for race in races if race["case"].startswith("deit_tiny"))
    loops = [_entry(race, "Torch-Pruning Hessian")["times_ours"] for race in (small, large)]
    full, gates = (
        _entry(small, begins)["times_ours"] for begins in ("forward + full", "plain gates")
    )
    return (
        "Exact scores of every sample (heads and neurons, DeiT-Ti, CPU) against one backward a "
        f"sample: {loops[0]:.1f}x faster at batch 8, {loops[1]:.0f}x at batch 64; against gates in "
        f"plain PyTorch {gates:.2f}x, against one full backward {full:.2f}x ([scoring]({PAGE}))."
    )


def _masked(race: Content) -> str:
    ratio = _entry(race, "multiplicative masks")["times_ours"]
    return (
        "A training step behind masks that leave half of a DeiT-Ti runs on that half: "
        f"{ratio:.1f}x faster than masks that are multiplied in ([training]({PAGE}))."
    )


def _kept() -> str:
    by_budget = {
        row["macs"]: row["swept"]
        for row in newest("default_plan")["rows"]
        if row["part"] == "combination"
        and (row["criterion"], row["normalization"]) == DEFAULT
        and row["model"] == "cifar10"
    }
    half, less = (
        f"{100 * by_budget[macs]['share']:.1f} ± {196 * by_budget[macs]['share_se']:.1f} %"
        for macs in (0.5, 0.3)
    )
    return (
        f"Without any training a ViT-S/14 tuned to CIFAR-10 keeps {half} of its accuracy at half "
        f"of the MACs and {less} at 30 % "
        f"([what plans keep]({PAGE}#what-plans-keep-without-training))."
    )


def _compared() -> str:
    rows = (line.strip("| ").split(" | ") for line in evidence.claims(newest("evidence")["lines"]))
    points = {(row[0], row[2]): row[3] for row in rows if len(row) == 5}
    peer, fresh = (
        [points[f"`fast` is above {other}", f"at {share}"] for share in ("50%", "25%")]
        for other in ("Torch-Pruning Taylor", "a new model of its shape")
    )
    return (
        f"`fast` less Torch-Pruning's Taylor cut with the same training, digits: {peer[0]} points "
        f"of top-1 at half of the MACs, {peer[1]} at a quarter; less a new model of its shape: "
        f"{fresh[0]} and {fresh[1]} ([results](docs/results/README.md))."
    )


def _reading(content: Content) -> str:
    training = content["paths"]["training"]
    times = training["Pillow alone"]["ms"] / training["now, as a loader process reads"]["ms"]
    return (
        f"One core reads {content['images_per_s_per_core']['training']:,} training photographs a "
        f"second, with the bits of Pillow alone and {times:.1f}x as fast "
        "([feed the device](docs/feed-the-device.md))."
    )


def support(found: Mapping[str, Mapping[str, Sequence[str]]]) -> str:
    """Families and verbs with the unit kinds each takes; families that are alike share a row."""
    verbs = [verb for verb in next(iter(found.values())) if verb != "export"]
    lines = [f"| family | {' | '.join(verbs)} | export |", f"|---|{'---|' * (len(verbs) + 1)}"]
    alike: dict[str, list[str]] = {}
    for family, able in found.items():
        cells = ["".join(LETTERS[kind] for kind in able[verb]) or "-" for verb in verbs]
        row = f"{' | '.join(cells)} | {', '.join(able['export']) or '-'}"
        alike.setdefault(row, []).append(family)
    lines += [f"| {', '.join(families)} | {row} |" for row, families in alike.items()]
    words = ", ".join(f"{letter} {kind}" for kind, letter in LETTERS.items())
    return "\n".join(
        [*lines, "", f"Unit kinds: {words}. Each was tried (`python -m tests.support`)."]
    )
