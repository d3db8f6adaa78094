"""Everything mode on equal weights: segment_anything's generator, our full grid, our two rounds.

TinyViT-5M with SAM's decoder at 1024 pixels. The weights are random, so the decoder's last layers are scaled
until its masks are decided and its predicted IoUs spread around the threshold; what matters for the time is
how many masks pass. Peak memory is that of a process of its own, beyond what it had before the first picture.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import forget_peak, markdown, peak_mebibytes, ratios, status_mebibytes, write_numbers

from lightning_modules.tinysam.everything import Everything, MaskGenerator
from lightning_modules.tinysam.network import SAM

WAYS = ("segment_anything", "full grid", "two rounds")
SIZE = (480, 640)


def network(side: int) -> SAM:
    """A segmenter whose random masks pass the filters now and then."""
    torch.manual_seed(0)
    sam = SAM(side).eval()
    with torch.no_grad():
        for mlp in sam.mask_decoder.output_hypernetworks_mlps:
            mlp.layers[2].weight.mul_(300)
        sam.mask_decoder.iou_prediction_head.layers[2].weight.mul_(10)
    return sam


def generator(way: str, sam: SAM, options: dict[str, Any]) -> Any:
    if way != "segment_anything":
        return MaskGenerator(sam, Everything(rounds=1 if way == "full grid" else 2, **options))
    from segment_anything import SamAutomaticMaskGenerator
    from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    encoder, side = sam.image_encoder, sam.image_size
    encoder.img_size = side
    theirs = Sam(
        encoder,
        PromptEncoder(256, (side // 16, side // 16), (side, side), 16),
        MaskDecoder(transformer_dim=256, transformer=TwoWayTransformer(2, 256, 8, 2048)),
    ).eval()
    theirs.load_state_dict(sam.state_dict(), strict=False)
    return SamAutomaticMaskGenerator(theirs, **options)


def picture() -> np.ndarray:
    """Discs on a gradient."""
    ys, xs = np.mgrid[: SIZE[0], : SIZE[1]]
    image = np.stack([xs * 255 // SIZE[1], ys * 255 // SIZE[0], (xs + ys) % 256], axis=-1).astype(np.uint8)
    for x, y, r, colour in ((150, 150, 90, 250), (450, 200, 120, 30), (300, 380, 70, 130)):
        image[(xs - x) ** 2 + (ys - y) ** 2 < r * r] = colour
    return image


def thresholds(sam: SAM, options: argparse.Namespace) -> dict[str, Any]:
    """Filters that a share of the masks passes, found on a coarse grid."""
    seen: list[float] = []
    probe = MaskGenerator(sam, Everything(rounds=1, points_per_side=4, pred_iou_thresh=-1e9))
    decoder = sam.mask_decoder
    original = decoder.iou
    decoder.iou = lambda queries, multimask_output=True: (  # type: ignore[method-assign]
        seen.extend(original(queries, multimask_output).flatten().tolist())
        or original(queries, multimask_output)
    )
    probe.generate(picture())
    decoder.iou = original  # type: ignore[method-assign]
    limit = float(np.quantile(seen, 1 - options.share))
    return {
        "points_per_side": options.points_per_side,
        "pred_iou_thresh": limit,
        "stability_score_thresh": 0.6,
        "box_nms_thresh": 0.9,
    }


def alone(options: argparse.Namespace) -> None:
    """One picture in this process: seconds of the processor, masks, peak memory; as JSON."""
    sam = network(options.image_size)
    filters = json.loads(options.filters) if options.filters else thresholds(sam, options)
    if not options.filters:
        print(json.dumps(filters))
        return
    made = generator(options.alone, sam, filters)
    made.predictor.set_image(picture())  # the encoder's buffers are there before anything is counted
    before = status_mebibytes("VmRSS")
    forget_peak()
    start = time.process_time()
    records = made.generate(picture())
    seconds = time.process_time() - start
    masks = [np.packbits(record["segmentation"]).tobytes().hex() for record in records]
    print(json.dumps({"seconds": seconds, "mebibytes": peak_mebibytes() - before, "masks": masks}))


def child(options: argparse.Namespace, way: str, filters: str = "") -> Any:
    words = [sys.executable, __file__, "--alone", way, "--filters", filters]
    words += ["--image-size", str(options.image_size), "--points-per-side", str(options.points_per_side)]
    words += ["--share", str(options.share)]
    output = subprocess.run(words, check=True, capture_output=True, text=True, env={**os.environ}).stdout
    return json.loads(output.splitlines()[-1])


def agreement(ours: list[str], theirs: list[str], limit: float = 0.8) -> float:
    """Share of their masks that have one of ours at an IoU of `limit`."""
    left = [np.unpackbits(np.frombuffer(bytes.fromhex(mask), np.uint8)).astype(bool) for mask in ours]
    found = 0
    for mask in theirs:
        right = np.unpackbits(np.frombuffer(bytes.fromhex(mask), np.uint8)).astype(bool)
        found += any((right & one).sum() >= limit * (right | one).sum() for one in left)
    return found / max(len(theirs), 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--points-per-side", type=int, default=32)
    parser.add_argument("--share", type=float, default=0.1, help="of the masks that pass the predicted IoU")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--alone", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--filters", default="", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.alone:
        alone(options)
        return 0
    filters = json.dumps(child(options, "full grid"))
    results: dict[str, list[Any]] = {way: [] for way in WAYS}
    for _ in range(options.repeats):
        for way in WAYS:
            results[way].append(child(options, way, filters))
    seconds = {way: [run["seconds"] for run in runs] for way, runs in results.items()}
    reference = results["segment_anything"][0]
    rows = []
    for way in WAYS:
        faster = statistics.median(ratios(seconds["segment_anything"], seconds[way]))
        memory = reference["mebibytes"] / max(results[way][0]["mebibytes"], 1)
        same = agreement(results[way][0]["masks"], reference["masks"])
        peak = f"{results[way][0]['mebibytes']:.0f}"
        row = [way, f"{statistics.median(seconds[way]):.1f}", f"{faster:.2f}", peak]
        rows.append([*row, f"{memory:.2f}", str(len(results[way][0]["masks"])), f"{same:.3f}"])
    print(
        markdown(
            ["way", "CPU s", "times faster", "peak MiB", "times less memory", "masks", "of theirs found"],
            rows,
        )
    )
    write_numbers(options.json, {"filters": json.loads(filters), "seconds": seconds})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
