"""Tar shards, as WebDataset and img2dataset write them, read in long runs and yet by index.

The headers of the tars are read once and kept in `.index` beside them, where that can be written, so a sample
is known by its place. The order of an epoch is then that
of any other data set, a function of seed and epoch: ranks get equally many batches, and an epoch is resumed
anywhere without reading what was read before.
"""

import io
import logging
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.loading import EpochSampler, hash_seed
from datamodules.reading import CorruptSampleError, DataError, is_hidden
from datamodules.shards import digest, replace

log = logging.getLogger(__name__)


class TarShards(Dataset[dict[str, Any]]):
    """The samples of uncompressed tar files; a sample is what has the same name up to its first dot.

    Samples are dicts: "key", that name with the folders before it; "path", the tar's; "index"; and the bytes
    of each member. A sample that lacks a member is left out and counted.

    Args:
        files: the shards.
        members: the endings of each, such as `{"image": ("jpg", "png"), "caption": ("txt",)}`.

    Raises:
        DataError: a file is no whole tar, or none has such a sample.
    """

    def __init__(self, files: Sequence[Path], members: Mapping[str, Sequence[str]]) -> None:
        self.files = [Path(file) for file in files]
        self.members = list(members)
        ending = {suffix: place for place, suffixes in enumerate(members.values()) for suffix in suffixes}
        keys: list[str] = []
        spans: list[NDArray[np.int64]] = []
        self.lengths: list[int] = []
        self.incomplete = 0
        for file in self.files:
            index = _kept_index(file, ending, len(members))
            whole = {key: span for key, span in index.items() if (span[:, 0] >= 0).all()}
            self.incomplete += len(index) - len(whole)
            self.lengths.append(len(whole))
            keys += whole.keys()
            spans += whole.values()
        if not keys:
            names = ", ".join(map(str, self.files[:3])) or "no file"
            raise DataError(f"no tar has samples with {', '.join(members)} ({names}).")
        if self.incomplete:
            log.warning("%d samples that lack a member are left out.", self.incomplete)
        self._keys = np.array([key.encode("utf-8", "surrogateescape") for key in keys])
        self._spans = np.stack(spans)  # (samples, members, 2): offset and bytes
        self._shards = np.repeat(np.arange(len(self.files)), self.lengths)

    @property
    def keys(self) -> list[str]:
        """The samples' names with their folders."""
        return [key.decode("utf-8", "surrogateescape") for key in self._keys]

    def member_bytes(self, index: int, member: str) -> int:
        """Size of a sample's member."""
        return int(self._spans[index, self.members.index(member), 1])

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.files[self._shards[index]]
        key = self._keys[index].decode("utf-8", "surrogateescape")
        sample: dict[str, Any] = {"key": key, "path": str(path), "index": index}
        try:
            with path.open("rb") as file:
                for name, (offset, size) in zip(self.members, self._spans[index], strict=True):
                    file.seek(offset)
                    sample[name] = file.read(size)
                    if len(sample[name]) < size:
                        raise CorruptSampleError(f"cannot read {key} of {path}: the file has become shorter")
        except OSError as error:
            raise CorruptSampleError(f"cannot read {key} of {path} ({error})") from error
        return sample


def _kept_index(path: Path, ending: Mapping[str, int], count: int) -> dict[str, NDArray[np.int64]]:
    """`_index`, from what an earlier run has kept of it, as long as the tar has not changed since."""
    try:
        status = path.stat()
    except OSError:
        return _index(path, ending, count)
    known = digest(f"{status.st_size} {status.st_mtime_ns}", *(f"{e} {place}" for e, place in ending.items()))
    kept = path.parent / ".index" / f"{path.name}-{known}.npz"
    try:
        with np.load(kept) as arrays:
            keys, spans = arrays["keys"], arrays["spans"]
            if len(keys) == len(spans) and spans.shape[1:] == (count, 2):
                return {
                    key.decode("utf-8", "surrogateescape"): span
                    for key, span in zip(keys, spans, strict=True)
                }
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        log.warning("%s cannot be read and is made again (%s).", kept, error)
    index = _index(path, ending, count)
    keys = np.array([key.encode("utf-8", "surrogateescape") for key in index], np.bytes_)
    with suppress(
        OSError
    ):  # a folder that cannot be written, or a full disk: the next run reads the tar again
        content = io.BytesIO()
        np.savez(
            content, keys=keys, spans=np.stack(list(index.values())) if index else np.empty((0, count, 2))
        )
        kept.parent.mkdir(exist_ok=True)
        replace(kept, content.getvalue())
    return index


def _index(path: Path, ending: Mapping[str, int], count: int) -> dict[str, NDArray[np.int64]]:
    """Offset and size (members, 2) of each sample's members; -1 where there is none."""
    index: dict[str, NDArray[np.int64]] = {}
    try:
        length = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, slash, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if not member.isfile() or is_hidden(name) or suffix.lower() not in ending:
                    continue
                if member.offset_data + member.size > length:
                    raise DataError(f"{path} ends within {member.name}: get it again.")
                span = index.setdefault(folder + slash + stem, np.full((count, 2), -1, np.int64))
                span[ending[suffix.lower()]] = member.offset_data, member.size
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{path} is no uncompressed tar that can be read ({error}).") from error
    return index


class ShardSampler(EpochSampler):
    """Shuffles shards, and samples among a few shards at a time, so that files are read in long runs.

    Args:
        lengths: samples of each shard, as they follow one another in the data set.
        window: shards whose samples are shuffled among each other.
        options: of `EpochSampler`.
    """

    def __init__(self, lengths: Sequence[int], window: int = 16, **options: Any) -> None:
        super().__init__(range(sum(lengths)), **options)
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}.")
        self.window = window
        self._ends = np.cumsum(np.asarray(lengths))

    def _order(self, length: int) -> Tensor:
        if not self.shuffle:
            return super()._order(length)
        rng = np.random.default_rng(hash_seed(self.seed, self.epoch))
        shards = np.split(np.arange(length), self._ends[:-1])
        shuffled = rng.permutation(len(shards))
        windows = [shuffled[start : start + self.window] for start in range(0, len(shards), self.window)]
        order = [rng.permutation(np.concatenate([shards[shard] for shard in chosen])) for chosen in windows]
        return torch.from_numpy(np.concatenate(order))
