"""Quantization in files: progress after each window, and the final integers, with what they belong to."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from callbacks.quantization.layers import QuantizedMatrix
from callbacks.quantization.scheme import Scheme
from callbacks.quantization.settings import Progress
from callbacks.run.checkpointing import AtomicCheckpointIO

_TENSORS = ("integers", "scale", "zero_point")
_AT_ONCE = 2**20


def as_plain(matrix: QuantizedMatrix) -> dict[str, Any]:
    """A layer's result as tensors, numbers and strings: loads with `weights_only=True`."""
    tensors = {key: value.cpu() for key in _TENSORS if (value := getattr(matrix, key)) is not None}
    rest = {"activation_step": matrix.activation_step, "changed": matrix.changed}
    return {"scheme": asdict(matrix.scheme), **tensors, **rest}


def from_plain(saved: Mapping[str, Any]) -> QuantizedMatrix:
    """The opposite of `as_plain`."""
    values = {key: value for key, value in saved.items() if key != "scheme"}
    return QuantizedMatrix(Scheme(**saved["scheme"]), **values)


def fingerprint(network: nn.Module, segments: Tensor | None) -> dict[str, str]:
    """What a quantization depends on besides its options: the weights and the calibration tokens, as
    hashes.
    """
    weights = hashlib.sha256()
    for name, parameter in network.named_parameters():
        total, size = 0.0, 0.0
        for part in parameter.detach().flatten().split(_AT_ONCE):  # no copy of an embedding in float64
            part = part.double()
            total, size = total + float(part.sum()), size + float(part.abs().sum())
        weights.update(f"{name} {tuple(parameter.shape)} {total!r} {size!r}".encode())
    found = {"weights": weights.hexdigest()[:16], "configuration": _configuration(network)}
    if segments is not None:
        found["calibration"] = hashlib.sha256(segments.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
    return found


def _configuration(network: nn.Module) -> str:
    """Hash of what decides a model's function besides its weights (positions, norms, activations)."""
    config: Any = getattr(network, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return "none"
    left_out = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
    content = {key: value for key, value in config.to_dict().items() if key not in left_out}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


class IdentifiedFile:
    """A file of plain tensors and numbers that belongs to certain options, weights and data.

    Args:
        path: of the file.
        identity: options and fingerprints; a file with another identity is refused.
        keys: of the content.
        what: of a calibration it holds, for messages.
        remedy: besides deleting it, for messages.
    """

    def __init__(
        self, path: Path, identity: Mapping[str, Any], keys: Iterable[str], what: str, remedy: str
    ) -> None:
        self.path = path
        self.identity = json.loads(json.dumps(identity))
        self._keys = set(keys)
        self._what = what
        self._remedy = remedy

    def write(self, content: Mapping[str, Any]) -> None:
        """Replace the file."""
        AtomicCheckpointIO().save_checkpoint({"identity": json.dumps(self.identity), **content}, self.path)

    def _read(self) -> dict[str, Any]:
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            before = json.loads(saved["identity"])
            lacking = self._keys - saved.keys()
        except OSError:
            raise
        except Exception as error:  # torch raises nearly anything on damaged files
            raise self._damaged() from error
        if lacking or not isinstance(before, dict):
            raise self._damaged()
        return saved

    def _damaged(self) -> MisconfigurationException:
        return MisconfigurationException(
            f"'{self.path}' is damaged, or no {self._what} of a calibration: delete it to start anew, or "
            f"{self._remedy}."
        )

    def read(self) -> dict[str, Any] | None:
        """The content; None where there is no file.

        Raises:
            MisconfigurationException: it was made with other options, weights or data; the differences are
                listed. Or it is damaged.
        """
        if not self.path.is_file():
            return None
        saved = self._read()
        before = json.loads(saved["identity"])
        keys = sorted({*before, *self.identity})
        different = [
            f"{key}: {before.get(key)} in the file, {self.identity.get(key)} now"
            for key in keys
            if before.get(key) != self.identity.get(key)
        ]
        if different:
            raise MisconfigurationException(
                f"'{self.path}' was made with other settings ({'; '.join(different)}). Delete it to start "
                f"anew, or {self._remedy}."
            )
        return saved


class ProgressFile(IdentifiedFile):
    """One file that always holds the last complete window.

    Args:
        path: of the file.
        identity: see `IdentifiedFile`.
        shapes: (d_out, d_in) of each layer; None: not compared.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.shapes = shapes or {}
        keys = ("windows", "matrices", "learned", "scales", "thresholds", "rows")
        super().__init__(path, identity, keys, "progress", "set resume: false")

    def save(self, progress: Progress) -> None:
        """Replace the file."""
        self.write(
            {
                "windows": progress.windows,
                "matrices": {name: as_plain(matrix) for name, matrix in progress.matrices.items()},
                "learned": progress.learned,
                "scales": progress.scales,
                "thresholds": progress.thresholds,
                "rows": progress.rows,
            }
        )

    def load(self) -> Progress | None:
        """What was saved; None where there is nothing. Errors are those of `read`."""
        saved = self.read()
        if saved is None:
            return None
        try:
            matrices = {name: from_plain(matrix) for name, matrix in saved["matrices"].items()}
        except Exception as error:  # what is saved may be anything
            raise self._damaged() from error
        for name, matrix in matrices.items():
            shape, wanted = matrix.integers, self.shapes.get(name)
            if self.shapes and (wanted is None or (shape is not None and tuple(shape.shape) != wanted)):
                raise self._damaged()
        rank_zero_info(f"Going on from '{self.path}': {saved['windows']} windows are done.")
        return Progress(
            windows=saved["windows"],
            matrices=matrices,
            learned=saved["learned"],
            scales=saved["scales"],
            thresholds=saved["thresholds"],
            rows=saved["rows"],
        )
