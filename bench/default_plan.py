"""Which criterion and normalisation keep most of a model: the evidence for the defaults of `plan`.

python -m bench.default_plan [--work runs/evidence] [--share 0/1]

Each criterion under each normalisation is measured right after the cut and after the sweep, on the
models of bench.dense_models; at last today's default and the two best also after distillation. What
is measured is a line of WORK/default_plan.jsonl and stays: end the program when you like and call
it again, or have it end by itself after BUDGET_S seconds. Two may work at once, one on --share 0/2
and one on --share 1/2.
Writes bench/results/<yyyymm>_default_plan.json, of which `python bench/table.py` makes the tables.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitprune_fast as vp
from bench import study
from bench.dense_models import LEARNT, NAMES, WORK, dense, photographs, prepared
from bench.table import chosen, combinations
from vitprune_fast.benches.harness import keep_freed_memory
from vitprune_fast.data import Loader
from vitprune_fast.planning.latency import latencies
from vitprune_fast.randomness import generator

CRITERIA = {
    "taylor abs": ("taylor", "abs"),
    "taylor square": ("taylor", "square"),
    "fisher": ("fisher", "square"),
    "magnitude": ("magnitude", "group"),
}
GRID = list(
    itertools.product(CRITERIA, ("none", "mean_per_group", "isomorphic", "per_mac", "lamp"))
)
TODAY = ("taylor abs", "isomorphic")
# the most telling first
CASES = (
    *(("cifar10", macs) for macs in (0.5, 0.3)),
    *((name, 0.5) for name in NAMES if name.startswith("digits")),
    *(("cifar10", macs) for macs in (0.7, 0.4, 0.57, 0.8)),
    *(("cifar100", macs) for macs in (0.5, 0.3)),
)
# evaluated in fp32 as well, to see what bf16 changes
CHECKED = (TODAY, ("taylor square", "per_mac"), ("fisher", "none"))
TRAINED, TRAINED_MACS, EPOCHS = "cifar10", (0.5, 0.3), (1, 5)
CALIBRATION, TEST, BATCH = 1024, 2000, 64


class Photographs:
    """Training batches that a distillation can enter anywhere; each image is flipped or not."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images) // BATCH

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        draws = generator(0, "order", epoch)
        order = torch.randperm(len(self.images), generator=draws)
        flipped = torch.rand(len(self.images), generator=draws) < 0.5
        for picked in order.split(BATCH)[start : len(self)]:
            images, mirrored = prepared(self.images[picked]), flipped[picked][:, None, None, None]
            yield torch.where(mirrored, images.flip(3), images), self.labels[picked]


class Subject:
    """A dense model with its images, and what is measured on them."""

    def __init__(self, work: Path, name: str):
        self.work, self.name = work, name
        self.model: Any = dense(work, name)
        self.stop: Callable[[], bool] = lambda: False
        if name in LEARNT:
            splits = [photographs(work, name, split) for split in ("train", "test")]
            counts = (CALIBRATION, TEST)
            self.train, self.test = (
                (prepared(images[:count]), labels[:count])
                for (images, labels), count in zip(splits, counts, strict=True)
            )
        else:
            data = vp.open_data("digits", image_size=(8, 8), channels=1)
            splits = [data.split(split) for split in ("train", "test")]
            self.train, self.test = (next(iter(Loader(each, len(each))))[:2] for each in splits)
        self.logits_of_dense = cache(lambda half: self.logits(self.model, half))

    def calibration(self) -> list[tuple[Tensor, ...]]:
        """Batches of training images: what scores and fits read."""
        return list(zip(*(part.split(BATCH) for part in self.train), strict=True))

    def logits(self, model: nn.Module, half: bool) -> Tensor:
        """Of the test images; photographs in bf16, which is several times as fast."""
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            return torch.cat([model(part).float() for part in self.test[0].split(BATCH)])

    def scores(self, criterion: str) -> vp.Scores:
        path = self.work / "scores" / f"{self.name}.{criterion.replace(' ', '_')}.safetensors"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            name, reduction = CRITERIA[criterion]
            found: Any = {"criterion": name, "reduction": reduction}
            vp.score(self.model, self.calibration(), **found).save(path)
        return vp.Scores.load(path)

    def plan(self, macs: float, criterion: str, normalization: Any) -> vp.Plan:
        budget = vp.Budget(macs=macs)
        return vp.plan(self.model, self.scores(criterion), budget, normalization=normalization)

    def pruned(self, plan: vp.Plan, state: str) -> Any:
        """The model cut, or cut and swept."""
        options: Any = {"calibration": self.calibration()} if state == "swept" else {}
        return vp.prune(self.model, plan, **options)

    def quality(self, model: nn.Module, half: bool | None = None) -> dict[str, Any]:
        """Top-1, its share of the dense top-1, and KL(dense || model) in nats, with errors."""
        half = self.name in LEARNT if half is None else half
        labels, count = self.test[1], len(self.test[1])
        found, wanted = self.logits(model, half), self.logits_of_dense(half)
        hits, whole = ((each.argmax(1) == labels).double() for each in (found, wanted))
        share = hits.mean() / whole.mean()
        # both are counted on the same images: only where they differ is the ratio uncertain
        share_se = (hits - share * whole).std() / whole.mean() / count**0.5
        kl = F.kl_div(
            found.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="none"
        )
        kl = kl.sum(1).double()
        numbers = {"share": share, "share_se": share_se, "kl": kl.mean()}
        numbers["kl_se"] = kl.std() / count**0.5
        rounded = {name: round(value.item(), 5) for name, value in numbers.items()}
        return {"correct": int(hits.sum()), "dense": int(whole.sum()), "of": count, **rounded}

    def qualities(self, plan: vp.Plan, half: bool | None = None) -> dict[str, Any]:
        """Quality right after the cut and after the sweep."""
        states = ("cut", "swept")
        return {state: self.quality(self.pruned(plan, state), half) for state in states}

    def combination(self, done: list[dict], macs: float, *chosen: str) -> dict[str, Any]:
        """What a plan leaves of the model, right after the cut and after the sweep."""
        try:
            plan = self.plan(macs, *chosen)
        except vp.InfeasibleBudget as error:
            return {"refused": str(error)}
        digest = hashlib.sha256(json.dumps(plan.to_json()).encode()).hexdigest()[:16]
        for row in done:
            # another combination may have chosen the same units
            if (row["model"], row.get("plan")) == (self.name, digest):
                return {name: row[name] for name in ("plan", "met", "kept", "cut", "swept")}
        cut, started = self.pruned(plan, "cut"), time.thread_time()
        swept = self.pruned(plan, "swept")
        seconds = round(time.thread_time() - started, 1)
        axes = vp.describe(self.model).units
        return {
            "plan": digest,
            "met": round(vp.cost(cut).macs / vp.cost(self.model).macs, 4),
            "kept": {
                kind: [len(plan[axis.name]) for axis in axes(kind)] for kind in ("head", "neuron")
            },
            "cut": self.quality(cut),
            "swept": {**self.quality(swept), "seconds": seconds},
        }

    def check(self, macs: float, *chosen: str) -> dict[str, Any]:
        """The same in fp32."""
        return self.qualities(self.plan(macs, *chosen), half=False)

    def latency(self, macs: float, *chosen: str) -> dict[str, Any]:
        """Milliseconds of a forward pass of the dense and the pruned model, on one thread."""
        models = [self.model, self.pruned(self.plan(macs, *chosen), "cut")]
        return {
            f"batch_{size}": [
                round(1e3 * each.median_s, 2) for each in latencies(models, size, seconds=3.0)
            ]
            for size in (1, 64)
        }

    def distilled(
        self, macs: float, *chosen: str, state: str, epochs: int
    ) -> dict[str, Any] | None:
        """What a short training makes of a pruned model; None when it was stopped."""
        student = self.pruned(self.plan(macs, *chosen), state)
        images, labels = photographs(self.work, self.name, "train")
        learnt = slice(LEARNT[self.name])
        train: Any = Photographs(images[learnt], labels[learnt])
        config = vp.DistillConfig(epochs=epochs, warmup_epochs=0.5, dtype="bfloat16", log_steps=0)
        name = "_".join(map(str, (macs, *chosen, state, epochs))).replace(" ", "_")
        folder = self.work / "distilled" / name
        result = vp.distill(
            student, self.model, train, None, config, checkpoint_dir=folder, stop=self.stop
        )
        if not result.finished:
            return None
        return {"lr": float(f"{result.start['peak_lr']:.2g}"), **self.quality(student)}


def jobs(path: Path) -> Iterator[dict[str, Any]]:
    """What each measurement is of, in order; the last ones are of what the first ones found."""

    def job(part: str, model: str, macs: float, combination: tuple[str, str], **more: Any) -> dict:
        names = {"criterion": combination[0], "normalization": combination[1]}
        return {"part": part, "model": model, "macs": macs, **names, **more}

    for model, macs in CASES:
        yield from (job("combination", model, macs, each) for each in GRID)
    yield from (job("check", *CASES[0], each) for each in CHECKED)
    done = [row for row in read(path) if row["part"] == "combination"]
    if len(done) < len(CASES) * len(GRID):
        return
    best = [each for each in combinations(done) if each != TODAY][:2]
    for macs in TRAINED_MACS:
        yield from (job("latency", TRAINED, macs, each) for each in (TODAY, *best))
    starts = [(TODAY, "cut"), *((each, "swept") for each in (TODAY, *best))]
    for epochs, macs, (each, state) in itertools.product(EPOCHS, TRAINED_MACS, starts):
        yield job("distilled", TRAINED, macs, each, state=state, epochs=epochs)


def measured(subject: Subject, done: list[dict], job: dict[str, Any]) -> dict[str, Any] | None:
    """The numbers of one job; None where it was stopped in the middle."""
    names = ("macs", "criterion", "normalization")
    of = [job[name] for name in names]
    more = {name: job[name] for name in job.keys() - {"part", "model", *names}}
    if job["part"] == "combination":
        return subject.combination(done, *of)
    return getattr(subject, job["part"])(*of, **more)


def read(path: Path) -> list[dict]:
    """All that was measured so far, by whichever process."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measured_on_tuned(
    about: str | None, name: str, model: str, rows: Callable[[Subject], list[dict[str, Any]]]
) -> None:
    """Measure rows on one of the tuned models on one thread, and write them down.

    Args:
        about: what ``--help`` says.
        name: of the study.
        model: of LEARNT.
        rows: what is measured of it.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--work", type=Path, default=WORK)
    work = parser.parse_args().work
    torch.set_num_threads(1)
    keep_freed_memory()
    found = rows(Subject(work, model))
    study.write(name, model=f"ViT-S/14 tuned to photographs ({model}) at 84 px", rows=found)


def main() -> None:
    """Measure what is missing, for as long as there is time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--share", default="0/1", help="K/N: every N-th measurement, from K on")
    arguments = parser.parse_args()
    first, every = map(int, arguments.share.split("/"))
    end = time.monotonic() + float(os.environ.get("BUDGET_S", "inf"))
    torch.set_num_threads(1)
    keep_freed_memory()
    path = arguments.work / "default_plan.jsonl"
    subject = cache(lambda name: Subject(arguments.work, name))
    for job in itertools.islice(jobs(path), first, None, every):
        done = read(path)
        if any(job.items() <= row.items() for row in done):
            continue
        one = subject(job["model"])
        one.stop = lambda: time.monotonic() > end
        found = None if one.stop() else measured(one, done, job)
        if found is None:
            print("BUDGET_S is over: the same call goes on from here")
            break
        line = json.dumps({**job, **found})
        with path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)
    rows = read(path)
    about = "ViT-S/14 tuned to photographs at 84 px, and the digits preset"
    # of others: this is one thread
    load = round(max(0.0, os.getloadavg()[0] - 1), 1)
    study.write("default_plan", model=about, load_average=load, rows=rows)
    print("best within the bounds:", chosen(rows))


if __name__ == "__main__":
    main()
