"""Published presets, field by field, beside the committed table that names where each is from."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from vitprune_fast.config.run import RunConfig
from vitprune_fast.config.yamlfile import to_plain
from vitprune_fast.recipes.by_name import named, names
from vitprune_fast.recipes.presets import preset

TABLE = Path(__file__).parents[2] / "docs" / "recipes" / "settings.csv"
ALL = "*"
# mappings that are values and no parts of the configuration
VALUES = ("plan.keep", "plan.bounds", "model.args", "student.args")
# where a run writes is no setting of a method
NO_METHOD = ("out", "recipe")


def rows() -> list[dict[str, str]]:
    """The lines of the table."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def flat(plain: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Setting -> value, parts of the configuration by dots."""
    found: dict[str, Any] = {}
    for key, value in plain.items():
        name = f"{before}{key}"
        inner = isinstance(value, dict) and name not in VALUES
        found |= flat(value, f"{name}.") if inner else {name: value}
    return found


BASES = ("cifar", "tiny-imagenet", "mini-imagenet", "imagenet")
PRESETS = [
    (name, recipe)
    for recipe in names()
    for name in dict.fromkeys((*BASES, *named(recipe).presets))
    if name.startswith(BASES)
]


def stated(name: str, recipe: str) -> dict[str, Any]:
    """What the table says of a preset; what is said of it alone comes last."""
    base = next(each for each in BASES if name.startswith(each))
    order = [(base, ALL), (ALL, recipe), (base, recipe), (name, recipe)]
    return {
        row["setting"]: json.loads(row["value"])
        for place in dict.fromkeys(order)
        for row in rows()
        if (row["preset"], row["recipe"]) == place
    }


@pytest.mark.parametrize(("name", "recipe"), PRESETS)
def test_a_preset_is_what_the_table_says(name: str, recipe: str) -> None:
    unset, built = flat(to_plain(RunConfig())), flat(to_plain(preset(name, recipe)))
    for setting in NO_METHOD:
        del unset[setting], built[setting]
    assert built == {**unset, **stated(name, recipe)}


def test_every_line_is_of_a_preset_and_says_where_it_is_from() -> None:
    places = {(name, recipe) for name, recipe in PRESETS}
    known = {*places, *((ALL, r) for _, r in places), *((base, ALL) for base in BASES)}
    for row in rows():
        assert (row["preset"], row["recipe"]) in known, row
        # a paper or its code by a year or an identifier, an abstract, or us
        words = ("our choice", "arXiv:", "abstract", "released code", "unverified", "DeiT's code")
        assert any(word in row["source"] for word in words), row


def test_published_numbers_are_in_the_table() -> None:
    """Some that the papers are known for, so that the table itself is not made up."""
    imagenet = stated("imagenet", "manifold")
    assert imagenet["distill.layers"][4:] == [[8, 20], [9, 21], [10, 22], [11, 23]]
    assert (imagenet["distill.alpha"], imagenet["distill.manifold_rows"]) == (1.0, 192)
    assert imagenet["model.name"].startswith("cait_s24")
    assert set(stated("imagenet", "unified")["plan.keep"].values()) == {0.25, 1.0}
    width = stated("imagenet-vit-s", "width-depth")
    assert (width["plan.macs"], width["plan.params"]) == (0.7, 0.7)
    deit = stated("imagenet", "fast")
    assert (deit["distill.mixup"], deit["distill.cutmix"], deit["distill.erase"]) == (
        0.8,
        1.0,
        0.25,
    )
    assert deit["distill.lr"] / deit["distill.lr_batch"] == 5e-4 / 512
