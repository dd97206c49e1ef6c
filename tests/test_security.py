"""Files of strangers: nothing in them runs, none takes the machine's memory or time."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import resource
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.work import counted
from vitprune_fast import files
from vitprune_fast.config.model import ModelConfig
from vitprune_fast.data import open_data
from vitprune_fast.errors import DamagedFile, VitpruneError
from vitprune_fast.models.open import open_model
from vitprune_fast.planning import Plan
from vitprune_fast.saved_models import load, save
from vitprune_fast.scoring import Scores
from vitprune_fast.testing import random_vit

MEGABYTE = 1 << 20
# getrusage counts in kilobytes, on macOS in bytes
RSS_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class Outcome:
    """What opening a file did."""

    error: str
    ours: bool
    calls: int
    growth: int


def _open_and_measure(open_file: Callable[[Path], Any], path: Path) -> Outcome:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    caught = None
    with counted() as work:
        try:
            open_file(path)
        except Exception as error:
            caught = error
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * RSS_UNIT
    name = "opened" if caught is None else f"{type(caught).__name__}: {caught}"
    return Outcome(name, isinstance(caught, VitpruneError), work.calls, growth)


def _refused(open_file: Callable[[Path], Any], path: Path) -> None:
    """The file gives one of our errors after bounded work in bounded memory; nothing runs."""
    inside = [each for each in (path, *path.glob("*")) if each.is_file()]
    # what is on the disk: a file of holes gives no right to its length
    size = sum(each.stat().st_blocks * 512 for each in inside)
    mark = path.parent / "executed"
    # a process of its own, which starts with a peak of what it already has
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        outcome = pool.submit(_open_and_measure, open_file, path).result()
    assert outcome.ours, outcome.error[:2000]
    # importing what reads it takes 40,000; a reader in Python takes 6 for each byte of a pickle
    assert outcome.calls <= 100_000 + 10 * size, outcome
    assert outcome.growth <= 2 * size + 100 * MEGABYTE, outcome
    assert "\n" not in outcome.error and len(outcome.error) < 2000
    assert not mark.exists()


# checkpoints


def _checkpoint(path: Path) -> None:
    args = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 3}
    open_model(ModelConfig(name="vit_tiny_patch16_224", args=args, checkpoint=path))


class _Calls:
    """Unpickled, it would call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


def _payloads(mark: Path) -> dict[str, Any]:
    code = f"open({str(mark)!r}, 'w')"
    return {
        "touch": _Calls(Path.touch, mark),
        "system": _Calls(os.system, f"touch '{mark}'"),
        "eval": _Calls(eval, code),
        "exec": _Calls(exec, code),
        "import": _Calls(__import__, "this"),
        "open": _Calls(open, str(mark), "w"),
        "nested": {"state_dict": {"a": [_Calls(eval, code)]}},
    }


@pytest.mark.parametrize("suffix", ["pth", "pt", "ckpt", "bin", "safetensors"])
@pytest.mark.parametrize("form", ["pickle", "torch", "legacy"])
def test_no_checkpoint_executes_anything(tmp_path: Path, suffix: str, form: str) -> None:
    mark = tmp_path / "executed"
    for name, payload in _payloads(mark).items():
        path = tmp_path / f"{name}.{suffix}"
        content = {"state_dict": {"weight": torch.ones(2), "x": payload}}
        if form == "pickle":
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
        with pytest.raises(DamagedFile) as caught:
            _checkpoint(path)
        assert str(path) in str(caught.value) and not mark.exists()


def test_the_payloads_are_real(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    for name, payload in _payloads(mark).items():
        if name != "import":
            pickle.loads(pickle.dumps(payload))
            mark.unlink()


def _zip_bomb(path: Path) -> None:
    """300 MB of zeros in 300 kB, as the weights of a model."""
    plain = path.with_suffix(".plain")
    torch.save({"weight": torch.zeros(75 << 20)}, plain)
    with (
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed,
    ):
        for entry in source.namelist():
            packed.writestr(entry, source.read(entry))
    plain.unlink()


def _overlapping_zip(path: Path) -> None:
    """Many names for the same bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(MEGABYTE))
        (entry,) = archive.infolist()
        archive.filelist += [entry] * 1000
        archive.NameToInfo["archive/again"] = entry


def _pickled(*opcodes: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02" + b"".join(opcodes) + b".")
            archive.writestr("archive/version", b"3")
            archive.writestr("archive/byteorder", b"little")

    return make


def _long(number: int) -> bytes:
    return b"\x8a\x08" + number.to_bytes(8, "little")


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(_zip_bomb, id="zip-bomb"),
        pytest.param(_overlapping_zip, id="overlapping-zip"),
        pytest.param(lambda path: path.write_bytes(b"PK\x03\x04" + bytes(99)), id="broken-zip"),
        pytest.param(
            _pickled(b"c__builtin__\nbytearray\n", _long(10**12), b"\x85R"), id="bytearray"
        ),
        pytest.param(_pickled(b"c__builtin__\nbytearray\n", _long(10**9), b"\x85R"), id="gigabyte"),
        pytest.param(_pickled(b"]" * 10**5), id="lists"),
        pytest.param(_pickled(b"(" * 10**5), id="marks"),
        pytest.param(_pickled(b"]" + b"]a" * 3 + b"a" * 10**5), id="appends"),
        pytest.param(_pickled(b"\x8d" + (10**15).to_bytes(8, "little")), id="text-of-petabytes"),
        pytest.param(_pickled(b"\x8b" + struct.pack("<i", 2**31 - 1)), id="number-of-gigabytes"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.mkdir(), id="folder"),
        pytest.param(lambda path: path.symlink_to("/dev/zero"), id="device"),
        pytest.param(lambda path: os.mkfifo(path), id="pipe"),
    ],
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_checkpoints_are_bounded(tmp_path: Path, make: Callable[[Path], None], suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    make(path)
    _refused(_checkpoint, path)


def test_the_zip_that_torch_writes_is_read(tmp_path: Path) -> None:
    model = random_vit(dtype=torch.float32)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    from vitprune_fast.models.checkpoint import read_checkpoint

    assert read_checkpoint(tmp_path / "x.pth")[""].keys() == model.state_dict().keys()


# safetensors


def _header(content: bytes, length: int | None = None, size: int | None = None) -> Callable:
    def make(path: Path) -> None:
        stated = len(content) if length is None else length
        path.write_bytes(stated.to_bytes(8, "little") + content)
        if size is not None:
            os.truncate(path, size)

    return make


def _entries(count: int) -> bytes:
    entry = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return ("{" + ",".join(entry % n for n in range(count)) + "}").encode()


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(_header(b" " * 100 * MEGABYTE), id="100-megabytes"),
        pytest.param(_header(b"{", 2**63), id="longest"),
        pytest.param(_header(b"{", 100 * MEGABYTE, 1 << 40), id="holes"),
        pytest.param(_header(b"[" * 15 * MEGABYTE), id="deep"),
        pytest.param(_header(b'{"a":' * 3 * MEGABYTE), id="deep-objects"),
        pytest.param(_header(_entries(10**5 + 10**5)), id="many-tensors"),
        pytest.param(_header(b'{"a":NaN}'), id="nan"),
        pytest.param(_header(b'{"a":' + b"9" * 10 * MEGABYTE + b"}"), id="digits"),
        pytest.param(_header(b"{}" + b" " * 6 + bytes(8)), id="rest"),
        pytest.param(
            _header(b'{"a":{"dtype":"F32","shape":[0,%d],"data_offsets":[0,0]}}' % 2**63),
            id="no-shape",
        ),
    ],
)
@pytest.mark.parametrize("read", [files.read_tensors, Scores.load, _checkpoint])
def test_safetensors_are_bounded(
    tmp_path: Path, make: Callable[[Path], None], read: Callable[[Path], Any]
) -> None:
    path = tmp_path / "x.safetensors"
    make(path)
    _refused(read, path)


@pytest.mark.parametrize("field", ["axes", "provenance", "samples"])
@pytest.mark.parametrize("text", ["[" * 10**6, "9" * 10**6, "NaN", "{}x", "\ud800", "[[]]"])
def test_metadata_of_scores_is_bounded(tmp_path: Path, field: str, text: str) -> None:
    metadata = {
        "format": "vitprune_fast.scores",
        "axes": '["a"]',
        "provenance": "{}",
        "criterion": "taylor",
        "reduction": "abs",
        "samples": "1",
        "skipped": "0",
    }
    header = {
        "__metadata__": metadata | {field: text},
        "values/a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    }
    content = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(content).to_bytes(8, "little") + content + bytes(4))
    _refused(Scores.load, path)


# JSON


def _plan(**changes: Any) -> bytes:
    plan = {"format": "vitprune_fast.plan", "version": 1, "sizes": {"a": 4}, "kept": {"a": [1]}}
    return json.dumps(plan | {"removed": []} | changes).encode()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"[" * 15 * MEGABYTE, id="deep"),
        pytest.param(b'{"a":' * 3 * MEGABYTE, id="deep-objects"),
        pytest.param(b"[" + b"[]," * 5 * MEGABYTE + b"0]", id="many-lists"),
        pytest.param(b"[" + b"{}," * 5 * MEGABYTE + b"0]", id="many-objects"),
        pytest.param(b"[" + b"1," * 7 * MEGABYTE + b"0]", id="many-numbers"),
        pytest.param(b"9" * 15 * MEGABYTE, id="digits"),
        pytest.param(b"[" + b"9" * 4000 + b"]", id="fewer-digits"),
        pytest.param(b"-" + b"1" * 15 * MEGABYTE + b"e5", id="digits-with-exponent"),
        pytest.param(b'"' + b"\\ud800" * 2 * MEGABYTE + b'"', id="half-characters"),
        pytest.param(_plan(sizes={"a": float("nan")}), id="nan"),
        pytest.param(_plan(sizes={"a": 1e999}), id="infinity"),
        pytest.param(_plan(sizes={"a": 10**9}), id="size"),
        pytest.param(_plan(sizes={"a": 10**90}), id="larger-size"),
        pytest.param(_plan(kept={"a": [10**9]}), id="unit"),
        pytest.param(_plan(kept={"a": 10**9}), id="count"),
        pytest.param(_plan(kept={"a": "1" * 10**7}), id="text"),
        pytest.param(_plan(kept={"a": list(range(10**6))}), id="many-units"),
        pytest.param(_plan(kept={"x" * 10**7: []}), id="long-name"),
        pytest.param(_plan(removed={"a": 1}), id="removed"),
    ],
)
def test_plans_are_bounded(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    _refused(Plan.load, path)


def test_a_file_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(b"[")
    os.truncate(path, 1 << 40)
    _refused(Plan.load, path)


# saved models


def _seal(folder: Path, names: dict[str, Path]) -> None:
    """Write a manifest that is right about every file, whatever it is called."""
    listed = {}
    for name, path in names.items():
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        listed[name] = {"bytes": len(content), "sha256": digest}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": listed}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save(random_vit(dtype=torch.float32, depth=1), folder)
    return folder


def _copy(saved: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def _set(*keys: Any, to: Any) -> Callable[[dict], None]:
    def change(config: dict) -> None:
        place: Any = config["vitprune_fast"]
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = to(place[keys[-1]]) if callable(to) else to

    return change


def _change_and_refuse(saved: Path, folder: Path, change: Callable[[dict], None]) -> None:
    folder = _copy(saved, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    _seal(folder, {name: folder / name for name in ("config.json", "model.safetensors")})
    _refused(load, folder)


LSTM = {"class": "torch.nn.modules.rnn.LSTM", "input_size": 1, "hidden_size": 1}


@pytest.mark.parametrize(
    "change",
    [
        _set("args", "depth", to=10**9),
        _set("args", "depth", to=10**90),
        _set("args", "depth", to=1 << 14),
        _set("args", "depth", to=[10**9]),
        _set("args", "embed_dim", to=10**9),
        _set("args", "img_size", to=[10**9, 10**9]),
        _set("args", "patch_size", to=[0, 0]),
        _set("args", "num_classes", to=10**12),
        _set("args", "reg_tokens", to=10**12),
        _set("args", "mlp_ratio", to=1e308),
        _set("args", "device", to="cpu"),
        _set("args", "norm_layer", to={"class": "__import__"}),
        _set(
            "args", "norm_layer", to={"class": "timm.models.vision_transformer.VisionTransformer"}
        ),
        _set("args", "act_layer", to={**LSTM, "num_layers": 1 << 14}),
        _set("args", "mlp_layer", to={"class": "timm.layers.mlp.Mlp", "device": "cpu"}),
        _set("args", "block_fn", to={"class": "x." * 10**6}),
        _set("args", "block_fn", to={"class": {"class": "os.system"}}),
        _set("args", to=[["a"]]),
        _set("class", to="os.system"),
        _set("class", to="timm.models.eva.Eva"),
        _set("class", to="this.that"),
        _set("swaps", to={"head": "this.that"}),
        _set("swaps", to={"head": "timm.models.resnet.ResNet"}),
        _set("swaps", to={"." * 10**6: "Constant"}),
        _set("halves", to={"blocks.0": {"chain": "x" * 10**6, "core": "x"}}),
        _set("halves", to={"blocks.0": {"chain": ["norm1"] * 10**5, "core": "attn"}}),
        _set("halves", to={"blocks.0": {"chain": ["__init__"], "core": "__init__"}}),
        _set("deleted", to=["blocks.0"] * 10**5),
        _set("deleted", to="x" * 10**6),
        _set("attributes", to={"blocks.0.attn.num_heads": 10**90}),
        _set("attributes", to={"__class__": "x"}),
        _set("attributes", to={"." * 10**6: 1}),
        _set("attributes", to={"forward": "x"}),
        _set("attributes", to={"blocks.0.attn.qkv": None}),
    ],
)
def test_descriptions_of_models_are_bounded(
    saved: Path, tmp_path: Path, change: Callable[[dict], None]
) -> None:
    _change_and_refuse(saved, tmp_path / "model", change)


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "../model/../secret",
        "sub/../../secret",
        "{outside}",
        "link",
        "linked/secret",
        "",
        ".",
        "a\0b",
        "x" * 10**6,
    ],
)
def test_names_in_a_manifest_cannot_leave_the_folder(
    saved: Path, tmp_path: Path, name: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    folder = _copy(saved, tmp_path / "model")
    (folder / "sub").mkdir()
    (folder / "link").symlink_to(secret)
    (folder / "linked").symlink_to(tmp_path)
    _seal(folder, {name.format(outside=secret): secret})
    _refused(load, folder)


@pytest.mark.parametrize("target", ["secret", "/dev/zero"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_out_of_a_saved_model_are_refused(
    saved: Path, tmp_path: Path, name: str, target: str
) -> None:
    folder = _copy(saved, tmp_path / "model")
    (tmp_path / "secret").write_bytes((folder / name).read_bytes())
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / target)
    _refused(load, folder)


def test_one_file_under_many_names_is_read_once(saved: Path, tmp_path: Path) -> None:
    folder = _copy(saved, tmp_path / "model")
    content = folder / "model.safetensors"
    _seal(folder, {"./" * n + content.name: content for n in range(1000)})
    _refused(load, folder)


def test_writing_over_a_link_leaves_its_target_alone(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plan.json").symlink_to(outside)
    files.write_json(tmp_path / "run" / "plan.json", {})
    assert outside.read_text() == "mine"
    assert not (tmp_path / "run" / "plan.json").is_symlink()


# archives


def _tar(path: Path) -> None:
    open_data(f"tar:{path}", image_size=16, channels=3)


def _shard(path: Path) -> None:
    open_data(f"wds:{path}", image_size=16, channels=3)


def _long_tar(path: Path) -> None:
    """A header that claims 8 GB of extended attributes."""
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, (8 << 30) - 1
    path.write_bytes(header.tobuf(tarfile.USTAR_FORMAT) + bytes(10240))
    os.truncate(path, 9 << 30)


def _many_headers(path: Path) -> None:
    header = tarfile.TarInfo("cat/x.jpg")
    path.write_bytes(header.tobuf() * 2000)


def _tar_bomb(path: Path) -> None:
    """Sizes that add up to far more than the file."""
    header = tarfile.TarInfo("cat/x.jpg")
    header.size = 8 << 30
    path.write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(10240))


@pytest.mark.parametrize("make", [_long_tar, _many_headers, _tar_bomb])
@pytest.mark.parametrize("kind", ["tar", "wds"])
def test_archives_are_bounded(tmp_path: Path, make: Callable[[Path], None], kind: str) -> None:
    path = tmp_path / "x.tar"
    make(path)
    _refused(_tar if kind == "tar" else _shard, path)
