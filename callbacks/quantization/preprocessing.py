"""CFP over a network: outlier channels are scaled, outlier weights truncated (spec 2.6 to 2.8)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from callbacks.quantization.blocks import BlockStack
from callbacks.quantization.folding import ChannelRange, Fold, apply_fold, fold_scales, folds_of
from callbacks.quantization.outliers import detect_outliers, truncated
from callbacks.quantization.ranks import maximum
from callbacks.quantization.settings import CrossBlockSettings


class ChannelScaling:
    """Scales of outlier channels, folded into the layers that make the channels, block after block.

    Args:
        stack: of the network, which is changed in place.
        names: of the layers that are quantized.
        settings: see `CrossBlockSettings`.
    """

    def __init__(self, stack: BlockStack, names: Sequence[str], settings: CrossBlockSettings) -> None:
        self.stack = stack
        self.names = names
        self.settings = settings

    def fit(self, segments: Tensor) -> dict[str, Tensor]:
        """Choose and fold the scales after a look at all segments (count, length).

        Returns:
            The scales by `block/fold`.
        """
        hidden = [self.stack.embed(ids) for ids in segments.split(self.settings.batch_size)]
        last = max(index for index in range(len(self.stack)) if self.stack.layer_names(index, self.names))
        scales: dict[str, Tensor] = {}
        for index in range(last + 1):
            scales |= self._scale_block(index, hidden)
        return scales

    def apply(self, saved: dict[str, Tensor]) -> None:
        """Fold scales that `fit` returned before."""
        for key, scales in saved.items():
            index, number = (int(part) for part in key.split("/"))
            self.stack.keep(index, index + 1)
            fold = self._folds(index)[number]
            apply_fold(fold, self.stack.blocks[index], scales.to(self.stack.device))

    def _folds(self, index: int) -> list[Fold]:
        prefix = f"{self.stack.name(index)}."
        names = self.stack.layer_names(index, self.names)
        return folds_of(self.stack.blocks[index], [name.removeprefix(prefix) for name in names])

    @torch.no_grad()
    def _scale_block(self, index: int, hidden: list[Tensor]) -> dict[str, Tensor]:
        """Fold the scales of a block; `hidden` moves on behind it."""
        self.stack.keep(index, index + 1)
        block, folds = self.stack.blocks[index], self._folds(index)
        channels = ChannelRange({fold.consumers[0]: block.get_submodule(fold.consumers[0]) for fold in folds})
        probe = hidden[0][:1]
        for number, batch in enumerate(hidden):
            indices = slice(number * self.settings.batch_size, number * self.settings.batch_size + len(batch))
            hidden[number] = self.stack.run(index, index + 1, batch, indices)
        channels.remove()
        for extremes, sign in ((channels.largest, 1), (channels.smallest, -1)):
            for values in extremes.values():
                values.copy_(sign * maximum(sign * values))
        options = {
            "coarse_factor": self.settings.cfp_coarse_factor,
            "variance_weight": self.settings.cfp_variance_weight,
            "min_gap": self.settings.cfp_min_gap,
        }
        trial = self.stack.trial(index, probe)
        chosen: dict[str, Tensor] = {}
        for number, fold in enumerate(folds):
            scales = fold_scales(fold, block, channels, self.settings.cfp_variant, options)
            if bool((scales == 1).all()):
                continue
            if trial.moves(fold, scales):  # something else reads these channels
                continue
            apply_fold(fold, block, scales)
            chosen[f"{index}/{number}"] = scales.cpu()
        return chosen


def truncate_outliers(weight: Tensor, settings: CrossBlockSettings) -> tuple[Tensor, dict[str, float]]:
    """A weight (d_out, d_in) without its outliers, and the smallest threshold and how many weights it cut.

    The latter is empty where nothing is cut.
    """
    options = (settings.cfp_coarse_factor, settings.cfp_variance_weight, settings.cfp_min_gap)
    if settings.cfp_granularity == "channel":
        detections = [detect_outliers(row.abs(), *options) for row in weight]
        threshold: float | Tensor = weight.new_tensor([[each.threshold] for each in detections])
    else:
        detections = [detect_outliers(weight.abs(), *options)]
        threshold = detections[0].threshold
    count = sum(each.outliers for each in detections)
    if not count:
        return weight, {}
    smallest = float(min(each.threshold for each in detections))
    return truncated(weight, threshold), {"threshold": smallest, "weights": count}
