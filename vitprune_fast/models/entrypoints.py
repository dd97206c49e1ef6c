"""timm's names for pruned models: ``timm.create_model("local-dir:FOLDER")`` opens what we saved.

Imported as soon as both timm and vitprune_fast are (``vitprune_fast/__init__.py``), so nothing of
ours is imported at its top that takes time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models import register_model

from vitprune_fast.errors import InvalidInput


def _opened(name: str, options: dict[str, Any], features: int = 3) -> Any:
    """The model of a folder, for timm.

    The sizes of a pruned model are those of its tensors, so its weights come with it, whatever
    ``pretrained`` says.

    Args:
        name: what timm calls it.
        options: what ``create_model`` passes on.
        features: how many of the last ones ``features_only`` gives, where it is not told which.

    Raises:
        InvalidInput: no folder is named, or an option is none of these.
        DamagedFile: see :func:`vitprune_fast.load`.
    """
    from vitprune_fast.saved_models import load

    given = {key: value for key, value in options.items() if value is not None}
    stated = given.pop("pretrained_cfg", None) or {}
    source = stated if isinstance(stated, dict) else vars(stated)
    for ignored in ("pretrained", "pretrained_cfg_overlay", "cache_dir", "pretrained_model_args"):
        given.pop(ignored, None)
    classes, pool = given.pop("num_classes", None), given.pop("global_pool", None)
    features_only = given.pop("features_only", False)
    out_indices = given.pop("out_indices", None)
    # what train scripts always say, and a loaded model has already
    given = {key: value for key, value in given.items() if value or key not in _RATES}
    if not source.get("file"):
        raise InvalidInput(
            f"create_model: {name} must be opened from a folder, as a model of any size, got its "
            'name alone; use timm.create_model("local-dir:FOLDER", pretrained=True)'
        )
    if given:
        raise InvalidInput(
            f"create_model: options of {name} must be num_classes, global_pool, features_only and "
            f"out_indices, got {next(iter(given))}; its sizes are those of its weights"
        )
    path = Path(source["file"])
    model: Any = load(path if path.is_dir() else path.parent)
    if features_only:
        from timm.models._features import FeatureGetterNet

        unset = min(features, len(model.feature_info))
        return FeatureGetterNet(model, unset if out_indices is None else out_indices)
    if classes not in (None, model.num_classes) or pool is not None:
        model.reset_classifier(model.num_classes if classes is None else classes, pool)
    return model


_RATES = ("drop_rate", "drop_path_rate", "attn_drop_rate", "proj_drop_rate", "scriptable")


@register_model
def vit_pruned(pretrained: bool = False, **options: Any) -> Any:
    """A pruned VisionTransformer, distilled or not."""
    return _opened("vit_pruned", options)


@register_model
def cait_pruned(pretrained: bool = False, **options: Any) -> Any:
    """A pruned CaiT."""
    return _opened("cait_pruned", options)


@register_model
def pvt_v2_pruned(pretrained: bool = False, **options: Any) -> Any:
    """A pruned PVTv2."""
    return _opened("pvt_v2_pruned", options, features=4)
