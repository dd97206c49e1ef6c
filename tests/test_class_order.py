"""A head that names its classes takes data of the same order, and no other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import transformers
from timm.data import ImageNetInfo

from tests.small import NAME, SMALL, photographs
from vitprune_fast import load, save
from vitprune_fast.cli.main import main
from vitprune_fast.config.model import ModelConfig
from vitprune_fast.data import ImageData, open_data
from vitprune_fast.data.class_order import compared
from vitprune_fast.errors import InvalidInput
from vitprune_fast.models.open import open_model
from vitprune_fast.run.assumptions import about_classes
from vitprune_fast.run.inputs import check_order, remember_normalisation
from vitprune_fast.stated import class_names, name_classes

# tench, goldfish, great white shark
IDS = ("n01440764", "n01443537", "n01484850")
WORDS = (
    "tench, Tinca tinca",
    "goldfish, Carassius auratus",
    "great white shark, white shark, man-eater, man-eating shark, Carcharodon carcharias",
)


@pytest.mark.parametrize(
    ("head", "classes", "alike"),
    [
        pytest.param(IDS, IDS, True, id="ids"),
        pytest.param(IDS, IDS[::-1], False, id="ids-in-another-order"),
        pytest.param(IDS, (*IDS[:2], "n01491361"), False, id="another-id"),
        pytest.param(IDS, WORDS, True, id="what-ids-stand-for"),
        pytest.param(WORDS, IDS[::-1], False, id="that-in-another-order"),
        pytest.param(("0", "1", "10"), ("0", "10", "1"), False, id="numbers-as-text"),
        pytest.param(IDS, ("Schleie", "Goldfisch", "Hai"), None, id="other-words"),
        pytest.param(IDS, ("Schleie", *WORDS[1:]), True, id="most-of-what-ids-stand-for"),
        pytest.param(IDS, ("Schleie", *WORDS[:0:-1]), False, id="most-in-another-order"),
        pytest.param(IDS, (*WORDS[:1], "Goldfisch", "Hai"), None, id="a-part-of-it"),
        pytest.param(("n00000000", *IDS[1:]), ("x", *WORDS[1:]), None, id="an-unknown-id"),
        pytest.param(("0", "1", "2"), ("1", "2", "3"), None, id="numbers-from-one"),
        pytest.param(IDS, IDS[:2], None, id="of-another-head"),
    ],
)
def test_only_what_surely_differs_is_told_apart(
    head: Sequence[str], classes: Sequence[str], alike: bool | None
) -> None:
    pairs = compared(head, classes)
    assert (None if pairs is None else all(a == b for _, a, b in pairs)) is alike


def data_of(*classes: str) -> Any:
    return SimpleNamespace(classes=classes)


def small() -> Any:
    return timm.create_model(NAME, **SMALL, num_classes=3)


def test_the_first_difference_is_named() -> None:
    model = small()
    name_classes(model, IDS)
    check_order(model, data_of(*IDS))
    check_order(model, data_of(*WORDS))
    sentence = "must be in the order of the model's head, got 'n01484850' where the head has "
    with pytest.raises(InvalidInput, match=rf"{sentence}'n01443537' \(label 1\)"):
        check_order(model, data_of(IDS[0], IDS[2], IDS[1]))
    assert about_classes(model, data_of(*IDS)) == about_classes(small(), data_of(*IDS)) == {}
    said = about_classes(model, data_of("a", "b", "c"))["classes"]
    assert "(n01440764, ...)" in said and "(a, ...)" in said


def digits(size: int = 8) -> ImageData:
    return open_data("digits", image_size=size, channels=3)


def test_a_model_remembers_the_classes_it_learnt(tmp_path: Path) -> None:
    model, data = timm.create_model(NAME, **SMALL, num_classes=10), digits(16)
    remember_normalisation(model, data, trained=False)
    assert class_names(model) is None
    remember_normalisation(model, data, trained=True)
    save(model, tmp_path)
    for opened in (load(tmp_path), timm.create_model(f"local-dir:{tmp_path}", pretrained=True)):
        assert class_names(opened) == data.classes
        with pytest.raises(InvalidInput, match=r"got '9' where the head has '0' \(label 0\)"):
            check_order(opened, data_of(*data.classes[::-1]))


def test_names_of_transformers_are_read_and_written(tmp_path: Path) -> None:
    sizes: Any = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    sizes |= {"intermediate_size": 48, "image_size": 16, "patch_size": 8, "num_labels": 10}
    model: Any = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))
    # by default transformers numbers them
    assert class_names(model) is None
    model.config.id2label = dict(enumerate("jihgfedcba"))
    assert class_names(model) == tuple("jihgfedcba")
    with pytest.raises(InvalidInput, match=r"got 'a' where the head has 'j' \(label 0\)"):
        check_order(model, data_of(*"abcdefghij"))
    remember_normalisation(model, digits(16), trained=True)
    save(model, tmp_path)
    assert class_names(load(tmp_path)) == tuple("0123456789")


@pytest.mark.parametrize(
    ("classes", "named"), [(1000, True), (10, False)], ids=["of-imagenet", "a-fresh-head"]
)
def test_weights_of_timm_know_the_classes_of_imagenet(
    classes: int, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained, **sizes: create(name, **sizes)
    )
    args = {**SMALL, "num_classes": classes}
    with torch.device("meta"):
        model = open_model(ModelConfig(NAME, args, pretrained=True))
        random = open_model(ModelConfig(NAME, args))
    assert class_names(random) is None
    wanted = tuple(ImageNetInfo().label_names()) if named else None
    assert class_names(model) == wanted


def test_names_that_are_none_are_not_read() -> None:
    for names in ({"0": "a"}, [1, 2, 3], [], "abc"):
        model = small()
        model.pretrained_cfg |= {"label_names": names}
        assert class_names(model) is None


def test_every_verb_refuses_another_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    photographs(Path("photos"))
    for name, classes in (("right", ("ant", "bee")), ("wrong", ("bee", "ant"))):
        model = timm.create_model(NAME, **SMALL, num_classes=2)
        name_classes(model, classes)
        save(model, name)
    data = ("--data", "folder:photos")
    teaching = ("--epochs", "1", "--warmup-epochs", "0")
    for words in (
        ("eval", "--model", "wrong", *data),
        ("eval", "--model", "right", "--teacher", "wrong", *data),
        ("distill", "--model", "right", "--teacher", "wrong", *data, *teaching, "--out", "out"),
        ("run", "--model", "wrong", *data, "--out", "out"),
    ):
        assert main([*words]) != 0
        assert "got 'ant' where the head has 'bee' (label 0)" in capsys.readouterr().err
    assert main(["eval", "--model", "right", *data]) == 0
