"""Files that are either whole or not there, and readers that trust nothing they read.

Writers put the bytes in a temporary file of the same folder, flush it, rename it over the old one
and flush the folder, so a reader (or a restart after a power cut) meets the old content or the new.
Readers have limits and raise ``DamagedFile``; nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import stat
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from vitprune_fast.errors import DamagedFile, InvalidInput, RunFolderError

MANIFEST = "manifest.json"
MAX_JSON_BYTES = 16 << 20
MAX_JSON_DEPTH = 32
# a value may take a hundred times the memory of the three characters that make it
MAX_JSON_VALUES = 1 << 20
MAX_DIGITS = 100
MAX_NAME = 4096
# ten times as much memory is taken to read it
MAX_HEADER_BYTES = 8 << 20
_TEMPORARY = re.compile(r"\..+\.\d+-\d+\.tmp")
_NUMBER_LIST = re.compile(r'\[\n([^\[\]{}"]*)\n\s*\]')
_CHUNK = 1 << 20

PathLike = str | os.PathLike[str]


def write_bytes(path: PathLike, data: bytes) -> None:
    """Replace ``path`` by ``data`` in one step; on any failure the old file stays as it was.

    Raises:
        RunFolderError: the folder is missing or read-only, the disk is full, or ``path`` is a
            device, a pipe or a socket.
    """
    path = Path(path)
    check_replaceable(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        try:
            _write_and_flush(temporary, data)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        flush_folder(path.parent)
    except OSError as error:
        raise RunFolderError(
            f"file {path} must be writable, got: {error.strerror or error}; "
            "the earlier content is untouched: free space or fix the permission and start again"
        ) from error


def check_replaceable(path: PathLike) -> None:
    """Refuse a place where a device, a pipe or a socket is: a file put there would remove it.

    Raises:
        RunFolderError: as said, or the path is none.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RunFolderError(f"file {path} must be writable, got: {reason}") from error
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise RunFolderError(
            f"file {path} must be new or a regular file, got a device, a pipe or a socket; "
            "take another place"
        )


def _write_and_flush(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        _write_all(handle, data)
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_all(handle: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


def make_folder(path: PathLike) -> None:
    """Create a folder and its parents, where they are not there.

    Raises:
        RunFolderError: a file is in the way, or the place is read-only.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_folder(path, error.strerror or str(error)) from error


def probe_folder(path: PathLike) -> None:
    """Ask whether a folder can be created or written, before the work whose result goes there.

    Nothing is created.

    Raises:
        RunFolderError: a file is in the way, or the place is read-only.
    """
    path = Path(path)
    try:
        # the part of the path that is there decides about the rest
        there = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
        if not there.is_dir():
            raise _no_folder(path, f"{there}, which is no folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise _no_folder(path, f"{there}, which is read-only")
    except OSError as error:
        raise _no_folder(path, error.strerror or str(error)) from error


def _no_folder(path: PathLike, reason: str) -> RunFolderError:
    return RunFolderError(
        f"folder {path} must be a folder that can be created or written, got {reason}; "
        "take another or fix the permission"
    )


def append_line(path: PathLike, line: str) -> None:
    """Add one line at the end of a text file and flush it; a failed attempt leaves nothing.

    A kill may still leave a part of the line, which a reader must expect at the end of the file.

    Raises:
        RunFolderError: the file cannot be written, or the disk is full.
    """
    path = Path(path)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            before = os.fstat(handle).st_size
            try:
                _write_all(handle, f"{line}\n".encode())
                os.fsync(handle)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.ftruncate(handle, before)
                raise
        finally:
            os.close(handle)
        if before == 0:
            flush_folder(path.parent)
    except OSError as error:
        raise RunFolderError(
            f"file {path} must be writable, got: {error.strerror or error}; "
            "the earlier lines are untouched: free space or fix the permission and start again"
        ) from error


def flush_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder: PathLike) -> None:
    """Delete the temporary files that killed processes left in ``folder`` and below it.

    Only for the owner of the folder: another process may be about to rename its own.
    """
    for path in list(Path(folder).rglob(".*.tmp")):
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            with contextlib.suppress(OSError):
                path.unlink()


def write_text(path: PathLike, text: str) -> None:
    """Replace ``path`` by ``text`` in UTF-8; see ``write_bytes``."""
    write_bytes(path, text.encode())


def write_json(path: PathLike, value: Any) -> None:
    """Replace ``path`` by ``value`` as JSON, keys in the order given; see ``write_bytes``.

    Raises:
        InvalidInput: ``value`` holds NaN, an infinity, or something JSON has no form for.
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"file {path} must be plain finite JSON data, got: {error}") from error
    # numbers of one list share a line; a raw line break never lies inside a JSON string
    text = _NUMBER_LIST.sub(lambda match: "[" + " ".join(match[1].split()) + "]", text)
    write_text(path, text + "\n")


def open_regular(path: PathLike) -> BinaryIO:
    """Open a file of strangers to read it; nobody waits for a pipe or a device.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    return open(path, "rb", opener=_opened_if_regular)


def _opened_if_regular(path: str, flags: int) -> int:
    # a pipe would have its reader wait for a writer
    handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "no regular file", path)
    return handle


def read_json(path: PathLike) -> Any:
    """Read JSON that anyone may have written.

    Args:
        path: a regular file in UTF-8, of at most 16 MiB.

    Raises:
        DamagedFile: missing, too large, not UTF-8, not JSON, nested deeper than 32 levels, over a
            million values, a key twice in one object, NaN or an infinity, an integer of absurd
            length.
    """
    path = Path(path)
    _regular_size(path)
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(data) > MAX_JSON_BYTES:
        raise DamagedFile(f"file {path} must have at most {MAX_JSON_BYTES} bytes, got more")
    try:
        return parse_json(data)
    except ValueError as error:
        raise DamagedFile(f"file {path} must be valid JSON, got {error}") from None


def parse_json(data: bytes) -> Any:
    """Parse JSON under the rules of ``read_json``.

    Raises:
        ValueError: with the reason.
    """
    if sum(map(data.count, (b",", b":", b"[", b"{"))) > MAX_JSON_VALUES:
        raise ValueError(f"more than {MAX_JSON_VALUES} values")
    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            parse_int=_short_integer,
            object_pairs_hook=_object_without_duplicates,
        )
    except RecursionError:
        raise ValueError("brackets nested without end") from None
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return value
    raise ValueError(f"more than {MAX_JSON_DEPTH} levels of nesting")


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name}, which JSON does not have")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:32]}, which is too large")
    return value


def _short_integer(text: str) -> int:
    # reading digits takes the square of their number
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object with the same key twice")
    return result


def write_tensors(
    path: PathLike,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Replace ``path`` by a safetensors file; equal content gives equal bytes.

    Args:
        path: the file.
        tensors: any shapes, dtypes and devices; views are stored as what they show.
        metadata: strings kept in the header.
    """
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    # of nothing at all the library would write a header that is no JSON
    about = dict(metadata or {}) if plain or metadata else None
    data = safetensors.torch.save(plain, about)
    # the library writes the metadata in the random order of a hash map
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(
        json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":")
    ).encode()
    header += b" " * (-len(header) % 8)
    start = len(header).to_bytes(8, "little") + header
    write_bytes(path, b"".join([start, memoryview(data)[8 + length :]]))


def read_tensors(path: PathLike) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file into memory of their own.

    Nothing in the file is executed; pickles and zip archives are refused whatever their name.

    Returns:
        Name to CPU tensor, sorted by name.

    Raises:
        DamagedFile: missing, truncated, another format, a header over 8 MiB or that does not match
            the data.
    """
    with _open_tensors(Path(path)) as file:
        # memory of torch's own alignment: matrix products may round by address
        return {name: file.get_tensor(name).clone() for name in sorted(file.keys())}


def read_metadata(path: PathLike) -> dict[str, str]:
    """Read the metadata strings of a safetensors file; refuses what ``read_tensors`` refuses."""
    with _open_tensors(Path(path)) as file:
        return dict(file.metadata() or {})


@contextlib.contextmanager
def _open_tensors(path: Path) -> Iterator[Any]:
    _regular_size(path)
    try:
        with open(path, "rb") as file:
            start = file.read(8)
        _refuse_pickle(path, start)
        if int.from_bytes(start, "little") > MAX_HEADER_BYTES:
            raise DamagedFile(
                f"file {path} must be safetensors with a header of at most "
                f"{MAX_HEADER_BYTES} bytes, got a longer one"
            )
        with safe_open(path, "pt") as tensors:
            yield tensors
    except OSError as error:
        raise _unreadable(path, error) from error
    except DamagedFile:
        raise
    # the library's own error, and what torch raises for a shape that cannot be
    except (SafetensorError, KeyError, TypeError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise DamagedFile(
            f"file {path} must be safetensors, got {reason}; copy or download it again"
        ) from None


def _refuse_pickle(path: Path, start: bytes) -> None:
    kind = None
    if start[:4] == b"PK\x03\x04":
        kind = "a zip archive (what torch.save writes)"
    # a header length may begin with the same two bytes, but then ends in zeros
    elif start[:1] == b"\x80" and start[1:2] <= b"\x05" and any(start[3:]):
        kind = "a pickle"
    if kind:
        raise DamagedFile(
            f"file {path} must be safetensors, got {kind}, which can hold code and is "
            "never opened; convert it with safetensors.torch.save_file where you trust it"
        )


def sha256(path: PathLike) -> str:
    """SHA-256 of a regular file as 64 lower-case hexadecimal digits."""
    path = Path(path)
    _regular_size(path)
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise _unreadable(path, error) from error
    return digest.hexdigest()


def inside(folder: PathLike, name: str) -> Path:
    """Return the path of ``name`` in ``folder``, for names that came out of a file.

    Raises:
        DamagedFile: ``name`` is absolute, climbs out with ``..``, or leads out through a link.
    """
    root = Path(folder).resolve()
    try:
        path = (root / name).resolve()
    except (OSError, ValueError, RuntimeError):
        path = root.parent
    if "\0" in name or len(name) > MAX_NAME or path == root or root not in path.parents:
        raise DamagedFile(
            f"folder {folder} must hold all files that are named in it, got {name[:200]!r}"
        )
    return path


def write_manifest(folder: PathLike, names: Iterable[str]) -> None:
    """Write ``manifest.json``: size and SHA-256 of each file. Written last, it seals the folder.

    Args:
        folder: the folder.
        names: paths relative to ``folder``.
    """
    root = Path(folder)
    files = {}
    for name in sorted(names):
        path = inside(root, name)
        files[name] = {"bytes": _regular_size(path), "sha256": sha256(path)}
    write_json(root / MANIFEST, {"format": 1, "files": files})


def replace_sealed(folder: PathLike, name: str, text: str) -> None:
    """Put a text file in the place of one of a sealed folder, which is whole at every moment.

    No other file is read: what the manifest says of them stays.

    Args:
        folder: with a ``manifest.json``.
        name: of the file, relative to ``folder``; need not be there yet.
        text: what it will hold.

    Raises:
        DamagedFile: the manifest is missing or none.
    """
    root = Path(folder)
    listed = _listed(root)
    others = {other: entry for other, entry in listed.items() if other != name}
    # a file that no manifest lists is nobody's damage
    write_json(root / MANIFEST, {"format": 1, "files": others})
    write_text(root / name, text)
    entry = {"bytes": (root / name).stat().st_size, "sha256": sha256(root / name)}
    write_json(
        root / MANIFEST, {"format": 1, "files": dict(sorted({**others, name: entry}.items()))}
    )


def is_as_listed(folder: PathLike, name: str) -> bool:
    """Whether ``manifest.json`` lists a file that is still as it was written."""
    try:
        entry = _listed(Path(folder)).get(name)
        return isinstance(entry, dict) and entry.get("sha256") == sha256(inside(folder, name))
    except DamagedFile:
        return False


def _listed(root: Path) -> dict[str, Any]:
    manifest = read_json(root / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or set(manifest) != {"format", "files"}:
        raise DamagedFile(f"file {root / MANIFEST} must hold `format` and `files`")
    if manifest["format"] != 1 or isinstance(manifest["format"], bool):
        raise DamagedFile(f"file {root / MANIFEST} must have format 1, got {manifest['format']!r}")
    return files


def check_manifest(folder: PathLike, but: Collection[str] = ()) -> list[str]:
    """Compare every file with ``manifest.json``.

    Args:
        folder: the folder.
        but: names of files that may be missing or changed.

    Returns:
        The names the manifest lists; files it does not list are not looked at.

    Raises:
        DamagedFile: the manifest or a file is missing or differs in any bit, or a file is listed
            twice.
    """
    root = Path(folder)
    files = _listed(root)
    seen: set[Path] = set()
    for name, wanted in files.items():
        path = inside(root, name)
        # else a thousand spellings of one large file would keep us busy
        if path in seen:
            raise DamagedFile(f"file {root / MANIFEST} must list {path} once")
        seen.add(path)
        if name in but:
            continue
        size = _regular_size(path)
        found = {"bytes": size, "sha256": sha256(path)}
        if wanted != found:
            raise DamagedFile(
                f"file {path} must have the sha256 and size of {MANIFEST}, "
                f"got {found}; copy or download the folder again"
            )
    return list(files)


def _regular_size(path: Path) -> int:
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    # a pipe or a device would block or never end
    if not stat.S_ISREG(status.st_mode):
        raise DamagedFile(f"file {path} must be a regular file")
    return status.st_size


def _unreadable(path: Path, error: Exception) -> DamagedFile:
    reason = getattr(error, "strerror", None) or str(error)
    return DamagedFile(f"file {path} must be a readable file, got: {reason}")
