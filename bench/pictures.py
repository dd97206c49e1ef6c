"""docs/pictures/: what the README shows, made of committed results.

python -m bench.pictures                        accuracy.svg, from bench/results/*_evidence.json
python -m bench.pictures --report runs/digits   report.png too, the head of that run's report

The second one draws a page, for which it needs `pip install weasyprint pymupdf`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from bench.evidence.arms import OURS, PEER, SHARES
from bench.evidence.page import interval, newest, top1s

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"
ACCURACY, REPORT = FOLDER / "accuracy.svg", FOLDER / "report.png"
# arm -> what the picture calls it: the default, the same without training, and what both must beat
ARMS = {
    "from scratch, distilled": "new model of that shape, distilled",
    OURS: "fast, the default recipe",
    "one-shot": "one-shot, nothing trained",
    PEER: "Torch-Pruning Taylor, distilled",
    "magnitude": "magnitude, distilled",
    "random": "random, distilled",
}
# pixels from the top: to the end of what each step did to the accuracy
HEIGHT = 970
# the page as a wide window shows it, without what stands below
STYLE = """
@page { size: 1100px 4000px; margin: 0 }
main { padding: 1.4rem 1.25rem !important }
.tiles { grid-template-columns: repeat(5, 1fr) !important }
.panels { grid-template-columns: 1fr 1fr !important }
"""


def accuracy(content: dict[str, Any]) -> dict[str, Any]:
    """The numbers of the picture: per cent of top-1, means over seeds with half of their interval.

    Args:
        content: of a results file of `make evidence`.

    Returns:
        ``dense`` ([mean, half]) and ``arms`` (arm -> share of the MACs -> [mean, half]).
    """
    lines = content["lines"]

    def point(values: list[float]) -> list[float]:
        return [round(100 * f(values), 2) for f in (statistics.fmean, interval)]

    arms = [line for line in lines if line["table"] == "arms"]
    return {
        "command": content["command"],
        "commit": content["commit"],
        "dense": point([*top1s(lines, "dense", max(SHARES), "before").values()]),
        "arms": {
            arm: {f"{share:g}": point([*top1s(arms, arm, share).values()]) for share in SHARES}
            for arm in ARMS
        },
    }


def drawn(found: dict[str, Any]) -> str:
    """The picture as an SVG file, with its numbers as JSON in its description."""
    from vitprune_fast.run.report import figures

    colours = (figures.LINES[4], figures.AFTER, figures.LINES[3], figures.LINES[1])
    colours += (figures.LINES[2], figures.BEFORE)

    def draw(axes: Any) -> None:
        mean, half = found["dense"]
        axes.axhspan(mean - half, mean + half, color=figures.MUTED, alpha=0.6, linewidth=0)
        axes.axhline(mean, color=figures.INK, linestyle="--", linewidth=1, label="dense model")
        for place, (arm, colour) in enumerate(zip(ARMS, colours, strict=True)):
            shift = 0.9 * (place - (len(ARMS) - 1) / 2)
            points = found["arms"][arm].items()
            axes.errorbar(
                [100 * float(share) + shift for share, _ in points],
                [mean for _, (mean, _) in points],
                yerr=[half for _, (_, half) in points],
                fmt="o-",
                ms=5,
                linewidth=1,
                elinewidth=1.6,
                capsize=2.5,
                color=colour,
                label=ARMS[arm],
            )
        axes.set_xticks([100 * share for share in SHARES])
        axes.set_xlabel("multiply-accumulates, % of the dense model's")
        axes.set_ylabel("top-1 on 599 digits, %")
        axes.set_ylim(top=100)
        axes.grid(axis="y")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))

    text = figures.drawn("Accuracy against multiply-accumulates", 3.0, draw, width=7.4)
    text = text.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    # a white page, also where the reader's is dark
    start = text.index(">") + 1
    data = f"<desc>{escape(json.dumps(found))}</desc>"
    paper = '<rect width="100%" height="100%" fill="white"/>'
    return text[:start] + data + paper + text[start:] + "\n"


def numbers(svg: str) -> dict[str, Any]:
    """The numbers that a picture was made of."""
    found = re.search(r"<desc>(.*?)</desc>", svg, re.DOTALL)
    assert found, "the picture has no description"
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


def photographed(page: Path) -> bytes:
    """The head of a report as PNG."""
    # by hand and rarely: nothing that this package or its tests need
    pymupdf, weasyprint = import_module("pymupdf"), import_module("weasyprint")

    document = weasyprint.HTML(str(page)).write_pdf(stylesheets=[weasyprint.CSS(string=STYLE)])
    first = pymupdf.open(stream=document)[0]
    # in points
    top = pymupdf.Rect(0, 0, first.rect.width, 0.75 * HEIGHT)
    return first.get_pixmap(dpi=96, clip=top).tobytes("png")


def main() -> None:
    """Writes the pictures."""
    parser = argparse.ArgumentParser("python -m bench.pictures", description=__doc__)
    parser.add_argument("--report", type=Path, metavar="RUN", help="a finished run folder")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    ACCURACY.write_text(drawn(accuracy(newest())), encoding="utf-8")
    if options.report:
        REPORT.write_bytes(photographed(options.report / "report.html"))


if __name__ == "__main__":
    main()
