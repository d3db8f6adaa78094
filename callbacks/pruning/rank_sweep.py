"""The rank gradient of many layers at once, cheaply and with a checked error (RPG, section 2.8).

What a full SVD of every layer costs is spent on directions that the gradient does not need. Here, for each
layer: the smaller Gram matrix and its eigenvectors in single precision; a step that improves the subspace,
and an estimate of the error that is left (`subspace.py`); double precision for the layers where that exceeds
the bound.

Layers are independent: dealt over processes by cost, and over threads on the CPU, where LAPACK does not
scale. The eigenvectors are exchanged rather than the gradients: a tenth of the traffic, and all processes add
the same bits.

No subspace is kept from one sweep to the next. Projecting on it and repairing what has changed takes as many
matrix products as the decomposition takes time, and a resumed run would need it to go on bit for bit.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from callbacks.pruning.rank_loss import Backend, Truncation, as_matrix, exact_truncation
from callbacks.pruning.subspace import decompose, refined_truncation, symmetric_gram

_EXACT_SIDE = 128  # up to here double precision costs next to nothing

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class RankSweep:
    """Truncations of all layers, with the error of the gradients bounded.

    Args:
        tolerance: the paper's delta.
        backend: `gram` as described above; `svd` is the full SVD of every layer, as the reference does it.
        max_error: bound on the estimated relative error (Frobenius norm) of a layer's gradient.
    """

    def __init__(self, tolerance: float, backend: Backend = "gram", max_error: float = 5e-5) -> None:
        self.tolerance = tolerance
        self.backend = backend
        self.max_error = max_error
        self.repeated: list[str] = []
        self._failed: set[str] = set()

    def __call__(self, weights: Mapping[str, Tensor]) -> dict[str, Truncation]:
        """Truncate every weight; all processes of a distributed run must call it with equal weights.

        Args:
            weights: by name, (out, ...), floating point, on one device.

        Returns:
            By name, in the order of `weights`; weights of zeros, and those that no decomposition could treat
            (one warning each), are missing. `repeated` then names the layers that needed double precision.
        """
        matrices = {name: as_matrix(weight.detach()).float() for name, weight in weights.items()}
        self.repeated = []
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if world == 1:
            return self._truncate_all(matrices)
        mine = deal({name: cost(matrix.shape) for name, matrix in matrices.items()}, world)[dist.get_rank()]
        return exchange(matrices, self._truncate_all({name: matrices[name] for name in mine}))

    def _truncate_all(self, matrices: Mapping[str, Tensor]) -> dict[str, Truncation]:
        if not matrices:
            return {}
        names = sorted(matrices, key=lambda name: -cost(matrices[name].shape))  # the largest first
        on_gpu = next(iter(matrices.values())).is_cuda
        if self.backend == "gram" and on_gpu:
            decomposed = batched_eigh(matrices)
            found = [self._guarded(name, matrices[name], decomposed.get(name)) for name in names]
        else:
            found = in_threads(lambda name: self._guarded(name, matrices[name], None), names, not on_gpu)
        truncations = dict(zip(names, found, strict=True))
        return {name: truncation for name in matrices if (truncation := truncations[name]) is not None}

    def _guarded(
        self, name: str, matrix: Tensor, decomposed: tuple[Tensor, Tensor, Tensor] | None
    ) -> Truncation | None:
        """Truncate one matrix; on failure retry in double precision, then leave it out with one warning."""
        try:
            return self._truncate(name, matrix, decomposed)
        except torch.linalg.LinAlgError:
            pass
        try:
            return _stored(exact_truncation(matrix, self.tolerance), matrix)
        except torch.linalg.LinAlgError as error:
            if name not in self._failed:
                rank_zero_warn(f"The rank loss leaves out {name}: it cannot be decomposed ({error}).")
            self._failed.add(name)
            return None

    def _truncate(
        self, name: str, matrix: Tensor, decomposed: tuple[Tensor, Tensor, Tensor] | None
    ) -> Truncation | None:
        if self.backend == "svd" or min(matrix.shape) <= _EXACT_SIDE:
            return _stored(exact_truncation(matrix, self.tolerance, self.backend), matrix)
        product, eigenvalues, eigenvectors = decomposed or decompose(matrix)
        truncation = refined_truncation(product, eigenvalues, eigenvectors, self.tolerance, self.max_error)
        if truncation is not None and truncation.error > self.max_error:
            # the rounding of the Gram matrix seldom matters; that of its eigenvectors does
            self.repeated.append(name)
            product = product.double()
            values, vectors = torch.linalg.eigh(product)
            truncation = refined_truncation(product, values, vectors, self.tolerance, self.max_error)
        if truncation is None or truncation.error <= self.max_error:
            return _stored(truncation, matrix)
        return _stored(exact_truncation(matrix, self.tolerance), matrix)


def add_rank_gradients(
    truncations: Mapping[str, Truncation],
    weights: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    scale: float,
) -> float:
    """Add `scale` times the gradient of the mean rank loss to `gradients`, in place.

    Args:
        truncations: from a `RankSweep` over the same weights.
        weights: by name.
        gradients: by name, in the weights' shapes and dtype.
        scale: the paper's lambda.

    Returns:
        The mean rank loss over the truncated layers, 0 without any.
    """
    if not truncations:
        return 0.0

    def add(name: str) -> None:
        weight, gradient = weights[name].detach(), gradients[name]
        matrix = as_matrix(weight).float()
        out = as_matrix(gradient)
        share = scale / len(truncations)
        if out.dtype == torch.float32 and out.data_ptr() == gradient.data_ptr():
            truncations[name].add_gradient(matrix, out, share)
        else:  # a 16-bit gradient, or one whose memory order has no matrix view
            total = truncations[name].add_gradient(matrix, out.float().clone(), share)
            gradient.copy_(total.view(gradient.shape))

    on_gpu = next(iter(weights.values())).is_cuda
    in_threads(add, list(truncations), not on_gpu)
    return sum(truncation.loss for truncation in truncations.values()) / len(truncations)


def batched_eigh(matrices: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """`decompose` for the matrices with more than `_EXACT_SIDE` rows and columns, one call for each Gram
    size.

    A group that does not converge is left out; its members are then decomposed one by one.
    """
    sizes: dict[int, list[str]] = {}
    for name, matrix in matrices.items():
        if min(matrix.shape) > _EXACT_SIDE:
            sizes.setdefault(min(matrix.shape), []).append(name)
    found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for names in sizes.values():
        products = torch.stack([symmetric_gram(matrices[name]) for name in names])
        try:
            eigenvalues, eigenvectors = torch.linalg.eigh(products)
        except torch.linalg.LinAlgError:
            continue
        found.update(zip(names, zip(products, eigenvalues, eigenvectors, strict=True), strict=True))
    return found


def _stored(truncation: Truncation | None, matrix: Tensor) -> Truncation | None:
    """The same with the basis in the matrix's precision, as it is exchanged."""
    if truncation is None:
        return None
    return Truncation(
        truncation.rank,
        truncation.tail,
        truncation.squared_norm,
        truncation.basis.to(matrix.dtype).contiguous(),
        truncation.side,
        truncation.error,
    )


def cost(shape: Sequence[int]) -> float:
    """Relative time of one layer: the eigenvectors (q^3), and the products with the whole matrix (q^2 p)."""
    small, large = min(shape), max(shape)
    return small**2 * (5 * small + large)


def deal(costs: Mapping[str, float], hands: int) -> list[list[str]]:
    """Deal names to `hands` processes, the dearest first and always to the one with the least so far."""
    dealt: list[list[str]] = [[] for _ in range(hands)]
    loads = [0.0] * hands
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        hand = loads.index(min(loads))
        dealt[hand].append(name)
        loads[hand] += costs[name]
    return dealt


def in_threads(
    function: Callable[[_Item], _Result], items: Iterable[_Item], parallel: bool = True
) -> list[_Result]:
    """`[function(item) for item in items]`, one item a thread, with each thread's linear algebra on one core.

    The results do not depend on the number of threads.
    """
    items = list(items)
    threads = torch.get_num_threads()
    workers = min(threads, len(items), os.cpu_count() or 1)
    if not parallel or not items:
        return [function(item) for item in items]
    try:
        if workers == 1:
            torch.set_num_threads(1)
            return [function(item) for item in items]
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(threads)


def exchange(matrices: Mapping[str, Tensor], own: Mapping[str, Truncation]) -> dict[str, Truncation]:
    """Truncations of all processes on all processes, bit for bit the same.

    Args:
        matrices: all of them, equal on all processes, in the same order.
        own: truncations that this process made; no name is on two processes.
    """
    first = next(iter(matrices.values()))
    numbers = torch.zeros(len(matrices), 5, dtype=torch.float64, device=first.device)
    for row, name in enumerate(matrices):
        if name in own:
            mine = own[name]
            values = [1.0, mine.rank, mine.tail, mine.squared_norm, float(mine.side == "dropped")]
            numbers[row] = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(numbers)  # every row has one owner, so that sums are copies
    table = {name: row for name, row in zip(matrices, numbers.tolist(), strict=True) if row[0]}

    widths = {
        name: min(matrices[name].shape) - int(row[1]) if row[4] else int(row[1])
        for name, row in table.items()
    }
    sizes = [min(matrices[name].shape) * widths[name] for name in table]
    bases = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
    parts = dict(zip(table, bases.split(sizes), strict=True))
    for name, truncation in own.items():
        parts[name].copy_(truncation.basis.reshape(-1))
    dist.all_reduce(bases)
    return {
        name: Truncation(
            int(row[1]),
            row[2],
            row[3],
            parts[name].view(min(matrices[name].shape), widths[name]),
            "dropped" if row[4] else "kept",
        )
        for name, row in table.items()
    }
