"""Assignment and losses of DECO and DECO+, for all layers and images at once.

Outputs of L layers are stacked: logits (L, B, Q, C) and boxes (L, B, Q, 4) as normalised (cx, cy, w, h).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import sigmoid_focal_loss

from lightning_modules.deco.boxes import iou_and_giou, to_corners
from lightning_modules.parts.distributed import mean_over_ranks


class Targets(NamedTuple):
    """The objects of a batch, padded to the fullest image."""

    labels: Tensor
    """(B, N) int64, 0 where padded."""
    boxes: Tensor
    """(B, N, 4), normalised (cx, cy, w, h)."""
    counts: list[int]
    """Objects of each image."""


class Assignment(NamedTuple):
    """Matched pairs of queries and objects, four index vectors of one length, sorted by layer and image."""

    layer: Tensor
    image: Tensor
    query: Tensor
    object: Tensor


def pad_targets(labels: Sequence[Tensor], boxes: Sequence[Tensor], num_classes: int) -> Targets:
    """One batch of targets out of one tensor an image.

    Args:
        labels: (n,) each, int64.
        boxes: (n, 4) each, normalised (cx, cy, w, h).
        num_classes: labels must be below it.

    Raises:
        ValueError: a label is outside [0, num_classes).
    """
    padded = pad_sequence(list(labels), batch_first=True)
    if padded.numel() and not bool(((padded >= 0) & (padded < num_classes)).all()):
        found = sorted({label for image in labels for label in image.tolist()})
        raise ValueError(
            f"Labels must be in [0, {num_classes}) = [0, num_classes): this batch has "
            f"{', '.join(str(label) for label in found if not 0 <= label < num_classes)}."
        )
    return Targets(padded, pad_sequence(list(boxes), batch_first=True), [len(image) for image in labels])


# Assignment


@torch.no_grad()
def assignment_costs(
    logits: Tensor,
    boxes: Tensor,
    targets: Targets,
    weights: tuple[float, float, float],
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Tensor:
    """Cost of every query for every object, (L, B, Q, N): focal class cost, L1 and negative GIoU.

    Args:
        logits: (L, B, Q, C).
        boxes: (L, B, Q, 4).
        targets: of the batch.
        weights: of class cost, L1 and GIoU.
        alpha: of the focal cost.
        gamma: of the focal cost.
    """
    labels = targets.labels[None, :, None].expand(*logits.shape[:-1], -1)  # (L, B, Q, N)
    p = logits.gather(-1, labels).sigmoid()
    negative = (1 - alpha) * p**gamma * -(1 - p + 1e-8).log()
    positive = alpha * (1 - p) ** gamma * -(p + 1e-8).log()
    queries, objects = boxes[..., None, :], targets.boxes[:, None]
    distance = (queries - objects).abs().sum(dim=-1)
    _, giou = iou_and_giou(to_corners(queries), to_corners(objects))
    return weights[0] * (positive - negative) + weights[1] * distance - weights[2] * giou


def assign(costs: Tensor, counts: Sequence[int]) -> Assignment:
    """The cheapest assignment in each layer and image; min(Q, n) pairs where there are n objects.

    Args:
        costs: (L, B, Q, N).
        counts: the n of each image.

    Returns:
        Indices on the device of `costs`. Costs that are not finite count as very large: the losses, not the
        matching, are where a diverged run is reported.
    """
    device = costs.device
    table = costs.nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6).cpu().numpy()
    rows: list[Tensor] = []
    for layer, images in enumerate(table):
        for image, count in enumerate(counts):
            queries, objects = linear_sum_assignment(images[image, :, :count])
            pairs = torch.empty(4, len(queries), dtype=torch.int64)
            pairs[0], pairs[1] = layer, image
            pairs[2], pairs[3] = torch.from_numpy(queries), torch.from_numpy(objects)
            rows.append(pairs)
    return Assignment(*torch.cat(rows, dim=1).to(device, non_blocking=True))


def mean_object_count(count: int, device: torch.device) -> Tensor:
    """Objects a rank, averaged over all ranks and at least one: what every loss is divided by."""
    return mean_over_ranks(torch.tensor(float(count), device=device)).clamp(min=1)


# Losses


def focal_loss(
    logits: Tensor, targets: Targets, assignment: Assignment, alpha: float, gamma: float
) -> Tensor:
    """Sigmoid focal loss over all queries and classes, summed for each layer: (L,)."""
    wanted = torch.zeros_like(logits)
    labels = targets.labels[assignment.image, assignment.object]
    wanted[assignment.layer, assignment.image, assignment.query, labels] = 1
    return sigmoid_focal_loss(logits, wanted, alpha, gamma).sum(dim=(1, 2, 3))


def varifocal_loss(
    logits: Tensor, boxes: Tensor, targets: Targets, assignment: Assignment, alpha: float, gamma: float
) -> Tensor:
    """Varifocal loss (Zhang et al. 2021), summed for each layer: (L,).

    The target of a matched query at its object's class is the IoU q of its box; everything else has target 0
    and weight alpha * p^gamma.
    """
    labels = targets.labels[assignment.image, assignment.object]
    place = (assignment.layer, assignment.image, assignment.query, labels)
    predicted = boxes.detach()[assignment.layer, assignment.image, assignment.query]
    iou, _ = iou_and_giou(
        to_corners(predicted), to_corners(targets.boxes[assignment.image, assignment.object])
    )
    wanted = torch.zeros_like(logits)
    wanted[place] = iou
    weight = alpha * logits.detach().sigmoid() ** gamma
    weight[place] = iou
    return F.binary_cross_entropy_with_logits(logits, wanted, weight, reduction="none").sum(dim=(1, 2, 3))


def box_losses(boxes: Tensor, targets: Targets, assignment: Assignment) -> tuple[Tensor, Tensor]:
    """L1 distance and 1 - GIoU of the matched pairs, summed for each layer: two of (L,)."""
    predicted = boxes[assignment.layer, assignment.image, assignment.query]
    wanted = targets.boxes[assignment.image, assignment.object]
    distance = (predicted - wanted).abs().sum(dim=-1)
    _, giou = iou_and_giou(to_corners(predicted), to_corners(wanted))
    zeros = boxes.new_zeros(len(boxes))
    return zeros.index_add(0, assignment.layer, distance), zeros.index_add(0, assignment.layer, 1 - giou)


class SetCriterion(nn.Module):
    """Assigns objects to queries and gives the weighted losses of every layer.

    Args:
        cost_class: weight of the class cost in the matching.
        cost_bbox: of the L1 cost.
        cost_giou: of the GIoU cost.
        class_weight: weight of the classification loss.
        bbox_weight: of the L1 loss.
        giou_weight: of the GIoU loss.
        alpha: of the focal cost and of the classification loss.
        gamma: likewise.
        auxiliary: also supervise the outputs before the last one.
    """

    class_term: str
    aux_suffix: str

    def __init__(
        self,
        cost_class: float,
        cost_bbox: float,
        cost_giou: float,
        class_weight: float,
        bbox_weight: float,
        giou_weight: float,
        alpha: float,
        gamma: float,
        auxiliary: bool,
    ) -> None:
        super().__init__()
        self.costs = (cost_class, cost_bbox, cost_giou)
        self.weights = {self.class_term: class_weight, "loss_bbox": bbox_weight, "loss_giou": giou_weight}
        self.alpha = alpha
        self.gamma = gamma
        self.auxiliary = auxiliary

    def classification(
        self, logits: Tensor, boxes: Tensor, targets: Targets, assignment: Assignment
    ) -> Tensor:
        """The classification loss of each layer, summed over images: (L,)."""
        raise TypeError(f"{type(self).__name__} is abstract: use FocalCriterion or VarifocalCriterion.")

    def assign(self, outputs: Mapping[str, Tensor], targets: Targets) -> Assignment:
        """The cheapest assignment of every supervised layer, the last layer last."""
        logits, boxes = self.stacked(outputs)
        costs = assignment_costs(logits, boxes, targets, self.costs, self.alpha, self.gamma)
        return assign(costs, targets.counts)

    def forward(
        self, outputs: Mapping[str, Tensor], targets: Targets, assignment: Assignment | None = None
    ) -> dict[str, Tensor]:
        """Weighted terms: `loss_bbox` and so on for the last layer, with a suffix for each one before it.

        Args:
            outputs: of a `DetectionNetwork`.
            targets: of the batch.
            assignment: what `assign` gave for them; None makes them here.
        """
        assignment = self.assign(outputs, targets) if assignment is None else assignment
        logits, boxes = self.stacked(outputs)
        count = mean_object_count(sum(targets.counts), logits.device)
        classes = self.classification(logits, boxes, targets, assignment)
        distance, giou = box_losses(boxes, targets, assignment)
        sums = dict(zip(self.weights, (classes, distance, giou), strict=True))
        terms: dict[str, Tensor] = {}
        for layer in range(len(logits)):
            suffix = "" if layer == len(logits) - 1 else f"{self.aux_suffix}{layer}"
            for name, values in sums.items():
                terms[name + suffix] = self.weights[name] * values[layer] / count
        return terms

    def stacked(self, outputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (L, B, Q, C) and boxes (L, B, Q, 4) in float32, the last layer last."""
        logits, boxes = outputs["logits"].float()[None], outputs["boxes"].float()[None]
        if self.auxiliary and "aux_logits" in outputs:
            logits = torch.cat([outputs["aux_logits"].float(), logits])
            boxes = torch.cat([outputs["aux_boxes"].float(), boxes])
        return logits, boxes


class FocalCriterion(SetCriterion):
    """DECO's: `loss_ce` is a focal loss; defaults as published."""

    class_term = "loss_ce"
    aux_suffix = "_"

    def __init__(
        self,
        cost_class: float = 1.0,
        cost_bbox: float = 5.0,
        cost_giou: float = 2.0,
        class_weight: float = 2.0,
        bbox_weight: float = 5.0,
        giou_weight: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        auxiliary: bool = True,
    ) -> None:
        super().__init__(
            cost_class, cost_bbox, cost_giou, class_weight, bbox_weight, giou_weight, alpha, gamma, auxiliary
        )

    def classification(
        self, logits: Tensor, boxes: Tensor, targets: Targets, assignment: Assignment
    ) -> Tensor:
        """See `focal_loss`."""
        return focal_loss(logits, targets, assignment, self.alpha, self.gamma)


class VarifocalCriterion(SetCriterion):
    """DECO+'s: `loss_vfl` is a varifocal loss; defaults as published.

    `alpha` is that of the matching's focal cost, `vfl_alpha` that of the loss.
    """

    class_term = "loss_vfl"
    aux_suffix = "_aux_"

    def __init__(
        self,
        cost_class: float = 2.0,
        cost_bbox: float = 5.0,
        cost_giou: float = 2.0,
        class_weight: float = 1.0,
        bbox_weight: float = 5.0,
        giou_weight: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        vfl_alpha: float = 0.75,
        auxiliary: bool = True,
    ) -> None:
        super().__init__(
            cost_class, cost_bbox, cost_giou, class_weight, bbox_weight, giou_weight, alpha, gamma, auxiliary
        )
        self.vfl_alpha = vfl_alpha

    def classification(
        self, logits: Tensor, boxes: Tensor, targets: Targets, assignment: Assignment
    ) -> Tensor:
        """See `varifocal_loss`."""
        return varifocal_loss(logits, boxes, targets, assignment, self.vfl_alpha, self.gamma)


@torch.no_grad()
def assignment_errors(logits: Tensor, targets: Targets, assignment: Assignment) -> dict[str, Tensor]:
    """What the authors log beside the losses, for the last layer.

    Args:
        logits: of the last layer, (B, Q, C).
        targets: of the batch.
        assignment: of all layers; those of the last one are read.

    Returns:
        `class_error`: per cent of the matched queries whose most probable class is wrong (100 where
        nothing is matched). `cardinality_error`: DETR's count of queries whose best class is not the last
        one, against the number of objects; it means nothing with sigmoid heads.
    """
    best = logits.argmax(dim=-1)  # (B, Q)
    pairs = sum(min(best.shape[1], count) for count in targets.counts)
    image, query, place = (assignment[axis][len(assignment.image) - pairs :] for axis in (1, 2, 3))
    right = (best[image, query] == targets.labels[image, place]).float()
    counts = torch.tensor(targets.counts, device=best.device)
    objects = (best != logits.shape[-1] - 1).sum(dim=1)
    return {
        "class_error": 100 - 100 * right.sum() / max(pairs, 1),
        "cardinality_error": (objects - counts).abs().float().mean(),
    }
