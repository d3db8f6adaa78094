"""TokenReduction: the callback that puts reducers into a ViT for the time of a run, and takes them out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from callbacks.token_reduction.attach import attach_reducers, detach_reducers
from callbacks.token_reduction.macs import VitShape, smallest_r
from callbacks.token_reduction.options import find_transformer, spread
from callbacks.token_reduction.reducer import Reducer
from callbacks.token_reduction.report import ReductionReport, described
from callbacks.token_reduction.state import TokenRecords

Stage = Literal["fit", "validate", "test", "predict"]
STAGES: tuple[Stage, ...] = ("fit", "validate", "test", "predict")


class TokenReduction(Callback, ABC):
    """What PPT, ToMe and EViT have in common: where, when, how much, and the report.

    `setup` attaches the reducers, before wrappers, compilation and optimisers look at the network, and
    `teardown` detaches them. After validation and test, `<name>/macs`, `<name>/tokens_block<i>` and, where
    images choose, `<name>/pooled_block<i>` (share of images, over all ranks) are logged. They are of the
    image size that the network was made for. In compiled code nothing can be seen of the choices, and their
    shares are left out.

    Args:
        compress_blocks: 0-based indices of the blocks that remove tokens; None takes every block.
        r: tokens to remove, in all compressing blocks or one number for each.
        target_macs: budget of multiply-accumulates an image; the smallest r that meets it replaces `r`.
        proportional_attention: after a merge, let attention count a token as often as its size.
        target: path of the VisionTransformer in the module, such as `network`; None takes the only one there
            is.
        stages: Trainer commands in which the network is reduced (a fit includes its validation).
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
        self._report: ReductionReport | None = None
        self._settings: dict[str, Any] = {}
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

    # Attaching

    @property
    def state_key(self) -> str:
        """Callbacks on two networks of a module keep their states apart."""
        return self._generate_state_key(target=self.target)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the rules into the network if the stage is one of `stages`."""
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
        reduced = attach_reducers(network, reducers, self.proportional_attention)
        self._report = ReductionReport(
            self.name, reduced, shape, reducers, self.decides, self.visualize, self.trace_source
        )
        self._settings = described(reducers, self.proportional_attention)
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
        if self._report is not None:
            self._report.stop()
            detach_reducers(self._report.network)
        self._report = None

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The rules of the last run; they outlive it, so that a checkpoint saved afterwards has them too."""
        return self._settings

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Warn if the checkpoint comes from a run with other settings."""
        now = self._settings
        if state_dict and now and state_dict != now:
            rank_zero_warn(
                f"{type(self).__name__}: the checkpoint was trained with {state_dict}, and this run uses "
                f"{now}. The weights are used as they are."
            )

    # Evaluation: the choices, the pictures, the report

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting."""
        self._restart(drawing=False)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting and drawing."""
        self._restart(drawing=True)

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start drawing."""
        self._restart(drawing=True)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: int
    ) -> None:
        """Watch the batch."""
        self._start(draws=False)

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: int) -> None:
        """Watch the batch."""
        self._start(draws=trainer.is_global_zero)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: int
    ) -> None:
        """Watch the batch if it is to be drawn."""
        self._start(draws=trainer.is_global_zero, counts=False)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: int
    ) -> None:
        """Count the choices."""
        self._stop(trainer)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: int
    ) -> None:
        """Count the choices, and draw."""
        self._stop(trainer, batch)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: int
    ) -> None:
        """Draw."""
        self._stop(trainer, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log shares, tokens and MACs."""
        self._log(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log shares, tokens and MACs."""
        self._log(trainer, pl_module)

    def _restart(self, drawing: bool) -> None:
        if self._report is not None:
            self._report.restart(drawing)

    def _start(self, draws: bool, counts: bool = True) -> None:
        if self._report is not None:
            self._report.start(draws, counts)

    def _stop(self, trainer: Trainer, drawn: Any = None) -> None:
        if self._report is not None:
            self._report.stop()
            self.records = self._report.records
            if drawn is not None:
                self._report.draw(trainer, drawn)

    def _log(self, trainer: Trainer, module: LightningModule) -> None:
        if self._report is not None and not trainer.sanity_checking:
            self._report.log(trainer, module)

    def results(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Cost, tokens and shares of the reduced network; empty where nothing is reduced."""
        return {} if self._report is None else self._report.results()
