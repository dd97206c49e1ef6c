"""How fast images come, part by part and in all, and how fast a device takes them: `bench data`.

Parts are processor time of one thread for one image, the least of some passes over the same images,
whose parts take turns. What loader processes deliver together is time on the wall, and so is what
the device takes on a CPU; on a GPU it is time between two events of its stream.
"""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vitprune_fast.data import Augment, ImageData, Images, Loader, RandomCrop
from vitprune_fast.data.decode import decode
from vitprune_fast.data.images import Reader
from vitprune_fast.data.photographs import Photographs
from vitprune_fast.errors import InvalidInput
from vitprune_fast.randomness import derive_seed, uniforms
from vitprune_fast.timing import in_turns, measure

PATHS: dict[str, RandomCrop | None] = {
    "training": RandomCrop(),
    # as DeiT is trained
    "RandAugment": RandomCrop(scale=0.08, policy="rand-m9-mstd0.5-inc1"),
    "evaluation": None,
}
"""What may be done with a photograph -> how it is changed."""

READ, DECODE, VIEW, POLICY, BATCH = "read file", "decode", "crop, resize", "policy", "to a batch"
TOGETHER, HAND_OVER, NORMALISE = "all of these", "hand-over", "normalise"
PARTS = (READ, DECODE, VIEW, POLICY, BATCH, TOGETHER, HAND_OVER, NORMALISE)

FORWARD, SCORE, DISTIL = "forward", "scoring", "distilling"
TAKEN_BY = {"training": DISTIL, "RandAugment": DISTIL, "evaluation": FORWARD}
"""What a device does with the images of a path."""

ROUNDS = 5
# images that the parts are measured on
SAMPLED = 64
# a loader is stopped long before
ENOUGH = 1 << 18
QUALITY, SIZE = 96, (500, 375)


def make_photographs(folder: Path, count: int = SAMPLED) -> str:
    """Write JPEGs like those of ImageNet in size and detail into four class folders.

    Args:
        folder: to write to.
        count: of images.

    Returns:
        What they are, in words.
    """
    random = np.random.default_rng(0)
    try:
        from sklearn.datasets import load_sample_images

        whole, what = load_sample_images().images, "crops of two photographs of scikit-learn"
    except ImportError:
        whole, what = [_texture(random) for _ in range(2)], "noise with the spectrum of photographs"
    (width, height), total = SIZE, 0
    for number in range(count):
        photo = Image.fromarray(whole[number % len(whole)])
        left, top = (
            int(random.integers(1 + most)) for most in (photo.width - width, photo.height - height)
        )
        photo = photo.crop((left, top, left + width, top + height))
        if number % 4 == 3:
            photo = photo.transpose(Image.Transpose.ROTATE_90)
        elif number % 2:
            photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        file = folder / str(number % 4) / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        photo.save(file, quality=QUALITY, subsampling="4:2:0")
        total += file.stat().st_size
    return (
        f"{what}, {count} of {width} x {height}, quality {QUALITY}, {total // count:,} bytes each"
    )


def _texture(random: np.random.Generator) -> np.ndarray:
    """``(427, 640, 3)`` uint8 whose amplitudes fall with the frequency, as those of photographs."""
    rows, columns = np.fft.fftfreq(427)[:, None], np.fft.rfftfreq(640)
    fall = 1 / np.maximum(np.hypot(rows, columns), 1 / 640)
    # one pattern for the light and weaker ones for the colours
    waves = np.fft.rfft2(random.standard_normal((4, 427, 640))) * fall
    light, *colours = (each / each.std() for each in np.fft.irfft2(waves, s=(427, 640)))
    pixels = np.stack([128 + 50 * light + 12 * colour for colour in colours], axis=2)
    return pixels.clip(0, 255).astype(np.uint8)


def decoders() -> str:
    """The libraries that may decode, as they are installed."""
    found = []
    for name in ("pillow", "simplejpeg"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def sample(data: ImageData, count: int = SAMPLED) -> Images:
    """Photographs of all splits, evenly spread.

    Raises:
        InvalidInput: they are no photographs.
    """
    if not isinstance(data.source, Photographs):
        raise InvalidInput(f"bench data: data must be photographs, got {data.name}")
    total = len(data.source.names)
    count = min(count, total)
    return Images(
        data.source,
        "train",
        torch.arange(count) * total // count,
        data.split("train").normalisation,
        data.set_aside,
        data.cache,
    )


def parts(
    images: Images, device: torch.device, rounds: int = ROUNDS
) -> dict[str, dict[str, float]]:
    """Seconds that each part takes for an image, by path.

    Args:
        images: photographs, each of which is read in every pass.
        device: normalises.
        rounds: passes over the images.

    Returns:
        Of every path its parts; those that a loader does also together, in one pass; what handing
        a batch over from one process to another takes in both; and normalising on the device.
    """
    source: Any = images.source
    ids = images.ids.tolist()
    names = [source.path(number) for number in ids]

    def content(number: int) -> bytes:
        with source.open(number) as file:
            return file.read()

    def decoded(content: bytes, name: str) -> Any:
        return decode(lambda: io.BytesIO(content), name, channels=source.channels)

    contents = [content(number) for number in ids]
    photos = [decoded(*each) for each in zip(contents, names, strict=True)]
    read = Reader(source)(images.ids)
    # reads as a data set does whose photographs cost nothing
    bare = copy.copy(source)
    bare.image, bare._view = lambda *_: None, lambda *_: read.pixels[0].numpy()
    queue: Any = torch.multiprocessing.SimpleQueue()
    shown = read.pixels.to(device)

    def viewed(augment: RandomCrop | None) -> Callable[[], float]:
        draws = augment.draws if augment else 0
        numbers = uniforms(derive_seed(0, "augment", 0), images.ids.numpy(), draws)

        def views() -> None:
            for photo, draw in zip(photos, numbers, strict=True):
                source._view(photo, augment, draw)

        return lambda: measure(views, "cpu")

    def handed_over() -> float:
        # a batch moves into shared memory once
        fresh = read._replace(pixels=read.pixels.clone())
        return measure(lambda: (queue.put(fresh), queue.get()), "cpu")

    forms: dict[tuple[str, str], Callable[[], float]] = {
        ("", READ): lambda: measure(lambda: [content(number) for number in ids], "cpu"),
        ("", DECODE): lambda: measure(lambda: [*map(decoded, contents, names)], "cpu"),
        ("", HAND_OVER): handed_over,
        ("", NORMALISE): lambda: measure(lambda: images.normalisation(shown), device),
    }
    for path, augment in PATHS.items():
        plain = augment and replace(augment, policy="")
        forms[path, VIEW] = viewed(plain)
        if augment != plain:
            forms[path, POLICY] = viewed(augment)
        for part, of in ((BATCH, bare), (TOGETHER, source)):
            reader = Reader(of, 0, augment)
            forms[path, part] = lambda r=reader: measure(lambda: r(images.ids), "cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        taken = in_turns(forms, rounds)
    finally:
        torch.set_num_threads(threads)
    least = {form: min(seconds) / len(ids) for form, seconds in taken.items()}
    found = {}
    for path in PATHS:
        known = {part: least[of, part] for of, part in least if of in ("", path)}
        own = {part: known[part] for part in PARTS if part in known}
        if POLICY in own:
            # measured together with the view that it changes
            own[POLICY] -= own[VIEW]
        found[path] = own
    return found


def per_core(parts: dict[str, float]) -> float:
    """Images per second of one core that does nothing but load them."""
    return 1 / (parts[TOGETHER] + parts[HAND_OVER])


def delivered(
    images: Images,
    augment: Augment | None,
    workers: int,
    device: torch.device,
    *,
    batch_size: int,
    seconds: float,
) -> float:
    """Images per second on a device, normalised, that a loader with so many processes delivers."""
    many = images.some(torch.arange(ENOUGH) % len(images))
    loader = Loader(many, batch_size, shuffle=augment is not None, augment=augment, workers=workers)
    with closing(loader):
        batches = loader.read(0, range(len(loader)), device)
        # what the processes have made ready before anyone waits says nothing about their speed
        for _ in islice(batches, 2 * workers + 1):
            pass
        _finish(device)
        count, started = 0, time.perf_counter()
        while count == 0 or time.perf_counter() - started < seconds:
            count += len(next(batches)[0])
            _finish(device)
        return count / (time.perf_counter() - started)


def taken(
    model: nn.Module, images: Tensor, device: torch.device, seconds: float
) -> dict[str, float]:
    """Images per second that a model on a device can take, by what is done with them.

    Args:
        model: on the device.
        images: a batch ``(B, C, H, W)`` in its dtype, on the device.
        device: that computes.
        seconds: how long each is measured, after a first call.

    Returns:
        Of a forward; of scoring, a forward and gradients of the input; and of distilling, a
        training step of the model with itself as the teacher.
    """
    model = model.eval().requires_grad_(False)
    student = copy.deepcopy(model).train().requires_grad_()
    optimizer = torch.optim.AdamW(student.parameters())

    def forward() -> Tensor:
        with torch.no_grad():
            return model(images).float()

    def scored() -> None:
        inputs = images.detach().requires_grad_()
        torch.autograd.grad(model(inputs).float().logsumexp(1).sum(), inputs)

    def distilled() -> None:
        F.cross_entropy(student(images).float(), forward().softmax(1)).backward()
        optimizer.step()
        optimizer.zero_grad()

    def rate(call: Callable[[], Any]) -> float:
        call()
        found: list[float] = []
        while sum(found) < seconds or not found:
            found.append(measure(call, device, clock=time.perf_counter))
        return len(images) / min(found)

    return {
        name: rate(call)
        for name, call in ((FORWARD, forward), (SCORE, scored), (DISTIL, distilled))
    }


def counts(workers: int) -> list[int]:
    """How many loader processes are tried: none, one, twice as many ..., and all."""
    return sorted({0, *(2**power for power in range(workers.bit_length())), workers})


def limit(delivered: dict[str, dict[int, float]], taken: dict[str, float]) -> str:
    """The sentence that says what waits for what.

    Args:
        delivered: path -> loader processes -> images per second.
        taken: what a device does -> images per second.
    """
    words = []
    for path, kind in TAKEN_BY.items():
        best = max(delivered[path].values())
        slower = "the device" if taken[kind] < best else "its images"
        rates = f"{best:,.0f} images/s read, {taken[kind]:,.0f} taken by {kind}"
        words.append(f"{path} waits for {slower} ({rates})")
    return ", ".join(words)


def rows(found: dict[str, dict[str, float]]) -> Sequence[Sequence[str]]:
    """Milliseconds of every part in every path."""
    return [
        (part, *(f"{1e3 * path[part]:.3f}" if part in path else "" for path in found.values()))
        for part in PARTS
    ]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
