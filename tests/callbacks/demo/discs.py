"""A picture of two discs, and a segmenter that knows them."""

import numpy as np
import torch
from torch import nn

from tests.lightning_modules.tinysam.tiny import tiny_sam

DISCS = ((60, 80, 30), (170, 70, 40))
"""x, y, radius in pixels of a picture of 240 x 160."""


def discs_picture():
    y, x = np.mgrid[:160, :240]
    picture = np.full((160, 240, 3), 230, np.uint8)
    for (cx, cy, radius), colour in zip(DISCS, ((200, 40, 40), (40, 60, 200)), strict=True):
        picture[(x - cx) ** 2 + (y - cy) ** 2 < radius**2] = colour
    return picture


class _Decoder(nn.Module):
    """Of the prompt's first place: the disc that it is in, as masks of a frame of 64 pixels."""

    def attend(self, image_embeddings, image_pe, sparse, dense):
        return sparse, sparse

    def iou(self, queries, multimask_output=True):
        inside = [self._inside(place) for place in queries]
        return torch.tensor([[0.3, 0.95 if any(found) else 0.3, 0.2] for found in inside])

    def masks(self, queries, keys, multimask_output=True):
        y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
        maps = []
        for place in queries:
            logits = torch.full((3, 16, 16), -20.0)
            for (cx, cy, radius), found in zip(DISCS, self._inside(place), strict=True):
                if found:
                    scale = 16 / 240
                    distance = ((x + 0.5 - cx * scale) ** 2 + (y + 0.5 - cy * scale) ** 2).sqrt()
                    logits[1] = (60 * (radius * scale - distance)).clamp(-20, 20)
            maps.append(logits)
        return torch.stack(maps)

    def forward(self, image_embeddings, image_pe, sparse, dense, multimask_output=True):
        return self.masks(sparse, sparse), self.iou(sparse), sparse

    @staticmethod
    def _inside(place):
        scale = 64 / 240
        x, y = place[:, :2].mean(dim=0).tolist()
        return [(x - cx * scale) ** 2 + (y - cy * scale) ** 2 < (r * scale) ** 2 for cx, cy, r in DISCS]


class _Prompts(nn.Module):
    """Places as they are: the corners of a box, or the points."""

    def __init__(self):
        super().__init__()
        self.no_mask_embed = nn.Embedding(1, 32)

    def get_dense_pe(self):
        return torch.zeros(1, 32, 4, 4)

    def forward(self, points, boxes, masks):
        places = points[0] if points is not None else boxes.view(-1, 2, 2)
        return places, torch.zeros(1, 32, 4, 4)


def discs_network():
    torch.manual_seed(0)
    network = tiny_sam()
    network.prompt_encoder, network.mask_decoder = _Prompts(), _Decoder()
    return network.eval()
