"""The dropped subspace of one matrix from single-precision eigenvectors, with the error of its gradient
estimated.

The eigenvectors of the Gram matrix G in single precision are wrong by about `eps lambda_1 / gap` for a pair
of directions on either side of the cut. Pairs near the cut have the smallest gaps; where one direction
dominates the spectrum the gradient is then off by up to 1e-2. One Newton step for the subspace squares the
error of all pairs that it looks at. It looks at the pairs near the cut first, which is cheap, and at all of
them where that is not enough.
"""

import torch
from torch import Tensor

from callbacks.pruning.rank_loss import Truncation, choose_rank, split

_BLOCK = 128  # of the symmetric Gram product
_WINDOW = 64  # directions on either side of the cut that the cheap step looks at
_SOLVER = 1.25  # eigenvectors are wrong by at most this times eps lambda_1 / gap
_ROUNDING = (
    2.5 * 2**-23
)  # a single-precision Gram matrix by this times (lambda_1 + 0.1) / q, between two of them
_PRODUCTS = 4e-6  # relative error of the single-precision products that follow
_AMBIGUOUS = 1e-6  # energy by which the chosen k must beat the runner-up
_LARGE_ANGLE = 0.1  # rad: beyond it one Newton step is no longer quadratic


def symmetric_gram(matrix: Tensor) -> Tensor:
    """The smaller Gram matrix (q, q) with each block above the diagonal computed once.

    Three quarters (q = 256) down to five eighths (q = 512) of the products of a plain one.
    """
    rows = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    out = rows.new_empty(rows.shape[0], rows.shape[0])
    _fill_gram(rows, out, 0, rows.shape[0])
    return out


def _fill_gram(rows: Tensor, out: Tensor, start: int, end: int) -> None:
    if end - start <= _BLOCK:
        out[start:end, start:end] = rows[start:end] @ rows[start:end].mT
        return
    middle = (start + end) // 2
    _fill_gram(rows, out, start, middle)
    _fill_gram(rows, out, middle, end)
    block = rows[start:middle] @ rows[middle:end].mT
    out[start:middle, middle:end] = block
    out[middle:end, start:middle] = block.mT


def decompose(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Smaller Gram matrix, its eigenvalues in ascending order, and its eigenvectors, in the matrix's
    precision.
    """
    product = symmetric_gram(matrix)
    eigenvalues, eigenvectors = torch.linalg.eigh(product)
    return product, eigenvalues, eigenvectors


def refined_truncation(
    product: Tensor, eigenvalues: Tensor, eigenvectors: Tensor, tolerance: float, max_error: float
) -> Truncation | None:
    """Truncate along given eigenvectors, improve the subspace, estimate the error that is left.

    Args:
        product: the Gram matrix G (q, q), made in single precision.
        eigenvalues: (q,) ascending.
        eigenvectors: (q, q) columns, in single or double precision.
        tolerance: the paper's delta.
        max_error: relative error of the gradient that ends the search.

    Returns:
        With the estimate in `error`, infinite where single precision cannot decide; None for a matrix of
        zeros.
    """
    squared_norm = float(product.diagonal().double().sum())
    if squared_norm == 0:
        return None
    shares = eigenvalues.double().clamp_min(0) / squared_norm
    rank, _ = choose_rank(shares.flip(0), tolerance)
    if rank == 0:
        return Truncation(0, 1.0, squared_norm, eigenvectors[:, :0], "kept")
    scaled = product / squared_norm
    truncation = _newton_step(scaled, shares, eigenvectors, rank, tolerance, squared_norm, _WINDOW)
    if truncation.error > max_error:
        truncation = _newton_step(scaled, shares, eigenvectors, rank, tolerance, squared_norm, len(shares))
    return truncation


def _newton_step(
    product: Tensor,
    shares: Tensor,
    eigenvectors: Tensor,
    rank: int,
    tolerance: float,
    squared_norm: float,
    window: int,
) -> Truncation:
    """Rotate the subspace towards invariance, as far as `window` directions on either side of the cut can
    tell.

    With S the window's eigenvectors on the side that the basis spans, O those on the other, and Lambda the
    eigenvalues, the residual R = G S - S Lambda has the components O^T R along O; `F_ij = (O^T R)_ij /
    (lambda_j - lambda_i)` are the angles by which S is off, and S + O F is off by their squares.
    """
    dropped = len(shares) - rank
    basis, _, side = split(eigenvectors, rank)
    low, high = slice(max(dropped - window, 0), dropped), slice(dropped, dropped + window)
    inner, outer = (low, high) if side == "dropped" else (high, low)

    near = eigenvectors[:, inner]
    residual = product @ near - near * shares[inner].to(near.dtype)
    # Rayleigh quotients: these eigenvalues to second order
    shares = shares.clone()
    shares[inner] += (near * residual).sum(0).double()
    gaps = _apart(shares[None, inner] - shares[outer, None])
    angles = (eigenvectors[:, outer].mT @ residual).double() / gaps
    basis = basis.clone()
    shift = 0 if side == "dropped" else dropped
    basis[:, inner.start - shift : inner.stop - shift] += eigenvectors[:, outer] @ angles.to(basis.dtype)

    tails = shares.cumsum(0)
    tail = float(tails[dropped - 1]) if side == "dropped" else 1 - float(shares[dropped:].sum())
    second_order = angles.abs() * angles.norm()
    second_order = second_order if side == "dropped" else second_order.mT
    solver = _SOLVER * torch.finfo(near.dtype).eps
    error = _error_left(shares, dropped, tail, solver, second_order, (high, low))
    if angles.abs().max() > _LARGE_ANGLE or _is_ambiguous(tails, dropped, tolerance):
        error = float("inf")
    return Truncation(rank, tail, squared_norm, basis, side, error)


def _apart(gaps: Tensor) -> Tensor:
    """Gaps without zeros: equal eigenvalues on both sides of the cut give angles beyond any bound."""
    return torch.where(gaps == 0, torch.finfo(gaps.dtype).tiny, gaps)


def _error_left(
    shares: Tensor,
    dropped: int,
    tail: float,
    solver: float,
    second_order: Tensor,
    seen: tuple[slice, slice],
) -> float:
    """Relative error of the gradient after the Newton step: what it leaves, and what it could not see.

    A rotation by `theta_ij` of the subspaces changes T by `theta_ij sqrt(lambda_i + lambda_j)`, against `||T
    - tau Y||^2 = tau (1 - tau)`. Pairs that the step has seen keep products of two angles, others the
    error of the eigensolver; all keep the rounding of the Gram matrix, whose entries are about (lambda_1 +
    0.1) / q of its trace. The constants cover all that was measured: flat, decaying, sparse and one-direction
    spectra of 64 to 1024 values.

    Args:
        shares: (q,) eigenvalues as shares of the energy, ascending.
        dropped: number of directions dropped.
        tail: their energy.
        solver: error of the eigenvectors, in units of lambda_1 / gap.
        second_order: angles that the step leaves at the pairs it has seen, (kept ones, dropped ones).
        seen: slices of `shares`: kept ones, dropped ones.
    """
    kept, low = shares[dropped:, None], shares[None, :dropped]
    gaps = _apart(kept - low).abs()
    largest = float(shares[-1])
    theta = solver * largest / gaps
    rows = slice(seen[0].start - dropped, seen[0].stop - dropped)
    theta[rows, seen[1]] = second_order
    theta += _ROUNDING * (largest + 0.1) / len(shares) / gaps
    energy = (theta.square() * (kept + low)).sum()
    return _PRODUCTS + float((energy / max(tail * (1 - tail), 1e-30)).sqrt())


def _is_ambiguous(tails: Tensor, dropped: int, tolerance: float) -> bool:
    """Whether a neighbour of the chosen k is as near to the tolerance, to within rounding."""
    distances = (tails - tolerance).abs()
    neighbours = distances[max(dropped - 2, 0) : dropped + 1]
    return bool((neighbours - distances[dropped - 1] < _AMBIGUOUS).sum() > 1)
