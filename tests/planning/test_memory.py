"""Peak memory: hand counts of what is alive together; the model comes back as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vitprune_fast.errors import InvalidInput
from vitprune_fast.planning import peak_memory_bytes
from vitprune_fast.testing import random_pvt, random_vit

# an image of 2 x 4 pixels in one channel
IMAGE = (1, 2, 4)


def weights_of(model: nn.Module) -> int:
    """Bytes of the parameters, tied ones once, and of the buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def small_mlp() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch_size", [1, 64])
def test_what_is_alive_together_counts(batch_size: int, dtype: torch.dtype) -> None:
    """Fullest in the activation: 8 pixels, its 16 inputs and its 16 outputs of every image."""
    model = small_mlp().to(dtype)
    numbers = (8 * 16 + 16) + (16 * 4 + 4) + batch_size * (8 + 16 + 16)
    assert peak_memory_bytes(model, batch_size, IMAGE) == numbers * dtype.itemsize


def test_an_activation_counts_until_it_is_freed() -> None:
    class Keeping(nn.Module):
        def __init__(self, keeps: bool) -> None:
            super().__init__()
            self.keeps = keeps

        def forward(self, images: Tensor) -> Tensor:
            kept = []
            for _ in range(5):
                made = images + 1
                # a view has the memory of its base, which an operation in place changes
                made.view(-1).relu_()
                kept = [*kept, made] if self.keeps else []
            return images

    one = 3 * 8 * 4
    # the old value of a name is freed after the new one is there
    assert peak_memory_bytes(Keeping(False), 3, IMAGE) == one + 2 * one
    assert peak_memory_bytes(Keeping(True), 3, IMAGE) == one + 5 * one


def test_a_vit_is_fullest_in_an_mlp() -> None:
    """Behind GELU: four tensors as wide as the stream, and the hidden ones before and behind.

    The four are what the first block read, what this one read, what its attention left, and the
    normalised input of the MLP. (2 x 2 patches and a class token of 24 channels, 96 neurons.)
    """
    model = random_vit(dtype=torch.float32)
    for batch_size in (1, 2, 64):
        activations = batch_size * (3 * 16 * 16 + 5 * (4 * 24 + 2 * 96))
        assert peak_memory_bytes(model, batch_size) == weights_of(model) + 4 * activations


@pytest.mark.parametrize("model", [random_vit(), random_pvt("b2"), random_pvt("b2_li")])
def test_it_is_the_same_every_time_and_grows_by_images(model: nn.Module) -> None:
    one, two, three = (peak_memory_bytes(model, size) for size in (1, 2, 3))
    assert weights_of(model) < one and three - two == two - one == one - weights_of(model)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert peak_memory_bytes(model, 3) == three
    finally:
        torch.set_num_threads(threads)


def test_weights_count_in_the_dtype_computed_in_and_tied_ones_once() -> None:
    model = small_mlp()
    model.register_buffer("more", torch.zeros(100))
    model.tied = model[1].weight
    counted = peak_memory_bytes(model, 2, IMAGE)
    assert counted == weights_of(model) + 2 * (8 + 16 + 16) * 4
    assert 2 * peak_memory_bytes(model, 2, IMAGE, dtype="bfloat16") == counted
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}


def test_the_parts_of_attention_of_torch_are_seen() -> None:
    """Without gradients the whole layer may be one operation, with its 64 neurons inside."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 64, batch_first=True)

        def forward(self, images: Tensor) -> Tensor:
            return self.layer(images.flatten(2).mT)

    model, enabled = Tokens(), torch.backends.mha.get_fastpath_enabled()
    assert peak_memory_bytes(model, 1, (8, 3, 3)) - weights_of(model) >= 9 * 2 * 64 * 4
    assert torch.backends.mha.get_fastpath_enabled() == enabled


def test_the_model_comes_back_as_it_was() -> None:
    model = random_vit().train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    seen = []
    model.head.register_forward_hook(
        lambda module, *_: seen.append((module.training, torch.is_grad_enabled()))
    )
    peak_memory_bytes(model, dtype="float32")
    assert seen == [(False, False)] and modes == [module.training for module in model.modules()]
    assert model.head.weight.dtype == torch.float64 and model.head.weight.requires_grad


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_size": 0}, "peak_memory_bytes: batch_size must be at least 1, got 0"),
        ({"input_size": None}, "peak_memory_bytes: input_size must be a side"),
        ({"input_size": (3, 0, 4)}, "peak_memory_bytes: input_size must be a side"),
        ({"dtype": "int8"}, "peak_memory_bytes: dtype must be one of"),
    ],
)
def test_it_rejects(options: dict, sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        peak_memory_bytes(small_mlp(), **{"input_size": IMAGE, **options})


@pytest.mark.gpu
def test_cuda_counts_what_its_allocator_hands_out() -> None:
    model = small_mlp()
    there = torch.zeros(1 << 20, device="cuda")
    first, second = (peak_memory_bytes(model, 64, IMAGE, "cuda") for _ in range(2))
    # in whole blocks, and with what products work in
    assert peak_memory_bytes(model, 64, IMAGE) <= first == second < there.nbytes
    assert next(model.parameters()).device.type == "cpu"
