"""JPEGs through the fast decoder: the bits of Pillow, and Pillow's word on whatever is damaged."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from vitprune_fast.data import decode as module
from vitprune_fast.data.decode import decode
from vitprune_fast.errors import DamagedFile

RNG = np.random.default_rng(0)


def _picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Soft shapes with some noise, as photographs have."""
    coarse = RNG.integers(0, 256, (height // 6 + 1, width // 6 + 1, 3), dtype=np.uint8)
    soft = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(soft, dtype=int) + RNG.integers(-9, 10, (height, width, 1))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)


def _jpeg(width: int = 53, height: int = 37, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    _picture(width, height, mode).save(buffer, "jpeg", **options)
    return buffer.getvalue()


def _turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


PLAIN = {
    **{f"quality {q}": _jpeg(quality=q) for q in (1, 50, 75, 96, 100)},
    **{f"subsampled {s}": _jpeg(subsampling=s) for s in ("4:4:4", "4:2:2", "4:2:0", "4:1:1")},
    **{f"{w} x {h}": _jpeg(w, h) for w, h in ((1, 1), (1, 17), (16, 1), (7, 9), (64, 48))},
    "4:4:0": simplejpeg.encode_jpeg(np.asarray(_picture(53, 37)), colorsubsampling="440"),
    "progressive": _jpeg(progressive=True),
    "optimised": _jpeg(optimize=True),
    "restart markers": _jpeg(restart_marker_blocks=3),
    "grey": _jpeg(mode="L"),
    "progressive grey": _jpeg(mode="L", progressive=True),
    "stored as RGB": _jpeg(keep_rgb=True),
    "comment": _jpeg(comment=b"none"),
    "profile": _jpeg(icc_profile=bytes(300)),
    "upright by EXIF": _jpeg(exif=_turned(1)),
    "followed by other bytes": _jpeg() + bytes(50),
}
OTHERS = {
    "on its side": _jpeg(exif=_turned(6)),
    "mirrored": _jpeg(exif=_turned(2)),
    "on its side by XMP": _jpeg(xmp=b'<x:xmpmeta tiff:Orientation="8"/>'),
    "CMYK": _jpeg(mode="CMYK"),
    "without its last mark": _jpeg()[:-2],
    "ends early": _jpeg()[:-200],
}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The files that the fast decoder has taken."""
    files: list[bytes] = []
    real = simplejpeg.decode_jpeg

    def noted(data: bytes, *arguments: Any, **options: Any) -> np.ndarray:
        pixels = real(data, *arguments, **options)
        files.append(data)
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", noted)
    return files


def _outcome(data: bytes, channels: int) -> np.ndarray | str:
    try:
        return decode(lambda: io.BytesIO(data), "x.jpg", channels=channels)
    except DamagedFile as error:
        # Pillow says where in memory the file was
        return re.sub(r"0x[0-9a-f]+", "0x", str(error))


def _by_pillow(data: bytes, channels: int) -> np.ndarray | str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "simplejpeg", None)
        return _outcome(data, channels)


def _same(one: np.ndarray | str, other: np.ndarray | str) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return isinstance(one, str) and isinstance(other, str) and one == other
    return one.dtype == other.dtype and np.array_equal(one, other)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", PLAIN)
def test_plain_jpegs_have_the_bits_of_pillow(kind: str, channels: int, taken: list[bytes]) -> None:
    data = PLAIN[kind]
    got = _outcome(data, channels)
    # Pillow makes grey of colours in its own way
    assert taken == ([data] if channels == 3 or "grey" in kind else [])
    assert _same(got, _by_pillow(data, channels))
    assert isinstance(got, np.ndarray) and got.shape[2] == channels
    assert got.flags.writeable and got.flags.c_contiguous


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", OTHERS)
def test_pillow_decodes_what_is_not_plain(kind: str, channels: int, taken: list[bytes]) -> None:
    assert _same(_outcome(OTHERS[kind], channels), _by_pillow(OTHERS[kind], channels))
    # older versions of Pillow do not read XMP
    assert not taken or "XMP" in kind


def test_the_name_of_a_file_says_nothing(taken: list[bytes]) -> None:
    buffer = io.BytesIO()
    _picture(20, 10).save(buffer, "png")
    assert _same(_outcome(buffer.getvalue(), 3), _by_pillow(buffer.getvalue(), 3))
    assert not taken


def _damaged(count: int) -> Iterator[bytes]:
    """Files with a bit turned, bytes lost, zeroed or put in, a mark set, or the end missing."""
    rng, files = np.random.default_rng(1), [*PLAIN.values(), *OTHERS.values()]
    for number in range(count):
        data = bytearray(files[rng.integers(len(files))])
        # every other one in the headers
        at = int(rng.integers(len(data) if number % 2 else min(len(data), 600)))
        some = int(rng.integers(1, 20))
        match number % 6:
            case 0:
                data[at] ^= 1 << rng.integers(8)
            case 1:
                data[at : at + some] = b""
            case 2:
                data[at : at + some] = bytes(min(some, len(data) - at))
            case 3:
                data[at:at] = rng.bytes(some)
            case 4:
                data[at : at + 2] = bytes((0xFF, rng.integers(0xC0, 0x100)))
            case 5:
                data = data[: max(at, 1)]
        yield bytes(data)


def test_pillow_alone_decides_what_is_bad(taken: list[bytes]) -> None:
    good = bad = 0
    for data in _damaged(1500):
        for channels in (1, 3):
            want = _by_pillow(data, channels)
            assert _same(_outcome(data, channels), want), data
            good, bad = good + (not isinstance(want, str)), bad + isinstance(want, str)
    # both kinds occur, and some damage is only another picture to both
    assert good > 200 and bad > 200 and len(taken) > 100


def test_a_size_that_pillow_does_not_see_is_not_allocated(
    taken: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simplejpeg, "decode_jpeg_header", lambda data: (65500, 65500, "", ""))
    assert _same(_outcome(PLAIN["grey"], 1), _by_pillow(PLAIN["grey"], 1)) and not taken
    monkeypatch.undo()
    # of a header that says so itself nothing is decoded
    at = PLAIN["7 x 9"].index(b"\xff\xc0") + 5
    huge = PLAIN["7 x 9"][:at] + (9000).to_bytes(2, "big") * 2 + PLAIN["7 x 9"][at + 4 :]
    said = "open_data: image must be readable, got x.jpg: 9000 x 9000 pixels, more than 67108864"
    assert _outcome(huge, 3) == said


def test_room_that_is_used_again_changes_nothing() -> None:
    room, shared = np.empty(64 * 48 * 3, np.uint8), []
    for width, height in ((64, 48), (20, 30), (65, 48), (64, 48)):
        pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "jpeg")
        plain, found = (
            decode(lambda b=buffer: io.BytesIO(b.getvalue()), "x", room=each)
            for each in (None, room)
        )
        assert np.array_equal(found, plain)
        shared.append(np.shares_memory(found, room))
    # what does not fit has memory of its own
    assert shared == [True, True, False, True]
