"""The rank gradient of many layers at once, with a bounded error (RPG, section 2.8).

A layer costs its smaller Gram matrix and that matrix's eigenvectors, in single precision. Rounding turns the
eigenvectors on either side of the cut by up to `eps lambda_1 / gap`; where that may show in the gradient, or
in the choice of k, the layer is decomposed again in double precision. Gram matrices of one size are
decomposed in one call, and layers are dealt over the processes of a distributed run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from callbacks.pruning.rank_loss import (
    Backend,
    Side,
    Truncation,
    as_matrix,
    exact_truncation,
    gram,
    truncation_along,
)

_SOLVER = 0.35  # eigenvectors are wrong by at most this times eps lambda_1 / gap, over all measured spectra
_BATCH = 1 << 24  # entries of the Gram matrices that are decomposed in one call
_EXACT_SIDE = 64  # up to here double precision costs next to nothing
_AMBIGUOUS = 1e-6  # energy by which the chosen k must beat its neighbours in single precision
_ENERGIES = (1e-20, 1e30)  # squared norms whose parts single precision can hold


class RankSweep:
    """Truncations of all layers, with the error of the gradients bounded.

    Args:
        tolerance: the paper's delta.
        backend: `gram` as described above; `svd` is the full SVD of every layer, as the reference does it.
        max_error: bound on the estimated relative error (Frobenius norm) of a layer's gradient.
    """

    def __init__(self, tolerance: float, backend: Backend = "gram", max_error: float = 1e-4) -> None:
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
            (one warning each), are missing. `repeated` then names the layers of this process that needed
            double precision.
        """
        matrices = {name: as_matrix(weight.detach()).float() for name, weight in weights.items()}
        self.repeated = []
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return self._truncate_all(matrices)
        by_cost = sorted(matrices, key=lambda name: -cost(matrices[name].shape))
        ours = by_cost[dist.get_rank() :: dist.get_world_size()]
        return exchange(matrices, self._truncate_all({name: matrices[name] for name in ours}))

    def _truncate_all(self, matrices: Mapping[str, Tensor]) -> dict[str, Truncation]:
        sizes: dict[int, list[str]] = {}
        for name, matrix in matrices.items():
            sizes.setdefault(min(matrix.shape), []).append(name)
        truncations: dict[str, Truncation | None] = {}
        for size, names in sizes.items():
            if self.backend == "gram" and size > _EXACT_SIDE:
                most = max(_BATCH // size**2, 1)
                for start in range(0, len(names), most):
                    batch = {name: matrices[name] for name in names[start : start + most]}
                    truncations |= self._in_single_precision(batch)
            truncations |= {
                name: self._exact(name, matrices[name]) for name in names if name not in truncations
            }
        return {name: truncation for name in matrices if (truncation := truncations[name]) is not None}

    def _in_single_precision(self, matrices: Mapping[str, Tensor]) -> dict[str, Truncation]:
        """Truncations of matrices with Gram matrices of one size, where the error is within the bound."""
        products = torch.stack([gram(matrix) for matrix in matrices.values()])
        energies = products.diagonal(dim1=1, dim2=2).double().sum(1).tolist()
        try:
            decomposed = zip(*torch.linalg.eigh(products), strict=True)
        except torch.linalg.LinAlgError:
            return {}
        truncations = {}
        for name, energy, (eigenvalues, eigenvectors) in zip(matrices, energies, decomposed, strict=True):
            if not _ENERGIES[0] < energy < _ENERGIES[1]:
                continue
            shares = eigenvalues.double().clamp_min(0) / energy
            truncation = truncation_along(shares * energy, eigenvectors, energy, self.tolerance)
            error = gradient_error(shares, truncation, torch.finfo(eigenvectors.dtype).eps)
            if error <= self.max_error and not is_ambiguous(shares, truncation.rank, self.tolerance):
                # without the other eigenvectors of the batch
                truncations[name] = replace(truncation, basis=truncation.basis.contiguous())
            else:
                self.repeated.append(name)
        return truncations

    def _exact(self, name: str, matrix: Tensor) -> Truncation | None:
        """Truncate one matrix by the backend, then in double precision; else leave it out with a warning."""
        reason: Exception | None = None
        for backend in dict.fromkeys((self.backend, "gram")):
            try:
                truncation = exact_truncation(matrix, self.tolerance, backend)
            except torch.linalg.LinAlgError as error:
                reason = error
            else:
                return truncation and replace(truncation, basis=truncation.basis.to(matrix.dtype))
        if name not in self._failed:
            rank_zero_warn(f"The rank loss leaves out {name}: it cannot be decomposed ({reason}).")
        self._failed.add(name)
        return None


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
    for name, truncation in truncations.items():
        gradient = gradients[name]
        matrix, out = as_matrix(weights[name].detach()).float(), as_matrix(gradient)
        if out.dtype == torch.float32 and out.data_ptr() == gradient.data_ptr():
            truncation.add_gradient(matrix, out, scale / len(truncations))
        else:  # a 16-bit gradient, or one whose memory order has no matrix view
            total = truncation.add_gradient(matrix, out.float().clone(), scale / len(truncations))
            gradient.copy_(total.view(gradient.shape))
    return sum(truncation.loss for truncation in truncations.values()) / max(len(truncations), 1)


def gradient_error(shares: Tensor, truncation: Truncation, eps: float) -> float:
    """Relative error of the gradient from rounding in the eigenvectors, estimated from above.

    A rotation by `theta_ij` between kept direction i and dropped direction j changes T by
    `theta_ij sqrt(lambda_i + lambda_j)`, against `||T - tau Y||^2 = tau (1 - tau)`.

    Args:
        shares: (q,) eigenvalues as shares of the energy, ascending.
        truncation: made along their eigenvectors.
        eps: of the eigenvectors' precision.
    """
    dropped = len(shares) - truncation.rank
    low, high = shares[:dropped], shares[dropped:, None]
    theta = _SOLVER * eps * shares[-1] / (high - low).clamp_min(torch.finfo(shares.dtype).tiny)
    moved = (theta.square() * (high + low)).sum()
    return float((moved / max(truncation.tail * (1 - truncation.tail), 1e-30)).sqrt())


def is_ambiguous(shares: Tensor, rank: int, tolerance: float) -> bool:
    """Whether a neighbour of the chosen k is as near to the tolerance, to within rounding."""
    dropped = len(shares) - rank
    distances = (shares.cumsum(0) - tolerance).abs()
    neighbours = distances[max(dropped - 2, 0) : dropped + 1]
    return bool((neighbours - distances[dropped - 1] < _AMBIGUOUS).sum() > 1)


def cost(shape: Sequence[int]) -> float:
    """Relative time of one layer: the eigenvectors (q^3), and the products with the whole matrix (q^2 p)."""
    small, large = min(shape), max(shape)
    return small**2 * (5 * small + large)


def exchange(matrices: Mapping[str, Tensor], ours: Mapping[str, Truncation]) -> dict[str, Truncation]:
    """Truncations of all processes on all processes, bit for bit the same.

    The eigenvectors are exchanged rather than the gradients: a tenth of the traffic.

    Args:
        matrices: all of them, equal on all processes, in the same order.
        ours: truncations that this process made; no name is on two processes.
    """
    first = next(iter(matrices.values()))
    numbers = torch.zeros(len(matrices), 4, dtype=torch.float64, device=first.device)
    sides = [min(matrix.shape) for matrix in matrices.values()]
    bases = [first.new_zeros(side, side // 2) for side in sides]  # of the side with fewer directions
    for index, name in enumerate(matrices):
        if name in ours:
            truncation = ours[name]
            values = (1.0, truncation.rank, truncation.tail, truncation.squared_norm)
            numbers[index] = torch.tensor(values, dtype=torch.float64)
            bases[index][:, : truncation.basis.shape[1]] = truncation.basis
    together = torch.cat([basis.flatten() for basis in bases])
    dist.all_reduce(numbers)  # every row has one owner, so that sums are copies
    dist.all_reduce(together)
    truncations = {}
    parts = together.split([basis.numel() for basis in bases])
    for name, side, part, row in zip(matrices, sides, parts, numbers.tolist(), strict=True):
        there, rank, tail, squared_norm = row
        if there:
            width = min(int(rank), side - int(rank))
            basis = part.view(side, side // 2)[:, :width]
            spanned: Side = "dropped" if side - rank <= rank else "kept"
            truncations[name] = Truncation(int(rank), tail, squared_norm, basis, spanned)
    return truncations
