"""DECO+: RT-DETR's frame with convolutional interaction instead of attention. Plain torch.

Parameter names are those of the authors' release.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from lightning_modules.deco.backbones import ResNetD
from lightning_modules.deco.layers import (
    MLP,
    ConvNorm,
    InceptionDepthwise,
    InteractionLayer,
    negative_bias,
    resize,
)
from lightning_modules.deco.network import DetectionNetwork, grid_of, outputs_of
from lightning_modules.deco.plus_encoder import PlusEncoder

STRIDES = (8, 16, 32)


class DecoPlus(DetectionNetwork):
    """DECO+, multi scale: image-dependent queries, selected by score and refined layer by layer.

    Args:
        num_classes: width of the logits.
        depth: layers of the ResNet-d backbone.
        frozen: the backbone's batch norms and stem are not trained; None is as published (50: yes, 18: no).
        num_queries: boxes an image.
        grid_height: rows qH of the query grid; must divide `num_queries`.
        hidden_dim: width of encoder and decoder.
        encoder_depth: ConvNeXt blocks on the coarsest level.
        encoder_kernel: side of their depthwise kernels.
        expansion: of the CSP layers; None is as published (50: 1.0, 18: 0.5).
        decoder_layers: None is as published (50: 6, 18: 3).
        decoder_kernel: side of the cross-interaction's depthwise kernel.
        incept_height: length of the self-interaction's vertical kernel.
        incept_width: length of its horizontal kernel.
        branch_ratio: share of the channels in each of its three convolutions.
        memory_level: level (0: stride 8, 1: 16, 2: 32) at which the decoder sees the fused image.
        eval_idx: the layer whose output counts in eval mode; layers after it are not run.
        fusion: of queries and memory in the cross-interaction.
        upsample: how the query grid grows to the memory's size.
        pool: how it shrinks back.
        layer_scale: initial value of every gamma.

    Raises:
        ValueError: the grid does not fit `num_queries`, or an option is out of its range.
    """

    def __init__(
        self,
        num_classes: int = 80,
        depth: Literal[18, 50] = 50,
        frozen: bool | None = None,
        num_queries: int = 300,
        grid_height: int = 15,
        hidden_dim: int = 256,
        encoder_depth: int = 4,
        encoder_kernel: int = 7,
        expansion: float | None = None,
        decoder_layers: int | None = None,
        decoder_kernel: int = 9,
        incept_height: int = 13,
        incept_width: int = 15,
        branch_ratio: float = 0.25,
        memory_level: int = 1,
        eval_idx: int = -1,
        fusion: Literal["add", "mul", "concat"] = "add",
        upsample: Literal["nearest", "bilinear"] = "nearest",
        pool: Literal["max", "avg"] = "max",
        layer_scale: float = 1e-6,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_queries = num_queries
        self.backbone = ResNetD(depth, frozen)
        expansion = (1.0 if depth == 50 else 0.5) if expansion is None else expansion
        self.encoder = PlusEncoder(
            self.backbone.channels, hidden_dim, encoder_depth, encoder_kernel, expansion, layer_scale
        )
        count = (6 if depth == 50 else 3) if decoder_layers is None else decoder_layers
        layers = [
            InteractionLayer(
                hidden_dim,
                InceptionDepthwise(hidden_dim, incept_height, incept_width, branch_ratio=branch_ratio),
                decoder_kernel,
                fusion,
                upsample,
                pool,
                layer_scale,
            )
            for _ in range(count)
        ]
        grid = grid_of(num_queries, grid_height)
        self.decoder = PlusDecoder(layers, hidden_dim, num_classes, grid, memory_level, eval_idx)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """See `DetectionNetwork`; the last auxiliary output is that of the query selection.

        Args:
            images: (batch, 3, H, W) in [0, 1]; sides are multiples of 32.

        Raises:
            ValueError: a side is no multiple of 32, or the image has fewer tokens than there are queries.
        """
        height, width = images.shape[-2:]
        if height % 32 or width % 32:
            raise ValueError(f"DECO+ takes images whose sides are multiples of 32, not {height}x{width}.")
        tokens = sum((height // stride) * (width // stride) for stride in STRIDES)
        if tokens < self.num_queries:
            raise ValueError(
                f"num_queries: an image of {height}x{width} has {tokens} tokens, fewer than the "
                f"{self.num_queries} queries."
            )
        return self.decoder(self.encoder(self.backbone(images)), self.all_layers)

    def drop_auxiliary(self) -> None:
        """Keep the score head of the layer that counts, and no layer after it."""
        self.decoder.drop_auxiliary()
        self.all_layers = False


class PlusDecoder(nn.Module):
    """Query selection, interaction layers with iterative boxes, and one pair of heads a layer.

    Args:
        layers: the interaction layers.
        dim: their width.
        num_classes: width of the logits.
        grid: (qH, qW).
        memory_level: see `DecoPlus`.
        eval_idx: see `DecoPlus`.
    """

    def __init__(
        self,
        layers: list[InteractionLayer],
        dim: int,
        num_classes: int,
        grid: tuple[int, int],
        memory_level: int,
        eval_idx: int,
    ) -> None:
        super().__init__()
        levels, count = len(STRIDES), len(layers)
        if not 0 <= memory_level < levels:
            raise ValueError(f"memory_level: 0, 1 or 2, not {memory_level}.")
        if not -count <= eval_idx < count:
            raise ValueError(f"eval_idx: there are {count} decoder layers, {eval_idx} is none of them.")
        self.grid = grid
        self.memory_level = memory_level
        self.eval_layer = eval_idx % count
        self.input_proj = nn.ModuleList(ConvNorm(dim, dim, 1) for _ in range(levels))
        strides = [2 * (memory_level - level) for level in range(memory_level)]
        self.downsample_convs = nn.ModuleList(
            ConvNorm(dim, dim, stride, stride, "silu", padding=(stride - 1) // 2) for stride in strides
        )
        self.output_proj = ConvNorm(levels * dim, dim, 1)
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(layers)
        self.query_pos_head = MLP(4, 2 * dim, dim)
        self.enc_output = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim))
        self.enc_score_head = nn.Linear(dim, num_classes)
        self.enc_bbox_head = MLP(dim, dim, dim, 4)
        self.dec_score_head = nn.ModuleList(nn.Linear(dim, num_classes) for _ in layers)
        self.dec_bbox_head = nn.ModuleList(MLP(dim, dim, dim, 4) for _ in layers)
        self._initialise()

    def _initialise(self) -> None:
        for score in (self.enc_score_head, *self.dec_score_head):
            nn.init.constant_(score.bias, negative_bias())
        for box in (self.enc_bbox_head, *self.dec_bbox_head):
            nn.init.zeros_(box.layers[-1].weight)
            nn.init.zeros_(box.layers[-1].bias)
        for linear in (self.enc_output[0], *self.query_pos_head.layers):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, levels: list[Tensor], all_layers: bool = False) -> dict[str, Tensor]:
        """Outputs of the encoder's levels (batch, d, h, w), fine to coarse, see `DetectionNetwork`."""
        levels = [project(level) for project, level in zip(self.input_proj, levels, strict=True)]
        memory = self.fuse(levels)
        queries, reference, logits = self.select(levels)
        outputs = self.refine(queries, reference, memory, all_layers)
        if self.training or all_layers:  # the selection is the last auxiliary output
            scores, boxes = outputs
            scores.insert(-1, logits)
            boxes.insert(-1, reference.sigmoid())
        return outputs_of(*outputs)

    def fuse(self, levels: list[Tensor]) -> Tensor:
        """The memory M (batch, d, h, w) at `memory_level`."""
        size = levels[self.memory_level].shape[-2:]
        finer = [shrink(level) for shrink, level in zip(self.downsample_convs, levels, strict=False)]
        coarser = [resize(level, size) for level in levels[self.memory_level + 1 :]]
        return self.output_proj(torch.cat([*finer, levels[self.memory_level], *coarser], dim=1))

    def select(self, levels: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens with the highest class score, best first.

        Returns:
            Content (batch, Q, d), boxes before the sigmoid (batch, Q, 4), logits (batch, Q, classes).
        """
        anchors, valid = anchors_of([(level.shape[-2], level.shape[-1]) for level in levels], levels[0])
        tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)  # (batch, N, d)
        content = self.enc_output(tokens * valid)
        logits = self.enc_score_head(content)  # (batch, N, classes)
        count = self.grid[0] * self.grid[1]
        chosen = logits.amax(dim=-1).topk(count, dim=1).indices[..., None]  # (batch, Q, 1)
        content = content.gather(1, chosen.expand(-1, -1, content.shape[-1]))
        logits = logits.gather(1, chosen.expand(-1, -1, logits.shape[-1]))
        # the box head looks at one token at a time: it need not run on those that were not chosen
        reference = self.enc_bbox_head(content) + anchors[chosen.squeeze(-1)]
        return content, reference, logits

    def refine(
        self, queries: Tensor, reference: Tensor, memory: Tensor, all_layers: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Logits and boxes of every layer that is wanted.

        In training the box of layer i > 0 also sends a gradient into that of layer i - 1 ("look forward
        twice"); its value is the same.
        """
        wanted = self.training or all_layers
        last = len(self.decoder.layers) - 1 if self.training else self.eval_layer  # type: ignore[arg-type]
        box = reference.detach().sigmoid()  # (batch, Q, 4)
        grid = queries.detach().transpose(1, 2).unflatten(2, self.grid)  # (batch, d, qH, qW)
        logits, boxes = [], []
        for place in range(last + 1):
            before, start = box, box.detach() if self.training else box
            position = self.query_pos_head(start.to(grid.dtype)).transpose(1, 2).unflatten(2, self.grid)
            grid = self.decoder.layers[place](grid, memory, position)  # type: ignore[index,operator]
            queries = grid.flatten(2).transpose(1, 2)  # (batch, Q, d)
            change = self.dec_bbox_head[place](queries)
            box = (change + inverse_sigmoid(start)).sigmoid()
            if wanted or place == last:
                logits.append(self.dec_score_head[self._head(place)](queries))
                twice = self.training and place > 0
                boxes.append((change + inverse_sigmoid(before)).sigmoid() if twice else box)
        return logits, boxes

    def _head(self, place: int) -> int:
        """Place of a layer's score head; after `drop_auxiliary` there is one."""
        return place - len(self.decoder.layers) + len(self.dec_score_head)  # type: ignore[arg-type]

    def drop_auxiliary(self) -> None:
        """Keep what eval mode needs."""
        end = self.eval_layer + 1
        self.decoder.layers = self.decoder.layers[:end]  # type: ignore[index]
        self.dec_bbox_head = self.dec_bbox_head[:end]
        self.dec_score_head = self.dec_score_head[self.eval_layer : end]


def anchors_of(sizes: list[tuple[int, int]], like: Tensor, side: float = 0.05) -> tuple[Tensor, Tensor]:
    """One anchor box a token: square cells' centres, sides of 0.05, 0.1 and 0.2.

    Args:
        sizes: (h, w) of the levels, fine to coarse.
        like: gives the device.
        side: normalised side on the first level; doubles from level to level.

    Returns:
        Logits of normalised (cx, cy, w, h), float32 (tokens, 4), +inf where an anchor is invalid (one of its
        values outside (0.01, 0.99)); 1 for valid and 0 for invalid tokens, (tokens, 1).
    """
    boxes = []
    for level, (height, width) in enumerate(sizes):
        rows = (torch.arange(height, device=like.device, dtype=torch.float32) + 0.5) / height
        columns = (torch.arange(width, device=like.device, dtype=torch.float32) + 0.5) / width
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        length = torch.full_like(x, side * 2**level)
        boxes.append(torch.stack([x, y, length, length], dim=-1).flatten(0, 1))
    anchors = torch.cat(boxes)  # (tokens, 4)
    valid = ((anchors > 0.01) & (anchors < 0.99)).all(dim=-1, keepdim=True)
    logits = torch.log(anchors / (1 - anchors))
    return logits.masked_fill(~valid, float("inf")), valid.to(like.dtype)


def inverse_sigmoid(values: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of values in [0, 1], with both the value and its complement at least `eps`."""
    values = values.clamp(0, 1)
    return torch.log(values.clamp(min=eps) / (1 - values).clamp(min=eps))
