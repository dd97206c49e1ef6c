"""Turn bench/results/*.json into the tables of its page, and the figures of the README and of docs.

python bench/table.py [--add DIR ...]

``--add`` first makes one results file of what the runs of `make gpu` left in these folders.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from bench import front  # noqa: E402
from bench import lines as found_lines  # noqa: E402

RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
FEEDING = ROOT / "docs" / "feed-the-device.md"
# what a run that is only estimated takes for granted
RATES = ROOT / "vitprune_fast" / "run" / "rates.json"
MARKS = {
    name: (f"<!-- {name}:begin -->", f"<!-- {name}:end -->")
    for name in ("headline", "support", "claims", "data")
}
INTRODUCTION = """# Measured results

Written by `make bench` and `make gpu` from the JSON files next to it; not edited by hand. Each line
is the minimum over interleaved rounds, after the outputs were checked to be equal. CPU numbers are
the processor time of one thread; GPU numbers are of replayed graphs, with what the host needs for
one call outside of them as "host us". "times ours" above 1 means that our form is the faster one;
"of copy" is the speed as a share of that of a plain copy that moves as many bytes, raced with it;
"spread" is how far the median lies above the minimum.
"""
OURS = "vitprune"
# of a call on the host, in the order of the columns
HOST_FORMS = ("vitprune", "registered", "torch")
# points of top-1 that the digits may lose under a default
MAY_LOSE = {"cut": 2.0, "swept": 0.5}
# ops that gated_unit and gather_all took the place of; their times are not those of these kernels
GONE = ("activation_score", "gated_activation", "gated_glu", "glu_score", "gather")
COLUMNS = (
    "| op | case | form | min us | GB/s | of copy | times ours | spread | host us |\n"
    "|---|---|---|--:|--:|--:|--:|--:|--:|"
)


def load_note(content: dict) -> str:
    """A warning where other work ran during the measurement."""
    load = content.get("load_average", 0)
    return f", load average {load}: other work shared the caches" if load > 1.5 else ""


def facts(content: dict) -> str:
    """Command, commit, date and versions of one results file, and what went wrong in it."""
    versions = content["versions"]
    bad = [
        f", {case['status'].upper()}: {name}"
        for name, case in content.get("cases", {}).items()
        if case["status"] not in found_lines.GOOD
    ]
    return (
        f"`{content['command']}`, commit {content['commit']}, {content['date']}, "
        f"torch {versions['torch']}, Triton {versions['triton']}"
        f"{load_note(content)}{''.join(bad)}."
    )


def share_of_copy(record: dict) -> str:
    """In per cent; a dash where it was not measured."""
    return f"{100 * record['of_copy']:.0f} %" if "of_copy" in record else "-"


def table(content: dict) -> str:
    """The table of one results file."""
    rows = [
        f"| {r['op']} | {r['case']} | {r['form']} | {r['min_us']} | {r['gb_per_s']} "
        f"| {share_of_copy(r)} | {r['times_ours']} | {100 * r['spread']:.0f} % "
        f"| {r.get('host_us', '-')} |"
        for r in content["records"]
        if "disagrees" not in r
    ]
    rows += ["", *(f"- {r['disagrees']}." for r in content["records"] if "disagrees" in r)]
    return "\n".join([f"## {content['device']}\n", facts(content) + "\n", COLUMNS, *rows, ""])


def stages(content: dict) -> str:
    """Wall times of stages of one results file; empty where there are none."""
    if not content.get("stages"):
        return ""
    lines = ["| case | stage | s |", "|---|---|--:|"]
    for found in content["stages"]:
        lines += [f"| {found['case']} | {name} | {s} |" for name, s in found["seconds"].items()]
    return "\n".join([*lines, ""])


def races(content: dict) -> str:
    """The table of whole scoring steps of one results file; empty where there are none."""
    if not content.get("scoring"):
        return ""
    lines = [*race_lines(content["scoring"]), ""]
    lines += ["Of limit: the matrix products at the best rate measured in the same run."]
    lines += [
        f"Peak memory, {found['case']}: {found['score'] / 2**20:,.0f} MiB to score, "
        f"{found['full'] / 2**20:,.0f} MiB for a full backward, whose gradients are "
        f"{found['gradients'] / 2**20:,.0f} MiB."
        for found in content.get("memory", [])
        if "score" in found
    ]
    lines += [
        f"Peak memory, {found['case']}: {found['prune'] / 2**20:,.0f} MiB to prune, "
        f"for a result of {found['result'] / 2**20:,.0f} MiB."
        for found in content.get("memory", [])
        if "prune" in found
    ]
    return "\n".join([*lines, ""])


def training_races(content: dict) -> str:
    """The table of whole training steps of one results file; empty where there are none."""
    if not content.get("training"):
        return ""
    lines = [*race_lines(content["training"]), ""]
    lines += [
        f"Peak memory, {found['case']}: {found['vitprune'] / 2**20:,.0f} MiB, and "
        f"{found['materialised'] / 2**20:,.0f} MiB with all similarities written out."
        for found in content.get("memory", [])
        if "materialised" in found
    ]
    return "\n".join([*lines, ""])


def race_lines(races: list[dict]) -> list[str]:
    """A line per form of every race."""
    lines = [
        "| case | form | ms | images/s | times ours | of limit | spread |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for found in races:
        for entry in found["entries"]:
            form = f"{entry['name']} ({entry['note']})" if entry["note"] else entry["name"]
            limit = f"{100 * entry['of_limit']:.0f} %" if entry["of_limit"] else "-"
            lines.append(
                f"| {found['case']} | {form} | {1e3 * entry['seconds']:,.1f} "
                f"| {entry['images_per_s']:,.1f} | {entry['times_ours']:.2f} | {limit} "
                f"| {100 * entry['spread']:.0f} % |"
            )
    return lines


def contents() -> list[dict]:
    """What the files with timings of ops hold, newest first; not of ops that are no more."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))[::-1]]
    found = [content for content in found if content.get("records")]
    for content in found:
        content["records"] = [r for r in content["records"] if r["op"] not in GONE]
    return found


def newest_files(name: str) -> list[Path]:
    """The newest file of a measurement that has its own; none before it was made."""
    return sorted(RESULTS.glob(f"*_{name}.json"))[-1:]


def page() -> str:
    """The page of the results: a section for every file."""
    timed = contents()
    made = (table, races, training_races, stages)
    parts = [kernels(newest(timed))] if timed else []
    parts += [part for content in timed for make in made if (part := make(content))]
    for name, made in (
        ("digits", digits),
        ("attention_form", attention),
        ("threads", threads),
        ("sweep", sweeps),
        ("host_time", host_times),
        ("criteria", criteria),
        ("default_plan", default_plan),
        ("compensation", compensation),
        ("kinds", kinds),
        ("masked_evaluation", masked_evaluation),
        ("data", data_section),
    ):
        parts += [made(json.loads(path.read_text())) for path in newest_files(name)]
    return "\n".join([INTRODUCTION, *parts])


def newest(found: list[dict]) -> dict:
    """The newest results of a GPU, or where there are none those of a CPU."""
    on_gpu = [c for c in found if any(record["device"] == "cuda" for record in c["records"])]
    return (on_gpu or found)[0]


def cases(records: Iterable[dict]) -> dict[str, list[list[dict]]]:
    """For every op its cases, each as the records of its forms; ours comes first."""
    by_case: dict[str, dict[str, list[dict]]] = {}
    for record in records:
        if "disagrees" in record:
            continue
        by_case.setdefault(record["op"], {}).setdefault(record["case"], []).append(record)
    return {op: list(found.values()) for op, found in by_case.items()}


def span(values: list[float], unit: str, digits: int) -> str:
    """Smallest and largest of some numbers, as one where they do not differ."""
    low, high = (f"{value:,.{digits}f}" for value in (min(values), max(values)))
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


def kernels(content: dict) -> str:
    """One line per op, from one results file, as a section of the page."""
    lines = [
        "## Every op in one line\n",
        "| op | example | ours | fastest other form | faster than it | of copy speed |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for op, found in cases(content["records"]).items():
        # ours with other tiles is no other form; a race that no other finished says nothing
        peers = [[f for f in forms[1:] if not f["form"].startswith(OURS)] for forms in found]
        found = [forms for forms, others in zip(found, peers, strict=True) if others]
        if not found:
            continue
        others = [min(forms, key=lambda form: form["min_us"]) for forms in peers if forms]
        ratios = [
            other["min_us"] / forms[0]["min_us"] for forms, other in zip(found, others, strict=True)
        ]
        shares = [100 * forms[0]["of_copy"] for forms in found if "of_copy" in forms[0]]
        lines.append(
            f"| `{op}` | {found[0][0]['case']} | {found[0][0]['min_us']:,.0f} us "
            f"| {others[0]['min_us']:,.0f} us ({others[0]['form']}) "
            f"| {span(ratios, 'x', 1)} | {span(shares, '%', 0) if shares else '-'} |"
        )
    if any(record["device"] == "cuda" for record in content["records"]):
        where = content["device"]
    else:
        where = f"On the CPU; no time of a GPU is reported yet. {content['device']}"
    lines += [
        "",
        "One line per op, with its first case as the example; the last two columns span all cases, "
        "the lost ones too.",
        "",
        f"{where}: {facts(content)}",
        "",
    ]
    return "\n".join(lines)


def digits(content: dict) -> str:
    """The default job, seed by seed, as a section of the page."""
    runs = content["runs"]
    profile, versions = runs[0]["profile"], runs[0]["versions"]
    lines = [
        "## The default job, seed by seed\n",
        "| seed | top-1 dense | cut | swept | distilled | agreement | MACs | params "
        "| latency b1 | images/s b64 |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|---|",
    ]
    for run in runs:
        before, after = run["before"], run["after"]
        top1s = [f"{run[step]['top1']:.2%}" for step in front.STEPS]
        lines.append(
            f"| {run['seed']} | {' | '.join(top1s)} | {after['agreement']:.2%} "
            f"| {after['macs'] / before['macs']:.1%} | {after['params'] / before['params']:.1%} "
            f"| {before['latency_ms']:.2f} → {after['latency_ms']:.2f} ms "
            f"| {before['images_per_s']:,.0f} → {after['images_per_s']:,.0f} |"
        )
    lines += [
        "",
        f"Real 8x8 digit images, {runs[0]['after']['samples']} of them for the test; {len(runs)} "
        f"seeds fixed in advance. {profile['hardware']}, {profile['threads']} "
        f"thread{'s' if profile['threads'] != 1 else ''}, {profile['dtype']}, torch "
        f"{versions['torch']}, timm {versions['timm']}. `{content['command']}`.",
        "",
    ]
    return "\n".join(lines)


def criteria(content: dict) -> str:
    """How every criterion ranks units, compared with leaving them out, as a section of the page."""
    kinds = list(content["criteria"][0]["loss"])
    lines = [
        "## How criteria rank units\n",
        f"| criterion | seconds | {' | '.join(kinds)} |",
        f"|---|--:|{'--:|' * len(kinds)}",
    ]
    for row in content["criteria"]:
        cells = [
            f"{row['loss'][kind]:.2f} / {row['kl'][kind]:.2f}" if kind in row["loss"] else "-"
            for kind in kinds
        ]
        name = f"`{row['criterion']}` {row['reduction']}"
        lines.append(f"| {name} | {row['seconds']} | {' | '.join(cells)} |")
    loss, kl = content["seconds"]["loss"], content["seconds"]["kl"]
    lines += [
        "",
        "Spearman rank correlation with the exact `loss` / `kl` of leaving every unit out, inside "
        f"each axis, averaged over the axes; {content['images']} training images on "
        f"{content['model']}. The exact scores took {loss} and {kl} s of one thread. "
        f"`{content['command']}`, commit {content['commit']}, {content['date']}, "
        f"torch {content['versions']['torch']}.",
        "",
    ]
    return "\n".join(lines)


def compensation(content: dict) -> str:
    """What is left of a model that is not trained any more, as a section of the page."""
    lines = [
        "## What the sweep keeps of the digits\n",
        "| MACs | cut | swept | error after a branch, cut / fitted |",
        "|--:|--:|--:|--:|",
    ]
    for row in content["compensation"]:
        top1 = " | ".join(f"{row[how]:.2%}" for how in ("cut", "swept"))
        lines.append(f"| {row['macs']:.0%} | {top1} | {row['before']:.0%} / {row['after']:.0%} |")
    lines += [
        "",
        f"Top-1 of {content['model']}, which has {content['dense']:.2%} whole; nothing is trained "
        f"afterwards. Fitted on {content['tokens']:,} tokens of training images; the error is that "
        "of the stream as a share of what the branch has to write, the median over the branches. "
        f"`{content['command']}`, commit {content['commit']}, {content['date']}, "
        f"torch {content['versions']['torch']}.",
        "",
    ]
    return "\n".join(lines)


def attention(content: dict) -> str:
    """Forms of attention with a backward on a CPU, as a section of the page."""
    lines = [
        "## Attention with its backward on a CPU\n",
        f"`{content['command']}`, commit {content['commit']}, {content['date']}, "
        f"torch {content['versions']['torch']}, {content['device']}{load_note(content)}.\n",
        "| products of 16 bits | dtype | tokens | head dim | ours ms | fused ms | plain ms |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row['products']} | {row['dtype']} | {row['tokens']} | {row['head_dim']} "
        f"| {' | '.join(str(row['ms'][form]) for form in ('vitprune', 'fused', 'plain'))} |"
        for row in content["attention"]
    ]
    lines += [
        "",
        f"Packed qkv of {content['width']} columns, {content['batch']} images; processor time of "
        "one thread, least of the rounds.",
    ]
    return "\n".join([*lines, ""])


def threads(content: dict) -> str:
    """Default threads and one thread while other work runs, as a section of the page."""
    lines = [
        "## Threads while other work runs\n",
        f"`{content['command']}`, commit {content['commit']}, {content['date']}, "
        f"torch {content['versions']['torch']}, {content['device']}, {content['cores']} cores"
        f"{load_note(content)}.\n",
        "| other work | form | median s | min s | times `--threads 1` | from | to |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row['beside']} | {row['form']} | {row['median_s']} | {row['min_s']} "
        f"| {row['times_one']} | {row['least']} | {row['most']} |"
        for row in content["threads"]
    ]
    lines += [
        "",
        f"Training and saving of {content['model']} with `vitprune-fast distill`, "
        f"{content['rounds']} interleaved rounds; ratios are those of one round. What was saved "
        "with as many threads had the same bits in all of them.",
    ]
    return "\n".join([*lines, ""])


def sweeps(content: dict) -> str:
    """What a sweep costs, as a section of the page."""
    lines = [
        "## A sweep over its images\n",
        f"`{content['command']}`, commit {content['commit']}, {content['date']}, "
        f"torch {content['versions']['torch']}, {content['device']}{load_note(content)}.\n",
        "| model | dense forward s | pruned forward s | sweep s | in dense forwards |",
        "|---|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row['case']} | {' | '.join(map(str, row['seconds'].values()))} | {row['passes']} |"
        for row in content["sweeps"]
    ]
    lines += [
        "",
        f"{content['images']:,} images, {content['model']}; processor time of one thread, least of "
        f"{content['rounds']} rounds.",
    ]
    return "\n".join([*lines, ""])


def kinds(content: dict) -> str:
    """What cutting more kinds of units keeps, as a section of the page."""
    lines = [
        "## Which kinds to cut together\n",
        f"`{content['command']}`, commit {content['commit']}, {content['date']}, "
        f"torch {content['versions']['torch']}, {content['device']}.\n",
        "| MACs | kinds | params | blocks | cut | swept |",
        "|--:|---|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row['macs']:.0%} | {row['kinds']} | {row['params']:.1%} | {row['kept']['block']:.0%} "
        f"| {_share(row['cut'])} | {_share(row['swept'])} |"
        for row in content["rows"]
    ]
    lines += [
        "",
        f"{content['model']}: share of the dense top-1 on {content['rows'][0]['cut']['of']:,} test "
        "images, with its 95 % interval; all kinds scored at once by `taylor` `square` and planned "
        "together.",
    ]
    return "\n".join([*lines, ""])


def _share(found: dict) -> str:
    return f"{100 * found['share']:.1f} ± {196 * found['share_se']:.1f}"


def masked_evaluation(content: dict) -> str:
    """What a candidate of the search costs, as a section of the page."""
    forms = content["forms"]
    lines = [
        "## An evaluation behind masks\n",
        f"`{content['command']}`, commit {content['commit']}, {content['date']}, "
        f"torch {content['versions']['torch']}, {content['device']}.\n",
        f"{content['model']}, {content['images']} images, half of the heads and neurons masked: "
        f"{forms['masked']['seconds']:.3f} s, a plain one {forms['plain']['seconds']:.3f} s, "
        f"{content['masked_over_plain']:.3f} times as long (spread "
        f"{forms['masked']['spread']:.1%} and {forms['plain']['spread']:.1%}). Processor time of "
        "one thread.",
    ]
    return "\n".join([*lines, ""])


def host_times(content: dict) -> str:
    """What the host spends on a call of our ops, as a section of the page."""
    lines = [
        "## Host time of a call\n",
        f"`{content['command']}`, commit {content['commit']}, {content['date']}, "
        f"torch {content['versions']['torch']}, {content['device']}{load_note(content)}.\n",
        "| op, forward and backward | ours us | through the registered op us | torch's own us |",
        "|---|--:|--:|--:|",
    ]
    lines += [
        f"| `{row['op']}` | {' | '.join(str(row['us'][form]) for form in HOST_FORMS)} |"
        for row in content["host"]
    ]
    lines += [
        "",
        f"{content['model'].capitalize()}; torch's own are `scaled_dot_product_attention`, "
        "`layer_norm` and `gelu`, their CPU kernels counted in. Processor time of one thread, "
        f"{content['calls']} calls, least of {content['rounds']} rounds.",
    ]
    return "\n".join([*lines, ""])


def data_section(content: dict) -> str:
    """Reading photographs, as a section of the page."""
    return "\n".join(["## Photographs from file to batch\n", data(content), ""])


def data(content: dict) -> str:
    """What reading photographs takes: before, now and by libraries; part by part; and the index."""
    paths, parts, index = content["paths"], content["ms_per_image"], content["index"]
    lines = [
        f"| ms per image, times the commit before | {' | '.join(paths)} |",
        f"|---|{'--:|' * len(paths)}",
    ]
    for form in next(iter(paths.values())):
        cells = []
        for found in paths.values():
            agrees = found[form].get("agrees")
            note = f", {agrees}" if agrees else ""
            cells.append(f"{found[form]['ms']:.2f}, {found[form]['times']:.2f}x{note}")
        lines.append(f"| {form} | {' | '.join(cells)} |")
    about = (
        f"`{content['command']}` with {content['before']} as the commit before, commit "
        f"{content['commit']}, {content['date']}, torch {content['versions']['torch']}, "
        f"{content['decoders']}, {content['device']}{load_note(content)}. "
        f"{content['photographs'].capitalize()}; "
        f"processor time of one thread, least of {content['rounds']} rounds in turns. The commit "
        "before and now are one call that gives normalised fp32; the others give eight bits, which "
        "the device normalises. Levels are of 255."
    )
    lines += [
        "",
        textwrap.fill(about, 100, break_long_words=False, break_on_hyphens=False),
        "",
        f"| part, ms per image | {' | '.join(parts)} |",
        f"|---|{'--:|' * len(parts)}",
    ]
    for part in max(parts.values(), key=len):
        cells = [f"{found[part]:.2f}" if part in found else "" for found in parts.values()]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    rates = content["images_per_s_per_core"]
    lines += [
        f"| **images per second and core** | {' | '.join(f'**{r:,}**' for r in rates.values())} |",
        "",
        "| index | MiB | as a list, MiB | first start s | later starts s |",
        "|---|--:|--:|--:|--:|",
    ]
    for method in ("fork", "forkserver"):
        found = index[method]
        keys = ("names_mib", "list_mib", "first_start_s", "start_s")
        cells = " | ".join(str(found[key]) for key in keys)
        lines.append(f"| {index['names']:,} names, {method} | {cells} |")
    lines += [
        "",
        "A start is that of two loader processes until their first batch; the first of a fork "
        "server\nimports torch.",
    ]
    return "\n".join(lines)


def rates(content: dict, file: str) -> str:
    """What a core reads, as the package takes it along."""
    found = {
        "source": f"bench/results/{file}",
        "processor": content["device"],
        "images_per_s_per_core": content["images_per_s_per_core"],
    }
    return json.dumps(found, indent=1) + "\n"


def combinations(rows: list[dict]) -> dict[tuple[str, str], dict]:
    """What is kept under every (criterion, normalisation), the best first.

    ``cut`` and ``swept`` hold, for every model and budget, the share of the dense top-1, its
    standard error, the KL to the dense logits and the points of top-1 that are lost; means over the
    seeds for the digits. A budget that cannot be met keeps nothing. ``mean`` holds what is kept
    after the sweep and right after the cut, of the models and budgets that all were measured on.
    """
    nothing = {"share": 0.0, "share_se": 0.0, "kl": float("inf"), "correct": 0, "dense": 1, "of": 1}
    found: dict[tuple[str, str], dict] = {}
    for row in rows:
        if row["part"] == "combination":
            one = found.setdefault(key_of(row), {"cut": {}, "swept": {}})
            for state, cells in one.items():
                cell = (row["model"].partition(".")[0], row["macs"])
                cells.setdefault(cell, []).append(row.get(state, nothing))
    for one in found.values():
        for cells in one.values():
            for cell, seeds in cells.items():
                cells[cell] = {
                    name: fmean(each[name] for each in seeds) for name in ("share", "kl")
                }
                error = sum(each["share_se"] ** 2 for each in seeds) ** 0.5 / len(seeds)
                lost = fmean((each["dense"] - each["correct"]) / each["of"] for each in seeds)
                cells[cell] |= {"share_se": error, "points": 100 * lost}
    shared = set.intersection(*(set(one["swept"]) for one in found.values())) if found else set()
    for one in found.values():
        states = (one[state] for state in ("swept", "cut"))
        one["mean"] = [fmean(cells[cell]["share"] for cell in shared) for cells in states]
    return dict(sorted(found.items(), key=lambda item: item[1]["mean"], reverse=True))


def chosen(rows: list[dict]) -> tuple[str, str] | None:
    """The best combination of those under which the digits lose no more than they may."""
    for name, one in combinations(rows).items():
        digits = {state: one[state].get(("digits", 0.5)) for state in MAY_LOSE}
        if all(cell and cell["points"] <= MAY_LOSE[state] for state, cell in digits.items()):
            return name
    return None


def key_of(row: dict) -> tuple[str, str]:
    """Which combination a row is of."""
    return row["criterion"], row["normalization"]


def default_plan(content: dict) -> str:
    """What every combination of criterion and normalisation keeps, as a section of the page."""
    rows = content["rows"]
    found, best = combinations(rows), chosen(rows)
    cells = sorted({cell for one in found.values() for cell in one["swept"]}, key=lambda c: -c[1])
    cells.sort(key=lambda cell: ("digits", "cifar10", "cifar100").index(cell[0]))

    def lines(title: str, columns: list[str], values: list[tuple[tuple[str, str], list]]) -> str:
        head = [f"| {title} | {' | '.join(columns)} |", f"|---|{'--:|' * len(columns)}"]
        bold = {name: f"**{', '.join(name)}**" for name in [best] if name}
        return "\n".join(
            [*head, *(f"| {bold.get(k, ', '.join(k))} | {' | '.join(v)} |" for k, v in values), ""]
        )

    def share(cell: dict) -> str:
        return f"{cell['share']:.3f} ± {1.96 * cell['share_se']:.3f}"

    kept, kl = [], []
    for name, one in found.items():
        pairs = [(one["cut"].get(cell), one["swept"].get(cell)) for cell in cells]
        shares = [f"{cut['share']:.3f} / {share(swept)}" if cut else "-" for cut, swept in pairs]
        kept.append((name, [*shares, f"{one['mean'][1]:.3f} / {one['mean'][0]:.3f}"]))
        kl.append(
            (name, [f"{cut['kl']:.3f} / {swept['kl']:.4f}" if cut else "-" for cut, swept in pairs])
        )
    columns = [f"{model} {macs:g}" for model, macs in cells]
    about = (
        f"`{content['command']}`, commit {content['commit']}, {content['date']}, "
        f"torch {content['versions']['torch']}, {content['device']}{load_note(content)}."
    )
    parts = ["## What plans keep without training\n", about + "\n"]
    parts += [lines("share of the dense top-1, cut / swept", [*columns, "mean"], kept)]
    parts += [lines("KL to the dense logits, cut / swept", columns, kl), plan_notes(rows), ""]
    speed = {(*key_of(r), r["macs"]): r for r in rows if r["part"] == "latency"}
    trained = []
    for row in (row for row in rows if row["part"] == "distilled"):
        times = speed[(*key_of(row), row["macs"])]
        pairs = [" / ".join(map(str, times[f"batch_{size}"])) for size in (1, 64)]
        plain = [f"{row[name]:g}" for name in ("macs", "epochs", "lr")]
        numbers = [row["state"], *plain, share(row), f"{row['kl']:.4f}", *pairs]
        trained.append((key_of(row), numbers))
    columns = ["from", "MACs", "epochs", "lr", "share", "KL"]
    columns += [f"ms at batch {size}, dense / pruned" for size in (1, 64)]
    return "\n".join([*parts, lines("after distillation", columns, trained) if trained else ""])


def plan_notes(rows: list[dict]) -> str:
    """What the numbers of the tables above are, and how far bf16 moves them."""
    made = {(r["model"], r["macs"], *key_of(r)): r for r in rows if r["part"] == "combination"}
    took: dict[str, list[float]] = {}
    for row in made.values():
        if "seconds" in row.get("swept", {}):
            took.setdefault(row["model"].partition(".")[0], []).append(row["swept"]["seconds"])
    times = ", ".join(f"{name} {span(found, 's', 1)}" for name, found in took.items())
    dense = {row["model"]: row["swept"] for row in made.values() if "swept" in row}
    counts = ", ".join(f"{name} {d['dense']} of {d['of']}" for name, d in sorted(dense.items()))
    moved = [
        abs(row[state][name] - made[(row["model"], row["macs"], *key_of(row))][state][name])
        for name in ("share", "kl")
        for row in rows
        if row["part"] == "check"
        for state in ("cut", "swept")
    ]
    half = len(moved) // 2
    limits = " and ".join(f"{most:g} points ({state})" for state, most in MAY_LOSE.items())
    return (
        f"Plans of heads and neurons; nothing is trained. Dense top-1: {counts}; the digits are "
        "means over their seeds. Intervals are 95 %, of the ratio on the same test images. The "
        "mean is over the columns that all were measured on. Bold: "
        f"the best mean after the sweep where the digits lose at most {limits}. A sweep took, of "
        f"one thread against another: {times}."
        + (
            f" Photographs are evaluated in bf16; fp32 moves shares by at most "
            f"{max(moved[:half]):.4f} and KL by {max(moved[half:]):.4f} in {half} checks."
            if moved
            else ""
        )
    )


def filled(page: str, rows: str, marks: str) -> str:
    """A page's text with what stands between its marks replaced."""
    begin, end = MARKS[marks]
    pattern = re.compile(f"({re.escape(begin)}\n).*?({re.escape(end)})", re.DOTALL)
    text, count = pattern.subn(lambda match: f"{match[1]}{rows}\n{match[2]}", page)
    if count != 1:
        raise SystemExit(f"error: the page must have {begin} and {end} once, found {count}")
    return text


def added(folders: list[Path]) -> Path:
    """Write a results file of what runs of `make gpu` found; its path."""
    content = found_lines.combined(*folders)
    if not content.get("device"):
        names = ", ".join(map(str, folders))
        raise SystemExit(f"error: --add must name folders of `make gpu`, got {names}")
    month = content["date"][:7].replace("-", "")
    path = RESULTS / f"{month}_{found_lines.as_file_name(content['device'])}.json"
    found_lines.replace(path, content)
    return path


def main() -> None:
    """Write all of them."""
    parser = argparse.ArgumentParser("table.py", description=__doc__)
    parser.add_argument("--add", nargs="+", type=Path, metavar="DIR", help="folders of `make gpu`")
    if folders := parser.parse_args().add:
        print(added(folders))
    (RESULTS / "README.md").write_text(page())
    README.write_text(readme(README.read_text()))
    FEEDING.write_text(feeding(FEEDING.read_text()))
    for path in newest_files("data"):
        RATES.write_text(rates(json.loads(path.read_text()), path.name))


def feeding(text: str) -> str:
    """The page about reading photographs, with the newest tables."""
    for path in newest_files("data"):
        text = filled(text, data(json.loads(path.read_text())), "data")
    return text


def readme(text: str) -> str:
    """The README with its figures as the committed results say."""
    text = filled(text, front.headline(front.newest("digits")), "headline")
    text = filled(text, front.support(json.loads(front.SUPPORT.read_text())), "support")
    return filled(text, front.claims(newest(contents())), "claims")


if __name__ == "__main__":
    main()
