"""All masks of a picture, without prompts: SAM's full grid and TinySAM's two rounds (section 2.6)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import nms

from lightning_modules.parts.options import OptionError, check, check_choice, check_range
from lightning_modules.tinysam.amg import (
    box_xywh,
    crop_boxes,
    mask_boxes,
    near_edge,
    point_grid,
    remove_small_regions,
    rle_counts,
    stability_scores,
)
from lightning_modules.tinysam.network import SAM
from lightning_modules.tinysam.predictor import Predictor, full_size

DECODED = 8
"""Prompts that are decoded together: their maps of 4,096 places fit into a processor's cache."""
ENLARGED = 4
"""Masks that exist as full-resolution floats at a time."""

Output = Literal["binary_mask", "uncompressed_rle", "coco_rle"]
FineGrid = Literal["offset", "regular"]
Prune = Literal["first", "running"]


@dataclass(frozen=True)
class Everything:
    """How a picture is covered with prompts, and which masks are kept; SAM's names and defaults.

    Attributes:
        points_per_side: of the grid.
        points_per_batch: prompts between two calls of `progress`.
        pred_iou_thresh: masks whose predicted IoU is not above it are dropped before they are made.
        stability_score_thresh: least IoU of the mask at logit +offset with that at -offset.
        stability_score_offset: see there.
        box_nms_thresh: IoU of boxes above which the mask of the lower predicted IoU goes.
        crop_n_layers: further rounds on 4, 16, ... overlapping crops.
        crop_nms_thresh: likewise between crops, where those of smaller crops stay.
        crop_overlap_ratio: share of the short side that crops overlap by.
        crop_n_points_downscale_factor: the grid of layer l has this to the power of l fewer points per side.
        min_mask_region_area: holes and islands below it are filled and removed, pixels; 0 leaves them.
        output: form of `segmentation`: a bool array, or run lengths.
        rounds: 2 is TinySAM's hierarchy (no crops), 1 is SAM's full grid.
        coarse_points_per_side: of the first of two rounds; None is a quarter of `points_per_side`.
        high_score_thresh: logit above which a pixel needs no further prompt (the paper's tau).
        fine_grid: points of the second round: `offset` (released) or `regular` (the paper's wording).
        prune: whose confident area leaves out points of the second round: that of the `first` round (the
            paper's), or the `running` one, which grows with the second round; its points then come in turns
            from all over the picture.
    """

    points_per_side: int = 32
    points_per_batch: int = 64
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    crop_n_layers: int = 0
    crop_nms_thresh: float = 0.7
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    min_mask_region_area: int = 0
    output: Output = "binary_mask"
    rounds: Literal[1, 2] = 2
    coarse_points_per_side: int | None = None
    high_score_thresh: float = 8.5
    fine_grid: FineGrid = "offset"
    prune: Prune = "first"

    def __post_init__(self) -> None:
        for name in ("points_per_side", "points_per_batch", "crop_n_points_downscale_factor"):
            check_range(f"everything.{name}", getattr(self, name), "[1, inf)")
        for name in ("crop_n_layers", "min_mask_region_area", "stability_score_offset"):
            check_range(f"everything.{name}", getattr(self, name), "[0, inf)")
        for name in ("stability_score_thresh", "box_nms_thresh", "crop_nms_thresh"):
            check_range(f"everything.{name}", getattr(self, name), "[0, 1]")
        check_range("everything.crop_overlap_ratio", self.crop_overlap_ratio, "[0, 1)")
        check_choice("everything.output", self.output, Output)
        check_choice("everything.fine_grid", self.fine_grid, FineGrid)
        check_choice("everything.prune", self.prune, Prune)
        check(self.rounds in (1, 2), "everything.rounds", self.rounds, "1 or 2")
        if self.rounds == 2:
            check_range("everything.coarse_points_per_side", self.coarse, f"[1, {self.points_per_side}]")
            if self.crop_n_layers:
                raise OptionError(
                    f"everything.crop_n_layers={self.crop_n_layers}: crops go with the full grid; set "
                    "rounds: 1, or crop_n_layers: 0."
                )

    @property
    def coarse(self) -> int:
        """Points per side of the first of two rounds."""
        if self.coarse_points_per_side is None:
            return max(self.points_per_side // 4, 1)
        return self.coarse_points_per_side


@dataclass
class Candidates:
    """Masks that passed the filters, each with its bits packed.

    Attributes:
        bits: eight pixels a byte, of the crop.
        boxes: (n, 4) as x0, y0, x1, y1, inclusive, in the picture's pixels.
        iou: predicted (n,).
        stability: (n,).
        points: prompts (n, 2) in the picture's pixels.
        crops: (n, 4).
    """

    bits: list[NDArray[np.uint8]] = field(default_factory=list)
    boxes: list[list[int]] = field(default_factory=list)
    iou: list[float] = field(default_factory=list)
    stability: list[float] = field(default_factory=list)
    points: list[list[float]] = field(default_factory=list)
    crops: list[list[int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.bits)

    def taken(self, rows: list[int]) -> "Candidates":
        """Those of some rows, in their order."""
        columns = (self.bits, self.boxes, self.iou, self.stability, self.points, self.crops)
        return Candidates(*([column[row] for row in rows] for column in columns))  # type: ignore[arg-type]

    def joined(self, other: "Candidates") -> "Candidates":
        """These, then the others."""
        pairs = (
            (self.bits, other.bits),
            (self.boxes, other.boxes),
            (self.iou, other.iou),
            (self.stability, other.stability),
            (self.points, other.points),
            (self.crops, other.crops),
        )
        return Candidates(*(first + second for first, second in pairs))  # type: ignore[arg-type]

    def suppressed(self, scores: list[float], threshold: float) -> "Candidates":
        """Without those whose box overlaps one of a higher score, best first."""
        if not len(self):
            return self
        kept = nms(torch.tensor(self.boxes, dtype=torch.float32), torch.tensor(scores), threshold)
        return self.taken(kept.tolist())

    def mask(self, row: int, original: tuple[int, int]) -> NDArray[np.bool_]:
        """Bool (height, width) of the whole picture."""
        x0, y0, x1, y1 = self.crops[row]
        flat = np.unpackbits(self.bits[row], count=(y1 - y0) * (x1 - x0))
        mask = np.zeros(original, np.bool_)
        mask[y0:y1, x0:x1] = flat.reshape(y1 - y0, x1 - x0)
        return mask


class MaskGenerator:
    """Everything in a picture as records, see `generate`.

    Args:
        network: of the segmenter.
        options: how.
    """

    def __init__(self, network: SAM, options: Everything | None = None) -> None:
        self.options = options or Everything()
        self.predictor = Predictor(network)
        self.prompts = 0

    @torch.no_grad()
    def generate(
        self, image: NDArray[np.uint8], progress: Callable[[int, int], None] | None = None
    ) -> list[dict[str, Any]]:
        """Records of all masks, best predicted IoU first.

        Each has `segmentation`, `area` in pixels, `bbox` as x, y, width, height, `predicted_iou`,
        `stability_score`, `point_coords` of its prompt and `crop_box`.

        Args:
            image: uint8 RGB (height, width, 3).
            progress: is told how many prompts are done, and of how many that are planned by now.

        Raises:
            ValueError: no such picture, or one with fewer pixels than points in a row.
        """
        original = image.shape[:2]
        self.prompts = 0
        self._progress = progress or (lambda done, planned: None)
        found = self._two_rounds(image) if self.options.rounds == 2 else self._full_grid(image)
        return self._records(found, original)

    # One round over all crops

    def _full_grid(self, image: NDArray[np.uint8]) -> Candidates:
        options = self.options
        crops, layers = crop_boxes(
            image.shape[0], image.shape[1], options.crop_n_layers, options.crop_overlap_ratio
        )
        sides = [options.points_per_side // options.crop_n_points_downscale_factor**layer for layer in layers]
        planned = sum(max(side, 1) ** 2 for side in sides)
        found = Candidates()
        for crop, side in zip(crops, sides, strict=True):
            self._embed(image, crop)
            width, height = crop[2] - crop[0], crop[3] - crop[1]
            points = point_grid(max(side, 1)) * [width, height]
            crop_found = self._round(points, crop, image.shape[:2], planned)
            found = found.joined(crop_found.suppressed(crop_found.iou, options.box_nms_thresh))
        if len(crops) > 1:
            areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in found.crops]
            found = found.suppressed([1 / area for area in areas], options.crop_nms_thresh)
        return found

    # Two rounds

    def _two_rounds(self, image: NDArray[np.uint8]) -> Candidates:
        options = self.options
        height, width = image.shape[:2]
        crop = [0, 0, width, height]
        self._embed(image, crop)
        coarse = point_grid(options.coarse) * [width, height]
        covered = np.zeros((height, width), np.bool_)
        first = self._round(coarse, crop, (height, width), len(coarse), covered)
        fine = fine_points(coarse, covered, options.points_per_side, options.fine_grid)
        planned, running = len(coarse) + len(fine), options.prune == "running"
        if running:  # neighbours far apart in time
            fine = np.concatenate([fine[start :: len(coarse)] for start in range(len(coarse))])
        second = self._round(fine, crop, (height, width), planned, covered if running else None, running)
        found = second.joined(first)
        return found.suppressed(found.iou, options.box_nms_thresh)

    # Prompts to candidates

    def _embed(self, image: NDArray[np.uint8], crop: list[int]) -> None:
        x0, y0, x1, y1 = crop
        self.predictor.set_image(np.ascontiguousarray(image[y0:y1, x0:x1]))

    def _round(
        self,
        points: NDArray[np.float64],
        crop: list[int],
        original: tuple[int, ...],
        planned: int,
        covered: NDArray[np.bool_] | None = None,
        prune: bool = False,
    ) -> Candidates:
        """Candidates of prompts (n, 2) in a crop's pixels.

        Args:
            points: the prompts.
            crop: see there.
            original: height and width of the picture.
            planned: prompts, for `progress`.
            covered: bool (height, width) of the crop; where a mask is confident becomes true.
            prune: leave out what is covered when its turn comes.
        """
        x0, y0 = crop[:2]
        found = Candidates()
        for start in range(0, len(points), self.options.points_per_batch):
            batch = points[start : start + self.options.points_per_batch]
            if prune and covered is not None:
                planned -= len(batch)
                batch = uncovered(batch, covered)
                planned += len(batch)
            for row, iou, logits in self._decoded(batch):
                stability = stability_scores(logits, 0.0, self.options.stability_score_offset)
                stable = stability >= self.options.stability_score_thresh
                masks = (logits > 0)[stable].cpu().numpy()
                boxes = mask_boxes(masks) + np.array([x0, y0, x0, y0])
                inside = ~near_edge(boxes, crop, [0, 0, original[1], original[0]])
                if covered is not None:
                    sure = (logits > self.options.high_score_thresh)[stable].cpu().numpy()
                    covered |= sure[inside].any(axis=0)
                prompts = batch[row.numpy()][stable.cpu().numpy()] + [x0, y0]
                values = iou[stable].tolist(), stability[stable].tolist()
                for place in np.flatnonzero(inside):
                    found.bits.append(np.packbits(masks[place]))
                    found.boxes.append(boxes[place].tolist())
                    found.iou.append(values[0][place])
                    found.stability.append(values[1][place])
                    found.points.append(prompts[place].tolist())
                    found.crops.append(crop)
            self.prompts += len(batch)
            self._progress(self.prompts, planned)
        return found

    def _decoded(self, points: NDArray[np.float64]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of a batch of prompts, the masks of a high predicted IoU, a few at a time: row of the prompt (k,),
        predicted IoU (k,) and logits (k, height, width) in the crop's pixels.
        """
        network, predictor = self.predictor.network, self.predictor
        decoder = network.mask_decoder
        assert predictor.original is not None
        for start in range(0, len(points), DECODED):
            coords = torch.from_numpy(points[start : start + DECODED])
            coords = predictor.transformed(coords)[:, None].to(predictor.device)
            labels = torch.ones(len(coords), 1, dtype=torch.int64, device=predictor.device)
            sparse, dense = network.prompt_encoder((coords, labels), None, None)
            queries, keys = decoder.attend(predictor.embedding, predictor.image_pe, sparse, dense[:1])
            iou = decoder.iou(queries)
            good = iou > self.options.pred_iou_thresh
            rows = good.any(dim=1)
            if not rows.any():
                continue
            low = decoder.masks(queries[rows], keys[rows])[good[rows]]
            owners = good.nonzero()[:, 0].cpu() + start
            for part in range(0, len(low), ENLARGED):
                piece = slice(part, part + ENLARGED)
                full = full_size(low[None, piece], network.image_size, predictor.size, predictor.original)[0]
                yield owners[piece], iou[good][piece], full

    # Candidates to records

    def _records(self, found: Candidates, original: tuple[int, ...]) -> list[dict[str, Any]]:
        size = int(original[0]), int(original[1])
        masks = [found.mask(row, size) for row in range(len(found))]
        if self.options.min_mask_region_area > 0 and masks:
            masks, found = self._tidied(masks, found)
        return [
            {
                "segmentation": _encoded(mask, self.options.output),
                "area": int(mask.sum()),
                "bbox": box_xywh(found.boxes[row]),
                "predicted_iou": found.iou[row],
                "point_coords": [found.points[row]],
                "stability_score": found.stability[row],
                "crop_box": box_xywh(found.crops[row]),
            }
            for row, mask in enumerate(masks)
        ]

    def _tidied(
        self, masks: list[NDArray[np.bool_]], found: Candidates
    ) -> tuple[list[NDArray[np.bool_]], Candidates]:
        """Without small holes and islands; of masks that have become alike the unchanged ones stay."""
        area = self.options.min_mask_region_area
        scores = []
        for row, mask in enumerate(masks):
            filled, changed = remove_small_regions(mask, area, "holes")
            masks[row], also = remove_small_regions(filled, area, "islands")
            found.boxes[row] = mask_boxes(masks[row][None])[0].tolist()
            scores.append(0.0 if changed or also else 1.0)
        threshold = max(self.options.box_nms_thresh, self.options.crop_nms_thresh)
        boxes = torch.tensor(found.boxes, dtype=torch.float32)
        rows = nms(boxes, torch.tensor(scores), threshold).tolist()
        return [masks[row] for row in rows], found.taken(rows)


def fine_points(
    coarse: NDArray[np.float64],
    covered: NDArray[np.bool_],
    points_per_side: int,
    grid: FineGrid = "offset",
) -> NDArray[np.float64]:
    """The prompts of the second round (n, 2), in pixels: around the coarse ones where nothing is covered yet.

    Args:
        coarse: prompts of the first round (m, 2), pixels, x fastest.
        covered: bool (height, width), the confident area.
        points_per_side: of the whole grid.
        grid: `offset` steps from the coarse points by whole strides, as released; `regular` takes the grid of
            SAM.

    Raises:
        ValueError: the picture has fewer pixels than points in a row or column.
    """
    height, width = covered.shape
    dx, dy = width // points_per_side, height // points_per_side
    if min(dx, dy) < 1:
        raise ValueError(
            f"everything: a picture of {width} x {height} pixels has no room for {points_per_side} points in "
            "a row and column; lower points_per_side."
        )
    if grid == "regular":
        candidates = point_grid(points_per_side) * [width, height]
    else:
        candidates = np.array([point for x, y in coarse for point in _around(x, y, dx, dy, width, height)])
        candidates = candidates.reshape(-1, 2)
    return uncovered(candidates, covered)


def uncovered(points: NDArray[np.float64], covered: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Those of the points (n, 2), in pixels, that lie where bool (height, width) is false."""
    places = np.floor(points).astype(int)
    return points[~covered[places[:, 1], places[:, 0]]]


def _around(x: float, y: float, dx: int, dy: int, width: int, height: int) -> list[tuple[float, float]]:
    """Neighbours of a coarse point; the far row and column only where they are inside of the picture."""
    points = [(x + i * dx, y + j * dy) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
    right, below = x + 2 * dx < width, y + 2 * dy < height
    if right:
        points += [(x + 2 * dx, y + j * dy) for j in (-1, 0, 1)]
    if below:
        points += [(x + i * dx, y + 2 * dy) for i in (-1, 0, 1)]
    if right and below:
        points.append((x + 2 * dx, y + 2 * dy))
    return points


def _encoded(mask: NDArray[np.bool_], form: str) -> Any:
    if form == "binary_mask":
        return mask
    if form == "uncompressed_rle":
        return {"size": list(mask.shape), "counts": rle_counts(mask)}
    from pycocotools import mask as coco_mask

    encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode()}
