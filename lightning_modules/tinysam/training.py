"""What of a promptable segmenter is trained, from which weights, and how fast."""

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_modules.parts.weights import load_state, read_checkpoint, state_dict_of

_SHARED = ("prompt_encoder", "mask_decoder")


def load_decoder(network: Any, path: str | Path) -> None:
    """Take prompt encoder and mask decoder from a file, whatever its image encoder is.

    Args:
        network: has both; changed in place.
        path: a SAM or TinySAM, or a checkpoint of ours.

    Raises:
        MisconfigurationException: the file has none, or others; names keys.
    """
    state = state_dict_of(read_checkpoint(path), source=path)
    for part in _SHARED:
        own = {key.removeprefix(f"{part}."): v for key, v in state.items() if key.startswith(f"{part}.")}
        if not own:
            raise MisconfigurationException(f"decoder_weights: '{path}' has no {part}.")
        load_state(getattr(network, part), own, path)


def copy_decoder(source: Any, target: Any, name: str) -> None:
    """Copy prompt encoder and mask decoder from one segmenter to another.

    Args:
        source: has both.
        target: changed in place.
        name: of the source, for the error.

    Raises:
        MisconfigurationException: they are of another size; names keys.
    """
    for part in _SHARED:
        load_state(getattr(target, part), getattr(source, part).state_dict(), name)


def freeze_what_is_not_trained(network: Any, train_decoder: bool, freeze_norms: bool) -> None:
    """Freeze the prompt encoder, what gets no gradient in multi-mask training, and more if wanted.

    Args:
        network: changed in place.
        train_decoder: False freezes the mask decoder, too.
        freeze_norms: keep the running statistics of the image encoder.
    """
    network.prompt_encoder.requires_grad_(False).eval()
    network.mask_decoder.output_hypernetworks_mlps[0].requires_grad_(False)  # of the single-mask output
    if not train_decoder:
        network.mask_decoder.requires_grad_(False).eval()
    for name in ("norm_head", "head"):  # of classification: in the released files, never run
        part = getattr(network.image_encoder, name, None)
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    if freeze_norms:
        for part in network.image_encoder.modules():
            if isinstance(part, _NormBase):
                part.eval()


def layer_factors(network: Any, decay: float) -> dict[str, float]:
    """Globs of parameter names with the factor of their learning rate: decay^(blocks behind them).

    `patch_embed` counts as the first block, and a merging as the block before it; the neck has 1.

    Raises:
        ValueError: `decay` is not in (0, 1], or the encoder has no layers of blocks.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"layer_lr_decay is in (0, 1], not {decay}.")
    if decay == 1:
        return {}
    layers = getattr(network.image_encoder, "layers", None)
    if layers is None:
        raise ValueError(f"layer_lr_decay: {type(network.image_encoder).__name__} has no layers.")
    prefix = "network.image_encoder"
    total = sum(len(layer.blocks) for layer in layers)
    factors = {f"{prefix}.patch_embed.*": decay ** (total - 1)}
    number = 0
    for place, layer in enumerate(layers):
        for block in range(len(layer.blocks)):
            factors[f"{prefix}.layers.{place}.blocks.{block}.*"] = decay ** (total - 1 - number)
            number += 1
        if getattr(layer, "downsample", None) is not None:
            factors[f"{prefix}.layers.{place}.downsample.*"] = decay ** (total - number)
    return factors
