"""Small Swin students of the OFA-KD paper, registered with timm, and the names of checkpoints from timm 0.6.

Importing this module makes `swin_nano` and `swin_pico` known to `timm.create_model`.
"""

import re
from collections.abc import Mapping
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

_CONFIGURATION = {
    "input_size": (3, 224, 224),
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "num_classes": 1000,
    "pool_size": (7, 7),
    "first_conv": "patch_embed.proj",
    "classifier": "head.fc",
    "fixed_input_size": True,
    "license": "apache-2.0",
}
default_cfgs = generate_default_cfgs(
    {"swin_nano": _CONFIGURATION, "swin_pico": _CONFIGURATION}
)  # timm looks here


def _swin(name: str, width: int, pretrained: bool, options: dict[str, Any]) -> SwinTransformer:
    if pretrained:
        raise ValueError(f"{name} has no pretrained weights: its authors published none.")
    architecture = {"embed_dim": width, "depths": (2, 2, 2, 2), "num_heads": (2, 4, 8, 16)}
    return build_model_with_cfg(
        SwinTransformer,
        name,
        False,
        feature_cfg={"flatten_sequential": True, "out_indices": (0, 1, 2, 3)},
        **{**architecture, **options},
    )


@register_model
def swin_nano(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """Swin with width 64 and depths 2, 2, 2, 2 (9.6 M parameters), the paper's ImageNet student."""
    return _swin("swin_nano", 64, pretrained, kwargs)


@register_model
def swin_pico(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """Swin with width 48 and depths 2, 2, 2, 2 (5.2 M parameters), the paper's CIFAR-100 student."""
    return _swin("swin_pico", 48, pretrained, kwargs)


_DOWNSAMPLE = re.compile(r"^layers\.(\d+)\.downsample\.")
_COMPUTED = ("relative_position_index", "attn_mask")


def from_timm_065(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of timm 0.6 (the authors' checkpoints) with timm 1.0's names.

    Only Swin's names have changed: stage i down-samples at the start of stage i + 1, the head is `head.fc`,
    and index buffers are computed. Other state dicts, newer Swins included, come back as they are.
    """
    is_swin = any("relative_position_bias_table" in key for key in state)
    if not is_swin or "head.fc.weight" in state or "layers.0.downsample.norm.weight" not in state:
        return dict(state)
    renamed = {}
    for key, value in state.items():
        if key.endswith(_COMPUTED):
            continue
        key = _DOWNSAMPLE.sub(lambda found: f"layers.{int(found[1]) + 1}.downsample.", key)
        renamed[re.sub(r"^head\.(?!fc\.)", "head.fc.", key)] = value
    return renamed
