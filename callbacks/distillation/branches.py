"""Exit branches (section 3.2 of the OFA-KD paper): from the feature of a student's stage to class logits.

Module names are those of the authors' code (`<stage>.<k>...` in a ModuleDict), so that values filled by name
apply.
"""

from collections.abc import Mapping
from math import isqrt, log2

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from callbacks.distillation.taps import StageShape

HEADS = 4  # of the attention in a token branch
FINAL_GRID = 7  # token grids are merged down to about this, CNN maps halve until stage 4


class SepConv(nn.Module):
    """Two depthwise-separable 3x3 convolutions; halves the map.

    Args:
        channels: in.
        out_channels: out.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels, bias=False),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            nn.Conv2d(channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H/2, W/2)."""
        return self.op(x)


class PatchMerging(nn.Module):
    """2x2 neighbouring tokens become one: concatenate, normalise, project.

    Args:
        grid: side of the square grid of tokens that comes in; even.
        width: of a token in.
        out_width: of a token out.
        activation: after the projection.
    """

    def __init__(self, grid: int, width: int, out_width: int, activation: nn.Module) -> None:
        super().__init__()
        self.grid = grid
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, out_width, bias=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(B, g g, D) to (B, g g / 4, D'); neighbours ordered (0,0), (1,0), (0,1), (1,1) of (row, column)."""
        half = self.grid // 2
        x = x.unflatten(1, (half, 2, half, 2))  # (B, rows, row in pair, columns, column in pair, D)
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)  # (B, g g / 4, 4 D)
        return self.activation(self.reduction(self.norm(x)))


class PatchMergings(nn.Module):
    """As many merges as bring a grid of tokens near 7x7; prefix tokens go around them.

    Args:
        grid: side of the square grid of patch tokens.
        width: D, of a token in.
        out_width: d_s, of a token out of the first merge and all later ones.
        prefix_tokens: in front of the patch tokens.

    Raises:
        ValueError: a grid to be merged is odd.
    """

    def __init__(self, grid: int, width: int, out_width: int, prefix_tokens: int) -> None:
        super().__init__()
        merges = merge_count(grid)
        self.prefix_tokens = prefix_tokens
        self.fn = nn.Sequential()
        for k in range(merges):
            if grid % 2:
                raise ValueError(f"An exit branch cannot merge 2x2 tokens of an odd grid, {grid}x{grid}.")
            last = merges >= 2 and k == merges - 1
            self.fn.append(PatchMerging(grid, width, out_width, nn.Identity() if last else nn.GELU()))
            grid, width = grid // 2, out_width

    def forward(self, x: Tensor) -> Tensor:
        """(B, P + g g, D) to (B, P + g g / 4^merges, d_s)."""
        if not self.prefix_tokens or not self.fn:
            return self.fn(x)
        prefix, patches = x[:, : self.prefix_tokens], x[:, self.prefix_tokens :]
        return torch.cat([prefix, self.fn(patches)], dim=1)


class TokenPool(nn.Module):
    """The class token where there is one, else the mean token.

    Args:
        prefix_tokens: 0 for the mean.
    """

    def __init__(self, prefix_tokens: int) -> None:
        super().__init__()
        self.prefix_tokens = prefix_tokens

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) to (B, D)."""
        return x[:, 0] if self.prefix_tokens else x.mean(dim=1)


def merge_count(grid: int) -> int:
    """Number of 2x2 merges m = max(floor(log2(grid / 7)), 0)."""
    return max(int(log2(grid / FINAL_GRID)), 0) if grid >= FINAL_GRID else 0


def cnn_branch(stage: int, channels: int, width: int, num_classes: int) -> nn.Sequential:
    """The branch of a map (B, C, H, W) of stage 1..4.

    Args:
        stage: i; 4 - i SepConv blocks double the channels, the last goes to `width`.
        channels: C.
        width: h = max(d_s, d_t), the larger penultimate width of student and teacher.
        num_classes: K.
    """
    if stage == 4:
        return nn.Sequential(
            nn.Conv2d(channels, width, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, num_classes),
        )
    blocks = 4 - stage
    branch = nn.Sequential()
    for j in range(blocks):
        out_channels = width if j == blocks - 1 else 2 * channels
        branch.append(SepConv(channels, out_channels))
        channels = out_channels
    return branch.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)])


def token_branch(
    stage: int, length: int, width: int, out_width: int, num_classes: int, prefix_tokens: int = 0
) -> nn.Sequential:
    """The branch of tokens (B, L, D) of stage 1..4: merges, transformer blocks, pooling, classifier.

    Args:
        stage: i; max(4 - i, 1) pre-norm blocks of 4 heads.
        length: L, prefix tokens included.
        width: D.
        out_width: d_s, the student's penultimate width.
        num_classes: K.
        prefix_tokens: class (and distillation) tokens in front.

    Raises:
        ValueError: the patch tokens form no square grid, a grid to be merged is odd, or widths do not fit.
    """
    if out_width % HEADS:
        raise ValueError(
            f"Exit branches of token students have {HEADS} heads; {out_width} is not divisible by it."
        )
    grid = isqrt(length - prefix_tokens)
    if grid**2 != length - prefix_tokens:
        raise ValueError(f"stage {stage}: {length - prefix_tokens} patch tokens form no square grid.")
    if width != out_width and (prefix_tokens > 0 or merge_count(grid) == 0):
        raise ValueError(
            f"stage {stage}: an exit branch takes tokens of width {out_width} (the student's penultimate "
            f"width) when there are class tokens to pass on or nothing to merge ({grid}x{grid} tokens); this "
            f"stage has {width}. Leave it out of `stages`."
        )
    blocks = [
        Block(
            out_width, HEADS, mlp_ratio=4.0, qkv_bias=False, norm_layer=nn.LayerNorm
        )  # eps 1e-5, not timm's 1e-6
        for _ in range(max(4 - stage, 1))
    ]
    return nn.Sequential(
        PatchMergings(grid, width, out_width, prefix_tokens),
        nn.Sequential(*blocks),
        TokenPool(prefix_tokens),
        nn.Linear(out_width, num_classes),
    )


def exit_branches(
    stages: Mapping[int, StageShape], student_width: int, teacher_width: int, num_classes: int
) -> nn.ModuleDict:
    """One initialised branch for each stage, keyed by the stage's number as a string.

    Args:
        stages: `{stage number: shape of the student's feature there}`.
        student_width: d_s, penultimate width of the student.
        teacher_width: d_t; only CNN branches use it.
        num_classes: K.
    """
    branches = nn.ModuleDict()
    for stage, shape in stages.items():
        if shape.is_map:
            width = max(student_width, teacher_width)
            branches[str(stage)] = cnn_branch(stage, shape.channels, width, num_classes)
        else:
            branches[str(stage)] = token_branch(
                stage, shape.length, shape.channels, student_width, num_classes, shape.prefix_tokens
            )
    return branches.apply(_initialise)


def _initialise(module: nn.Module) -> None:
    """Kaiming-normal convolutions (fan out, ReLU), truncated-normal linear layers (0.02), zero biases."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
        nn.init.zeros_(module.bias)
