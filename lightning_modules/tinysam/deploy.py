"""The decoder as a network of its own, with the inputs and outputs of SAM's ONNX files."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_modules.parts.inference import InferencePart, InferenceSpec
from lightning_modules.tinysam.network import SAM


class PromptedDecoder(nn.Module):
    """Prompt encoder and mask decoder: prompts on one embedded picture to masks of the frame.

    Inputs and outputs have the names and meanings of the ONNX files of SAM, so that their runners take it;
    other than there the number of prompts is free, and masks stay at a quarter of the frame.

    Args:
        network: whose parts are held, not copied.
    """

    def __init__(self, network: SAM) -> None:
        super().__init__()
        self.prompt_encoder = network.prompt_encoder
        self.mask_decoder = network.mask_decoder

    def forward(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Logits `low_res_masks` (n, 4, 4h, 4w) and `iou_predictions` (n, 4).

        The first of the four is SAM's single mask, for prompts of several points; the others are its three
        guesses for one point.

        Args:
            image_embeddings: (1, width, h, w).
            point_coords: (n, k, 2), x and y in pixels of the frame; a box is two points.
            point_labels: (n, k): 1 on the object, 0 beside it, 2 and 3 the corners of a box, -1 no point. A
                prompt without a box ends with a point of -1.
            mask_input: logits (n, 1, 4h, 4w) of an earlier round.
            has_mask_input: (n,), 1 where there is one, else 0.
        """
        encoder = self.prompt_encoder
        kinds = point_labels[..., None]
        encoded = encoder.pe_layer((point_coords + 0.5) / encoder.image_size)
        sparse = torch.where(kinds == -1, encoder.not_a_point_embed.weight, encoded)
        for label, corner in enumerate(encoder.point_embeddings):
            sparse = sparse + (kinds == label) * corner.get_parameter("weight")
        given = has_mask_input.view(-1, 1, 1, 1)
        none = encoder.no_mask_embed.weight.view(1, -1, 1, 1)
        dense = given * encoder.mask_downscaling(mask_input) + (1 - given) * none
        decoder = self.mask_decoder
        queries, keys = decoder.attend(image_embeddings, encoder.get_dense_pe(), sparse, dense)
        single, several = (decoder.masks(queries, keys, output) for output in (False, True))
        ious = [decoder.iou(queries, output) for output in (False, True)]
        return torch.cat([single, several], dim=1), torch.cat(ious, dim=1)


def decoder_part(network: SAM, embedding: Tensor) -> InferencePart:
    """`PromptedDecoder` with an example: a click and a box on the first picture.

    Args:
        network: the segmenter.
        embedding: (batch, width, h, w).
    """
    side = network.image_size
    inputs: Mapping[str, Tensor] = {
        "image_embeddings": embedding[:1],
        "point_coords": torch.tensor([[[0.3, 0.4], [0.0, 0.0]], [[0.2, 0.1], [0.7, 0.9]]]) * side,
        "point_labels": torch.tensor([[1.0, -1.0], [2.0, 3.0]]),
        "mask_input": torch.zeros(2, 1, *(4 * size for size in embedding.shape[2:])),
        "has_mask_input": torch.zeros(2),
    }
    points = {1: "points"}
    spec = InferenceSpec(
        outputs=("low_res_masks", "iou_predictions"),
        unit="prompts",
        free_dimensions={"point_coords": points, "point_labels": points},
        shared=("image_embeddings",),
    )
    return InferencePart(PromptedDecoder(network), inputs, spec)
