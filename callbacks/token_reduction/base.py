"""TokenReduction: the callback that patches a ViT for the time of a run, says what it did, and undoes it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from callbacks.run.directory import run_directory
from callbacks.token_reduction.macs import VitShape, smallest_r
from callbacks.token_reduction.network import ReducedTransformer
from callbacks.token_reduction.options import find_transformer, spread
from callbacks.token_reduction.patch import patch, unpatch
from callbacks.token_reduction.reducer import Reducer
from callbacks.token_reduction.state import TokenRecords
from callbacks.token_reduction.visualization import draw_layers

Stage = Literal["fit", "validate", "test", "predict"]
STAGES: tuple[Stage, ...] = ("fit", "validate", "test", "predict")


class TokenReduction(Callback, ABC):
    """What PPT, ToMe and EViT have in common: where, when, how much, and the report.

    `setup` patches the network, before wrappers, compilation and optimisers look at it, and `teardown`
    restores it. After validation and test, `<name>/macs`, `<name>/tokens_block<i>` and, where images choose,
    `<name>/pooled_block<i>` (share of images, over all ranks) are logged. They are of the image size that
    the network was made for. In compiled code nothing can be seen of the choices, and their shares are left
    out.

    Args:
        compress_blocks: 0-based indices of the blocks that remove tokens; None takes every block.
        r: tokens to remove, in all compressing blocks or one number for each.
        target_macs: budget of multiply-accumulates an image; the smallest r that meets it replaces `r`.
        proportional_attention: after a merge, let attention count a token as often as its size.
        target: path of the VisionTransformer in the module, such as `network`; None takes the only one there
            is.
        stages: Trainer commands in which the network is patched (a fit includes its validation).
        visualize: draw the tokens of so many images in `test` and `predict`, as `tokens/*.png` in the run
            directory.
        trace_source: keep, for the last evaluated batch, which patches went into which token
            (`callback.records`).

    Raises:
        ValueError: an option is out of its range, or does not fit the network; named in the message.
        MisconfigurationException: there is no VisionTransformer, or several and no `target`.
    """

    name: str

    def __init__(
        self,
        compress_blocks: list[int] | None,
        r: int | list[int] | None,
        target_macs: float | None = None,
        proportional_attention: bool = True,
        target: str | None = None,
        stages: list[Stage] | None = None,
        visualize: int = 0,
        trace_source: bool = False,
    ) -> None:
        unknown = sorted(set(stages or ()) - set(STAGES))
        if unknown:
            raise ValueError(f"stages: {', '.join(unknown)} is none of {', '.join(STAGES)}.")
        if visualize < 0:
            raise ValueError(f"visualize must not be negative, but is {visualize}.")
        self.compress_blocks = compress_blocks
        self.r = r
        self.target_macs = target_macs
        self.proportional_attention = proportional_attention
        self.target = target
        self.stages = tuple(stages) if stages is not None else STAGES
        self.visualize = visualize
        self.trace_source = trace_source
        self.records: TokenRecords | None = None
        self._network: ReducedTransformer | None = None
        self._shape: VitShape | None = None
        self._reducers: dict[int, Reducer] = {}
        self._settings: dict[str, Any] = {}
        self._pooled: dict[int, Tensor] = {}  # block: (2,) images that pooled, images
        self._shares: dict[int, float] = {}
        self._drawn = 0
        if compress_blocks is not None:
            if len(set(compress_blocks)) < len(compress_blocks):
                raise ValueError(f"compress_blocks lists a block twice: {compress_blocks}.")
            self.reducers(compress_blocks, r)  # refuses what is wrong as early as it can be known

    @abstractmethod
    def reducer(self, position: int, blocks: int, r: int | None) -> Reducer:
        """The rule of one block.

        Args:
            position: among the compressing blocks, from 0.
            blocks: how many compressing blocks there are.
            r: tokens to remove there.
        """

    @property
    def decides(self) -> bool:
        """Whether images choose between pooling and pruning, so that there is a share to log."""
        return False

    def reducers(self, blocks: Sequence[int], r: int | list[int] | None) -> dict[int, Reducer]:
        """`{block index: rule}` for tokens `r` to remove, one for all or one for each block."""
        counts: list[int | None] = spread("r", r, len(blocks))  # type: ignore[arg-type]
        return {block: self.reducer(at, len(blocks), counts[at]) for at, block in enumerate(blocks)}

    # Patching

    @property
    def state_key(self) -> str:
        """Callbacks on two networks of a module keep their states apart."""
        return self._generate_state_key(target=self.target)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Patch the network if the stage is one of `stages`."""
        if stage not in self.stages:
            return
        network = find_transformer(pl_module, self.target)
        blocks = range(len(network.blocks)) if self.compress_blocks is None else self.compress_blocks
        if not blocks:
            rank_zero_warn(f"{type(self).__name__}: compress_blocks is empty, so no token is removed.")
            return
        r, shape = self.r, VitShape.of(network)
        if self.target_macs is not None:
            r = smallest_r(shape, self.target_macs, lambda r: self.reducers(blocks, r))
        reducers = self.reducers(blocks, r)
        self._network = patch(network, reducers, self.proportional_attention)
        self._shape, self._reducers = shape, reducers
        self._settings = self._described(reducers)
        left, share = shape.tokens_after_blocks(reducers)[-1], shape.macs(reducers) / shape.macs()
        rank_zero_info(
            f"{type(self).__name__}: {left} of {shape.tokens} tokens and {share:.1%} of the MACs are left"
            f"{'' if self.target_macs is None else f', with r={r}'}."
        )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the network as it was found."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Likewise: Lightning calls no teardown after an error."""
        self._restore()

    def _restore(self) -> None:
        self._stop_recording()
        if self._network is not None:
            unpatch(self._network)
        self._network, self._shape, self._reducers = None, None, {}

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The rules of the last run; they outlive it, so that a checkpoint saved afterwards has them too."""
        return self._settings

    def _described(self, reducers: dict[int, Reducer]) -> dict[str, Any]:
        """What decides the results, as plain values: `dispatch` is but a way to compute them."""
        blocks = {
            str(block): {"rule": type(rule).__name__}
            | {key: value for key, value in vars(rule).items() if key != "dispatch"}
            for block, rule in reducers.items()
        }
        return {"blocks": blocks, "proportional_attention": self.proportional_attention}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Warn if the checkpoint comes from a run with other settings."""
        now = self._settings
        if state_dict and now and state_dict != now:
            rank_zero_warn(
                f"{type(self).__name__}: the checkpoint was trained with {state_dict}, and this run uses "
                f"{now}. The weights are used as they are."
            )

    # Evaluation: the choices and the pictures

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting."""
        self._pooled = {}

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting."""
        self._pooled, self._drawn = {}, 0

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start drawing."""
        self._drawn = 0

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: int
    ) -> None:
        """Watch the batch."""
        self._start_recording(draws=False)

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: int) -> None:
        """Watch the batch."""
        self._start_recording(draws=trainer.is_global_zero)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: int
    ) -> None:
        """Watch the batch if it is to be drawn."""
        self._start_recording(draws=trainer.is_global_zero, counts=False)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: int
    ) -> None:
        """Count the choices."""
        self._stop_recording()

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: int
    ) -> None:
        """Count the choices, and draw."""
        self._stop_recording()
        self._draw(trainer, batch)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: int
    ) -> None:
        """Draw."""
        self._stop_recording()
        self._draw(trainer, batch)

    def _start_recording(self, draws: bool, counts: bool = True) -> None:
        trace = self.trace_source or (draws and self._drawn < self.visualize)
        if self._network is not None and (trace or (counts and self.decides)):
            self.records = self._network.token_records = TokenRecords(trace)

    def _stop_recording(self) -> None:
        if self._network is None or self._network.token_records is None:
            return
        records, self._network.token_records = self._network.token_records, None
        for record in records.passes if self.decides else ():
            for block, entry in record.items():
                if entry.pooled is not None:  # counted on the device: nothing here waits for it
                    count = torch.stack([entry.pooled.sum(), torch.ones_like(entry.pooled).sum()])
                    self._pooled[block] = self._pooled[block] + count if block in self._pooled else count

    def _draw(self, trainer: Trainer, batch: Any) -> None:
        if not trainer.is_global_zero or self._network is None or self._drawn >= self.visualize:
            return
        images = batch.get("image") if isinstance(batch, dict) else None
        if self.records is None or not self.records.passes or images is None:
            reason = "the batch has no `image`" if images is None else "compiled code shows no tokens"
            rank_zero_warn(f"{type(self).__name__}: no tokens are drawn, {reason}.")
            self._drawn = self.visualize
            return
        names = batch["index"].tolist() if "index" in batch else range(self._drawn, self._drawn + len(images))
        directory = run_directory(trainer) / "tokens"
        directory.mkdir(exist_ok=True)
        grid = self._network.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
        for place, name in list(enumerate(names))[: self.visualize - self._drawn]:
            sheet = draw_layers(
                images[place], self.records.passes[0], place, grid, self._network.num_prefix_tokens
            )
            sheet.save(directory / f"{self.name}_{name:06d}.png")
            self._drawn += 1
        if self._drawn >= self.visualize:
            rank_zero_info(f"{type(self).__name__}: kept and merged tokens are drawn in {directory}.")

    # The report

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log shares, tokens and MACs."""
        self._log(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log shares, tokens and MACs."""
        self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, module: LightningModule) -> None:
        if self._shape is None or trainer.sanity_checking:
            return
        if self.decides:
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

    def results(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Cost, tokens and shares of the patched network; empty where it is not patched."""
        if self._shape is None:
            return {}
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
