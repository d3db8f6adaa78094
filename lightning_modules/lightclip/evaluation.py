"""How a model of pictures and texts is measured: classes by name, and retrieval (sections 4.2, 4.3)."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import Metric

from lightning_modules.base import Method
from lightning_modules.parts.contracts import HasParts, HasPrompts, datamodule_of, optional
from lightning_modules.parts.distributed import first_of_each, gather_uneven, is_distributed
from lightning_modules.parts.retrieval import RetrievalMetrics

TOP = (1, 5, 10)
CHUNK = 256  # sentences that are encoded at once


def class_weights(features: Tensor) -> Tensor:
    """Unit vectors (classes, width) of the sentences' features (classes, templates, width)."""
    return F.normalize(F.normalize(features, dim=-1).mean(1), dim=-1)


class ZeroShotAccuracy(Metric):
    """`top1`, `top5` and `mean_class` (of top-1 over the classes that occur), percent, each index once."""

    full_state_update = False
    rank: list[Tensor]
    label: list[Tensor]
    index: list[Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in ("rank", "label", "index"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, scores: Tensor, label: Tensor, index: Tensor) -> None:
        """Collect a batch.

        Args:
            scores: (batch, classes).
            label: (batch,).
            index: (batch,) in the data set.
        """
        own = scores.gather(1, label[:, None])
        self.rank.append((scores > own).sum(1))
        self.label.append(label)
        self.index.append(index)

    def compute(self) -> dict[str, Tensor]:
        """The three, of all ranks."""
        columns = (getattr(self, name) for name in ("rank", "label", "index"))
        rank, label, index = (c if isinstance(c, Tensor) else torch.cat(c) for c in columns)
        rows = first_of_each(index)
        rank, label = rank[rows], label[rows]
        hit = (rank < 1).double()
        count = label.bincount()
        per_class = hit.new_zeros(len(count)).index_add(0, label, hit)[count > 0] / count[count > 0]
        found = {"top1": hit.mean(), "top5": (rank < 5).double().mean(), "mean_class": per_class.mean()}
        return {name: 100 * value for name, value in found.items()}


class BothWays:
    """Recall of pictures by text and of texts by picture; their `identity` says which belong together.

    Args:
        device: of the features.
        lenient: drop queries whose counterpart was not read, as in a shortened evaluation.
    """

    def __init__(self, device: torch.device, lenient: bool = False) -> None:
        self.metrics = {way: RetrievalMetrics(TOP, ignore_unmatched=lenient) for way in ("t2i", "i2t")}
        for metric in self.metrics.values():
            metric.to(device)

    def update(self, side: Literal["gallery", "queries"], features: Tensor, batch: Mapping[str, Any]) -> None:
        """Collect features (batch, width) of unit length of the pictures (gallery) or texts (queries)."""
        other: Literal["gallery", "queries"] = "queries" if side == "gallery" else "gallery"
        self.metrics["t2i"].update(side, features, batch["identity"], batch["index"])
        self.metrics["i2t"].update(other, features, batch["identity"], batch["index"])

    def compute(self) -> dict[str, Tensor]:
        """`i2t_R@k`, `t2i_R@k`, percent, and `mean_recall`; empty where a side was not read."""
        values = {way: self.metrics[way].compute() for way in ("i2t", "t2i")}  # gathers, on every rank
        if not all(values.values()):
            return {}
        found: dict[str, Tensor] = {f"{way}_R@{k}": values[way][f"R{k}"] for way in values for k in TOP}
        return {**found, "mean_recall": torch.stack(list(found.values())).mean()}


class ImageTextMethod(Method):
    """A method with an encoder for pictures and one for texts, evaluated by what its data offer.

    Pictures with `label` are classified by the names in the data's `prompts`; those with `identity` and the
    texts with `identity` are to be found by each other. Metrics are called `<split>/<set>/<metric>`.
    """

    @abstractmethod
    def encode_image(self, image: Tensor) -> Tensor:
        """Pictures (batch, 3, height, width) in [0, 1] to unit vectors (batch, width)."""

    @abstractmethod
    def encode_text(self, input_ids: Tensor) -> Tensor:
        """Token ids (batch, length) to unit vectors (batch, width)."""

    @property
    @abstractmethod
    def temperature(self) -> Tensor:
        """What cosines are multiplied with before a softmax."""

    # classes by name

    def class_vectors(self, input_ids: Tensor) -> Tensor:
        """Unit vectors (classes, width) of sentences (classes, templates, length); ranks share the work."""
        classes, templates, _ = input_ids.shape
        rank, world = (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)
        bounds = [classes * part // world for part in range(world + 1)]
        own = input_ids[bounds[rank] : bounds[rank + 1]].flatten(0, 1).to(self.device)
        parts = [self.encode_text(own[at : at + CHUNK]).float() for at in range(0, len(own), CHUNK)]
        if not parts:  # fewer classes than ranks
            parts = [self.encode_text(input_ids[0, :1].to(self.device)).float()[:0]]
        vectors = torch.cat(parts)
        return gather_uneven(class_weights(vectors.view(-1, templates, vectors.shape[1])))

    def _begin(self, split: str) -> None:
        data = datamodule_of(self.trainer)
        parts, prompts = optional(data, HasParts), optional(data, HasPrompts)
        self._parts = list(parts.parts(split)) if parts is not None else []
        known = {} if prompts is None else prompts.prompts
        self._classes = {
            part: self.class_vectors(known[part].input_ids) for part in self._parts if part in known
        }
        self._accuracy: dict[str, ZeroShotAccuracy] = {}
        self._recall: dict[str, BothWays] = {}

    def _part(self, dataloader_idx: int) -> str:
        return self._parts[dataloader_idx] if dataloader_idx < len(self._parts) else f"set_{dataloader_idx}"

    def _encoded(self, batch: Mapping[str, Any]) -> Tensor:
        if "image" in batch:
            return self.encode_image(batch["image"]).float()
        return self.encode_text(batch["input_ids"]).float()

    def _collect(self, split: str, batch: Mapping[str, Any], dataloader_idx: int) -> dict[str, Tensor]:
        part, features = self._part(dataloader_idx), self._encoded(batch)
        if part in self._classes:
            scores = features @ self._classes[part].T
            metric = self._accuracy.setdefault(part, ZeroShotAccuracy().to(self.device))
            metric.update(scores, batch["label"], batch["index"])
            return {"scores": scores}
        if "identity" not in batch:
            raise MisconfigurationException(
                f"{type(self).__name__}: {split} batches of '{part}' have neither names of classes nor "
                "`identity`: nothing can be measured on them."
            )
        side: Literal["gallery", "queries"] = "gallery" if "image" in batch else "queries"
        name = part.removesuffix(f"_{side}")
        if name not in self._recall:
            lenient = self.trainer.sanity_checking or self._shortened(split)
            self._recall[name] = BothWays(self.device, lenient)
        self._recall[name].update(side, features, batch)
        return {"features": features}

    def _shortened(self, split: str) -> bool:
        limit = {"val": self.trainer.limit_val_batches, "test": self.trainer.limit_test_batches}[split]
        return limit not in (None, 1.0) or bool(getattr(self.trainer, "fast_dev_run", False))

    def _measured(self, split: str) -> Iterator[tuple[str, Tensor]]:
        measured: dict[str, ZeroShotAccuracy | BothWays] = {**self._accuracy, **self._recall}
        for part, metric in measured.items():
            for name, value in metric.compute().items():
                yield f"{split}/{part.removeprefix(split + '_')}/{name}", value.float()

    def _log(self, split: str) -> None:
        self.log_dict(dict(self._measured(split)), sync_dist=False)
        self._classes, self._accuracy, self._recall = {}, {}, {}

    # what Lightning calls

    def on_validation_epoch_start(self) -> None:
        """Encode the classes' sentences with the weights of now."""
        self._begin("val")

    def on_test_epoch_start(self) -> None:
        """The same for the test sets."""
        self._begin("test")

    def on_predict_epoch_start(self) -> None:
        """The same for the names that a user gave."""
        self._begin("predict")

    def validation_step(
        self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Collect scores of classes, or features of a side."""
        return self._collect("val", batch, dataloader_idx)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Collect scores of classes, or features of a side."""
        return self._collect("test", batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of all ranks, equal on each."""
        self._log("val")

    def on_test_epoch_end(self) -> None:
        """The same for the test sets."""
        self._log("test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """`index` with `probabilities` (batch, classes) of the names given, or with `features` of a side."""
        part, features = self._part(dataloader_idx), self._encoded(batch)
        names = ("index", "path", "caption", "identity")
        extra: dict[str, Any] = {key: batch[key] for key in names if key in batch}
        if part in self._classes:
            probabilities = (self.temperature * (features @ self._classes[part].T)).softmax(1)
            return {**extra, "probabilities": probabilities}
        return {**extra, "features": features}
