"""Prompt encoder, mask decoder and the whole of TinySAM and its teacher, with the names of SAM's files."""

import math
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.parts.weights import load_state, read_checkpoint, state_dict_of
from lightning_modules.tinysam.frame import inside, without_padding
from lightning_modules.tinysam.tiny_vit import STRIDE, LayerNorm2d, TinyViT


class _PositionalEncoding(nn.Module):
    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, width // 2))

    def forward(self, places: Tensor) -> Tensor:
        """(..., width) of places (..., 2) as x, y in [0, 1]."""
        angles = 2 * math.pi * ((2 * places - 1) @ self.positional_encoding_gaussian_matrix)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class PromptEncoder(nn.Module):
    """Points, boxes and masks as embeddings.

    Args:
        image_size: side of the frame, pixels.
        width: of the embeddings.
    """

    def __init__(self, image_size: int = 1024, width: int = 256) -> None:
        super().__init__()
        self.image_size, self.width = image_size, width
        self.pe_layer = _PositionalEncoding(width)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, width) for _ in range(4))
        self.not_a_point_embed, self.no_mask_embed = nn.Embedding(1, width), nn.Embedding(1, width)
        self.mask_downscaling = nn.Sequential(
            *(nn.Conv2d(1, 4, 2, 2), LayerNorm2d(4), nn.GELU()),
            *(nn.Conv2d(4, 16, 2, 2), LayerNorm2d(16), nn.GELU()),
            nn.Conv2d(16, width, 1),
        )

    def get_dense_pe(self) -> Tensor:
        """Positional encoding of the embedding's places, (1, width, h, w)."""
        side = self.image_size // STRIDE
        steps = (torch.arange(side, device=self.no_mask_embed.weight.device) + 0.5) / side
        places = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1)
        return self.pe_layer(places).permute(2, 0, 1)[None]

    def forward(
        self, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Sparse (n, tokens, width) and dense (n, width, h, w) embeddings.

        Args:
            points: coordinates (n, k, 2) in pixels of the frame and labels (n, k).
            boxes: (n, 4).
            masks: logits (n, 1, 4h, 4w).
        """
        sparse = []
        if points is not None:
            sparse.append(self._points(*points, pad=boxes is None))
        if boxes is not None:
            sparse.append(self._boxes(boxes))
        given = [part for part in (*sparse, masks) if part is not None]
        count = len(given[0]) if given else 1
        weight = self.no_mask_embed.weight
        joined = torch.cat(sparse, dim=1) if sparse else weight.new_zeros(count, 0, self.width)
        side = self.image_size // STRIDE
        if masks is not None:
            return joined, self.mask_downscaling(masks)
        return joined, weight.view(1, -1, 1, 1).expand(count, -1, side, side)

    def _points(self, coords: Tensor, labels: Tensor, pad: bool) -> Tensor:
        coords = coords + 0.5
        if pad:
            coords = F.pad(coords, (0, 0, 0, 1))
            labels = F.pad(labels, (0, 1), value=-1)
        encoded = self.pe_layer(coords / self.image_size)
        kinds = labels[..., None]
        encoded = torch.where(kinds == -1, self.not_a_point_embed.weight, encoded)
        for label in (0, 1):
            encoded = encoded + (kinds == label) * self._corner(label)
        return encoded

    def _boxes(self, boxes: Tensor) -> Tensor:
        corners = self.pe_layer((boxes.view(-1, 2, 2) + 0.5) / self.image_size)
        return corners + torch.cat([self._corner(2), self._corner(3)])

    def _corner(self, kind: int) -> Tensor:
        embedding: Any = self.point_embeddings[kind]
        return embedding.weight


class _DecoderAttention(nn.Module):
    def __init__(self, width: int, heads: int, downsample: int = 1) -> None:
        super().__init__()
        inner = width // downsample
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, inner) for _ in range(3))
        self.out_proj = nn.Linear(inner, width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        projected = [self.q_proj(q), self.k_proj(k), self.v_proj(v)]
        count = max(part.shape[0] for part in projected)  # what all prompts share is projected once
        parts = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in projected]
        parts = [part.expand(count, -1, -1, -1) for part in parts]
        return self.out_proj(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))


class _DecoderMLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.relu(self.lin1(x)))


class _TwoWayBlock(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, first: bool) -> None:
        super().__init__()
        self.self_attn = _DecoderAttention(width, heads)
        self.cross_attn_token_to_image = _DecoderAttention(width, heads, 2)
        self.cross_attn_image_to_token = _DecoderAttention(width, heads, 2)
        self.mlp = _DecoderMLP(width, hidden)
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(width) for _ in range(4))
        self.first = first

    def forward(
        self, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.first:
            queries = self.self_attn(queries, queries, queries)
        else:
            q = queries + query_pe
            queries = queries + self.self_attn(q, q, queries)
        queries = self.norm1(queries)
        k = keys + key_pe
        queries = self.norm2(queries + self.cross_attn_token_to_image(queries + query_pe, k, keys))
        queries = self.norm3(queries + self.mlp(queries))
        keys = self.norm4(keys + self.cross_attn_image_to_token(k, queries + query_pe, queries))
        return queries, keys


class _TwoWayTransformer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_TwoWayBlock(width, heads, hidden, place == 0) for place in range(2))
        self.final_attn_token_to_image = _DecoderAttention(width, heads, 2)
        self.norm_final_attn = nn.LayerNorm(width)

    def forward(self, keys: Tensor, key_pe: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        queries = tokens
        for layer in self.layers:
            queries, keys = layer(queries, keys, tokens, key_pe)
        attended = self.final_attn_token_to_image(queries + tokens, keys + key_pe, keys)
        return self.norm_final_attn(queries + attended), keys


class _Layers(nn.Module):
    def __init__(self, width: int, outs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, n) for n in (width, width, outs))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[2](F.relu(self.layers[1](F.relu(self.layers[0](x)))))


class MaskDecoder(nn.Module):
    """Masks and predicted IoUs of prompts.

    Args:
        width: of the embeddings.
        heads: of attention.
        hidden: of the transformer's MLPs.
    """

    def __init__(self, width: int = 256, heads: int = 8, hidden: int = 2048) -> None:
        super().__init__()
        self.transformer = _TwoWayTransformer(width, heads, hidden)
        self.iou_token, self.mask_tokens = nn.Embedding(1, width), nn.Embedding(4, width)
        self.output_upscaling = nn.Sequential(
            *(nn.ConvTranspose2d(width, width // 4, 2, 2), LayerNorm2d(width // 4), nn.GELU()),
            *(nn.ConvTranspose2d(width // 4, width // 8, 2, 2), nn.GELU()),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(_Layers(width, width // 8) for _ in range(4))
        self.iou_prediction_head = _Layers(width, 4)

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse: Tensor,
        dense: Tensor,
        multimask_output: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (n, 3, 4h, 4w), predicted IoUs (n, 3) and output tokens (n, 5, width).

        Args:
            image_embeddings: (n, width, h, w), or of one image for all prompts.
            image_pe: (1, width, h, w).
            sparse: (n, tokens, width).
            dense: (n, width, h, w), or one for all prompts, which then share what is computed from it.
            multimask_output: False gives the one mask of SAM's single-mask output instead of three.
        """
        queries, keys = self.attend(image_embeddings, image_pe, sparse, dense)
        masks = self.masks(queries, keys, multimask_output)
        return masks, self.iou(queries, multimask_output), queries[:, :5]

    def attend(
        self, image_embeddings: Tensor, image_pe: Tensor, sparse: Tensor, dense: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The transformer's queries (n, 5 + tokens, width) and keys as a map (n, width, h, w)."""
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([own.expand(sparse.shape[0], -1, -1), sparse], dim=1)
        keys = image_embeddings + dense
        grid = keys.shape[-2:]
        queries, found = self.transformer(
            keys.flatten(2).transpose(1, 2), image_pe.flatten(2).transpose(1, 2), tokens
        )
        return queries, found.transpose(1, 2).unflatten(-1, grid)

    def masks(self, queries: Tensor, keys: Tensor, multimask_output: bool = True) -> Tensor:
        """Logits (n, 3, 4h, 4w) of what `attend` gave; one mask of the single-mask output."""
        upscaled = self.output_upscaling(keys)
        chosen = range(1, 4) if multimask_output else range(1)
        weights = [self.output_hypernetworks_mlps[k](queries[:, 1 + k]) for k in chosen]
        return torch.einsum("nkc,nchw->nkhw", torch.stack(weights, dim=1), upscaled)

    def iou(self, queries: Tensor, multimask_output: bool = True) -> Tensor:
        """Predicted IoUs (n, 3), before any mask is made."""
        return self.iou_prediction_head(queries[:, 0])[:, slice(1, 4) if multimask_output else slice(0, 1)]


class SAM(nn.Module):
    """A promptable segmenter.

    Args:
        image_size: side of the square frame, a multiple of 16.
        encoder: a TinyViT, or another network from images to embeddings; None is TinyViT-5M.
        width: of the embeddings.
        hidden: of the decoder's MLPs.
    """

    def __init__(
        self, image_size: int = 1024, encoder: nn.Module | None = None, width: int = 256, hidden: int = 2048
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.image_encoder = TinyViT() if encoder is None else encoder
        self.prompt_encoder = PromptEncoder(image_size, width)
        self.mask_decoder = MaskDecoder(width, hidden=hidden)

    @property
    def name(self) -> str:
        """For messages."""
        return f"SAM with {type(self.image_encoder).__name__}"

    def forward(self, images: Tensor, size: Tensor | None = None) -> Tensor:
        """Embeddings of normalised images: what reports measure and exports take; prompts come later.

        Args:
            images: (batch, 3, side, side).
            size: (batch, 2), height and width of the pictures in them; the rest becomes 0. None: all of it.
        """
        if size is not None:
            images = without_padding(images, inside(size, images.shape[-1]))
        return self.image_encoder(images)


def load_sam(network: SAM, path: str | Path) -> None:
    """Load a file of SAM's names (`tinysam.pth`, `sam_vit_h_4b8939.pth`) or a checkpoint of ours, strictly.

    Args:
        network: changed in place.
        path: see `read_checkpoint`.

    Raises:
        MisconfigurationException: keys are missing, unexpected or of another shape; the first are listed.
    """
    state = state_dict_of(read_checkpoint(path), source=path)
    unused = ("image_encoder.head.", "image_encoder.norm_head.")
    state = {key: value for key, value in state.items() if not key.startswith(unused)}
    if isinstance(network.image_encoder, _Features):
        state = {_timm_name(key): value for key, value in state.items()}
    load_state(network, state, path)


def _timm_name(key: str) -> str:
    """SAM's name of a parameter of the image encoder as timm has it."""
    if not key.startswith("image_encoder.") or key.startswith("image_encoder.network."):
        return key
    renamed = key.replace(".mlp.lin1.", ".mlp.fc1.").replace(".mlp.lin2.", ".mlp.fc2.")
    return renamed.replace("image_encoder.", "image_encoder.network.", 1)


def sam_vit(name: str = "samvit_huge_patch16", image_size: int = 1024, **options: Any) -> SAM:
    """SAM with timm's image encoder."""
    encoder = timm.create_model(name, img_size=image_size, num_classes=0, **options)
    return SAM(image_size, _Features(encoder))


class _Features(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.forward_features(images)  # type: ignore[operator]
