"""Files: whole or not there; readers refuse what they cannot trust and execute nothing."""

from __future__ import annotations

import errno
import json
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitprune_fast import files
from vitprune_fast.errors import DamagedFile, InvalidInput, RunFolderError


class _Killed(BaseException):
    """Stands for the process ending at this call."""


def _failing(name: str, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(files.os, name, fail)


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES])
def test_a_failed_write_keeps_the_old_file(
    call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "value.json"
    files.write_json(path, {"a": 1})
    with monkeypatch.context() as patch:
        _failing(call, OSError(code, os.strerror(code)), patch)
        with pytest.raises(RunFolderError, match=f"value.json must be .*: {os.strerror(code)}"):
            files.write_json(path, {"a": 2})
    assert os.listdir(tmp_path) == ["value.json"]
    assert files.read_json(path) == {"a": 1}
    files.write_json(path, {"a": 2})
    assert files.read_json(path) == {"a": 2}


def test_a_disk_that_fills_up_half_way_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "value"
    files.write_bytes(path, b"old")
    real = os.write
    calls = []

    def short_then_full(handle: int, data: memoryview) -> int:
        calls.append(len(data))
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data[:5])

    monkeypatch.setattr(files.os, "write", short_then_full)
    with pytest.raises(RunFolderError, match="No space left"):
        files.write_bytes(path, bytes(100))
    assert calls == [100, 95, 90]
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["value"]


def test_partial_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(files.os, "write", lambda handle, data: real(handle, data[:7]))
    files.write_bytes(tmp_path / "value", bytes(range(100)))
    assert (tmp_path / "value").read_bytes() == bytes(range(100))


def test_order_is_flush_rename_flush_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def spy(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: object) -> object:
            calls.append(name)
            return real(*arguments)

        monkeypatch.setattr(files.os, name, call)

    for name in ("write", "fsync", "replace", "unlink"):
        spy(name)
    files.write_bytes(tmp_path / "value", b"first")
    files.write_bytes(tmp_path / "value", b"second")
    # the old file is never deleted, only replaced
    assert calls == ["write", "fsync", "replace", "fsync"] * 2


def test_missing_folder_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"file .* must be writable"):
        files.write_bytes(tmp_path / "no" / "value", b"")


def test_remove_leftovers_removes_only_temporary_files(tmp_path: Path) -> None:
    for name in (".value.123-4.tmp", "value", ".hidden", "x.tmp"):
        (tmp_path / name).write_bytes(b"")
    files.remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "value", "x.tmp"]


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=10),
    lambda child: st.lists(child, max_size=4) | st.dictionaries(st.text(max_size=5), child),
    max_leaves=12,
)


@given(_JSON)
def test_json_round_trip_keeps_every_bit(tmp_path: Path, value: object) -> None:
    path = tmp_path / "value.json"
    files.write_json(path, value)
    back = files.read_json(path)
    assert repr(back) == repr(value)


def test_file_names_that_are_no_text_survive(tmp_path: Path) -> None:
    names = [os.fsdecode(b"caf\xe9.jpg"), "ünicode\nname"]
    files.write_json(tmp_path / "value.json", names)
    assert files.read_json(tmp_path / "value.json") == names


def test_number_lists_share_a_line(tmp_path: Path) -> None:
    files.write_json(tmp_path / "value.json", {"kept": [1, 2, 3], "text": "[\n1,\n2\n]"})
    text = (tmp_path / "value.json").read_text()
    assert text == '{\n  "kept": [1, 2, 3],\n  "text": "[\\n1,\\n2\\n]"\n}\n'


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), {"a": {1, 2}}, torch.zeros(1)], ids=repr
)
def test_write_json_rejects_what_json_cannot_hold(tmp_path: Path, value: object) -> None:
    with pytest.raises(InvalidInput, match="must be plain finite JSON data, got"):
        files.write_json(tmp_path / "value.json", value)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b'{"a": NaN}', "NaN", id="nan"),
        pytest.param(b"[-Infinity]", "Infinity", id="infinity"),
        pytest.param(b"[1e999]", "too large", id="overflow"),
        pytest.param(b'{"a": 1, "a": 2}', "same key twice", id="duplicate"),
        pytest.param(b"[" * 33 + b"]" * 33, "levels of nesting", id="deep"),
        pytest.param(b"[" * 5_000_000, "must be valid JSON", id="very-deep"),
        pytest.param(b'{"a":' * 1_000_000, "must be valid JSON", id="deep-objects"),
        pytest.param(b"1" * 100_000, "must be valid JSON", id="huge-integer"),
        pytest.param(b"\xff\xfe", "must be valid JSON", id="not-utf8"),
        pytest.param(b"", "must be valid JSON", id="empty"),
        pytest.param(b"{} {}", "must be valid JSON", id="two-values"),
        pytest.param(b'"' + b'\\"' * 1_000_000, "must be valid JSON", id="open-string"),
        pytest.param(bytes(16 << 20) + b"0", "at most 16777216 bytes", id="large"),
    ],
)
def test_read_json_rejects(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "value.json"
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match=reason) as caught:
        files.read_json(path)
    assert "value.json" in str(caught.value)


def _missing(path: Path) -> None:
    return None


@pytest.mark.parametrize(
    "make", [_missing, Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")]
)
@pytest.mark.parametrize("read", [files.read_json, files.read_tensors, files.sha256])
def test_readers_reject_what_is_no_regular_file(
    tmp_path: Path, make: Callable[[Path], None], read: Callable[[Path], object]
) -> None:
    make(tmp_path / "value")
    with pytest.raises(DamagedFile, match="must be a r"):
        read(tmp_path / "value")


_TENSORS = {
    "odd": torch.arange(7, dtype=torch.int16),
    "half": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.zeros(0, 4),
    "flags": torch.tensor([True, False]),
}


def test_tensors_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "value.safetensors"
    metadata = {"zeta": "1", "alpha": "ü\n"}
    files.write_tensors(path, _TENSORS, metadata)
    back = files.read_tensors(path)
    assert list(back) == sorted(_TENSORS)
    for name, tensor in _TENSORS.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)
    assert files.read_metadata(path) == metadata
    # stock readers open it too
    assert torch.equal(safetensors.torch.load_file(path)["odd"], _TENSORS["odd"])


def test_no_tensors_round_trip(tmp_path: Path) -> None:
    for metadata in ({}, {"a": "b"}):
        files.write_tensors(tmp_path / "x.safetensors", {}, metadata)
        assert files.read_tensors(tmp_path / "x.safetensors") == {}
        assert files.read_metadata(tmp_path / "x.safetensors") == metadata


def test_read_tensors_own_their_aligned_memory(tmp_path: Path) -> None:
    path = tmp_path / "value.safetensors"
    files.write_tensors(path, {"a": torch.zeros(3, dtype=torch.int8), "b": torch.zeros(5)})
    for tensor in files.read_tensors(path).values():
        assert tensor.data_ptr() % 64 == 0
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_views_are_stored_as_what_they_show(tmp_path: Path) -> None:
    path = tmp_path / "value.safetensors"
    value = torch.arange(12.0).view(3, 4)
    files.write_tensors(path, {"transposed": value.T, "column": value[:, 1]})
    back = files.read_tensors(path)
    assert torch.equal(back["transposed"], value.T) and torch.equal(back["column"], value[:, 1])
    assert path.stat().st_size < 300


def test_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    metadata = {letter: letter for letter in "abcdefgh"}
    digests = set()
    for order in (1, -1):
        files.write_tensors(tmp_path / "v", dict(list(_TENSORS.items())[::order]), metadata)
        digests.add(files.sha256(tmp_path / "v"))
    # eight metadata keys in the library's random order would agree once in 40,320 times
    header = (tmp_path / "v").read_bytes()[8:]
    assert header.index(b'"a"') < header.index(b'"b"') < header.index(b'"h"')
    assert len(digests) == 1


class _Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.target,))


def _dump_protocol(protocol: int) -> Callable[[object, Path], None]:
    def dump(value: object, path: Path) -> None:
        path.write_bytes(pickle.dumps(value, protocol))

    return dump


@pytest.mark.parametrize(
    "dump",
    [
        pytest.param(lambda value, path: torch.save(value, path), id="torch.save"),
        pytest.param(
            lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
            id="legacy-torch.save",
        ),
        *[pytest.param(_dump_protocol(protocol), id=f"pickle{protocol}") for protocol in range(6)],
    ],
)
def test_pickles_are_refused_and_never_executed(
    tmp_path: Path, dump: Callable[[object, Path], None]
) -> None:
    path, target = tmp_path / "model.safetensors", tmp_path / "executed"
    dump({"weight": _Payload(target)}, path)
    with pytest.raises(DamagedFile, match=r"model.safetensors must be (a whole )?safetensors"):
        files.read_tensors(path)
    assert not target.exists()


def test_a_header_length_that_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    path = tmp_path / "value.safetensors"
    tensors = {"a": torch.ones(1)}
    for length in (0x0180, 0x0280, 0x0580, 0x4B50):
        files.write_tensors(path, tensors, {"pad": ""})
        spare = length - int.from_bytes(path.read_bytes()[:8], "little")
        files.write_tensors(path, tensors, {"pad": "x" * spare})
        assert int.from_bytes(path.read_bytes()[:8], "little") == length
        assert torch.equal(files.read_tensors(path)["a"], tensors["a"])


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x01\0\0", id="short"),
        pytest.param(b"\xff" * 8 + b"{}", id="length-over-everything"),
        pytest.param((17 << 20).to_bytes(8, "little") + b" " * (17 << 20), id="huge-header"),
        pytest.param((2).to_bytes(8, "little") + b"[]", id="list-header"),
        pytest.param((5_000_000).to_bytes(8, "little") + b"[" * 5_000_000, id="deep-header"),
        pytest.param((4).to_bytes(8, "little") + b"nope", id="text-header"),
    ],
)
def test_read_tensors_rejects_bad_headers(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "value.safetensors"
    path.write_bytes(content)
    for read in (files.read_tensors, files.read_metadata):
        with pytest.raises(DamagedFile, match=r"file .*value.safetensors must"):
            read(path)


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param({"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4]}, id="huge-shape"),
        pytest.param({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, id="negative"),
        pytest.param({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, id="hole"),
        pytest.param({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, id="past-the-end"),
        pytest.param({"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}, id="dtype"),
        pytest.param({"shape": [1]}, id="incomplete"),
        pytest.param({"dtype": "F32", "shape": [2**40] * 4, "data_offsets": [0, 4]}, id="overflow"),
    ],
)
def test_read_tensors_rejects_bad_entries(tmp_path: Path, entry: dict) -> None:
    header = json.dumps({"a": entry}).encode()
    path = tmp_path / "value.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(DamagedFile, match="must be safetensors"):
        files.read_tensors(path)


@given(st.data())
@settings(max_examples=300)
def test_mutated_files_give_only_our_errors(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "value"
    tensors = data.draw(st.booleans())
    if tensors:
        files.write_tensors(path, _TENSORS, {"a": "b"})
    else:
        files.write_json(path, {"blocks.0.attn.heads": [0, 1, 3], "nested": {"x": 1.5}})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        files.read_tensors(path) if tensors else files.read_json(path)
    except DamagedFile as error:
        assert str(path) in str(error)


def _sealed_folder(folder: Path) -> None:
    (folder / "sub").mkdir(parents=True)
    files.write_tensors(folder / "model.safetensors", {"w": torch.ones(2)})
    files.write_json(folder / "sub" / "config.json", {"depth": 2})
    files.write_manifest(folder, ["model.safetensors", "sub/config.json"])


def test_every_bit_flip_in_a_sealed_folder_is_found(tmp_path: Path) -> None:
    _sealed_folder(tmp_path)
    assert files.check_manifest(tmp_path) == ["model.safetensors", "sub/config.json"]
    for path in (
        tmp_path / "model.safetensors",
        tmp_path / "sub/config.json",
        tmp_path / "manifest.json",
    ):
        content = path.read_bytes()
        for bit in range(8 * len(content)):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            with pytest.raises(DamagedFile):
                files.check_manifest(tmp_path)
        path.write_bytes(content)
    files.check_manifest(tmp_path)


def test_check_manifest_finds_a_missing_file_and_allows_an_extra_one(tmp_path: Path) -> None:
    _sealed_folder(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    files.check_manifest(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(DamagedFile, match=r"model.safetensors must be a readable file"):
        files.check_manifest(tmp_path)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "", ".", "a\0b", "link/x", "x" * 5000]
)
def test_names_from_files_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "x").write_text("outside")
    (folder / "link").symlink_to(tmp_path)
    files.write_json(
        folder / "manifest.json",
        {"format": 1, "files": {name: {"bytes": 7, "sha256": files.sha256(tmp_path / "x")}}},
    )
    with pytest.raises(DamagedFile):
        files.check_manifest(folder)


def test_concurrent_writers_leave_one_whole_value(tmp_path: Path) -> None:
    path = tmp_path / "value"
    contents = [bytes([i]) * 200_000 for i in range(4)]
    errors: list[Exception] = []

    def write(content: bytes) -> None:
        try:
            for _ in range(20):
                files.write_bytes(path, content)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=[content]) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert path.read_bytes() in contents and os.listdir(tmp_path) == ["value"]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_write_that_never_returns_leaves_the_old_file(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write_bytes(tmp_path / "value", b"old")
    _failing(call, _Killed(), monkeypatch)
    with pytest.raises(_Killed):
        files.write_bytes(tmp_path / "value", b"new")
    assert (tmp_path / "value").read_bytes() == b"old"


def test_what_is_no_regular_file_is_never_replaced(tmp_path: Path) -> None:
    """Such as a device; a pipe stands for it."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        with pytest.raises(RunFolderError, match="regular file, got a device"):
            files.write_bytes(tmp_path / name, b"new")
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe"]


def test_a_refusal_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(DamagedFile) as refused:
        files.read_tensors(tmp_path / "x.safetensors")
    assert str(refused.value).count("must be safetensors") == 1
