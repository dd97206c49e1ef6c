"""The forms that reading photographs is compared with read the same photographs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import data_path
from vitprune_fast.cli.data_rates import make_photographs


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("photographs")
    for part in ("train", "val", "test"):
        make_photographs(folder / part, 4)
    return data_path.opened(folder)


def test_libraries_alone_show_the_same_window(images) -> None:
    content = Path(images.source.path(0)).read_bytes()
    seen: list[tuple[int, int]] = []

    def window(width: int, height: int) -> tuple[float, float, float, float]:
        seen.append((width, height))
        return 20.4, 30.6, 300.2, 250.0

    one, other = (view(content, window) for view in (data_path.by_pillow, data_path.by_torchvision))
    assert one.shape == other.shape == (224, 224, 3) and seen == [(500, 375)] * 2
    # windows of whole pixels, and no other windows
    apart = np.abs(one.astype(float) - other).mean()
    assert 0 < apart < np.abs(one.astype(float) - one[::-1]).mean() / 4
    assert data_path.agreement(one, one.copy()) == "same bits"
    assert data_path.agreement(one, one ^ 1) == "1.00 levels apart"


def test_both_forms_of_ours_hold_the_same_pixels(images) -> None:
    read = data_path.as_read(images, None)()
    normalised = data_path.in_batches(images, None)()
    assert torch.equal(images.normalisation(read), normalised)


def test_names_are_those_of_as_many_images() -> None:
    names = [*data_path.generated(3000)]
    assert len({*names}) == 3000 and len({name.split("/")[1] for name in names}) == 1000
    source = data_path.Generated(3000)
    assert source.names[2999] == names[2999] and len(source.labels) == 3000


def test_the_committed_file_compares_every_form(
    committed: Path = data_path.ROOT / "bench" / "results",
) -> None:
    (file,) = sorted(committed.glob("*_data.json"))[-1:]
    found = json.loads(file.read_text())
    assert {*found["paths"]} == {*data_path.PATHS} == {*found["images_per_s_per_core"]}
    for forms in found["paths"].values():
        assert tuple(forms) == data_path.FORMS
        assert forms[data_path.BEFORE]["times"] == 1
