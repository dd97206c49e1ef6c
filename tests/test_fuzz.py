"""Damaged plans, descriptions, manifests and tensor files: our own error or a valid value."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vitprune_fast import files
from vitprune_fast.errors import DamagedFile
from vitprune_fast.export import export
from vitprune_fast.planning import Plan
from vitprune_fast.saved_models import load, save
from vitprune_fast.scoring import Scores
from vitprune_fast.testing import random_vit

# the larger number takes a minute
QUICK, ALL = 500, 10_000
# what a careless or hostile writer puts where something else belongs
ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 10**9, 2**31, 2**63, -(2**63), 10**90, 0.5, -0.0, 1e308,
    float("nan"), float("inf"), "", "x", "../x", "/", "\0", "\ud800", "ü" * 50, [], [[]], {},
    {"": 0}, [10**9], [3, 1], [1, 1], [-1], ["a"], [None], [0.5], [True], {"a": [1]}, [0] * 300,
]  # fmt: skip
TEXTS = [
    b"null", b"NaN", b"-Infinity", b"1e999", b"-", b"[", b"]", b"{", b"}", b'"', b",", b":",
    b"\\u0000", b"\\ud800", b"\xff", b"\0", b"\xef\xbb\xbf", b"9" * 400, b"[" * 40, b'{"a":' * 40,
    b" ", b"\\",
]  # fmt: skip


class Mutator:
    """Seeded damage to bytes and to JSON values."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def bytes(self, content: bytes) -> bytes:
        """Flip, overwrite, cut, insert, repeat, swap: one to four times."""
        rng = self.rng
        for _ in range(rng.randint(1, 4)):
            at, other = rng.randint(0, len(content)), rng.randint(0, len(content))
            low, high = min(at, other), min(max(at, other), min(at, other) + 200)
            kind = rng.randrange(7)
            if kind == 0 and at < len(content):
                flipped = content[at] ^ 1 << rng.randrange(8)
                content = content[:at] + bytes([flipped]) + content[at + 1 :]
            elif kind == 1:
                content = content[:at] + rng.randbytes(rng.randint(1, 8)) + content[at + 1 :]
            elif kind == 2:
                content = content[:at]
            elif kind == 3:
                content = content[:low] + content[high:]
            elif kind == 4:
                content = content[:high] + content[low:high] * rng.randint(1, 3) + content[high:]
            elif kind == 5:
                content = content[:at] + rng.choice(TEXTS) + content[at:]
            else:
                content = content[high:] + content[low:high] + content[:low]
        return content

    def json(self, value: Any) -> Any:
        """Change one to three places of a JSON value: another value, gone, twice, renamed."""
        value = copy.deepcopy(value)
        for _ in range(self.rng.randint(1, 3)):
            value = self._change(value)
        return value

    def _change(self, value: Any) -> Any:
        rng = self.rng
        places = [(None, None), *_places(value)]
        parent, key = rng.choice(places)
        if parent is None:
            return copy.deepcopy(rng.choice(ODD_VALUES)) if rng.random() < 0.05 else value
        kind = rng.randrange(5)
        if kind <= 1:
            parent[key] = copy.deepcopy(rng.choice(ODD_VALUES))
        elif kind == 2:
            source, name = rng.choice(places[1:])
            parent[key] = copy.deepcopy(source[name])
        elif kind == 3:
            del parent[key]
        elif isinstance(parent, list):
            parent.insert(key, parent[key])
        else:
            parent[rng.choice(["", "x", "../x", f"{key}x", "\ud800"])] = parent.pop(key)
        return value

    def file(self, content: bytes) -> bytes:
        """Damage a JSON file, half of the time keeping it JSON."""
        if self.rng.random() < 0.5:
            return self.bytes(content)
        return json.dumps(self.json(json.loads(content))).encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    found = []
    level = [value]
    while level:
        container = level.pop()
        items: Any = ()
        if isinstance(container, dict):
            items = list(container.items())
        elif isinstance(container, list):
            items = list(enumerate(container))
        found += [(container, key) for key, _ in items]
        level += [child for _, child in items if isinstance(child, (dict, list))]
    return found


def _fuzz(
    count: int, seed: int, mutate: Callable[[Mutator], object], read: Callable[[], Any]
) -> tuple[int, int]:
    """Counts of refused and accepted files; any other error comes out with its number."""
    refused = 0
    for number in range(count):
        mutator = Mutator(1_000_000 * seed + number)
        mutate(mutator)
        try:
            read()
        except DamagedFile as error:
            refused += 1
            assert len(str(error)) < 3000
        except Exception as error:
            raise AssertionError(f"case {number} of seed {seed} gave {error!r}") from error
    return refused, count - refused


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save(random_vit(dtype=torch.float32, depth=1, embed_dim=12), folder)
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


COUNTS = pytest.mark.parametrize("count", [QUICK, pytest.param(ALL, marks=pytest.mark.slow)])


@COUNTS
def test_mutated_plans(tmp_path: Path, count: int) -> None:
    path = tmp_path / "plan.json"
    sizes = {"blocks.0.attn.heads": 3, "blocks.0.mlp.neurons": 12, "blocks": 1}
    kept = {"blocks.0.attn.heads": [0, 2], "blocks.0.mlp.neurons": [0, 1, 5, 11]}
    Plan(sizes, kept, ["blocks.0.mlp"]).save(path)
    content = path.read_bytes()

    def read() -> None:
        plan = Plan.load(path)
        for axis in plan:
            assert plan[axis] == sorted(set(plan[axis]))
            assert all(0 <= unit < plan.size(axis) for unit in plan[axis])
        assert all(isinstance(name, str) for name in plan.removed)

    refused, accepted = _fuzz(
        count, 1, lambda mutator: path.write_bytes(mutator.file(content)), read
    )
    assert refused > 0.5 * count and accepted > 0


@COUNTS
def test_mutated_descriptions(model: Path, count: int) -> None:
    config = (model / "config.json").read_bytes()
    weights = (model / "model.safetensors").read_bytes()

    def mutate(mutator: Mutator) -> None:
        content = mutator.file(config)
        (model / "config.json").write_bytes(content)
        # sealed again, as a careless or hostile writer would
        _seal(model, {"config.json": content, "model.safetensors": weights})

    def read() -> None:
        tensors = load(model).state_dict()
        assert not any(tensor.is_meta for tensor in tensors.values())

    refused, accepted = _fuzz(count, 2, mutate, read)
    assert refused > 0.5 * count and accepted > 0


@COUNTS
def test_mutated_manifests(model: Path, count: int) -> None:
    path = model / "manifest.json"
    content = path.read_bytes()
    listed = json.loads(content)["files"]

    def read() -> None:
        for name in files.check_manifest(model):
            assert model.resolve() in (model / name).resolve().parents
        # what passes says of every file it names what is true of it
        stated = files.read_json(path)["files"]
        assert all(stated[name] == listed[Path(name).name] for name in stated)

    refused, _ = _fuzz(count, 3, lambda mutator: path.write_bytes(mutator.file(content)), read)
    assert refused > 0.5 * count


@COUNTS
def test_mutated_tensor_files(tmp_path: Path, count: int) -> None:
    path = tmp_path / "scores.safetensors"
    values = {"blocks.0.attn.heads": torch.arange(3.0), "blocks.0.mlp.neurons": torch.ones(5)}
    Scores(values, "taylor", "abs", 4, 0, {}, {"seed": "0"}).save(path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, payload = json.loads(content[8 : 8 + length]), content[8 + length :]

    def mutate(mutator: Mutator) -> None:
        if mutator.rng.random() < 0.5:
            path.write_bytes(mutator.bytes(content))
            return
        text = json.dumps(mutator.json(header)).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + payload)

    def read() -> None:
        tensors = files.read_tensors(path)
        assert sum(t.nbytes for t in tensors.values()) <= path.stat().st_size
        files.read_metadata(path)
        scores = Scores.load(path)
        assert all(isinstance(value, torch.Tensor) for value in scores.values())

    refused, accepted = _fuzz(count, 4, mutate, read)
    assert refused > 0.3 * count and accepted > 0


def _seal(folder: Path, contents: dict[str, bytes]) -> None:
    listed = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": listed}))


# bit flips


def _flipped(content: bytes, bit: int) -> bytes:
    at = bit // 8
    return content[:at] + bytes([content[at] ^ 1 << bit % 8]) + content[at + 1 :]


def _find_flips(model: Path, name: str, bits: list[int]) -> None:
    path = model / name
    content = path.read_bytes()
    known = _but_of_the_card(content) if name == "manifest.json" else None
    for bit in bits:
        path.write_bytes(_flipped(content, bit))
        if known is not None and _but_of_the_card(path.read_bytes()) == known:
            load(model)
            continue
        with pytest.raises(DamagedFile):
            load(model)
    path.write_bytes(content)
    load(model)


def _but_of_the_card(manifest: bytes) -> Any:
    """What a manifest says of all files but of the card, which anybody may change."""
    try:
        found = json.loads(manifest)
        del found["files"]["README.md"]
    except (ValueError, LookupError, TypeError):
        return None
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "manifest.json"])
def test_every_bit_flip_in_the_description_is_found(model: Path, name: str) -> None:
    _find_flips(model, name, list(range(8 * (model / name).stat().st_size)))


@pytest.mark.slow
def test_every_bit_flip_in_the_header_of_the_weights_is_found(model: Path) -> None:
    content = (model / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    sample = random.Random(0).sample(range(8 * length, 8 * len(content)), 2000)
    _find_flips(model, "model.safetensors", [*range(8 * length), *sample])


FILES = ["config.json", "manifest.json", "model.safetensors"]


@pytest.mark.parametrize("name", FILES)
def test_sampled_bit_flips_are_found(model: Path, name: str) -> None:
    size = 8 * (model / name).stat().st_size
    _find_flips(model, name, [0, size - 1, *random.Random(0).sample(range(size), 100)])


@pytest.mark.parametrize("format", ["timm", "hf"])
def test_exported_folders_are_as_sealed_as_saved_ones(format: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from integrations.huggingface import model_of

    model: Any = model_of("vit", torch.float32) if format == "hf" else random_vit(depth=1)
    model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
    export(model, format, tmp_path / "model")
    names = [path.name for path in (tmp_path / "model").iterdir()]
    assert ("preprocessor_config.json" in names) == (format == "hf") and "README.md" in names
    for name in {*names} - {"README.md"}:
        path = tmp_path / "model" / name
        content = path.read_bytes()
        _find_flips(tmp_path / "model", name, random.Random(0).sample(range(8 * len(content)), 10))
        for damaged in (content[:-3], b"", None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(DamagedFile):
                load(tmp_path / "model")
        path.write_bytes(content)
    load(tmp_path / "model")
