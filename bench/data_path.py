"""Photographs from file to batch: the commit before, now, and libraries alone; and the index.

python -m bench.data_path --before TREE [--rounds N] [--images N] [--names N]

TREE is a checkout of the commit to compare with (git worktree add TREE COMMIT). Each form has a
process of its own with one thread, and they take turns at every call. Time is that of the thread,
least of the rounds; what comes out is compared first. The index is that of as many names as
ImageNet has, and the start of two loader processes that get it.
Writes bench/results/<yyyymm>_data.json, from which bench/table.py makes the tables.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).resolve()
ROOT = HERE.parent.parent
SIDE = 224
NAMES = 1_281_167
BEFORE, NOW, READ, PILLOW, TORCHVISION = (
    "the commit before",
    "now",
    "now, as a loader process reads",
    "Pillow alone",
    "torchvision alone",
)
FORMS = (BEFORE, NOW, READ, PILLOW, TORCHVISION)
# windows of libraries are those of the commit before, whose functions stay what they are
NOW_ALONE = (NOW, READ)
# form -> ours with the same kind of result
COMPARED = {BEFORE: NOW, PILLOW: READ, TORCHVISION: READ}
PATHS = ("training", "RandAugment", "evaluation")


def augments() -> dict[str, Any]:
    """How each path changes images, by names that both commits have."""
    from vitprune_fast.data import RandomCrop

    policy = RandomCrop(scale=0.08, policy="rand-m9-mstd0.5-inc1")
    return dict(zip(PATHS, (RandomCrop(), policy, None), strict=True))


def opened(folder: Path) -> Any:
    """The training split of the photographs."""
    from vitprune_fast.data import open_data

    return open_data(f"folder:{folder}", image_size=SIDE, channels=3).split("train")


def in_batches(images: Any, augment: Any) -> Callable[[], Tensor]:
    """Normalised, ``(B, C, H, W)`` fp32: the call that both commits have."""
    rows = torch.arange(len(images))
    return lambda: images.batch(rows, augment=augment)[0]


def as_read(images: Any, augment: Any) -> Callable[[], Tensor]:
    """``(B, H, W, C)`` uint8, which the device normalises."""
    from vitprune_fast.data.images import Reader

    reader = Reader(images.source, 0, augment)
    return lambda: reader(images.ids).pixels


def by_libraries(images: Any, augment: Any, view: Callable[..., np.ndarray]) -> Callable:
    """``(B, H, W, C)`` uint8 by other means, of the same windows; evaluation is the centre square.

    Runs on the commit before.

    Args:
        images: that are read.
        augment: chooses window, mirroring and policy.
        view: of a file's bytes and a function from (width, height) to a window, decoded and
            resized to ``(H, W, C)``.
    """
    from PIL import Image

    from vitprune_fast.randomness import derive_seed, uniforms

    ids, source = images.ids.tolist(), images.source
    count = augment.draws if augment else 0
    draws = uniforms(derive_seed(0, "augment", 0), images.ids.numpy(), count)

    def centre(width: int, height: int) -> tuple[float, float, float, float]:
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, left + side, top + side

    def call() -> Tensor:
        out = np.empty((len(ids), SIDE, SIDE, 3), np.uint8)
        for row, (number, draw) in enumerate(zip(ids, draws, strict=True)):
            content = Path(source.path(number)).read_bytes()
            if augment is None:
                out[row] = view(content, centre)
                continue
            mirrored = augment.window(draw, 1, 1)[1]
            pixels = view(content, lambda *size, d=draw: augment.window(d, *size)[0])
            if augment.policy:
                pixels = np.asarray(augment.changed(Image.fromarray(pixels), draw))
            out[row] = pixels[:, ::-1] if mirrored else pixels
        return torch.from_numpy(out)

    return call


def by_pillow(content: bytes, window: Callable) -> np.ndarray:
    """What one would write with Pillow."""
    from PIL import Image

    image = Image.open(io.BytesIO(content))
    box = window(*image.size)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box))


def by_torchvision(content: bytes, window: Callable) -> np.ndarray:
    """torchvision decodes and torch resizes, both in eight bits, windows of whole pixels."""
    from torch.nn.functional import interpolate
    from torchvision.io import decode_jpeg

    pixels: Any = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    left, top, right, bottom = map(round, window(pixels.shape[2], pixels.shape[1]))
    cut = pixels[None, :, top : max(bottom, top + 1), left : max(right, left + 1)]
    resized = interpolate(cut, (SIDE, SIDE), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def made(form: str, images: Any, augment: Any) -> Callable[[], Tensor]:
    """The call of a form."""
    if form in (BEFORE, NOW):
        return in_batches(images, augment)
    if form == READ:
        return as_read(images, augment)
    view = by_pillow if form == PILLOW else by_torchvision
    return by_libraries(images, augment, view)


def work(form: str, folder: Path) -> None:
    """Do what comes in: `keep PATH FILE` writes what comes out, `time PATH` prints seconds."""
    # memory comes as it does to a loader process: new pages cost what they cost
    torch.set_num_threads(1)
    images = opened(folder)
    calls = {path: made(form, images, augment) for path, augment in augments().items()}
    for line in sys.stdin:
        verb, path, *rest = line.split()
        started = time.thread_time()
        out = calls[path]()
        seconds = time.thread_time() - started
        if verb == "keep":
            np.save(rest[0], out.numpy())
        print(seconds, flush=True)


@contextmanager
def worker(tree: Path, form: str, folder: Path) -> Iterator[Callable[[str], float]]:
    """A function that sends a line to a process on the package of a tree, and hears seconds."""
    paths = {"PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE), "--work", form, "--folder", str(folder)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, **paths}, cwd=tree, **pipes) as process:

        def ask(line: str) -> float:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(f"{line}\n")
            process.stdin.flush()
            return float(process.stdout.readline())

        yield ask
        process.communicate()


def raced(before: Path, folder: Path, images: int, rounds: int) -> dict[str, Any]:
    """Milliseconds per image of every path in every form, and what comes out beside ours."""
    with ExitStack() as stack:
        trees = {form: ROOT if form in NOW_ALONE else before for form in FORMS}
        ask = {f: stack.enter_context(worker(tree, f, folder)) for f, tree in trees.items()}
        found: dict[str, Any] = {}
        for path in PATHS:
            kept = {form: folder / f"{number}.npy" for number, form in enumerate(FORMS)}
            for form, file in kept.items():
                ask[form](f"keep {path} {file}")
            out = {form: np.load(file) for form, file in kept.items()}
            taken: dict[str, list[float]] = {form: [] for form in FORMS}
            for _ in range(rounds):
                for form in FORMS:
                    taken[form].append(ask[form](f"time {path}"))
            least = {form: 1e3 * min(seconds) / images for form, seconds in taken.items()}
            found[path] = {
                form: {"ms": round(ms, 3), "times": round(least[BEFORE] / ms, 2)}
                for form, ms in least.items()
            }
            for form, ours in COMPARED.items():
                found[path][form]["agrees"] = agreement(out[form], out[ours])
            for form, row in found[path].items():
                print(f"{path:12} {form:32} {row['ms']:7.3f} ms {row['times']:6.2f}x", flush=True)
    return found


def agreement(out: np.ndarray, ours: np.ndarray) -> str:
    """How far pixels are apart, in levels of 255."""
    if np.array_equal(out, ours):
        return "same bits"
    apart = np.abs(out.astype(np.float64) - ours) * (1 if out.dtype == np.uint8 else 255 * 0.226)
    return f"{apart.mean():.2f} levels apart"


class Generated:
    """As many samples as ImageNet has, whose images cost nothing."""

    def __init__(self, count: int) -> None:
        from vitprune_fast.data.names import Names

        self.names = Names(generated(count))
        self.labels = torch.arange(count) % 1000
        self.classes = tuple(map(str, range(1000)))

    def read(self, ids: Tensor, augment: Any, draws: np.ndarray) -> Any:
        """Looks at the names."""
        from vitprune_fast.data.images import Read

        length = len([self.names[number] for number in ids.tolist()])
        return Read(torch.zeros(length, 1, 1, 3, dtype=torch.uint8), {})


def generated(count: int) -> Iterator[str]:
    """Names like those of ImageNet."""
    for number in range(count):
        wnid = f"n{1_440_764 + 7919 * (number % 1000):08d}"
        yield f"train/{wnid}/{wnid}_{number % 50_000}.JPEG"


def resident() -> float:
    """MiB of this process that are in memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def indexed(method: str, count: int) -> None:
    """Print, as JSON, what the index takes and how long processes with it take to start."""
    from vitprune_fast.data.cache import Cache
    from vitprune_fast.data.images import Images, Normalisation
    from vitprune_fast.data.loader import Loader
    from vitprune_fast.data.names import Names
    from vitprune_fast.data.set_aside import SetAside

    torch.set_num_threads(1)
    multiprocessing.set_start_method(method)
    before = resident()
    listed = [*generated(count)]
    as_list = resident() - before
    del listed
    before = resident()
    names = Names(generated(count))
    as_names = resident() - before
    del names
    source = Generated(count)
    rest = (Normalisation((0.5,) * 3, (0.5,) * 3), SetAside(count, 0.0), Cache())
    images = Images(source, "train", torch.arange(count), *rest)
    starts = []
    for _ in range(4):
        started = time.perf_counter()
        loader = Loader(images, 64, shuffle=True, workers=2)
        next(loader.read(0, range(len(loader))))
        starts.append(round(time.perf_counter() - started, 3))
        loader.close()
    found = {"list_mib": as_list, "names_mib": as_names}
    rounded = {name: round(mib, 1) for name, mib in found.items()}
    print(json.dumps({**rounded, "first_start_s": starts[0], "start_s": min(starts[1:])}))


def index(count: int) -> dict[str, Any]:
    """What the index takes, in a process of its own for each way to start processes."""
    found: dict[str, Any] = {"names": count}
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for method in ("fork", "forkserver"):
        command = [sys.executable, str(HERE), "--index", method, "--names", str(count)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environ, check=True)
        found[method] = json.loads(done.stdout)
        print(f"{method:12} {found[method]}", flush=True)
    return found


def measured(before: Path, rounds: int, images: int, names: int) -> dict[str, Any]:
    """All of it."""
    from vitprune_fast.cli import data_rates as rates

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        what = rates.make_photographs(folder / "train", images)
        # the splits that training does not read
        for part in ("val", "test"):
            rates.make_photographs(folder / part, 4)
        paths = raced(before, folder, images, rounds)
        parts = rates.parts(opened(folder), torch.device("cpu"), rounds)
    return {
        "photographs": what,
        "decoders": rates.decoders(),
        "rounds": rounds,
        "before": git(before, "rev-parse", "--short", "HEAD"),
        "paths": paths,
        "ms_per_image": {
            path: {part: round(1e3 * seconds, 3) for part, seconds in own.items()}
            for path, own in parts.items()
        },
        "images_per_s_per_core": {p: round(rates.per_core(own)) for p, own in parts.items()},
        "index": index(names),
    }


def git(tree: Path, *words: str) -> str:
    """What git says of a tree."""
    command = ["git", "-C", str(tree), *words]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", type=Path, metavar="TREE", help="checkout to compare with")
    for name, default in (("rounds", 9), ("images", 64), ("names", NAMES)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--index", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options.work, options.folder)
    if options.index:
        return indexed(options.index, options.names)
    if options.before is None or not (options.before / "vitprune_fast").is_dir():
        parser.error(f"--before must be a checkout of this repository, got {options.before}")
    from bench import study

    load_average = round(os.getloadavg()[0], 1)
    found = measured(options.before.resolve(), options.rounds, options.images, options.names)
    about = {"command": "python -m bench.data_path --before TREE", "model": "none"}
    study.write("data", **{**found, **about, "load_average": load_average})


if __name__ == "__main__":
    main()
