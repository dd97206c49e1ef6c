"""What we take for granted of timm, transformers, torchvision and torch, one test for each fact.

Nothing of ours is tested here. When a new release changes one of these facts, the test that fails
says which one, and which of our files must follow.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm.layers
import torch
from timm.layers import GluMlp, LayerScale, Mlp, SwiGLU
from timm.models.vision_transformer import Attention, ResPostBlock, VisionTransformer
from torch import Tensor, library, nn
from torch.nn import functional as F

ROOT = Path(__file__).parent.parent
SIZES: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "num_heads": 3}
_facts: list[Any] = []


def fact(sentence: str, *files: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Mark a check of a fact that ``files`` (below vitprune_fast/) rely on."""

    def keep(check: Callable[[], None]) -> Callable[[], None]:
        _facts.append(pytest.param(sentence, files, check, id=check.__name__))
        return check

    return keep


def vit(**options: Any) -> Any:
    model = VisionTransformer(**{**SIZES, "depth": 1, "num_classes": 5, **options})
    return model.double().eval()


def tokens() -> Tensor:
    return torch.randn(2, 5, 24, dtype=torch.float64)


def same(one: Tensor, other: Tensor) -> None:
    # sums of at most 96 products of fp64
    assert (one - other).abs().max() <= 1e-12 * max(1.0, other.abs().max().item())


def has(thing: Any, names: str) -> None:
    missing = [name for name in names.split() if not hasattr(thing, name)]
    assert not missing, f"{type(thing).__name__} has no {', '.join(missing)}"


@contextmanager
def called(module: nn.Module, order: list[str]) -> Iterator[None]:
    """Note the children of a module in the order in which they are called."""

    def note(name: str, *_: Any) -> None:
        order.append(name)

    children = module.named_children()
    handles = [child.register_forward_pre_hook(partial(note, name)) for name, child in children]
    yield
    for handle in handles:
        handle.remove()


def order_of(module: nn.Module, x: Tensor) -> str:
    order: list[str] = []
    with called(module, order), torch.no_grad():
        module(x)
    return " ".join(order)


# timm


@fact("timm's ViT keeps its sizes in these attributes", "structure/families/timm_vit.py")
def timm_vit_attributes() -> None:
    model = vit(reg_tokens=2)
    has(
        model,
        "embed_dim num_features head_hidden_size num_classes num_prefix_tokens num_reg_tokens",
    )
    has(model, "global_pool no_embed_class pool_include_prefix dynamic_img_size feature_info")
    has(model, "cls_token reg_token pos_embed patch_embed patch_drop norm_pre blocks norm fc_norm")
    has(model, "head_drop head reset_classifier forward_features forward_head")
    has(model.patch_embed, "img_size patch_size proj norm dynamic_img_pad dynamic_feat_size")
    assert model.feature_info[0]["num_chs"] == 24
    assert (model.patch_embed.proj.in_channels, model.patch_embed.dynamic_feat_size((16, 16))) == (
        3,
        (2, 2),
    )


@fact("timm's ViT calls its parts in this order", "structure/families/timm_vit.py")
def timm_vit_order() -> None:
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    wanted = "patch_embed pos_drop patch_drop norm_pre blocks norm fc_norm head_drop head"
    assert order_of(vit(), images) == wanted


@fact("timm's ViT takes these arguments", "structure/families/timm_vit.py")
def timm_vit_arguments() -> None:
    known = inspect.signature(VisionTransformer).parameters
    wanted = """img_size patch_size in_chans num_classes global_pool embed_dim qkv_bias qk_norm
        scale_attn_norm scale_mlp_norm proj_bias class_token pos_embed no_embed_class reg_tokens
        pre_norm final_norm fc_norm pool_include_prefix dynamic_img_size dynamic_img_pad
        patch_drop_rate norm_layer embed_norm_layer act_layer depth num_heads block_fn
        weight_init mlp_ratio mlp_layer init_values drop_rate pos_drop_rate proj_drop_rate
        attn_drop_rate drop_path_rate"""
    assert not set(wanted.split()) - set(known)


@fact(
    "timm's pre-norm block is x + drop_path1(ls1(attn(norm1(x)))), then the same with the MLP",
    "structure/families/timm_vit.py",
)
def timm_block() -> None:
    block: Any = vit(init_values=0.1).blocks[0]
    x = tokens()
    assert order_of(block, x) == "norm1 attn ls1 drop_path1 norm2 mlp ls2 drop_path2"
    y = x + block.ls1(block.attn(block.norm1(x)))
    same(block(x), y + block.ls2(block.mlp(block.norm2(y))))


@fact(
    "timm's post-norm block is x + drop_path1(norm1(attn(x))), then the same with the MLP",
    "structure/families/timm_vit.py",
)
def timm_res_post_block() -> None:
    block: Any = vit(block_fn=ResPostBlock).blocks[0]
    x = tokens()
    assert order_of(block, x) == "attn norm1 drop_path1 mlp norm2 drop_path2"
    y = x + block.norm1(block.attn(x))
    same(block(x), y + block.norm2(block.mlp(y)))


@fact("timm's LayerScale multiplies by gamma", "structure/families/timm_vit.py")
def timm_layer_scale() -> None:
    scale = LayerScale(24, init_values=0.3).double()
    x = tokens()
    assert [name for name, _ in scale.named_parameters()] == ["gamma"]
    assert torch.equal(scale(x), x * scale.gamma)
    has(scale, "init_values")


@fact(
    "timm's attention computes softmax(q k') v between qkv, q_norm, k_norm and norm, proj",
    "modules/known.py",
    "structure/families/timm_vit.py",
)
def timm_attention() -> None:
    attn: Any = vit(qk_norm=True, scale_attn_norm=True).blocks[0].attn
    assert type(attn) is Attention
    has(attn, "num_heads head_dim scale fused_attn qkv q_norm k_norm attn_drop norm proj proj_drop")
    x = tokens()
    q, k, v = attn.qkv(x).unflatten(2, (3, attn.num_heads, attn.head_dim)).unbind(2)
    q, k, v = (each.transpose(1, 2) for each in (attn.q_norm(q), attn.k_norm(k), v))
    out = (q @ k.transpose(-2, -1) * attn.head_dim**-0.5).softmax(-1) @ v
    want = attn.proj_drop(attn.proj(attn.norm(out.transpose(1, 2).flatten(2))))
    for fused in (False, True):
        vars(attn)["fused_attn"] = fused
        same(attn(x), want)


@fact(
    "timm's fused attention ignores attn.scale, the other one follows it",
    "modules/known.py",
    "surgery/prune.py",
)
def timm_attention_scale() -> None:
    attn: Any = vit().blocks[0].attn
    x = tokens()
    attn.fused_attn = True
    fused = attn(x)
    attn.scale = 7.0
    assert torch.equal(attn(x), fused)
    attn.fused_attn = False
    assert not torch.allclose(attn(x), fused)


@fact(
    "besides x timm's attention takes attn_mask and perhaps is_causal, both off by default",
    "modules/known.py",
)
def timm_attention_masks() -> None:
    _, _, *masks = inspect.signature(Attention.forward).parameters.values()
    off = {"attn_mask": None, "is_causal": False}
    assert masks[0].name == "attn_mask"
    assert all(mask.name in off and mask.default is off[mask.name] for mask in masks)


@fact("timm's MLP is fc2(norm(act(fc1(x))))", "modules/known.py")
def timm_mlp() -> None:
    mlp: Any = Mlp(24, 96, norm_layer=nn.LayerNorm).double().eval()
    x = tokens()
    assert order_of(mlp, x) == "fc1 act drop1 norm fc2 drop2"
    same(mlp(x), mlp.fc2(mlp.norm(mlp.act(mlp.fc1(x)))))


@fact("timm's GluMlp activates one half of fc1, told by gate_last", "modules/known.py")
def timm_glu_mlp() -> None:
    for gate_last in (False, True):
        mlp: Any = GluMlp(24, 96, act_layer=nn.SiLU, gate_last=gate_last).double().eval()
        x = tokens()
        assert order_of(mlp, x) == "fc1 act drop1 norm fc2 drop2"
        first, last = mlp.fc1(x).chunk(2, -1)
        h = first * mlp.act(last) if mlp.gate_last else mlp.act(first) * last
        same(mlp(x), mlp.fc2(mlp.norm(h)))


@fact("timm's SwiGLU is fc2(norm(act(fc1_g(x)) * fc1_x(x)))", "modules/known.py")
def timm_swiglu() -> None:
    mlp: Any = SwiGLU(24, 96).double().eval()
    x = tokens()
    # either projection may come first
    assert order_of(mlp, x).split()[2:] == ["act", "drop1", "norm", "fc2", "drop2"]
    same(mlp(x), mlp.fc2(mlp.norm(mlp.act(mlp.fc1_g(x)) * mlp.fc1_x(x))))


@fact(
    "timm's norms and activations are those of torch, and keep eps, weight and bias",
    "modules/norms.py",
    "modules/known.py",
)
def timm_layers() -> None:
    x = tokens()
    for norm in (timm.layers.LayerNorm(24).double(), timm.layers.RmsNorm(24).double()):
        has(norm, "normalized_shape eps weight")
    layer, rms = timm.layers.LayerNorm(24).double(), timm.layers.RmsNorm(24).double()
    assert isinstance(layer, nn.LayerNorm) and not isinstance(rms, nn.LayerNorm)
    same(layer(x), F.layer_norm(x, (24,), eps=layer.eps))
    same(rms(x), x * (x.square().mean(-1, keepdim=True) + rms.eps).rsqrt())
    same(timm.layers.GELU()(x), F.gelu(x))
    same(timm.layers.GELUTanh()(x), F.gelu(x, approximate="tanh"))
    same(timm.layers.QuickGELU()(x), x * torch.sigmoid(1.702 * x))


@fact("timm has these helpers of training and data", "distill/state.py", "data/folder.py")
def timm_helpers() -> None:
    from timm.data import auto_augment
    from timm.data.readers.img_extensions import get_img_extensions
    from timm.layers import DropPath
    from timm.task.task import TrainingTask
    from timm.utils import ModelEmaV3, unwrap_model

    has(auto_augment, "auto_augment_transform rand_augment_transform augment_and_mix_transform")
    assert ".png" in get_img_extensions(as_set=True)
    assert DropPath(0.5).drop_prob == 0.5
    assert "use_warmup" in inspect.signature(ModelEmaV3).parameters
    assert callable(unwrap_model)
    assert issubclass(TrainingTask, nn.Module)


# transformers and torchvision

_FAMILIES = "structure/families"
_HF, _PRUNING = f"{_FAMILIES}/hf_vit.py", "integrations/torch_pruning.py"


def _small(name: str) -> Any:
    import transformers

    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 24, "num_attention_heads": 3}
    config = getattr(transformers, f"{name}Config")(
        **sizes, num_hidden_layers=1, intermediate_size=48
    )
    return getattr(transformers, f"{name}ForImageClassification")(config)


def _hugging_face(body: Any, norms: str) -> Any:
    """The first layer, whichever version named its parts."""
    layer = (body.layers if hasattr(body, "layers") else body.encoder.layer)[0]
    has(layer, f"attention {norms}")
    if hasattr(layer.attention, "q_proj"):
        has(layer.attention, "k_proj v_proj o_proj num_attention_heads head_dim scaling")
    else:
        has(layer.attention.output, "dense")
        names = "query key value num_attention_heads attention_head_size all_head_size scaling"
        has(layer.attention.attention, names)
    if hasattr(layer, "mlp"):
        has(layer.mlp, "fc1 fc2")
    else:
        has(layer.intermediate, "dense")
        # the residual is added outside this Linear, in the module that holds it
        written = layer.output.dense(torch.zeros(2, 5, 48))
        same(layer.output(torch.zeros(2, 5, 48), torch.ones(2, 5, 24)), written + 1)
    return layer


@fact("transformers' ViT has separate projections, by one set of names", _HF, _PRUNING)
def transformers_vit() -> None:
    model = _small("ViT")
    has(model.vit.embeddings, "cls_token position_embeddings patch_embeddings")
    has(model.vit.embeddings.patch_embeddings, "projection num_patches")
    has(model.vit, "layernorm")
    _hugging_face(model.vit, "layernorm_before layernorm_after")


@fact("transformers' DeiT has them too", _HF, _PRUNING)
def transformers_deit() -> None:
    model = _small("DeiT")
    has(model.deit.embeddings, "cls_token distillation_token position_embeddings")
    _hugging_face(model.deit, "layernorm_before layernorm_after")


@fact("transformers' DINOv2 has them too, and LayerScales", _HF, _PRUNING)
def transformers_dinov2() -> None:
    layer = _hugging_face(_small("Dinov2").dinov2, "norm1 norm2 layer_scale1 layer_scale2")
    has(layer.layer_scale1, "lambda1")


@fact(
    "torchvision's ViT has these parts, around MultiheadAttention",
    f"{_FAMILIES}/torchvision_vit.py",
)
def torchvision_vit() -> None:
    from torchvision.models.vision_transformer import EncoderBlock, MLPBlock
    from torchvision.models.vision_transformer import VisionTransformer as Other

    model = Other(16, 8, 1, 3, 24, 48)
    has(model, "image_size hidden_dim seq_length class_token conv_proj encoder heads")
    has(model.encoder, "pos_embedding layers ln")
    block: Any = next(model.encoder.layers.children())
    assert type(block) is EncoderBlock and type(block.mlp) is MLPBlock
    assert order_of(block.double(), tokens()) == "ln_1 self_attention dropout ln_2 mlp"
    attention = block.self_attention
    assert type(attention) is nn.MultiheadAttention and attention.batch_first
    has(attention, "in_proj_weight in_proj_bias out_proj bias_k add_zero_attn num_heads embed_dim")
    assert [type(part) for part in block.mlp] == [
        nn.Linear,
        nn.GELU,
        nn.Dropout,
        nn.Linear,
        nn.Dropout,
    ]


# torch


@fact("a module keeps its hooks in these dicts", "gates/hooks.py", "modules/known.py")
def torch_hooks() -> None:
    module = nn.Identity()
    for name, register in (
        ("_forward_hooks", module.register_forward_hook),
        ("_forward_pre_hooks", module.register_forward_pre_hook),
        ("_backward_hooks", module.register_full_backward_hook),
        ("_backward_pre_hooks", module.register_full_backward_pre_hook),
    ):
        handle = register(lambda *_: None)
        assert list(getattr(module, name)) == [handle.id], name


@fact("a module's own forward stands in for that of its class", "modules/known.py")
def torch_forward() -> None:
    module: Any = nn.Identity()
    module.forward = lambda x: x + 1
    assert module(1) == 2
    del module.forward
    assert module(1) == 1


@fact("torch says whether an op has a kernel for a device", "_extension.py")
def torch_dispatch() -> None:
    ours = library.Library("vitprune_fast_canary", "DEF")
    ours.define("nothing(Tensor x) -> Tensor")
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_kernel("aten::mm", "CPU")
    assert not has_kernel("vitprune_fast_canary::nothing", "CUDA")


@fact("a tensor counts its changes, and the count can be raised", "ops/gather.py")
def torch_versions() -> None:
    x = torch.zeros(2)
    before = x._version
    x.add_(1)
    torch.autograd.graph.increment_version(x)
    assert x._version == before + 2


@fact("the flop counter takes a formula for an op that it does not know", "planning/cost.py")
def torch_flops() -> None:
    from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

    assert torch.ops.aten.mm in flop_registry
    shape = (1, 3, 5, 8)
    assert sdpa_flop_count(shape, shape, shape) == 2 * 2 * 3 * 5 * 5 * 8
    formula = {torch.ops.aten.sin: lambda *_, out_shape, **__: 10}
    counter = FlopCounterMode(display=False, custom_mapping=formula)
    with counter:
        torch.mm(torch.zeros(2, 3), torch.zeros(3, 4))
        torch.zeros(2).sin()
    assert counter.get_total_flops() == 2 * 2 * 3 * 4 + 10


@fact("deterministic mode fills fresh memory with NaN", "../tests/ops/conftest.py")
def torch_poison() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
    finally:
        torch.use_deterministic_algorithms(before)


@fact("what was compiled can be told to run as it is written", "modules/modes.py")
def torch_stance() -> None:
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    double = torch.compile(lambda x: 2 * x, backend=backend)
    with torch.compiler.set_stance("force_eager"):
        assert double(torch.ones(1)) == 2 and not graphs
    assert double(torch.ones(1)) == 2 and graphs


@fact("an op keeps its schema, its fake form and its gradient in the library", "ops/", "gates/")
def torch_library() -> None:
    has(library, "Library custom_op register_fake register_autograd opcheck")
    has(torch.Tag, "pt2_compliant_tag")
    has(torch.compiler, "is_compiling")


@pytest.mark.parametrize(("sentence", "files", "check"), _facts)
def test_what_we_take_for_granted_holds(
    sentence: str, files: tuple[str, ...], check: Callable[[], None]
) -> None:
    for name in files:
        assert (ROOT / "vitprune_fast" / name).exists(), f"{name} is no file of ours any more"
    try:
        check()
    except Exception as error:
        names = ", ".join(f"vitprune_fast/{name}" for name in files)
        pytest.fail(f"no longer true: {sentence}; {names} must follow\n{error!r}")
