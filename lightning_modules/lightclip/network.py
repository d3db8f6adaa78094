"""The two towers, named as open_clip's CLIP names them, and the parts that only training has (section 2)."""

import inspect
import math
from collections.abc import Sequence
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, Transformer
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lightning_modules.lightclip.words import end_positions
from lightning_modules.parts.options import OptionError, check, check_choice

Fusion = Literal["stages", "last", "none"]
TRAINING_ONLY = ("token_align.", "fusion.", "mlm.")
"""Prefixes of what inference does not need."""
LARGEST_SCALE = 100.0
POOLED = 7  # sides of the map that a fusion block looks at
SWIN_NANO = "swin_nano_patch4_window7_224"
SWIN_ARGUMENTS: dict[str, Any] = {
    "embed_dim": 48,
    "depths": (2, 2, 6, 2),
    "num_heads": (3, 6, 12, 24),
    "window_size": 7,
    "patch_size": 4,
    "drop_path_rate": 0.0,
}


def similarity_scale(logit_scale: Tensor) -> Tensor:
    """min(exp(`logit_scale`), 100), scalar (sections 2.3 and 2.4).

    The gradient is that of exp also at the largest value: where it were 0, a temperature that once reached
    it would never fall again.
    """
    scale = logit_scale.exp()
    return scale + (scale.clamp(max=LARGEST_SCALE) - scale).detach()


def build_trunk(
    name: str, image_size: int = 224, pretrained: bool = False, arguments: dict[str, Any] | None = None
) -> nn.Module:
    """A timm network without classifier that yields maps of at least four stages.

    Args:
        name: of timm, or `swin_nano_patch4_window7_224`, ViDT's Swin-Nano, which timm lacks.
        image_size: side in pixels.
        pretrained: timm's weights.
        arguments: further ones of timm's model.

    Raises:
        OptionError: timm does not know it, or it has not four stages.
    """
    if name == SWIN_NANO:
        check(not pretrained, "pretrained", pretrained, f"false: {SWIN_NANO} has no published weights")
        return SwinTransformer(img_size=image_size, num_classes=0, global_pool="", **SWIN_ARGUMENTS)
    if not timm.is_model(name):
        raise OptionError(f"trunk: timm has no model '{name}'.")
    given = {"pretrained": pretrained, "num_classes": 0, **(arguments or {})}
    if "img_size" in inspect.signature(timm.model_entrypoint(name)).parameters or name.startswith("vit"):
        given.setdefault("img_size", image_size)
    trunk: Any = timm.create_model(name, **given)
    vit = isinstance(trunk, VisionTransformer)
    trunk.reset_classifier(0, global_pool="avg" if vit else "")  # as open_clip does
    stages = getattr(trunk, "feature_info", ())
    if not hasattr(trunk, "forward_intermediates") or len(stages) < 4:
        raise OptionError(f"trunk: '{name}' has not the four stages with maps that LightCLIP fuses.")
    return trunk


class ImageTower(nn.Module):
    """A trunk, the mean of its final map and a linear projection.

    Args:
        trunk: of `build_trunk`.
        width: of the embedding.
        image_size: side of the picture that the channels are found with.
    """

    def __init__(self, trunk: nn.Module, width: int, image_size: int) -> None:
        super().__init__()
        self.trunk: Any = trunk
        for parameter in getattr(trunk, "head", nn.Identity()).parameters():
            parameter.requires_grad_(False)  # ConvNeXt's norm behind its final map: nothing here reads it
        mode = trunk.training
        with torch.no_grad():
            maps = self.eval().maps(torch.zeros(1, 3, image_size, image_size))
        trunk.train(mode)
        self.train()
        self.channels = [stage.shape[1] for stage in maps]
        self.head = nn.Module()
        self.head.proj = nn.Linear(self.channels[-1], width, bias=False)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Four maps (batch, channels, height, width); the last is the final one of the trunk."""
        trunk: Any = self.trunk
        final, stages = trunk.forward_intermediates(images, indices=4, output_fmt="NCHW")
        if (
            final.ndim == 4
            and final.shape[1] != stages[-1].shape[1]
            and final.shape[-1] == stages[-1].shape[1]
        ):
            final = final.permute(0, 3, 1, 2)
        elif final.ndim == 3:  # a ViT: tokens behind the final norm
            patches = final[:, trunk.num_prefix_tokens :]
            final = patches.transpose(1, 2).reshape(stages[-1].shape)
        elif isinstance(self.trunk, SwinTransformer):
            final = final.permute(0, 3, 1, 2)
        return [*stages[:-1], final]

    def project(self, final: Tensor) -> Tensor:
        """(batch, width) of the final map."""
        head: Any = self.head
        return head.proj(final.mean((2, 3)))

    def forward(self, images: Tensor) -> Tensor:
        """Embedding (batch, width) of normalised images (batch, 3, height, width)."""
        if isinstance(self.trunk, VisionTransformer):  # which may have fewer tokens than patches
            head: Any = self.head
            return head.proj(self.trunk(images))
        return self.project(self.maps(images)[-1])


def add_temperature(module: nn.Module) -> None:
    """Give a module `logit_scale`, the logarithm of 1 / 0.07; of one entry, as FSDP shards no scalars."""
    module.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))
    module.register_load_state_dict_pre_hook(_scalars_too)


def _scalars_too(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    if (key := f"{prefix}logit_scale") in state:
        state[key] = state[key].reshape(1)


class TokenAlign(nn.Module):
    """Projections of patches and words, and the temperature of their scores (section 2.4)."""

    logit_scale: nn.Parameter

    def __init__(self, channels: int, width: int, align_width: int) -> None:
        super().__init__()
        self.image_proj = nn.Linear(channels, align_width, bias=False)
        self.text_proj = nn.Linear(width, align_width, bias=False)
        add_temperature(self)

    def patches(self, final: Tensor) -> Tensor:
        """(batch, patches, width) of the final map, row by row, of unit length."""
        return F.normalize(self.image_proj(final.flatten(2).transpose(1, 2)), dim=-1)

    def words(self, hidden: Tensor) -> Tensor:
        """(batch, length, width) of the text's hidden states, of unit length."""
        return F.normalize(self.text_proj(hidden), dim=-1)


class FusionBlocks(nn.Module):
    """Cross-attention from the masked text to the picture's maps, one block a stage (section 2.5)."""

    def __init__(self, channels: Sequence[int], width: int, heads: int, source: Fusion) -> None:
        super().__init__()
        self.source = source
        used = [channels[-1]] * len(channels) if source == "last" else list(channels)
        self.image_proj = nn.ModuleList(nn.Linear(count, width) for count in used)
        self.blocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, mlp_ratio=4.0, is_cross_attention=True) for _ in used
        )

    def forward(self, stage: int, text: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """`text` (batch, length, width) with what it sees of a stage."""
        picture = maps[-1] if self.source == "last" else maps[stage]
        size = min(picture.shape[2], POOLED), min(picture.shape[3], POOLED)
        keys = F.adaptive_avg_pool2d(picture, size).flatten(2).transpose(1, 2)
        keys = self.image_proj[stage](keys)
        block: Any = self.blocks[stage]
        keys = block.ln_1_kv(keys)
        text = text + block.attn(block.ln_1(text), keys, keys, need_weights=False)[0]
        return text + block.mlp(block.ln_2(text))


class MaskedWords(nn.Module):
    """The mask's vector and the head over the vocabulary."""

    def __init__(self, width: int, vocabulary: int, tied: bool) -> None:
        super().__init__()
        self.mask_embedding = nn.Parameter(torch.randn(width) * 0.02)
        self.head = None if tied else nn.Linear(width, vocabulary)


def injection_points(layers: int, stages: int = 4) -> list[int]:
    """The block, from 0, behind which each fusion block acts."""
    return [math.ceil((stage + 1) * layers / stages) - 1 for stage in range(stages)]


class LightCLIPNet(nn.Module):
    """CLIP with a light image tower and a short text tower, and what training adds to it.

    Without the entries whose names start with `TRAINING_ONLY` it is open_clip's `CLIP`.

    Args:
        trunk: name of the image trunk, see `build_trunk`.
        image_size: side of the pictures, pixels.
        embed_dim: width D of the embedding.
        width: of the text tower.
        heads: of its attention, and of the fusion's.
        layers: of the text tower.
        context_length: longest text, tokens.
        vocabulary: rows of the token embedding; the mask's id is the next.
        start: id of the start token.
        end: id of the end token.
        act: of the text tower's MLPs.
        align_width: width of patches and words in token alignment; 0: without.
        mlm: with the masked pass.
        fusion: `stages`: stage m of the trunk to group m of text blocks; `last`: the final map to all;
            `none`: a masked pass that sees no picture.
        tie_head: the masked words' head shares the token embedding.
        pretrained: timm's weights in the trunk.
        trunk_args: further arguments of timm's trunk, such as `{output_stride: 16}`.

    Raises:
        OptionError: an option is out of its range.
    """

    logit_scale: nn.Parameter

    def __init__(
        self,
        trunk: str = "resnet18",
        image_size: int = 224,
        embed_dim: int = 512,
        width: int = 512,
        heads: int = 8,
        layers: int = 8,
        context_length: int = 77,
        vocabulary: int = 49408,
        start: int = 49406,
        end: int = 49407,
        act: Literal["gelu", "quick_gelu"] = "gelu",
        align_width: int = 256,
        mlm: bool = True,
        fusion: Fusion = "stages",
        tie_head: bool = False,
        pretrained: bool = False,
        trunk_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check(width % heads == 0, "heads", heads, f"a divisor of the width {width}")
        check_choice("fusion", fusion, Fusion)
        check_choice("act", act, Literal["gelu", "quick_gelu"])
        check(image_size >= 32 and image_size % 16 == 0, "image_size", image_size, "a multiple of 16 from 32")
        self.start, self.end, self.vocabulary = start, end, vocabulary
        self.context_length, self.layers, self.image_size = context_length, layers, image_size
        self.options = {"trunk": trunk, "embed_dim": embed_dim, "width": width, "heads": heads, "act": act}
        self.visual = ImageTower(
            build_trunk(trunk, image_size, pretrained, trunk_args), embed_dim, image_size
        )
        self._build_text(width, heads, layers, embed_dim, act)
        add_temperature(self)
        channels = self.visual.channels
        self.token_align = TokenAlign(channels[-1], width, align_width) if align_width else None
        self.mlm = MaskedWords(width, vocabulary, tie_head) if mlm else None
        self.fusion = None
        if mlm and fusion != "none":
            check(layers >= len(channels), "layers", layers, f"at least {len(channels)}, one a fused stage")
            self.fusion = FusionBlocks(channels, width, heads, fusion)
        self.points = injection_points(layers, len(channels)) if self.fusion is not None else []

    def _build_text(self, width: int, heads: int, layers: int, embed_dim: int, act: str) -> None:
        from open_clip.model import QuickGELU

        self.token_embedding = nn.Embedding(self.vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.empty(self.context_length, width))
        activation = nn.GELU if act == "gelu" else QuickGELU
        self.transformer = Transformer(width, layers, heads, act_layer=activation)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    @property
    def mask_id(self) -> int:
        """Id of the mask: the row behind the vocabulary."""
        return self.vocabulary

    def text_hidden(self, ids: Tensor, maps: Sequence[Tensor] | None = None, causal: bool = True) -> Tensor:
        """States (batch, length, width) behind the final norm.

        Args:
            ids: (batch, length); the mask's id is allowed where there is a masked pass.
            maps: of the picture, for the fused pass.
            causal: a word sees only those before it.
        """
        x = self._embed(ids)
        length = ids.shape[1]
        mask = None
        if causal:
            mask = torch.full((length, length), -torch.inf, dtype=x.dtype, device=x.device).triu_(1)
        for place, block in enumerate(self.transformer.resblocks):
            x = block(x, attn_mask=mask)
            if maps is not None and self.fusion is not None and place in self.points:
                x = self.fusion(self.points.index(place), x, maps)
        return self.ln_final(x)

    def _embed(self, ids: Tensor) -> Tensor:
        if ids.shape[1] > self.context_length:
            raise OptionError(
                f"context_length={self.context_length}: the captions of the data have {ids.shape[1]} tokens; "
                "set the data's context_length to the network's."
            )
        if self.mlm is None:
            embedded = self.token_embedding(ids)
        else:
            masked = ids == self.mask_id
            embedded = self.token_embedding(ids.masked_fill(masked, 0))
            embedded = torch.where(masked.unsqueeze(-1), self.mlm.mask_embedding.to(embedded.dtype), embedded)
        return embedded + self.positional_embedding[: ids.shape[1]].to(embedded.dtype)

    def pool(self, hidden: Tensor, ends: Tensor) -> Tensor:
        """(batch, embed_dim) of the state at the end token."""
        place = ends[:, None, None].expand(-1, 1, hidden.shape[2])
        return hidden.gather(1, place).squeeze(1) @ self.text_projection

    def encode_image(self, images: Tensor) -> Tensor:
        """(batch, embed_dim) of normalised pictures, not of unit length."""
        return self.visual(images)

    def forward(self, *inputs: Tensor) -> Any:
        """Unit vectors of each input, in order: of normalised pictures, or of token ids."""
        found = [
            F.normalize(
                self.encode_image(given) if given.is_floating_point() else self.encode_text(given), dim=-1
            )
            for given in inputs
        ]
        return found[0] if len(found) == 1 else tuple(found)

    def encode_text(self, ids: Tensor) -> Tensor:
        """(batch, embed_dim) of token ids (batch, length), not of unit length."""
        return self.pool(self.text_hidden(ids), end_positions(ids, self.end))

    def word_logits(self, hidden: Tensor) -> Tensor:
        """(rows, vocabulary) of selected states (rows, width)."""
        if self.mlm is None:
            raise OptionError("mlm: false has no masked pass.")
        if self.mlm.head is None:
            return hidden @ self.token_embedding.weight.T
        return self.mlm.head(hidden)

    def inference_state(self) -> dict[str, Tensor]:
        """The state dict that open_clip's `CLIP` loads strictly."""
        state = {key: value for key, value in self.state_dict().items() if not key.startswith(TRAINING_ONLY)}
        return state | {"logit_scale": state["logit_scale"].squeeze(0)}

    def open_clip_config(self) -> dict:
        """What open_clip builds the inference part from: `embed_dim`, `vision_cfg`, `text_cfg`."""
        options = self.options
        return {
            "embed_dim": options["embed_dim"],
            "quick_gelu": options["act"] == "quick_gelu",
            "vision_cfg": {
                "timm_model_name": options["trunk"],
                "timm_model_pretrained": False,
                "timm_pool": "avg",
                "timm_proj": "linear",
                "image_size": self.image_size,
            },
            "text_cfg": {
                "context_length": self.context_length,
                "vocab_size": self.vocabulary,
                "width": options["width"],
                "heads": options["heads"],
                "layers": self.layers,
            },
        }
