"""Embeddings of a teacher for the first pictures of a data set, kept by `FeatureCache`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from datamodules.features import FeatureCache, FeatureStore
from datamodules.shards import check_header, digest, read_header

NAME = "embeddings"


def open_embeddings(
    cache: FeatureCache,
    dataset: Dataset[Any],
    identity: Sequence[str],
    transform: Callable[[Any], Tensor],
) -> FeatureStore:
    """The embeddings of a data set, computed first where they are not there yet. A collective.

    Args:
        cache: of the teacher.
        dataset: its pictures.
        identity: name and size of each.
        transform: from a sample to what the teacher takes.

    Raises:
        MisconfigurationException: the folder holds embeddings of the same pictures, but of another teacher or
            transform; names the header, the field and both values. (To compute them anew without a word could
            take days.)
    """
    listed = digest(*identity)
    described = repr(transform)
    refuse_others(cache.folder, listed, cache.encoder.key, described, cache.shape, cache.dtype.name)
    return cache.open_dataset(NAME, dataset, listed, transform, described, named=lambda row: identity[row])


def refuse_others(
    folder: Path, listed: str, encoder: str, transform: str, shape: tuple[int, ...], dtype: str
) -> None:
    """Whether a folder's embeddings of these pictures are this teacher's; see `open_embeddings`."""
    headers = sorted(folder.glob(f"*/*/{NAME}-{listed}/header.json"))
    wanted = {"encoder": encoder, "transform": f"{transform}, {dtype} {shape}"}
    for path in headers:
        header = read_header(path.parent)
        if header is None:
            return  # damaged: made again
        if all(header.get(name) == value for name, value in wanted.items()):
            return
    for path in headers:
        check_header(path.parent, read_header(path.parent) or {}, wanted)
