"""DECO: backbone, ConvNeXt-style encoder, convolutional decoder (arXiv 2312.13735). Plain torch.

Parameter names are those of the authors' release.
"""

from copy import deepcopy
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_modules.deco.backbones import BackboneName, build_backbone
from lightning_modules.deco.layers import (
    MLP,
    ChannelNorm,
    ConvNeXtBlock,
    InteractionLayer,
    depthwise,
    init_convnext,
    negative_bias,
)
from lightning_modules.parts.normalize import normalized


class DetectionNetwork(nn.Module):
    """What `DecoDetector` trains: normalised images in, a fixed number of scored boxes out.

    ``forward(images)`` gives `logits` (batch, queries, classes) and `boxes` (batch, queries, 4), normalised
    (cx, cy, w, h). In training it also gives `aux_logits` and `aux_boxes` (layers, batch, queries, ...) of
    the outputs before the last one.

    Attributes:
        num_classes: width of the logits.
        num_queries: boxes an image.
        mean, std: what images in [0, 1] are normalised with.
        all_layers: give the auxiliary outputs in eval mode too.
    """

    num_classes: int
    num_queries: int
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    all_layers: bool = False

    def drop_auxiliary(self) -> None:
        """Remove the parts that only auxiliary outputs need; the network is for inference from then on."""


def network_images(images: Tensor, mean: Tensor, std: Tensor, mask: Tensor | None) -> Tensor:
    """Images in [0, 1] to what a `DetectionNetwork` takes, padding at zero.

    Args:
        images: (batch, 3, height, width).
        mean: (1, 3, 1, 1).
        std: (1, 3, 1, 1).
        mask: bool (batch, height, width), true for padding.
    """
    images = normalized(images, mean, std)
    return images if mask is None else images.masked_fill(mask[:, None], 0.0)


def grid_of(num_queries: int, grid_height: int) -> tuple[int, int]:
    """(qH, qW) of the query grid.

    Raises:
        ValueError: `grid_height` does not divide `num_queries`.
    """
    if grid_height < 1 or num_queries < 1 or num_queries % grid_height:
        raise ValueError(
            f"num_queries: {num_queries} queries do not fill a grid of height grid_height = {grid_height}."
        )
    return grid_height, num_queries // grid_height


class Deco(DetectionNetwork):
    """DECO, single scale: queries on a grid that mixes itself and the image by large depthwise convolutions.

    Args:
        num_classes: width of the logits; COCO's raw category ids need 91.
        backbone: `resnet50`, `convnext_tiny`, or `small` for experiments on a CPU.
        dilation: ResNet-50's last stage keeps stride 16 (DC5).
        num_queries: boxes an image.
        grid_height: rows qH of the query grid; must divide `num_queries`.
        hidden_dim: width d of the decoder; must be the last of `encoder_widths`.
        encoder_widths: of the encoder's stages.
        encoder_depths: blocks in each of them.
        encoder_kernel: side of their depthwise kernels.
        decoder_layers: number of interaction layers.
        decoder_kernel: side of both depthwise kernels of a layer.
        fusion: of queries and memory in the cross-interaction.
        upsample: how the query grid grows to the memory's size.
        pool: how it shrinks back.
        layer_scale: initial value of every gamma.

    Raises:
        ValueError: the grid does not fit `num_queries`, or `hidden_dim` the encoder.
    """

    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def __init__(
        self,
        num_classes: int = 91,
        backbone: BackboneName = "resnet50",
        dilation: bool = False,
        num_queries: int = 100,
        grid_height: int = 10,
        hidden_dim: int = 480,
        encoder_widths: tuple[int, ...] = (120, 240, 480),
        encoder_depths: tuple[int, ...] = (2, 6, 2),
        encoder_kernel: int = 7,
        decoder_layers: int = 6,
        decoder_kernel: int = 9,
        fusion: Literal["add", "mul", "concat"] = "add",
        upsample: Literal["nearest", "bilinear"] = "nearest",
        pool: Literal["max", "avg"] = "max",
        layer_scale: float = 1e-6,
    ) -> None:
        super().__init__()
        if hidden_dim != encoder_widths[-1]:
            raise ValueError(
                f"hidden_dim: the decoder's width {hidden_dim} must be the encoder's last one, "
                f"{encoder_widths[-1]} in encoder_widths."
            )
        self.num_classes = num_classes
        self.num_queries = num_queries
        self.grid = grid_of(num_queries, grid_height)
        body = build_backbone(backbone, dilation)
        self.backbone = nn.Sequential(_Body(body))
        self.input_proj = nn.Conv2d(body.channels, encoder_widths[0], 1)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        layers = [
            InteractionLayer(
                hidden_dim,
                depthwise(hidden_dim, decoder_kernel),
                decoder_kernel,
                fusion,
                upsample,
                pool,
                layer_scale,
            )
            for _ in range(decoder_layers)
        ]
        encoder = Encoder(encoder_widths, encoder_depths, encoder_kernel, layer_scale)
        self.deco_convnet = _EncoderDecoder(encoder, layers, num_queries, hidden_dim)
        classify = nn.Linear(hidden_dim, num_classes)
        nn.init.constant_(classify.bias, negative_bias())
        box = MLP(hidden_dim, hidden_dim, hidden_dim, 4)
        last = box.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        last.bias = nn.Parameter(torch.tensor([0.0, 0.0, -2.0, -2.0]))
        self.class_embed = nn.ModuleList(deepcopy(classify) for _ in range(decoder_layers))
        self.bbox_embed = nn.ModuleList(deepcopy(box) for _ in range(decoder_layers))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """See `DetectionNetwork`; images (batch, 3, H, W) of any size, padding is seen as what it holds."""
        memory = self.encode(images)
        hidden = self.decode(memory)[-len(self.class_embed) :]
        if not (self.training or self.all_layers):
            hidden = hidden[-1:]
        heads = zip(hidden, self.class_embed[-len(hidden) :], self.bbox_embed[-len(hidden) :], strict=True)
        logits, boxes = [], []
        for queries, classify, box in heads:
            queries = self.deco_convnet.decoder.norm(queries.flatten(2).transpose(1, 2))  # (batch, Q, d)
            logits.append(classify(queries))
            boxes.append(box(queries).float().sigmoid())
        return outputs_of(logits, boxes)

    def encode(self, images: Tensor) -> Tensor:
        """The memory M (batch, d, h, w)."""
        return self.deco_convnet.encoder(self.input_proj(self.backbone(images)))

    def decode(self, memory: Tensor) -> list[Tensor]:
        """Query grids (batch, d, qH, qW) after each layer, before the norm."""
        queries = self._on_grid(self.deco_convnet.tgt.weight).expand(memory.shape[0], -1, -1, -1)
        return self.deco_convnet.decoder(queries, memory, self._on_grid(self.query_embed.weight))

    def _on_grid(self, table: Tensor) -> Tensor:
        """(Q, d) to (1, d, qH, qW), row by row."""
        return table.t().unflatten(1, self.grid)[None]

    def drop_auxiliary(self) -> None:
        """Keep the last layer's heads only, and lose the encoder's unused norm."""
        self.class_embed = self.class_embed[-1:]
        self.bbox_embed = self.bbox_embed[-1:]
        self.deco_convnet.encoder._encoder.norm = nn.Identity()
        self.all_layers = False


def outputs_of(logits: list[Tensor], boxes: list[Tensor]) -> dict[str, Tensor]:
    """The last of the given outputs, and the ones before it stacked as auxiliary ones."""
    outputs = {"logits": logits[-1], "boxes": boxes[-1]}
    if len(logits) > 1:
        outputs["aux_logits"] = torch.stack(logits[:-1])  # (layers - 1, batch, Q, classes)
        outputs["aux_boxes"] = torch.stack(boxes[:-1])  # (layers - 1, batch, Q, 4)
    return outputs


class _Body(nn.Module):
    """Gives the backbone the name that it has in the release, `backbone.0.body`."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, images: Tensor) -> Tensor:
        """What the body gives."""
        return self.body(images)


class Encoder(nn.Module):
    """ConvNeXt stages without spatial reduction.

    Args:
        widths: of the stages.
        depths: blocks in each.
        kernel: side of the depthwise kernels.
        layer_scale: initial value of every gamma.
    """

    def __init__(
        self, widths: tuple[int, ...], depths: tuple[int, ...], kernel: int, layer_scale: float
    ) -> None:
        super().__init__()
        if len(widths) != len(depths):
            raise ValueError(
                f"encoder_depths: {len(depths)} depths for {len(widths)} stages of encoder_widths."
            )
        self._encoder = _Stages(widths, depths, kernel, layer_scale)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, first width, h, w) to (batch, last width, h, w)."""
        return self._encoder(features)


class _Stages(nn.Module):
    def __init__(
        self, widths: tuple[int, ...], depths: tuple[int, ...], kernel: int, layer_scale: float
    ) -> None:
        super().__init__()
        self.downsample_layers = nn.ModuleList(
            nn.Sequential(ChannelNorm(before, eps=1e-6), nn.Conv2d(before, after, 1))
            for before, after in pairwise(widths)
        )
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvNeXtBlock(width, kernel, layer_scale) for _ in range(depth)))
            for width, depth in zip(widths, depths, strict=True)
        )
        # the release has it and never applies it; frozen, so that DDP waits for no gradient of it
        self.norm: nn.Module = nn.LayerNorm(widths[-1], eps=1e-6).requires_grad_(False)
        init_convnext(self)

    def forward(self, features: Tensor) -> Tensor:
        features = self.stages[0](features)
        for widen, stage in zip(self.downsample_layers, self.stages[1:], strict=True):
            features = stage(widen(features))
        return features


class Decoder(nn.Module):
    """Interaction layers, and the norm that their outputs get for the heads alone."""

    def __init__(self, layers: list[InteractionLayer], dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(dim)

    def forward(self, queries: Tensor, memory: Tensor, position: Tensor) -> list[Tensor]:
        """The queries (batch, d, qH, qW) after each layer."""
        hidden = []
        for layer in self.layers:
            queries = layer(queries, memory, position)
            hidden.append(queries)
        return hidden


class _EncoderDecoder(nn.Module):
    """Encoder, decoder and the queries' content under the release's names, with its initialisation."""

    def __init__(self, encoder: Encoder, layers: list[InteractionLayer], num_queries: int, dim: int) -> None:
        super().__init__()
        self.tgt = nn.Embedding(num_queries, dim)
        self.encoder = encoder
        self.decoder = Decoder(layers, dim)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
