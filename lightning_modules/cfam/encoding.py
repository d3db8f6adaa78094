"""Features of images and captions, the vectors that are searched by, and what an index of them is made by."""

from collections.abc import Mapping
from functools import cached_property
from hashlib import blake2b
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_modules.cfam.network import GranularityDecoder
from lightning_modules.cfam.towers import ClipTowers, text_ends

TRAINING_ONLY = ("granularity_decoder", "granularity_decoder_text", "matcher", "cid_head", "classifier")


def encoded_sides(
    towers: ClipTowers,
    image: Tensor | None,
    ids: Tensor | None,
    decoders: tuple[GranularityDecoder | None, GranularityDecoder | None],
    mask_padding: bool,
) -> dict[str, Tensor]:
    """`v`, `t` (B, D), and with decoders `fv`, `ft` (B, K, D), of what is given.

    Args:
        towers: CLIP.
        image: normalised images (B, 3, H, W).
        ids: captions (B, L).
        decoders: of images and of captions.
        mask_padding: the decoder sees no token after the end of a caption.
    """
    found: dict[str, Tensor] = {}
    if image is not None:
        tokens = towers.image_tokens(image)
        found["v"] = tokens[:, 0]
        if decoders[0] is not None:
            found["fv"] = decoders[0](tokens)
    if ids is not None:
        tokens = towers.text_tokens(ids)
        found["t"] = at_end(tokens, ids)
        if decoders[1] is not None:
            places = torch.arange(ids.shape[1], device=ids.device)
            found["ft"] = decoders[1](tokens, places > text_ends(ids)[:, None] if mask_padding else None)
    return found


def at_end(tokens: Tensor, ids: Tensor) -> Tensor:
    """The global feature (B, D) of captions: of tokens (B, L, D) the one at the end mark of ids (B, L)."""
    return tokens[torch.arange(len(ids), device=ids.device), text_ends(ids)]


def retrieval_vectors(pooled: Tensor, queries: Tensor | None = None, alpha: float = 1.0) -> Tensor:
    """Unit vectors whose dot product is the score (section 2.7), float32.

    Args:
        pooled: global features (B, D).
        queries: (B, K, D) for the fused score: the vectors are (B, D (1 + K)); None: (B, D).
        alpha: weight of the global similarity in the fused score.
    """
    vectors = F.normalize(pooled.float(), dim=-1)
    if queries is None:
        return vectors
    local = F.normalize(queries.float(), dim=-1).flatten(1)
    return torch.cat([alpha**0.5 * vectors, ((1 - alpha) / queries.shape[1]) ** 0.5 * local], dim=1)


class GalleryEncoder:
    """Computes the vectors of a gallery for an index, and says what they depend on.

    Args:
        module: with `normalize` and `encode_image`.
        parts: what of it an image goes through, by name.
        model: name of the network, for people.
        score: what is ranked by.
    """

    def __init__(self, module: Any, parts: Mapping[str, nn.Module], model: str, score: str) -> None:
        self.module, self.parts, self.model, self.score = module, parts, model, score

    @cached_property
    def key(self) -> str:
        """Score, and a digest of the weights that an image goes through."""
        summed = blake2b(digest_size=12)
        for part, network in self.parts.items():
            for name, tensor in network.state_dict().items():
                summed.update(f"{part}.{name} {tuple(tensor.shape)}".encode())
                summed.update(tensor.detach().float().cpu().contiguous().numpy().data)
        return f"{self.score} score, weights {summed.hexdigest()}"

    @property
    def width(self) -> int:
        """Of the vectors."""
        decoder = self.parts.get("decoder")
        dim = int(self.module.base_model.dim)
        return dim if decoder is None else dim * (1 + len(decoder.queries))  # type: ignore[arg-type]

    def to(self, device: Any) -> "GalleryEncoder":
        """Move the module in place."""
        self.module.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Vectors (B, width) of images (B, 3, H, W) in [0, 1]."""
        weights = next(self.parts["visual"].parameters())
        return self.module.encode_image(self.module.normalize(images).to(weights.dtype))


def without_absent(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """A state without the training-only parts that `module` was built without."""
    absent = tuple(f"{part}." for part in TRAINING_ONLY if getattr(module, part) is None)
    kept = {key: value for key, value in state.items() if not (absent and key.startswith(absent))}
    if len(kept) < len(state):
        rank_zero_info("CFAM: training-only parts of the checkpoint that are not used are left out.")
    return kept
