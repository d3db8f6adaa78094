"""FakeDetector: what GenDet and its baselines share, from encoded features to the table by generator."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_modules.base import Method
from lightning_modules.gendet.evaluation import (
    GeneratorScore,
    ScoreCollection,
    best_threshold,
    score_generator,
    unweighted_mean,
)
from lightning_modules.parts.contracts import (
    HasFeatureCache,
    HasFeatureStatistics,
    HasGeneratorNames,
    HasSeenGenerators,
    datamodule_of,
    optional,
)
from lightning_modules.parts.encoder import ImageEncoder
from lightning_modules.parts.inference import InferenceSpec
from lightning_modules.parts.weights import load_weights, read_checkpoint

COLUMNS = ("ap", "accuracy", "calibrated_accuracy", "oracle_accuracy", "discrepancy_auc", "teacher_ap")


class FakeDetector(Method):
    """Tells generated images from photographs, and reports generator by generator.

    Batches are dictionaries: `features` float32 (batch, width) of cached features, or `image` float32 (batch,
    3, height, width) in [0, 1]; `label` int64 (batch,), 0 real and 1 fake; `generator` int64 (batch,), the
    number of the test set in the data module's `generator_names`; `index` int64 (batch,); for prediction also
    `path`.

    Scores grow with "fake" and lie in [0, 1]. Three thresholds are reported: 0.5 (strictly above), the one
    that was best on the validation data (kept in the checkpoint as `threshold`), and the best on each test
    set itself (`oracle`, which knows the answers).

    Args:
        encoder: images to features; None for a detector that reads images itself.
        standardize: subtract the mean of the training reals' cached features and divide by their deviation.
        kwargs: optimiser, schedule and parameter groups, see `Method`.
    """

    metrics = ("ap", "accuracy")
    threshold: Tensor
    feature_mean: Tensor
    feature_std: Tensor
    inference = InferenceSpec(outputs=("logits",), unit="images", kinds={"logits": "bernoulli"})

    def __init__(self, encoder: ImageEncoder | None = None, standardize: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.encoder = encoder
        self.standardize = standardize
        width = 1 if encoder is None else encoder.width
        self.register_buffer("threshold", torch.tensor(0.5))
        self.register_buffer("feature_mean", torch.zeros(width))
        self.register_buffer("feature_std", torch.ones(width))
        self.scores = ScoreCollection()
        self.generator_scores: list[GeneratorScore] = []
        self.rows: dict[str, Tensor] = {}

    # What a detector fills in

    def training_labels(self, epoch: int) -> tuple[int, ...]:
        """Labels of the images that a training epoch reads; the data module asks."""
        return (0, 1)

    def score(self, inputs: Tensor) -> dict[str, Tensor]:
        """`score` (batch,), and what else is known, from what `inputs` gave."""
        raise MisconfigurationException(f"{type(self).__name__} must define `score(inputs)`.")

    def forward(self, inputs: Tensor) -> Tensor:
        """Scores (batch,) of images (batch, 3, height, width) in [0, 1] or of features (batch, width)."""
        batch = {"image" if inputs.ndim == 4 else "features": inputs}
        return self.score(self.inputs(batch))["score"]

    def start_from(self, network: nn.Module, path: str | Path) -> None:
        """Load a network's weights, and from a checkpoint of ours also its threshold and statistics."""
        load_weights(network, path)
        self.weights_origin = f"file: {path}"
        state = read_checkpoint(path).get("state_dict", {})
        for name in ("threshold", "feature_mean", "feature_std"):
            if name in state:
                getattr(self, name).copy_(state[name])

    # Inputs

    def inputs(self, batch: dict[str, Any]) -> Tensor:
        """Standardised features (batch, width); images for a detector that reads them itself."""
        if self.encoder is None:
            return batch["image"]
        return (self.features(batch) - self.feature_mean) / self.feature_std

    def features(self, batch: dict[str, Any]) -> Tensor:
        """Features (batch, width) as the encoder gives them, cached or computed now.

        Raises:
            MisconfigurationException: cached features have another width than the encoder.
        """
        assert self.encoder is not None
        features = batch["features"] if "features" in batch else self.encoder(batch["image"])
        if features.shape[1] != self.encoder.width:
            raise MisconfigurationException(
                f"The features are {features.shape[1]} wide, but {self.encoder.model} gives "
                f"{self.encoder.width}."
            )
        return features

    def inference_inputs(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What `network` takes: the efficiency report measures what lies behind the encoder."""
        return {"features": self.inputs(batch)}

    def setup(self, stage: str) -> None:
        """Refuse an encoder-less detector on cached features.

        Raises:
            MisconfigurationException: the data module caches features, and there is no encoder.
        """
        data = optional(datamodule_of(self.trainer), HasFeatureCache)
        if self.encoder is None and data is not None and data.cache is not None:
            raise MisconfigurationException(
                f"{type(self).__name__} reads images: set data.init_args.cache to null."
            )

    def on_fit_start(self) -> None:
        """Take the statistics of the training reals' features.

        Raises:
            MisconfigurationException: `standardize` without cached features.
        """
        super().on_fit_start()
        if not self.standardize:
            return
        data = optional(datamodule_of(self.trainer), HasFeatureStatistics)
        statistics = None if data is None else data.feature_statistics()
        if statistics is None:
            raise MisconfigurationException("standardize: true needs cached features: set data's `cache`.")
        mean, std = (values.to(self.device) for values in statistics)
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(std.clamp_min(1e-6))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Look at the labels: of every batch on the CPU, of an epoch's first where that stalls a device.

        Raises:
            MisconfigurationException: a label is neither 0 nor 1, or one that this epoch must not read.
        """
        super().on_train_batch_start(batch, batch_idx)
        if batch_idx and batch["label"].device.type != "cpu":
            return
        found, wanted = set(batch["label"].unique().tolist()), self.training_labels(self.current_epoch)
        if not found <= {0, 1}:
            raise MisconfigurationException(f"labels must be 0 (real) or 1 (fake), got {sorted(found)}.")
        if not found <= set(wanted):
            raise MisconfigurationException(
                f"Epoch {self.current_epoch} must only read labels {list(wanted)}, but its loader gives "
                f"{sorted(found)}: use FakeImagesDataModule, which asks the detector."
            )

    # Evaluation

    def on_validation_epoch_start(self) -> None:
        """Begin with no image."""
        self.scores.reset()

    def on_test_epoch_start(self) -> None:
        """Begin with no image."""
        self.scores.reset()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Collect scores."""
        return self._collect(batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Collect scores."""
        return self._collect(batch)

    def _collect(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        scores = self.score(self.inputs(batch))
        self.scores.update(batch["index"], batch["label"], batch["generator"], scores)
        return scores

    def on_validation_epoch_end(self) -> None:
        """Choose the threshold in `fit`, log `val/ap`, `val/accuracy` and the others."""
        if self.trainer.sanity_checking:
            return
        self.rows = self.scores.compute()
        if self.trainer.training or self.trainer.state.fn == "fit":
            self.threshold.fill_(best_threshold(self.rows["score"], self.rows["label"]))
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """Log every generator's `test/<generator>/ap` and `/accuracy`, and the unweighted means."""
        self.rows = self.scores.compute()
        self._report("test")

    def _report(self, stage: str) -> None:
        data = datamodule_of(self.trainer)
        named, trained = optional(data, HasGeneratorNames), optional(data, HasSeenGenerators)
        found = self.rows["generator"].unique().tolist()
        names = ([] if named is None else named.generator_names) or [f"set_{place}" for place in found]
        seen = set(() if trained is None else trained.seen_generators)
        self.generator_scores = []
        for place in found:
            rows = self.rows["generator"] == place
            scores = {
                name: values[rows]
                for name, values in self.rows.items()
                if name not in ("index", "label", "generator")
            }
            row = score_generator(
                names[place], names[place] in seen, self.rows["label"][rows], scores, self.threshold.item()
            )
            self.generator_scores.append(row)
        self._log_scores(stage)

    def _log_scores(self, stage: str) -> None:
        values = self._means(self.generator_scores)
        if stage == "test":
            for row in self.generator_scores:
                values |= {f"{row.generator}/ap": row.ap, f"{row.generator}/accuracy": row.accuracy}
            groups = {"unseen": False, "seen": True}
            for name, seen in groups.items():
                rows = [row for row in self.generator_scores if row.seen is seen]
                values |= {f"{name}/{key}": value for key, value in self._means(rows).items()}
        for name, value in values.items():
            if value is not None:  # every rank has the same numbers
                self.log(f"{stage}/{name}", value, prog_bar=name in ("ap", "accuracy"), rank_zero_only=False)

    def _means(self, rows: list[GeneratorScore]) -> dict[str, float | None]:
        return {name: unweighted_mean(rows, name) for name in COLUMNS}

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """`score` and what else `score()` gives, each (batch,), beside `index`, and `label` and `path` where
        known.
        """
        known: dict[str, Any] = {key: batch[key] for key in ("index", "label", "path") if key in batch}
        return {**self.score(self.inputs(batch)), **known}
