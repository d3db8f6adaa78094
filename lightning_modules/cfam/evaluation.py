"""Evaluation and prediction of a method that ranks a gallery by sentences."""

from abc import abstractmethod
from typing import Any, Literal

from torch import Tensor

from lightning_modules.base import Method
from lightning_modules.parts.retrieval import RetrievalMetrics


class Retriever(Method):
    """Reads a gallery of images and queries of captions one after the other, and measures or returns both.

    A method says how it encodes them. Batches have `image` or `input_ids`, and `index`; to measure also
    `identity`.

    Args:
        msd_as_released: also log `mSD_released`, what CFAM's authors' script computes.
        options: of `Method`.
    """

    def __init__(self, msd_as_released: bool, *options: Any) -> None:
        super().__init__(*options)
        self.retrieval = RetrievalMetrics(released=msd_as_released)

    @abstractmethod
    def normalize(self, image: Tensor) -> Tensor:
        """Images in [0, 1] as `encode_image` takes them."""

    @abstractmethod
    def encode_image(self, image: Tensor) -> Tensor:
        """Unit vectors (B, width) of normalised images (B, 3, H, W)."""

    @abstractmethod
    def encode_text(self, ids: Tensor) -> Tensor:
        """Unit vectors (B, width) of captions (B, L)."""

    def _encode(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        if "image" in batch:
            return {"features": self.encode_image(self.normalize(batch["image"]))}
        return {"features": self.encode_text(batch["input_ids"])}

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Collect features of the gallery or of the queries."""
        found = self._encode(batch)
        side: Literal["gallery", "queries"] = "gallery" if "image" in batch else "queries"
        self.retrieval.update(side, found["features"], batch["identity"], batch["index"])
        return found

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of all ranks, equal on each."""
        self._log("val")

    def on_test_epoch_end(self) -> None:
        """The same for the test split."""
        self._log("test")

    def _log(self, split: str) -> None:
        self.retrieval.ignore_unmatched = self.trainer.sanity_checking
        values = self.retrieval.compute()
        self.log_dict({f"{split}/{name}": value for name, value in values.items()}, sync_dist=False)
        self.retrieval.reset()

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """`features` and `index` of gallery images (`path`) or of queries (`caption`)."""
        names = ("path", "caption", "identity")
        extra: dict[str, Any] = {key: batch[key] for key in names if key in batch}
        return {**self._encode(batch), "index": batch["index"], **extra}
