"""What travels beside the tokens through the blocks of one forward pass, and what is written down about
it.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the attention of a compressing block knows about its tokens.

    Attributes:
        queries: (batch, heads, tokens, head_dim), after a query norm.
        keys: (batch, heads, tokens, head_dim), after a key norm.
        values: (batch, heads, tokens, head_dim).
        scale: of the logits.
        bias: (batch, 1, 1, tokens) added to the logits, or None.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scale: float
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class BlockRecord:
    """What a compressing block did to a batch.

    Attributes:
        tokens: that leave the block.
        pooled: (batch,) bool, True where the image pooled; None where the method has no such choice.
        variance: (batch,) what was compared with the threshold; None where no score was needed.
        size: (batch, tokens) input patches that each token stands for; None while all are 1.
        sources: (batch, tokens, input tokens) uint8, 1 where an input token is part of a token; None unless
            traced.
    """

    tokens: int
    pooled: Tensor | None = None
    variance: Tensor | None = None
    size: Tensor | None = None
    sources: Tensor | None = None


@dataclass
class TokenRecords:
    """Collects what the compressing blocks do, one `{block index: BlockRecord}` a forward pass.

    Attributes:
        trace: also follow every input token (batch * tokens * input tokens bytes a block).
        passes: one entry a forward pass, in order.
    """

    trace: bool = False
    passes: list[dict[int, BlockRecord]] = field(default_factory=list)


class TokenState:
    """Sizes and sources of the tokens of one forward pass.

    A new one is made by every forward pass and handed from block to block, so passes cannot mix. It is a
    plain class and not a dataclass because FSDP copies dataclasses among the arguments of a module.

    Args:
        prefix: leading tokens that are never removed.
        proportional_attention: whether attention counts a token as often as its size (spec 2.2).
        trace: whether to follow every input token.
        record: whether to write down what the blocks do.
    """

    def __init__(
        self, prefix: int, proportional_attention: bool = True, trace: bool = False, record: bool = False
    ) -> None:
        self.prefix = prefix
        self.proportional_attention = proportional_attention
        self.trace = trace
        self.records: dict[int, BlockRecord] | None = {} if record or trace else None
        self.size: Tensor | None = None  # (batch, tokens) float32; None: all 1
        self.bias: Tensor | None = (
            None  # (batch, 1, 1, tokens) log size for the attention of the blocks that follow
        )
        self.sources: Tensor | None = None  # (batch, tokens, input tokens) uint8

    def sizes(self, x: Tensor) -> Tensor:
        """Sizes of the tokens `x` (batch, tokens, channels), in float32 whatever the precision of `x`."""
        return (
            torch.ones(x.shape[:2], dtype=torch.float32, device=x.device) if self.size is None else self.size
        )

    def resize(self, size: Tensor, x: Tensor) -> None:
        """Take over new sizes (batch, tokens) of `x`, and prepare the bias log(size) in the precision of
        `x`.
        """
        self.size = size
        self.bias = size.log().to(x.dtype)[:, None, None, :] if self.proportional_attention else None

    def traced(self, x: Tensor) -> Tensor:
        """Sources of the tokens `x`: at first each token stands for itself."""
        if self.sources is not None:
            return self.sources
        return torch.eye(x.shape[1], dtype=torch.uint8, device=x.device).expand(x.shape[0], -1, -1)

    def record(
        self, block: int, tokens: int, pooled: Tensor | None = None, variance: Tensor | None = None
    ) -> None:
        """Write down what block `block` has done, if anyone listens."""
        if self.records is not None:
            self.records[block] = BlockRecord(tokens, pooled, variance, self.size, self.sources)
