"""Integers as the dense bit streams of compressed-tensors' `pack-quantized` (spec section 7)."""

import numpy as np
import torch
from torch import Tensor


def pack_int32(integers: Tensor, bits: int) -> Tensor:
    """Signed integers (rows, columns) as int32 words (rows, ceil(columns bits / 32)).

    Each is shifted to q + 2^(bits-1) >= 0; element k of a row takes the bits k bits .. (k + 1) bits - 1,
    little end first, so that 3-bit values straddle words.
    """
    shifted = (integers.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8).cpu().numpy()
    rows, columns = shifted.shape
    stream = np.unpackbits(shifted[..., None], axis=2, bitorder="little", count=bits).reshape(rows, -1)
    stream = np.pad(stream, ((0, 0), (0, -columns * bits % 32)))
    words = np.packbits(stream, axis=1, bitorder="little").view("<i4")
    return torch.from_numpy(words.astype(np.int32))


def unpack_int32(words: Tensor, bits: int, columns: int) -> Tensor:
    """The integers (rows, columns), int8, that `pack_int32` packed."""
    data = words.cpu().numpy().astype("<i4").view(np.uint8)
    stream = np.unpackbits(data, axis=1, bitorder="little", count=columns * bits)
    shifted = np.packbits(stream.reshape(len(data), columns, bits), axis=2, bitorder="little")[..., 0]
    return torch.from_numpy(shifted.astype(np.int16) - 2 ** (bits - 1)).to(torch.int8)
