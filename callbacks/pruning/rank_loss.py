"""The adversarial rank loss of one weight (RPG, section 2.2): pure functions, tensors in and tensors out.

With X the weight as a matrix, r its Frobenius norm, Y = X / r, and A the best rank-k approximation of Y taken
as a constant, the loss is `-||Y - A||^2` and its gradient `dL/dX = -(2 / r) (T - tau Y)` with T = Y - A, tau
= ||T||^2. Everything here follows from the eigenvectors of the smaller Gram matrix of X: if S spans the
directions that are dropped, T = S S^T Y (or Y S S^T for a tall matrix). No Y, A or T is ever formed.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Backend: TypeAlias = Literal["gram", "svd"]
Side: TypeAlias = Literal["dropped", "kept"]

_BLOCK = 128  # columns of a Gram matrix that are computed at once


@dataclass(frozen=True)
class Truncation:
    """The best low-rank approximation of one matrix, as far as the loss and its gradient need it.

    Args:
        rank: k, the number of directions kept.
        tail: tau, the share of the energy in the dropped directions; the loss is `-tail`.
        squared_norm: of the matrix, r^2.
        basis: (smaller side, n) orthonormal columns that span the side with fewer directions.
        side: which one `basis` spans.
    """

    rank: int
    tail: float
    squared_norm: float
    basis: Tensor
    side: Side

    @property
    def loss(self) -> float:
        """The rank loss, in [-1, 0]."""
        return -self.tail

    def add_gradient(self, matrix: Tensor, out: Tensor, scale: float = 1.0) -> Tensor:
        """`out += scale * dL/dX`, in place.

        Args:
            matrix: X (rows, columns), the matrix that was truncated.
            out: (rows, columns), same dtype as `matrix`.
            scale: weight of the loss.
        """
        if self.rank == 0:  # T = Y and tau = 1: the gradient is exactly 0
            return out
        factor = -2 * scale / self.squared_norm
        basis = self.basis.to(matrix.dtype)
        onto_dropped = factor if self.side == "dropped" else -factor
        if matrix.shape[0] <= matrix.shape[1]:
            out.addmm_(basis, basis.mT @ matrix, alpha=onto_dropped)
        else:
            out.addmm_(matrix @ basis, basis.mT, alpha=onto_dropped)
        # what is not kept is dropped: T = Y - (kept part)
        rest = -self.tail if self.side == "dropped" else 1 - self.tail
        return out.add_(matrix, alpha=factor * rest)


def as_matrix(weight: Tensor) -> Tensor:
    """(out, rest) view of a weight of two or more dimensions."""
    return weight.reshape(weight.shape[0], -1)


def gram(matrix: Tensor) -> Tensor:
    """The smaller Gram matrix (q, q), q = min(rows, columns): its lower triangle, which is all that
    `torch.linalg.eigh` reads. What stands above is partly zero.
    """
    rows = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    product = rows.new_zeros(len(rows), len(rows))
    for start in range(0, len(rows), _BLOCK):
        end = start + _BLOCK
        product[start:, start:end] = rows[start:] @ rows[start:end].mT
    return product


def choose_rank(energies: Tensor, tolerance: float) -> tuple[int, float]:
    """The k whose dropped energy is nearest to the tolerance, and that energy.

    Args:
        energies: (q,) squared singular values in descending order, with sum 1.
        tolerance: the paper's delta, an energy share in (0, 1).

    Returns:
        k in [0, q - 1] (the larger one on a tie: one direction at least is dropped), and the dropped energy.
    """
    tails = energies.flip(0).cumsum(0)
    dropped = int((tails - tolerance).abs().argmin())
    return len(energies) - 1 - dropped, float(tails[dropped])


def truncation_along(
    eigenvalues: Tensor, eigenvectors: Tensor, squared_norm: float, tolerance: float
) -> Truncation:
    """The truncation that the eigenvectors of the smaller Gram matrix give.

    Args:
        eigenvalues: (q,) in ascending order, not negative.
        eigenvectors: (q, q) columns in the same order.
        squared_norm: of the matrix, not 0.
        tolerance: the paper's delta.
    """
    rank, tail = choose_rank(eigenvalues.double().flip(0) / squared_norm, tolerance)
    tail = min(tail, 1.0)  # rounding of the sum
    dropped = len(eigenvalues) - rank
    if dropped <= rank:
        return Truncation(rank, tail, squared_norm, eigenvectors[:, :dropped], "dropped")
    return Truncation(rank, tail, squared_norm, eigenvectors[:, dropped:], "kept")


def exact_truncation(matrix: Tensor, tolerance: float, backend: Backend = "gram") -> Truncation | None:
    """The truncation of one matrix in double precision (`gram`), or by a full SVD in its own precision
    (`svd`).

    Args:
        matrix: (rows, columns).
        tolerance: the paper's delta.
        backend: `svd` is the reference; `gram` is faster and, in double precision, as exact.

    Returns:
        None for a matrix of zeros, which has no direction to keep or drop.

    Raises:
        torch.linalg.LinAlgError: the decomposition did not converge.
    """
    if backend == "svd":
        left, singular_values, right = torch.linalg.svd(matrix.float(), full_matrices=False)
        eigenvalues = _without_noise(singular_values).double().square().flip(0)
        eigenvectors = (left if matrix.shape[0] <= matrix.shape[1] else right.mT).flip(1)
    else:
        eigenvalues, eigenvectors = torch.linalg.eigh(gram(matrix.double()))
        eigenvalues = _without_noise(eigenvalues)
    squared_norm = float(eigenvalues.sum())
    if squared_norm == 0:
        return None
    return truncation_along(eigenvalues, eigenvectors, squared_norm, tolerance)


def _without_noise(values: Tensor) -> Tensor:
    """Values that are rounding of zero as zeros: which of them is called kept must not hang on noise."""
    noise = len(values) * torch.finfo(values.dtype).eps * values.max()
    return torch.where(values > noise, values, torch.zeros_like(values))


def rank_loss(
    weight: Tensor, tolerance: float, backend: Backend = "gram"
) -> tuple[float, Tensor, int | None]:
    """Loss, gradient and kept rank of one weight.

    Example:
        >>> loss, gradient, rank = rank_loss(torch.eye(4), tolerance=0.2)
        >>> loss, rank
        (-0.25, 3)

    Args:
        weight: (out, ...) of two or more dimensions.
        tolerance: the paper's delta.
        backend: see `exact_truncation`.

    Returns:
        The loss in [-1, 0], its gradient in the weight's shape and dtype (at every entry, masked ones too),
        and k. A weight of zeros has loss 0, gradient 0 and rank None: it is not to be counted.
    """
    matrix = as_matrix(weight.detach())
    gradient = torch.zeros_like(matrix)
    truncation = exact_truncation(matrix, tolerance, backend)
    if truncation is None:
        return 0.0, gradient.view_as(weight), None
    return truncation.loss, truncation.add_gradient(matrix, gradient).view_as(weight), truncation.rank


# For reports


def energies(weight: Tensor) -> Tensor:
    """(q,) squared singular values of the unit-norm matrix, descending; zeros for a weight of zeros."""
    values = torch.linalg.eigvalsh(gram(as_matrix(weight.detach()).double())).clamp_min(0).flip(0)
    total = values.sum()
    return values / total if total > 0 else values


def delta_rank(energies: Tensor, tolerance: float = 0.1) -> int:
    """Smallest k whose dropped energy is at most the tolerance; 0 for zeros (RPG, section 2.7)."""
    dropped = energies.sum() - energies.cumsum(0)
    if not energies.sum() > 0:
        return 0
    return int((dropped > tolerance).sum()) + 1


def effective_rank(energies: Tensor) -> float:
    """`exp(-sum p log p)` of the energy shares p; 0 for a weight of zeros."""
    if not energies.sum() > 0:
        return 0.0
    return float(torch.special.entr(energies).sum().exp())
