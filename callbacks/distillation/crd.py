"""CRD: contrastive representation distillation (Tian et al., ICLR 2020, arXiv 1910.10699)."""

from math import sqrt
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from callbacks.distillation.criterion import Criterion, TrainingSet
from callbacks.distillation.functional import full_precision, hard_labels
from callbacks.distillation.relations import Embedding
from callbacks.distillation.taps import Features, FeatureShapes
from lightning_modules.parts.distributed import gather, is_distributed, mean_over_ranks

_EPS = 1e-7
_MAX_ROUNDS = 1000  # of redrawing negatives: enough for 99 % of one class


class CRD(Criterion):
    """Tells a sample's own embedding from those of other classes, across student and teacher.

    Both penultimate features are embedded in `dimension` numbers and normalised. Two memory banks hold an
    embedding of every training sample (of 1.28 M ImageNet images: 0.66 GB each, on the device and in
    checkpoints). A sample is scored against `negatives` entries of other classes, drawn anew each step from
    the step's seeded random state, see `ContrastMemory`. Needs `batch["index"]`, the position in the training
    set.

    Args:
        weight: of the term.
        dimension: of the embeddings.
        negatives: K, drawn with replacement for each sample.
        temperature: T of the scores.
        momentum: of the banks.
        num_samples: N, size of the training set; None asks the data module.
    """

    penultimate = True
    sample_index = True

    def __init__(
        self,
        weight: float = 1.0,
        dimension: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        num_samples: int | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.dimension = dimension
        self.negatives = negatives
        self.temperature = temperature
        self.momentum = momentum
        self.num_samples = num_samples

    def build(self, student: FeatureShapes, teacher: FeatureShapes, data: TrainingSet) -> None:
        """Embeddings and banks.

        Raises:
            ValueError: the size of the training set is unknown.
        """
        size = self.num_samples or data.size
        if size is None:
            raise ValueError("CRD needs the size of the training set: set criterion.init_args.num_samples.")
        self.embed_s = Embedding(student.penultimate, self.dimension)
        self.embed_t = Embedding(teacher.penultimate, self.dimension)
        self.contrast = ContrastMemory(
            size, self.dimension, self.negatives, self.temperature, self.momentum, data.labels
        )

    def synchronise(self) -> None:
        """Start every rank from rank 0's banks."""
        if is_distributed():
            for buffer in self.contrast.buffers():
                dist.broadcast(buffer, 0)

    def unsynchronised_buffers(self) -> list[str]:
        """The banks: every rank applies every rank's updates."""
        return [f"contrast.{name}" for name, _ in self.contrast.named_buffers()]

    def settings(self) -> dict[str, Any]:
        """Sizes and momentum."""
        return {"dimension": self.dimension, "negatives": self.negatives, "momentum": self.momentum}

    def forward(self, student: Features, teacher: Features, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`crd`.

        Raises:
            ValueError: the batch has no index, or one beyond the banks.
        """
        if "index" not in batch:
            raise ValueError("CRD needs batch['index'], the position of every sample in the training set.")
        index, labels = batch["index"], hard_labels(batch["label"])
        self.contrast.check(index)
        self.contrast.note_labels(index, labels)
        negatives = self.contrast.draw_negatives(labels)
        e_s = F.normalize(full_precision(self.embed_s(student.penultimate)), dim=1)
        e_t = F.normalize(full_precision(self.embed_t(teacher.penultimate)), dim=1)
        return {"crd": self.weight * self.contrast(e_s, e_t, index, negatives)}


class ContrastMemory(nn.Module):
    """Two memory banks, and the contrastive loss of new embeddings against them.

    Buffers: `memory_v1` (N, D) of the student, `memory_v2` (N, D) of the teacher, `params` = [K, T, Z_v1,
    Z_v2, momentum] as the authors store them, `labels` (N,), -1 where a sample's class is not yet known.

    Args:
        size: N, samples of the training set.
        dimension: D.
        negatives: K.
        temperature: T.
        momentum: share of the old entry in an update.
        labels: class of every sample (N,); None learns them from the batches, and until then an unseen sample
            counts as one of another class.
    """

    memory_v1: Tensor
    memory_v2: Tensor
    params: Tensor
    labels: Tensor

    def __init__(
        self,
        size: int,
        dimension: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        labels: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.negatives = negatives
        self.temperature = temperature
        self.momentum = momentum
        bound = 1 / sqrt(dimension / 3)
        for name in ("memory_v1", "memory_v2"):
            self.register_buffer(name, torch.empty(size, dimension).uniform_(-bound, bound))
        self.register_buffer("params", torch.tensor([negatives, temperature, -1.0, -1.0, momentum]))
        self.register_buffer("labels", torch.full((size,), -1) if labels is None else labels.clone())

    def check(self, index: Tensor) -> None:
        """Refuse positions beyond the banks.

        Raises:
            ValueError: names the position and the size.
        """
        # one small read-back a step, which the scoring of K negatives dwarfs
        largest = int(index.max())
        if largest >= len(self.memory_v1):
            raise ValueError(
                f"CRD: sample index {largest}, but the banks hold {len(self.memory_v1)} samples."
            )

    @torch.no_grad()
    def note_labels(self, index: Tensor, labels: Tensor) -> None:
        """Remember the classes (B,) of samples (B,) that are not known yet, those of all ranks."""
        index, labels = gather(index), gather(labels)
        known = self.labels[index]
        self.labels[index] = torch.where(known < 0, labels, known)

    @torch.no_grad()
    def draw_negatives(self, labels: Tensor) -> Tensor:
        """Positions (B, K) of samples of other classes, drawn with replacement, by rejection.

        Raises:
            ValueError: next to no sample is of another class.
        """
        count, size = len(labels), len(self.labels)
        drawn = torch.randint(size, (count, self.negatives), device=labels.device)
        for _ in range(_MAX_ROUNDS):
            rejected = self.labels[drawn] == labels[:, None]
            if not rejected.any():
                return drawn
            fresh = torch.randint(size, (count, self.negatives), device=labels.device)
            drawn = torch.where(rejected, fresh, drawn)
        raise ValueError("CRD found no negatives: (nearly) all samples of the training set are of one class.")

    def forward(self, e_s: Tensor, e_t: Tensor, index: Tensor, negatives: Tensor) -> Tensor:
        """The loss of both sides; afterwards the banks have moved towards the embeddings of all ranks.

        out_v1 = exp(memory_v2 e_s / T), out_v2 = exp(memory_v1 e_t / T); the first call fixes Z_v = N
        mean(out_v).

        Args:
            e_s: normalised student embeddings (B, D).
            e_t: normalised teacher embeddings (B, D).
            index: positions of the samples (B,).
            negatives: positions (B, K).
        """
        positions = torch.cat([index[:, None], negatives], dim=1)  # (B, 1 + K)
        out_v1 = self._scores(self.memory_v2, positions, e_s)
        out_v2 = self._scores(self.memory_v1, positions, e_t)
        size = len(self.memory_v1)
        with torch.no_grad():
            first = size * mean_over_ranks(torch.stack([out_v1.mean(), out_v2.mean()]))
            self.params[2:4] = torch.where(
                self.params[2:4] < 0, first.to(self.params.dtype), self.params[2:4]
            )
        z_v1, z_v2 = self.params[2].clone(), self.params[3].clone()
        loss = contrastive_loss(out_v1 / z_v1, size) + contrastive_loss(out_v2 / z_v2, size)
        self._update(gather(index), gather(e_s), gather(e_t))
        return loss

    def _scores(self, memory: Tensor, positions: Tensor, embeddings: Tensor) -> Tensor:
        with torch.autocast(embeddings.device.type, enabled=False):
            scores = torch.einsum("bkd,bd->bk", memory[positions].to(embeddings.dtype), embeddings)
        return (scores / self.temperature).exp()

    @torch.no_grad()
    def _update(self, index: Tensor, e_s: Tensor, e_t: Tensor) -> None:
        rows = _last_occurrences(index)
        index = index[rows]
        for memory, embeddings in ((self.memory_v1, e_s[rows]), (self.memory_v2, e_t[rows])):
            moved = self.momentum * memory[index].to(embeddings.dtype) + (1 - self.momentum) * embeddings
            memory[index] = F.normalize(moved, dim=1).to(memory.dtype)


def contrastive_loss(scores: Tensor, size: int) -> Tensor:
    """-(1/B) [sum log(P_0 / (P_0 + m Pn)) + sum_{b,k} log(m Pn / (P_k + m Pn))], Pn = 1/N, m = K (eq. 18 of
    CRD).

    Args:
        scores: (B, 1 + K), the positive first.
        size: N.
    """
    count = scores.shape[1] - 1
    noise = count / size
    positive, negative = scores[:, 0], scores[:, 1:]
    own = (positive / (positive + noise + _EPS)).log().sum()
    others = (noise / (negative + noise + _EPS)).log().sum()
    return -(own + others) / len(scores)


def _last_occurrences(index: Tensor) -> Tensor:
    """Rows of the last occurrence of every distinct position: duplicates write once, the same everywhere."""
    _, group = index.unique(return_inverse=True)
    rows = torch.arange(len(index), device=index.device)
    last = torch.zeros(int(group.max()) + 1, dtype=rows.dtype, device=index.device)
    return last.scatter_reduce(0, group, rows, reduce="amax", include_self=False)
