"""What a reduced network did to the tokens of a run: choices, pictures, numbers for logs and results."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from callbacks.run.directory import run_directory
from callbacks.token_reduction.macs import VitShape
from callbacks.token_reduction.network import ReducedTransformer
from callbacks.token_reduction.reducer import Reducer
from callbacks.token_reduction.state import TokenRecords
from callbacks.token_reduction.visualization import draw_layers


class ReductionReport:
    """Watches one reduced network.

    Args:
        name: of the method, in logs and files.
        network: with its reducers attached.
        shape: of the network before.
        reducers: `{block index: rule}`.
        decides: whether images choose between pooling and pruning.
        visualize: draw the tokens of so many images.
        trace_source: follow every input token of the last batch.
    """

    def __init__(
        self,
        name: str,
        network: ReducedTransformer,
        shape: VitShape,
        reducers: Mapping[int, Reducer],
        decides: bool,
        visualize: int,
        trace_source: bool,
    ) -> None:
        self.name = name
        self.network = network
        self.records: TokenRecords | None = None
        self._shape = shape
        self._reducers = reducers
        self._decides = decides
        self._visualize = visualize
        self._trace_source = trace_source
        self._pooled: dict[int, Tensor] = {}  # block: (2,) images that pooled, images
        self._shares: dict[int, float] = {}
        self._drawn = 0

    # Watching

    def restart(self, drawing: bool) -> None:
        """Count from none; draw from none where `drawing`."""
        self._pooled = {}
        if drawing:
            self._drawn = 0

    def start(self, draws: bool, counts: bool = True) -> None:
        """Watch the next forward pass, if anyone wants to know."""
        trace = self._trace_source or (draws and self._drawn < self._visualize)
        if trace or (counts and self._decides):
            self.records = self.network.token_records = TokenRecords(trace)

    def stop(self) -> None:
        """Count what was watched."""
        records, self.network.token_records = self.network.token_records, None
        for record in records.passes if records is not None and self._decides else ():
            for block, entry in record.items():
                if entry.pooled is not None:  # counted on the device: nothing here waits for it
                    count = torch.stack([entry.pooled.sum(), torch.ones_like(entry.pooled).sum()])
                    self._pooled[block] = self._pooled[block] + count if block in self._pooled else count

    def draw(self, trainer: Trainer, batch: Any) -> None:
        """Draw the tokens of the batch's images that are still wanted, on rank 0."""
        if not trainer.is_global_zero or self._drawn >= self._visualize:
            return
        images = batch.get("image") if isinstance(batch, dict) else None
        if self.records is None or not self.records.passes or images is None:
            reason = "the batch has no `image`" if images is None else "compiled code shows no tokens"
            rank_zero_warn(f"{self.name}: no tokens are drawn, {reason}.")
            self._drawn = self._visualize
            return
        names = batch["index"].tolist() if "index" in batch else range(self._drawn, self._drawn + len(images))
        directory = run_directory(trainer) / "tokens"
        directory.mkdir(exist_ok=True)
        grid = self.network.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
        for row, name in list(enumerate(names))[: self._visualize - self._drawn]:
            sheet = draw_layers(
                images[row], self.records.passes[0], row, grid, self.network.num_prefix_tokens
            )
            sheet.save(directory / f"{self.name}_{name:06d}.png")
            self._drawn += 1
        if self._drawn >= self._visualize:
            rank_zero_info(f"{self.name}: kept and merged tokens are drawn in {directory}.")

    # Numbers

    def log(self, trainer: Trainer, module: LightningModule) -> None:
        """Shares over all ranks, tokens and MACs."""
        if self._decides:
            # sums, so that an uneven last batch and uneven ranks count by their images
            none = torch.zeros(2, dtype=torch.long, device=module.device)
            counts = torch.stack([self._pooled.get(block, none) for block in self._reducers])
            counts = trainer.strategy.reduce(counts, reduce_op="sum")
            rows = zip(self._reducers, counts.tolist(), strict=True)
            self._shares = {block: pooled / images for block, (pooled, images) in rows if images}
        tokens = self._shape.tokens_after_blocks(self._reducers)
        values = {f"{self.name}/pooled_block{block}": share for block, share in self._shares.items()}
        values |= {f"{self.name}/tokens_block{block}": float(tokens[block]) for block in self._reducers}
        values[f"{self.name}/macs"] = float(self._shape.macs(self._reducers))
        module.log_dict(values, sync_dist=True)  # equal on all ranks

    def results(self) -> dict[str, Any]:
        """Cost, tokens, shares and rules."""
        rules = [vars(rule) for rule in self._reducers.values()]
        settings = {key: [rule[key] for rule in rules] for key in rules[0]}
        return {
            "macs": self._shape.macs(self._reducers),
            "macs_without": self._shape.macs(),
            "compress_blocks": list(self._reducers),
            "tokens_after_blocks": self._shape.tokens_after_blocks(self._reducers),
            "pooled_share": {f"block{block}": share for block, share in self._shares.items()},
            **{key: each[0] if len(set(each)) == 1 else each for key, each in settings.items()},
        }


def described(reducers: Mapping[int, Reducer], proportional_attention: bool) -> dict[str, Any]:
    """What decides the results, as plain values: `dispatch` is but a way to compute them."""
    blocks = {
        str(block): {"rule": type(rule).__name__}
        | {key: value for key, value in vars(rule).items() if key != "dispatch"}
        for block, rule in reducers.items()
    }
    return {"blocks": blocks, "proportional_attention": proportional_attention}
