"""open_clip's CLIP with every token projected, any image shape and any caption length (sections 2.1, 2.2)."""

import copy
from pathlib import Path
from typing import Any

import open_clip
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from open_clip import CLIP
from torch import Tensor, nn

from lightning_modules.cfam.positions import Interpolation, fit_positions
from lightning_modules.parts.options import check
from lightning_modules.parts.weights import load_state, read_checkpoint, state_dict_of


class ClipTowers(CLIP):
    """CLIP whose towers give all tokens in the joint space; open_clip's names, constant temperature.

    Args:
        config: `embed_dim`, `vision_cfg` and `text_cfg` as open_clip's model configurations have them.
        image_size: height and width, pixels; rows and columns that fill no patch are left out.
        context_length: tokens of a caption with its two marks.
        stride: of the patches, pixels; None is the patch size.

    Attributes:
        grid: rows and columns of image tokens.

    Raises:
        ValueError: an image smaller than a patch, or less than three tokens of text.
    """

    def __init__(
        self,
        config: dict[str, Any],
        image_size: tuple[int, int] = (384, 128),
        context_length: int = 77,
        stride: int | None = None,
    ) -> None:
        config = copy.deepcopy(config)
        patch = int(config["vision_cfg"]["patch_size"])
        check(min(image_size) >= patch, "image_size", list(image_size), f"at least the patch, {patch}")
        check(context_length >= 3, "context_length", context_length, "at least 3")
        check(stride is None or stride >= 1, "stride", stride, "at least 1")
        config["vision_cfg"]["image_size"] = tuple(image_size)
        config["text_cfg"]["context_length"] = context_length
        super().__init__(
            config["embed_dim"], config["vision_cfg"], config["text_cfg"], quick_gelu=True, output_dict=False
        )
        self.dim = int(config["embed_dim"])
        stride = stride or patch
        self.grid = ((image_size[0] - patch) // stride + 1, (image_size[1] - patch) // stride + 1)
        width = config["vision_cfg"]["width"]
        if stride != patch:
            self.visual.conv1.stride = (stride, stride)
            table = torch.randn(1 + self.grid[0] * self.grid[1], width) * width**-0.5
            self.visual.positional_embedding = nn.Parameter(table)
        scale = self.logit_scale.detach()
        del self.logit_scale
        self.register_buffer(
            "logit_scale", scale
        )  # the temperature is a constant, and FSDP shards no scalars

    def image_tokens(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to (B, 1 + rows x columns, D); token 0 is the global feature."""
        visual: Any = self.visual
        patches = visual.conv1(images).flatten(2).transpose(1, 2)
        first = visual.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        tokens = torch.cat([first, patches], dim=1) + visual.positional_embedding.to(patches.dtype)
        return visual.ln_post(visual.transformer(visual.ln_pre(tokens))) @ visual.proj

    def text_tokens(self, ids: Tensor) -> Tensor:
        """Ids (B, L) to (B, L, D), L at most the context length."""
        length = ids.shape[1]
        mask = self.attn_mask[:length, :length]
        tokens = self.token_embedding(ids) + self.positional_embedding[:length]
        tokens = self.transformer(tokens, attn_mask=mask.to(tokens.dtype))
        return self.ln_final(tokens) @ self.text_projection


def text_ends(ids: Tensor) -> Tensor:
    """Position (B,) of the end token, which has the largest id, in ids (B, L)."""
    return ids.argmax(dim=1)


def build_towers(
    model: str | dict[str, Any],
    image_size: tuple[int, int],
    context_length: int,
    stride: int | None = None,
    pretrained: str | None = None,
    interpolation: Interpolation = "bilinear",
) -> ClipTowers:
    """CLIP by open_clip's name or configuration, random or with released weights.

    Args:
        model: such as `ViT-B-16`, or a configuration.
        image_size: height and width, pixels.
        context_length: tokens of a caption.
        stride: of the patches.
        pretrained: open_clip's tag, such as `openai`; None is random.
        interpolation: of the image positions.

    Raises:
        ValueError: open_clip has no such model.
        MisconfigurationException: its weights cannot be fetched.
    """
    config = open_clip.get_model_config(model) if isinstance(model, str) else model
    if config is None:
        raise ValueError(f"model={model}: open_clip has no such model, expected one such as ViT-B-16.")
    keys = ("embed_dim", "vision_cfg", "text_cfg")
    if missing := [key for key in keys if key not in config]:
        raise ValueError(f"model: its configuration lacks {', '.join(missing)}, as open_clip's have.")
    towers = ClipTowers({key: config[key] for key in keys}, image_size, context_length, stride)
    if pretrained is None:
        rank_zero_warn("CFAM starts from random towers: the losses are meant for a pretrained CLIP.")
        return towers
    try:
        source = open_clip.create_model(str(model), pretrained=pretrained, force_quick_gelu=True)
    except (OSError, RuntimeError) as error:
        raise MisconfigurationException(
            f"pretrained: {pretrained}: open_clip's weights of {model} are not on this machine and cannot be "
            "fetched: fetch them where there is a network, or name a file in `init_from`."
        ) from error
    load_towers(towers, source.state_dict(), f"{model}/{pretrained}", interpolation)
    return towers


def load_towers(
    towers: ClipTowers,
    source: str | Path | dict[str, Tensor],
    name: str | None = None,
    interpolation: Interpolation = "bilinear",
) -> None:
    """Load CLIP's weights into `towers`, with both position tables resized.

    Args:
        towers: changed in place.
        source: a state dict or file of OpenAI's or open_clip's CLIP, of IRRA or of this module.
        name: of the source, for messages.
        interpolation: of the image positions.

    Raises:
        ValueError: no key is CLIP's.
        MisconfigurationException: keys are missing or of another shape.
    """
    name = name or str(source)
    if not isinstance(source, dict):
        source = state_dict_of(read_checkpoint(source), source=source)
    prefix = "base_model."
    state = {key.removeprefix(prefix): t.float() for key, t in source.items() if key.startswith(prefix)}
    if state:
        rank_zero_info(f"'{name}': {len(source) - len(state)} tensors beside the towers are left out.")
    else:
        state = {key: tensor.float() for key, tensor in source.items()}
    own = towers.state_dict()
    for key in ("input_resolution", "context_length", "vocab_size"):  # plain numbers in OpenAI's files
        state.pop(key, None)
    if not set(own) & set(state):
        raise ValueError(f"'{name}' has no weight of CLIP; its keys are {', '.join(list(source)[:4])}.")
    state.setdefault("logit_scale", own["logit_scale"])
    load_state(towers, fit_positions(state, own, towers.grid, interpolation), name)
