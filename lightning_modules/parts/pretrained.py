"""What a folder of transformers must bring: all weights of the model, and none that it has no place for."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

_HEADS = re.compile(r"^(classifier|score|qa_outputs|pooler|.*\.(classifier|score|pooler))(\.|$)")


def check_loaded(network: nn.Module, name: str, info: Mapping[str, Any], new_head: bool = False) -> None:
    """Refuse weights that stayed random, and weights of the blocks that were left out.

    Args:
        network: as it was loaded.
        name: of the model, for messages.
        info: what `from_pretrained(..., output_loading_info=True)` says.
        new_head: a head may be missing: it is to be trained.

    Raises:
        MisconfigurationException: names what is missing or superfluous.
    """
    missing = sorted(info.get("missing_keys", ()))
    if new_head:
        missing = [key for key in missing if not _HEADS.match(key)]
    unexpected = sorted(info.get("unexpected_keys", ()))
    if missing:
        behind = _common_prefix(missing, unexpected)
        hint = f"; the file has them behind '{behind}': rename them" if behind else ""
        raise MisconfigurationException(
            f"model '{name}': {len(missing)} weights are not in the file and would stay random: "
            f"{_listed(missing)}{hint}."
        )
    lists = [path for path, part in network.named_modules() if isinstance(part, nn.ModuleList)]
    # what is no weight of a layer (rotary frequencies, masks) is harmless
    inside = [
        key
        for key in unexpected
        if key.rpartition(".")[2] in ("weight", "bias") and any(key.startswith(f"{path}.") for path in lists)
    ]
    if inside:
        raise MisconfigurationException(
            f"model '{name}': the file has {len(inside)} weights of blocks that config.json leaves out: "
            f"{_listed(inside)}. Its configuration is not that of the weights."
        )
    if unexpected:
        rank_zero_warn(f"model '{name}': {len(unexpected)} weights are not used: {_listed(unexpected)}.")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _common_prefix(missing: list[str], unexpected: list[str]) -> str | None:
    """What all missing names have in front of them in the file."""
    found = set(unexpected)
    for key in unexpected:
        prefix = key.removesuffix(missing[0])
        if prefix != key and all(f"{prefix}{name}" in found for name in missing):
            return prefix
    return None


def declare_bits(network: nn.Module, config: Mapping[str, Any], compressed: Iterable[str]) -> None:
    """Note on each layer how many bits its weight had in a compressed-tensors folder, for reports.

    Args:
        network: with dequantized weights.
        config: `quantization_config` of the folder.
        compressed: names of the layers that have integers there.
    """
    from compressed_tensors.utils import is_match  # of the extra, without which the folder did not load

    modules = dict(network.named_modules())
    ends = {path: part for path, part in modules.items() if isinstance(part, nn.Linear)}
    groups = list(config["config_groups"].values())
    counts: dict[int, int] = {}
    for name in compressed:
        path = name if name in ends else next((each for each in ends if name.endswith(each)), None)
        if path is None:
            continue
        group = next((group for group in groups if is_match(path, ends[path], group["targets"])), groups[0])
        bits = int(group["weights"]["num_bits"])
        ends[path].weight_bits = float(bits)  # type: ignore[assignment]
        counts[bits] = counts.get(bits, 0) + 1
    widths = ", ".join(f"{count} of {bits} bits" for bits, count in sorted(counts.items()))
    rank_zero_info(
        f"The model is compressed ({widths}): its weights are dequantized, so they can be trained and "
        "quantized again."
    )
