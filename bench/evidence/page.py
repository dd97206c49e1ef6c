"""docs/results/: tables and a plot of what `python -m bench.evidence` found.

Differences are paired by seed; their intervals are those of Student's t over the seeds.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t

from bench import study
from bench.evidence.arms import LOSSES, OURS, PEER, SHARES, TOLERANCES

FOLDER, PLOT = study.RESULTS.parents[1] / "docs" / "results", "digits-{share}.png"
INTRODUCTION = """# Recipes beside each other

Written by `make evidence` from the committed JSON; not edited by hand. The digits of `make
prune`, 599 test images, which no run saw before its end. All arms start from the same dense model
of a seed, see as many images after it (30 epochs, in one training or in several; `one-shot` none,
and the CNN of `kd-cnn` its own before) and choose their checkpoint on validation images. *Cut*
and *swept* are before any training after the cut; models on the way of recipes with several cuts
are not shown. Differences are paired by seed; ± is half of the 95 % interval of Student's t over
the seeds. Torch-Pruning 1.6.1 cuts by its Taylor importance with one ratio, found by bisection,
once over all widths and once inside of branches (its script's `--bottleneck`); it is taught as
`fast` is. A model *from scratch* has the shape that `fast` found; it and a fresh student see as
many images as the dense model did besides, but in the table of losses. Times are ratios to the
dense model, measured in turns on one thread.
"""
CLAIMS_TEXT = """## What holds

A claim *holds* where the whole 95 % interval of the difference is above 0, and *does not hold*
where the whole of it is below; else these seeds *cannot tell*. The interval is that of other seeds
on the same 599 images, one of which is .17 points; among so many claims one may hold by chance.
Differences are percentage points of top-1, or of the dense model's multiply-accumulates. The
comparisons are ours, of whole methods with their losses and teachers.
"""
# of arms: the claim, whose it is, the arm, what it is compared with
CLAIMS = (
    (f"`{OURS}` is above Torch-Pruning Taylor", "ours", OURS, PEER),
    (f"`{OURS}` is above a new model of its shape", "ours", OURS, "from scratch, distilled"),
    (f"`{OURS}` is above `manifold` after one cut", "ours", OURS, "manifold, cut"),
    (f"`{OURS}` is above random cuts", "ours", OURS, "random"),
    ("`kd-cnn` is above random cuts", "Xu et al.", "kd-cnn", "random"),
    ("`width-depth` is above random cuts", "Zheng et al.", "width-depth", "random"),
    ("`unified` is above random cuts", "Yu and Wu", "unified", "random"),
    ("`auto-ratio` is above random cuts", "Feng et al.", "auto-ratio", "random"),
    ("`auto-ratio` is above `fixed-ratio`", "Feng et al.", "auto-ratio", "fixed-ratio"),
)
LOSSES_TEXT = """## Losses for a fresh student

One fresh student of about a quarter of the multiply-accumulates, one teacher, the same images (40
epochs).
"""
RATIOS_TEXT = """## One ratio against separate ratios, at an equal tolerance

Both are cut as far as the validation images allow before anything is trained: by one ratio for
heads and neurons, or by separate ones. At equal cost they stand in the tables above. The 56.91 %
of Feng et al. are against token masks, which are not built here.
"""
# seeds that a claim is judged by
LEAST = 3
Line = dict[str, Any]


def handed_back(folder: Path) -> Path:
    """The model that a run handed back."""
    summary = json.loads((folder / "summary.json").read_text())
    return folder / summary["models"]["after"]


def interval(values: Sequence[float]) -> float:
    """Half of the 95 % interval of a mean; NaN for one value."""
    if len(values) < 2:
        return float("nan")
    factor = float(student_t.ppf(0.975, len(values) - 1))
    return factor * statistics.stdev(values) / len(values) ** 0.5


def mean_text(values: Sequence[float]) -> str:
    """A mean of shares in per cent, with its interval; of one value that alone."""
    if len(values) == 1:
        return f"{100 * values[0]:.2f}"
    return f"{100 * statistics.fmean(values):.2f} ± {100 * interval(values):.2f}"


def difference(ours: dict[int, float], theirs: dict[int, float]) -> list[float]:
    """By seeds that both have."""
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def top1s(lines: Sequence[Line], arm: str, share: float, row: str = "after") -> dict[int, float]:
    """Seed -> top-1 of an arm at a budget, where it has that row."""
    return {
        line["seed"]: line["rows"][row]["top1"]
        for line in lines
        if line["arm"] == arm and line["share"] == share and row in line["rows"]
    }


def arms_table(lines: Sequence[Line], latency: Sequence[Line], share: float) -> list[str]:
    """One line per arm, the best first."""
    mine = [line for line in lines if line["table"] == "arms" and line["share"] == share]
    ms = {each["arm"]: each["ms"] for each in latency if each["share"] == share}
    peer = top1s(mine, PEER, share)
    # all begin with one architecture
    dense = next(line["rows"]["before"]["macs"] for line in mine if line["arm"] == OURS)
    rows = []
    for arm in dict.fromkeys(line["arm"] for line in mine):
        found = top1s(mine, arm, share)
        after = [line["rows"]["after"] for line in mine if line["arm"] == arm]
        parts = [top1s(mine, arm, share, row) for row in ("cut", "swept")]
        cells = [f"{100 * statistics.fmean(p.values()):.1f}" if p else "-" for p in parts]
        against = difference(found, peer)
        against_text = mean_text(against) if against and arm != PEER else "-"
        times = "-"
        if arm in ms and "dense" in ms:
            ratios = [ms["dense"][b] / ms[arm][b] for b in ("batch1", "batch64")]
            times = " / ".join(f"{ratio:.2f}" for ratio in ratios)

        def of(name: str, rows: list[Any] = after) -> float:
            return statistics.fmean(row[name] for row in rows)

        rows.append(
            (
                statistics.fmean(found.values()),
                f"| {arm} | {len(found)} | {' | '.join(cells)} | {mean_text([*found.values()])} "
                f"| {against_text} | {of('macs') / dense:.1%} | {of('params') / 1e3:,.0f} "
                f"| {of('file_bytes') / 1e3:,.0f} | {of('peak_memory_bytes') / 1e3:,.0f} "
                f"| {times} |",
            )
        )
    head = [
        f"| at {share:.0%} of the MACs | seeds | cut | swept | handed back | less {PEER} | MACs "
        "| params, k | file, kB | peak memory, kB | times faster, batch 1 / 64 |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    return [*head, *(text for _, text in sorted(rows, key=lambda row: -row[0])), ""]


def verdict(values: Sequence[float]) -> tuple[str, str]:
    """A mean difference, and what it says about the claim that it is above 0."""
    mean, half = statistics.fmean(values), interval(values)
    said = "holds" if mean > half else "does not hold" if mean < -half else "cannot tell"
    return f"{100 * mean:+.2f} ± {100 * half:.2f}", said


def macs_left(lines: Sequence[Line], arm: str) -> dict[int, float]:
    """Seed -> share of the multiply-accumulates that an arm has left."""
    return {
        line["seed"]: line["rows"]["after"]["macs"] / line["rows"]["before"]["macs"]
        for line in lines
        if line["arm"] == arm
    }


def claims(lines: Sequence[Line]) -> list[str]:
    """A line per claim and what it was measured on."""
    arms, students, ratios = (
        [line for line in lines if line["table"] == table]
        for table in ("arms", "students", "ratios")
    )
    found: list[tuple[str, str, dict[str, list[float]]]] = []
    for claim, whose, ours, theirs in CLAIMS:
        pairs = {
            f"at {share:.0%}": difference(top1s(arms, ours, share), top1s(arms, theirs, share))
            for share in SHARES
        }
        found.append((claim, whose, pairs))
    by_tolerance = {
        f"tolerance {tolerance:.0%}": difference(
            macs_left(ratios, f"fixed-ratio, {tolerance}"),
            macs_left(ratios, f"auto-ratio, {tolerance}"),
        )
        for tolerance in TOLERANCES
    }
    found.append(("`auto-ratio` leaves fewer MACs than `fixed-ratio`", "Feng et al.", by_tolerance))
    share = min(SHARES)
    for ours, whose, others in (
        ("manifold", "Hao et al.", ("soft", "hard", "soft, hidden", "soft, relation")),
        ("manifold-full", "ours", ("soft", "manifold")),
    ):
        mine = top1s(students, ours, share)
        pairs = {
            f"than {other}": difference(mine, top1s(students, other, share)) for other in others
        }
        found.append((f"`{ours}` teaches a fresh student better", whose, pairs))
    rows = ["| claim | method of | | difference | |", "|---|---|---|--:|---|"]
    for claim, whose, pairs in found:
        judged = {label: each for label, each in pairs.items() if len(each) >= LEAST}
        rows += [
            f"| {claim} | {whose} | {label} | {' | '.join(verdict(each))} |"
            for label, each in judged.items()
        ]
    return [*rows, ""]


def losses_table(lines: Sequence[Line]) -> list[str]:
    """One line per set of losses, beside the soft one."""
    mine = [line for line in lines if line["table"] == "students"]
    share = min(SHARES)
    soft = top1s(mine, "soft", share)
    rows = ["| losses | seeds | top-1 | less soft |", "|---|--:|--:|--:|"]
    for name in LOSSES:
        found = top1s(mine, name, share)
        if found:
            against = difference(found, soft)
            text = mean_text(against) if name != "soft" and against else "-"
            rows.append(f"| {name} | {len(found)} | {mean_text([*found.values()])} | {text} |")
    return [*rows, ""]


def ratios_table(lines: Sequence[Line]) -> list[str]:
    """Fixed against separate ratios, at equal accuracy."""
    mine = [line for line in lines if line["table"] == "ratios"]
    rows = [
        "| tolerance | recipe | seeds | heads gone | neurons gone | MACs left | of those of fixed "
        "| cut, top-1 | handed back |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for tolerance in TOLERANCES:
        left: dict[str, dict[int, float]] = {}
        for recipe in ("fixed-ratio", "auto-ratio"):
            own = [line for line in mine if line["arm"] == f"{recipe}, {tolerance}"]
            if not own:
                continue
            left[recipe] = macs_left(mine, f"{recipe}, {tolerance}")
            gone = [
                f"{statistics.fmean(line['ratios'][kind] for line in own):.1%}"
                for kind in ("head", "neuron")
            ]
            fixed = left.get("fixed-ratio", {})
            of_fixed = [share / fixed[s] for s, share in left[recipe].items() if s in fixed]
            accuracy = [
                f"{100 * statistics.fmean(line['rows'][row]['top1'] for line in own):.2f}"
                for row in ("cut", "after")
            ]
            rows.append(
                f"| {tolerance:.0%} | {recipe} | {len(own)} | {' | '.join(gone)} "
                f"| {mean_text([*left[recipe].values()])} % | {mean_text(of_fixed)} % "
                f"| {' | '.join(accuracy)} |"
            )
    return [*rows, ""]


def plot(lines: Sequence[Line], share: float) -> bytes:
    """Top-1 of every arm at a budget: seeds as rings, means with their interval, as PNG."""
    from vitprune_fast.run.report import figures

    mine = [line for line in lines if line["table"] == "arms" and line["share"] == share]
    arms = dict.fromkeys(line["arm"] for line in mine)
    found = {arm: [100 * value for value in top1s(mine, arm, share).values()] for arm in arms}
    order = sorted(found, key=lambda arm: statistics.fmean(found[arm]))

    def draw(axes: Any) -> None:
        for place, arm in enumerate(order):
            color = {OURS: figures.AFTER, PEER: figures.LINES[1]}.get(arm, figures.BEFORE)
            values = found[arm]
            axes.plot(values, [place] * len(values), "o", ms=4, mfc="none", color=color)
            mean, half = statistics.fmean(values), interval(values)
            axes.errorbar(mean, place, xerr=half, fmt="s", ms=5, capsize=3, color=color)
        axes.set_yticks(range(len(order)), order)
        axes.set_xlabel(f"top-1 at {share:.0%} of the MACs, %")
        # every seed is shown; an interval may end outside
        axes.set_xlim(min(min(values) for values in found.values()) - 0.5, 100)
        axes.grid(axis="x")

    return figures.picture(0.28 * len(order) + 0.8, draw)


def text(content: dict[str, Any]) -> str:
    """The page."""
    lines, latency = content["lines"], content.get("latency", [])
    versions = content["versions"]
    state = "" if content["complete"] else " Not all runs are finished."
    parts = [
        INTRODUCTION,
        f"`{content['command']}`, commit {content['commit']}, {content['date']}, "
        f"{content['device']}, torch {versions['torch']}.{state}\n",
        CLAIMS_TEXT,
        *claims(lines),
    ]
    for share in SHARES:
        name = PLOT.format(share=round(100 * share))
        parts += [f"## At {share:.0%} of the multiply-accumulates\n", f"![top-1]({name})\n"]
        parts += arms_table(lines, latency, share)
    parts += [LOSSES_TEXT, *losses_table(lines), RATIOS_TEXT, *ratios_table(lines)]
    return "\n".join(parts)


def newest() -> dict[str, Any]:
    """What the newest committed measurement found."""
    found = sorted(study.RESULTS.glob("[0-9]*_evidence.json"))
    if not found:
        raise SystemExit(f"error: no results in {study.RESULTS}; run `make evidence` first")
    return json.loads(found[-1].read_text())


def write() -> None:
    """Writes the page and its pictures from the newest measurement."""
    content = newest()
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "README.md").write_text(text(content))
    for share in SHARES:
        path = FOLDER / PLOT.format(share=round(100 * share))
        path.write_bytes(plot(content["lines"], share))
