"""The sweep: it recovers what can be, reports what is so, and changes nothing else."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vitprune_fast as vp
from tests.plans import KINDS, draw_plan
from tests.processes import together
from tests.surgery.test_moments import heads_and_neurons
from vitprune_fast import sealed
from vitprune_fast.errors import InvalidInput, RunFolderError, StageFailed, UnsupportedArchitecture
from vitprune_fast.planning import Plan
from vitprune_fast.sealed import CheckpointRefused
from vitprune_fast.structure import describe
from vitprune_fast.surgery import SweepReport, SweepStopped, prune
from vitprune_fast.surgery.sweep.least_squares import Products
from vitprune_fast.surgery.sweep.samples import Samples
from vitprune_fast.surgery.sweep.streamed import Streamed
from vitprune_fast.testing import VITS, random_images, random_vit

HELD_OUT = slice(9, None, 10)


def images_of(model: Any, count: int = 120, seed: int = 1) -> Tensor:
    return random_images(model, count, seed=seed)


def distance(one: Any, other: Any, images: Tensor) -> float:
    """Root mean square of the difference of logits, as a share of their spread."""
    with torch.no_grad():
        got, want = one(images), other(images)
    return float((got - want).square().mean().sqrt() / want.std())


def streams(model: Any, images: Tensor) -> Tensor:
    """What the final norm reads, by a hook written for the test."""
    seen = []
    hook = model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(images)
    hook.remove()
    return seen[0]


def swept(model: Any, plan: Plan, images: Any) -> tuple[Any, SweepReport]:
    small, report = prune(model, plan, calibration=images, report=True)
    return small, report


def with_redundant_units(kind: str) -> tuple[Any, Plan]:
    """A model in which the units that go are made of those that stay, and the plan that cuts them.

    Neurons and heads have a twin that writes something else; of v dims one is a mixture of others,
    since attention mixes tokens and not dims.
    """
    model = random_vit()
    structure = describe(model)
    kept: dict[str, list[int]] = {}
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            fc1, qkv = block.mlp.fc1, block.attn.qkv
            if kind == "neuron":
                half = fc1.out_features // 2
                for tensor in (fc1.weight, fc1.bias):
                    tensor[half:] = tensor[:half]
                kept[f"blocks.{i}.mlp.neurons"] = list(range(half))
                continue
            for tensor in (qkv.weight, qkv.bias):
                q_k_v = tensor.view(3, 3, 8, *tensor.shape[1:])
                if kind == "head":
                    q_k_v[:, 2] = q_k_v[:, 0]
                    kept[f"blocks.{i}.attn.heads"] = [0, 1]
                else:
                    q_k_v[2, :, 7] = 0.7 * q_k_v[2, :, 0] - 0.4 * q_k_v[2, :, 3]
                    kept[f"blocks.{i}.attn.v_dims"] = [
                        8 * h + j for h in range(3) for j in range(7)
                    ]
    return model, Plan.of(structure, kept)


@pytest.mark.parametrize("kind", ["head", "neuron", "v_dim"])
def test_redundant_units_are_made_up_for_exactly(kind: str) -> None:
    model, plan = with_redundant_units(kind)
    new = images_of(model, 50, seed=9)
    assert distance(prune(model, plan), model, new) > 0.1
    small, report = swept(model, plan, images_of(model, 400))
    # a mean square of rounded sums is known to the eps of float64, and its root to that of eps:
    # below it no smaller ridge is seen to be better
    assert distance(small, model, new) <= 1e-7
    assert all(fit.held_out <= 1e-7 for fit in report.fits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", VITS)
def test_every_branch_of_every_model_is_fitted_or_named(config: str, kind: str) -> None:
    model = random_vit(config)
    structure = describe(model)
    plan = draw_plan(structure, kind, random.Random(f"{config} {kind}"))
    images = images_of(model)
    small, report = swept(model, plan, images)
    cut = prune(model, plan)
    for fit in report.fits:
        assert (fit.ridge is None) == bool(fit.left_out)
        if not fit.left_out:
            assert fit.after <= fit.before * (1 + 1e-9)
    changed = any(not fit.left_out for fit in report.fits)
    assert changed == (distance(small, cut, images) > 0)
    held_out = images[HELD_OUT]
    # behind a norm the output is fitted, and not the stream
    if not config.startswith("res_post_norm"):
        kept = plan["embed"]
        want = streams(model, held_out)[..., kept]
        before, after = ((streams(m, held_out) - want).square().sum() for m in (cut, small))
        assert after <= before


@pytest.mark.parametrize("config", ["plain", "layerscale-registers-no_embed_class", "swiglu"])
def test_the_errors_reported_are_those_measured(config: str) -> None:
    model = random_vit(config)
    plan, images = heads_and_neurons(model), images_of(model)
    small, report = swept(model, plan, images)
    fitted = torch.ones(len(images), dtype=torch.bool)
    fitted[HELD_OUT] = False
    assert (report.images, report.held_out) == (len(images), len(images) // 10)
    want, got = streams(model, images), streams(small, images)
    last, classifier = report.fits[-2:]
    assert (last.place, last.part) == ("blocks.2.mlp", "writer")
    with torch.no_grad():
        x: list[Tensor] = []
        norm = small.blocks[2].norm2
        hook = norm.register_forward_pre_hook(lambda _, inputs: x.append(inputs[0]))
        small(images)
        hook.remove()
    to_write = (want - x[0])[fitted].flatten(0, 1)
    spread = (to_write - to_write.mean(0)).square().sum(1).mean().sqrt()
    assert report.tokens == len(to_write)
    for error, of in ((last.after, fitted), (last.held_out, ~fitted)):
        rms = (want - got)[of].flatten(0, 1).square().sum(1).mean().sqrt()
        assert error == pytest.approx(float(rms / spread), rel=1e-6)
    with torch.no_grad():
        logits, own = model(images), small(images)
    size = (logits[fitted] - logits[fitted].mean(0)).square().sum(1).mean().sqrt()
    for error, of in ((classifier.after, fitted), (classifier.held_out, ~fitted)):
        rms = (logits - own)[of].square().sum(1).mean().sqrt()
        assert error == pytest.approx(float(rms / size), rel=1e-6)


def test_norms_and_gains_stay_and_the_dense_model_too() -> None:
    model = random_vit("layerscale-registers-no_embed_class")
    model.blocks[1].train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    plan = heads_and_neurons(model)
    small, _ = swept(model, plan, images_of(model))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert [module.training for module in model.modules()] == modes
    cut = prune(model, plan).state_dict()
    same = {name for name, tensor in small.state_dict().items() if torch.equal(tensor, cut[name])}
    assert {name for name in cut if "norm" in name or "gamma" in name} <= same
    assert {"cls_token", "pos_embed", "reg_token", "patch_embed.proj.weight"} <= same
    assert "blocks.2.attn.qkv.weight" not in same and "blocks.2.mlp.fc2.weight" not in same


@pytest.mark.parametrize("config", VITS)
def test_keeping_everything_changes_no_bit(config: str) -> None:
    model = random_vit(config, dtype=torch.float32)
    small, report = swept(model, Plan.of(describe(model)), images_of(model, 20))
    assert report.fits == ()
    for name, tensor in small.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_what_comes_before_the_first_cut_changes_no_bit() -> None:
    model = random_vit(dtype=torch.float32)
    plan = Plan.of(describe(model), {"blocks.1.mlp.neurons": list(range(40))})
    small, report = swept(model, plan, images_of(model))
    places = [(fit.place, fit.part) for fit in report.fits]
    assert places[:2] == [("blocks.1.mlp", "writer"), ("blocks.2.attn", "reader")]
    for name, tensor in small.state_dict().items():
        if name.startswith(("blocks.0.", "blocks.1.attn.")):
            assert torch.equal(tensor, model.state_dict()[name])


def test_the_order_of_units_does_not_matter() -> None:
    model = random_vit()
    plan, images = heads_and_neurons(model), images_of(model)
    want, _ = swept(model, plan, images)
    other, kept = random_vit(), {name: list(units) for name, units in plan.items()}
    with torch.no_grad():
        for i, block in enumerate(other.blocks):
            size = block.mlp.fc1.out_features
            order = torch.randperm(size, generator=torch.Generator().manual_seed(i))
            for tensor in (block.mlp.fc1.weight, block.mlp.fc1.bias, block.mlp.fc2.weight.T):
                tensor.copy_(tensor[order].clone())
            heads = torch.tensor([2, 0, 1])
            for tensor in (block.attn.qkv.weight, block.attn.qkv.bias):
                split = tensor.view(3, 3, 8, *tensor.shape[1:])
                split.copy_(split[:, heads].clone())
            columns = block.attn.proj.weight.view(24, 3, 8)
            columns.copy_(columns[:, heads].clone())
            for axis, moved in (("mlp.neurons", order), ("attn.heads", heads)):
                old = set(plan[f"blocks.{i}.{axis}"])
                kept[f"blocks.{i}.{axis}"] = [n for n, m in enumerate(moved.tolist()) if m in old]
    structure = describe(other)
    axes = {name: units for name, units in kept.items() if structure.axes[name].kind != "qk_dim"}
    axes = {name: u for name, u in axes.items() if structure.axes[name].kind in ("head", "neuron")}
    got, _ = swept(other, Plan.of(structure, axes), images)
    assert distance(got, want, images_of(model, 20, seed=7)) <= 1e-8


def test_batches_of_any_size_and_labels_give_the_same_bits() -> None:
    model = random_vit(dtype=torch.float32)
    plan, images = heads_and_neurons(model), images_of(model, 150)
    want = prune(model, plan, calibration=images)
    labelled = [(batch, None) for batch in images.split(7)]
    for same in (images.split(31), labelled, iter(images.split(64))):
        got = prune(model, plan, calibration=same)
        for name, tensor in got.state_dict().items():
            assert torch.equal(tensor, want.state_dict()[name])


@pytest.mark.parametrize("config", ["plain", "res_post_norm", "deit_distilled"])
def test_a_stopped_sweep_goes_on_to_the_same_bits(tmp_path: Path, config: str) -> None:
    model, path = random_vit(config, dtype=torch.float32), tmp_path / "new" / "sweep.safetensors"
    plan, images = heads_and_neurons(model), images_of(model)
    want, report = swept(model, plan, images)
    events: list[dict[str, Any]] = []
    stops = iter([False, True, True, False, True])
    for wanted in (2, 3, 5):
        with pytest.raises(SweepStopped, match="must run to its end"):
            prune(
                model,
                plan,
                calibration=images,
                checkpoint=path,
                on_event=events.append,
                stop=lambda: next(stops),
            )
        assert path.exists()
        assert events[-1]["step"] == wanted
    got, again = prune(model, plan, calibration=images, report=True, checkpoint=path)
    assert not path.exists()
    assert again == report
    for name, tensor in got.state_dict().items():
        assert torch.equal(tensor, want.state_dict()[name])
    assert [event["step"] for event in events] == [1, 2, 3, 4, 5]
    assert {event["steps"] for event in events} == {7}


def test_a_checkpoint_of_another_sweep_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    model, path = random_vit(dtype=torch.float32), tmp_path / "sweep.safetensors"
    plan, images = heads_and_neurons(model), images_of(model)

    def go(model: Any, plan: Plan, images: Tensor) -> None:
        prune(model, plan, calibration=images, checkpoint=path, stop=lambda: True)

    with pytest.raises(SweepStopped):
        go(model, plan, images)
    other = Plan.of(describe(model), {"blocks.0.mlp.neurons": [0, 1]})
    for changed in (
        (random_vit(seed=1, dtype=torch.float32), plan, images),
        (model, other, images),
        (model, plan, images.flip(0)),
    ):
        with pytest.raises(
            CheckpointRefused, match="another model, plan, images or dtype; delete it"
        ):
            go(*changed)
    tensors, words = sealed.read_tensors(path), sealed.read_metadata(path)
    next(iter(tensors.values())).view(-1)[0] += 1
    sealed.write_tensors(path, tensors, words)
    with pytest.raises(CheckpointRefused, match="content as it was written"):
        go(model, plan, images)


def test_moments_are_those_of_the_cut_and_averages_are_swept_too() -> None:
    model, averaged = random_vit(), random_vit(seed=5)
    plan, images = heads_and_neurons(model), images_of(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(images[:4]).square().sum().backward()
    optimizer.step()
    small, carried, ema, report = prune(
        model, plan, optimizer, averaged, iter(images.split(40)), report=True
    )
    _, plain = prune(model, plan, optimizer)
    for got, want in zip(carried.state.values(), plain.state.values(), strict=True):
        assert torch.equal(got["exp_avg"], want["exp_avg"])
    assert {id(p) for group in carried.param_groups for p in group["params"]} == {
        id(p) for p in small.parameters()
    }
    alone = prune(averaged, plan, calibration=images)
    for name, tensor in ema.state_dict().items():
        assert torch.equal(tensor, alone.state_dict()[name])
    assert report == swept(model, plan, images)[1]


def test_an_average_is_held_to_the_same_rules(tmp_path: Path) -> None:
    model, averaged = random_vit(dtype=torch.float32), random_vit(seed=5, dtype=torch.float32)
    plan, images = heads_and_neurons(model), images_of(model)
    want = prune(model, plan, ema=averaged, calibration=images)
    path, asked = tmp_path / "sweep.safetensors", iter(range(100))
    with pytest.raises(SweepStopped):
        # in the second sweep
        prune(
            model,
            plan,
            ema=averaged,
            calibration=images,
            checkpoint=path,
            stop=lambda: next(asked) == 9,
        )
    events: list[dict[str, Any]] = []
    got = prune(
        model, plan, ema=averaged, calibration=images, checkpoint=path, on_event=events.append
    )
    assert [event["step"] for event in events] == [4, 5, 6, 7]
    assert not list(tmp_path.iterdir())
    for one, other in zip(got, want, strict=True):
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name])
    with pytest.raises(InvalidInput, match="must be an iterable of batches"):
        prune(model, plan, ema=averaged, calibration=3)  # pyright: ignore


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["head", "neuron", "v_dim"])
def test_forward_passes_in_16_bits_make_up_for_redundant_units_too(
    kind: str, name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plan = with_redundant_units(kind)
    model = model.float()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    images = images_of(model, 400)
    seen = []
    of = Products.of

    def watched(self: Products, rows: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        assert not torch.is_autocast_enabled("cpu") and y.dtype in (torch.float32, dtype)
        seen.append(rows.dtype)
        return of(self, rows, y)

    monkeypatch.setattr(Products, "of", watched)
    dtype = getattr(torch, name)
    small, report = prune(model, plan, calibration=images, report=True, dtype=name)
    # norms read the stream and put out what they read; branches put out what was computed
    assert {*seen} == {torch.float32, dtype}
    assert report.dtype == report.to_dict()["dtype"] == name
    assert {p.dtype for p in small.parameters()} == {torch.float32}
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    new = images_of(model, 50, seed=9)
    # each of some 24 values on the way to logits is off by half an ulp, at random, and a fit
    # averages that: sqrt(24) / 2 = 2.5 eps, and as much for the fit itself
    assert distance(small, model, new) <= 5 * torch.finfo(dtype).eps
    assert distance(prune(model, plan), model, new) > 0.1


def test_the_stream_is_wide_whatever_its_first_writer_is() -> None:
    bare = {"pos_embed": "none", "class_token": False, "global_pool": "avg"}
    model: Any = random_vit(dtype=torch.float32, **bare)
    structure, modules = describe(model), dict(model.named_modules())
    one = Streamed(model, modules, structure, torch.bfloat16)
    with torch.no_grad():
        images = images_of(model, 2)
        x = one.stem(images)
        assert x.dtype == torch.float32
        assert one.output(structure.stream[1], x, images[:1]).dtype == torch.bfloat16
        assert one.through(structure.stream[1:], x, images[:1]).dtype == torch.float32


def test_a_sweep_in_fp32_is_the_default_on_a_cpu_bit_for_bit() -> None:
    model = random_vit(dtype=torch.float32)
    plan, images = heads_and_neurons(model), images_of(model, 40)
    dtypes: Any = (None, "auto")
    found = [prune(model, plan, calibration=images, report=True, dtype=d) for d in dtypes]
    for name, tensor in found[0][0].state_dict().items():
        assert torch.equal(found[1][0].state_dict()[name], tensor)
    assert [report.dtype for _, report in found] == ["float32", "float32"]


def test_a_checkpoint_of_another_dtype_is_refused(tmp_path: Path) -> None:
    model = random_vit(dtype=torch.float32)
    path, plan = tmp_path / "sweep.safetensors", heads_and_neurons(model)
    options: dict[str, Any] = {"calibration": images_of(model, 40)}
    first = {**options, "checkpoint": path, "dtype": "bfloat16"}
    with pytest.raises(SweepStopped):
        prune(model, plan, **first, stop=lambda: True)
    with pytest.raises(CheckpointRefused, match=r"images or dtype"):
        prune(model, plan, **{**first, "dtype": "float32"})
    small: Any = prune(model, plan, **first)
    whole: Any = prune(model, plan, **options, dtype="bfloat16")
    assert all(torch.equal(t, whole.state_dict()[n]) for n, t in small.state_dict().items())


def test_autocast_of_the_caller_changes_no_bit() -> None:
    model = random_vit(dtype=torch.float32)
    plan, images = heads_and_neurons(model), images_of(model)
    want = prune(model, plan, calibration=images).state_dict()
    with torch.autocast("cpu", torch.bfloat16):
        got = prune(model, plan, calibration=images).state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in got.items())


@pytest.mark.parametrize("per_image", [4, 17, 196])
def test_all_tokens_are_seen_where_only_some_rows_are(per_image: int) -> None:
    for columns in range(1, 200, 7):
        samples = Samples("reader", 1000 * per_image, columns, per_image)
        rows = samples.some(torch.arange(64 * per_image)[:, None])[:, 0]
        if len(rows) >= 4 * per_image:
            assert len((rows % per_image).unique()) == per_image


def test_gains_next_to_nothing_make_no_huge_weights() -> None:
    model = random_vit("layerscale-registers-no_embed_class")
    with torch.no_grad():
        model.blocks[2].ls1.gamma.fill_(1e-6)
        model.blocks[2].ls2.gamma.fill_(0)
    plan = Plan.of(describe(model), {"blocks.1.mlp.neurons": list(range(30))})
    small, report = swept(model, plan, images_of(model))
    assert max(float(p.abs().max()) for p in small.parameters()) < 100
    left_out = {fit.place: fit.left_out for fit in report.fits if fit.part == "writer"}
    assert left_out["blocks.2.attn"] == "its weights would be more than 100 times as large"
    assert left_out["blocks.2.mlp"]
    assert all(fit.after <= 1.001 * max(fit.before, 1) for fit in report.fits)


def test_a_place_without_a_file_is_found_out_before_the_work(tmp_path: Path) -> None:
    model = random_vit(dtype=torch.float32)
    plan, read = heads_and_neurons(model), []

    def images() -> Any:
        read.append(1)
        yield images_of(model, 20)

    with pytest.raises(CheckpointRefused, match="checkpoint must be a file"):
        prune(model, plan, calibration=images(), checkpoint=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="must be a folder"):
        prune(model, plan, calibration=images(), checkpoint=tmp_path / "file" / "sweep")
    assert not read


def test_tied_maps_are_left_out_and_named() -> None:
    model = random_vit()
    model.blocks[2].mlp.fc2.weight = model.blocks[1].mlp.fc2.weight
    neurons = {f"blocks.{i}.mlp.neurons": list(range(50)) for i in (1, 2)}
    _, report = swept(model, Plan.of(describe(model), neurons), images_of(model))
    left_out = {(fit.place, fit.part): fit.left_out for fit in report.fits}
    for i in (1, 2):
        assert left_out[f"blocks.{i}.mlp", "writer"] == f"blocks.{i}.mlp.fc2.weight is tied"
    assert not left_out["blocks.2.attn", "writer"]


@pytest.mark.filterwarnings("ignore:prune")
def test_an_average_that_nothing_is_refitted_of_leaves_no_checkpoint(tmp_path: Path) -> None:
    model = random_vit(dtype=torch.float32)
    plan, images = heads_and_neurons(model), images_of(model, 1)
    averaged = random_vit(dtype=torch.float32)
    prune(model, plan, ema=averaged, calibration=images, checkpoint=tmp_path / "kept")
    assert not [*tmp_path.iterdir()]


def test_bad_images_are_one_sentence() -> None:
    model = random_vit(dtype=torch.float32)
    plan, images = heads_and_neurons(model), images_of(model, 20)
    cut = prune(model, plan).state_dict()
    for few in ([], images[:1]):
        with pytest.warns(UserWarning, match=f"at least 2 images .*got {len(few)}.*the plain cut"):
            small, report = swept(model, plan, few)
        assert report.fits == () and len(report.warnings) == 1
        assert all(torch.equal(t, cut[name]) for name, t in small.state_dict().items())
    bad: list[tuple[Any, str]] = [
        (5, "calibration must be an iterable of batches of images, got int"),
        ("folder", "calibration must be an iterable of batches of images, got str"),
        ({"pixel_values": images}, "calibration must be .* a single batch goes into a list"),
        ([images[0]], "images must be a floating tensor"),
        ([(images > 0)], "images must be a floating tensor"),
        (images[..., :8], "images must be .*like the model takes them"),
        (images * float("nan"), "calibration must give finite logits"),
    ]
    for calibration, message in bad:
        with pytest.raises(InvalidInput, match=f"^prune: {message}"):
            prune(model, plan, calibration=calibration)


def test_the_test_split_is_refused() -> None:
    data = vp.open_data("digits", image_size=8, channels=1)
    model = random_vit(img_size=8, in_chans=1)
    plan = heads_and_neurons(model)
    prune(model, plan, calibration=list(vp.Loader(data.split("train"), 64))[:1])
    with pytest.raises(InvalidInput, match="must be training images, got the test split"):
        prune(model, plan, calibration=vp.Loader(data.split("test"), 64))


def test_two_images_and_few_tokens_say_what_they_are() -> None:
    model = random_vit()
    plan = heads_and_neurons(model)
    _, report = swept(model, plan, images_of(model, 2))
    assert (report.images, report.held_out) == (2, 1)
    notes = [
        text
        for text in report.warnings
        if "columns, so the ridge is larger; give more images" in text
    ]
    assert len(notes) >= 1 and notes[-1].startswith("head, classifier: 1 rows for 24 columns")


def test_pixels_that_cannot_be_the_models_are_told() -> None:
    model = random_vit()
    model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    plan, raw = heads_and_neurons(model), torch.rand(40, 3, 16, 16, dtype=torch.float64)
    right = (raw - 0.5) / 0.25
    assert swept(model, plan, right)[1].warnings == ()
    for wrong, message in ((raw * 255, "pixels from"), (raw * 0.2, "pixels that spread by")):
        with pytest.warns(
            UserWarning, match=f"should be normalised as the model states.*{message}"
        ):
            _, report = swept(model, plan, wrong)
        assert len(report.warnings) == 1


def test_a_forward_that_does_more_is_refused() -> None:
    model = random_vit()
    plan, images = heads_and_neurons(model), images_of(model, 20)
    hook = model.blocks[1].register_forward_hook(lambda m, i, output: output * 1.1)
    with pytest.raises(UnsupportedArchitecture, match="compute its branches one after another"):
        prune(model, plan, calibration=images)
    hook.remove()
    prune(model, plan, calibration=images)


def test_a_report_is_plain_values() -> None:
    model = random_vit()
    _, report = swept(model, heads_and_neurons(model), images_of(model, 30))
    content = report.to_dict()
    assert content["images"] == 30 and content["held_out"] == 3
    assert content["fits"][0].keys() >= {"place", "part", "before", "after", "held_out", "ridge"}


def share(rank: int, images: Tensor, folder: Path) -> None:
    """Sweep with the others, stopped by one of them, and save what this process gets."""
    model, path = random_vit(dtype=torch.float32), folder / "sweep.safetensors"
    plan, asked = heads_and_neurons(model), []

    def stop() -> bool:
        asked.append(None)
        return rank == 1 and len(asked) == 2

    go: dict[str, Any] = {"calibration": images, "report": True, "checkpoint": path}
    with pytest.raises(SweepStopped):
        prune(model, plan, **go, stop=stop)
    small, report = prune(model, plan, **go, on_event=asked.append)
    # two of seven places were done
    assert len(asked) == 2 + 5
    torch.save((small.state_dict(), report), folder / f"{rank}.pt")


# the third of three has no batch of its own
@pytest.mark.parametrize(
    ("world", "count"), [pytest.param(2, 150, marks=pytest.mark.slow), (3, 40)]
)
def test_processes_share_the_images_and_get_the_same_bits(
    world: int, count: int, tmp_path: Path
) -> None:
    model = random_vit(dtype=torch.float32)
    images = images_of(model, count)
    want, report = swept(model, heads_and_neurons(model), images)
    together(world, share, images, tmp_path, store=tmp_path / "store")
    assert not (tmp_path / "sweep.safetensors").exists()
    for rank in range(world):
        got, found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert found == report
        assert all(torch.equal(got[n], t) for n, t in want.state_dict().items())


def refused(rank: int, images: Tensor) -> str:
    model = random_vit(dtype=torch.float32)
    with pytest.raises(StageFailed) as found:
        prune(model, heads_and_neurons(model), calibration=images[: 64 << rank])
    return str(found.value)


def test_processes_with_other_images_are_refused(tmp_path: Path) -> None:
    images = images_of(random_vit(dtype=torch.float32), 128)
    said = together(2, refused, images, store=tmp_path / "store")
    rule = "prune: calibration must give as many batches of 64 images in every process, got "
    assert {*said} == {f"{rule}2 in process 0 and 3 in process 1; give all of them the same images"}
