"""Centred kernel alignment (Kornblith et al., arXiv 1905.00414): how alike two representations of the same
samples are.

X (n, d_1) and Y (n, d_2) hold n samples; K and L are their n x n Gram matrices. 1 is equal up to an
orthogonal map and isotropic scaling, 0 is unrelated.
"""

import torch
from torch import Tensor


def linear_gram(features: Tensor) -> Tensor:
    """X X^T, (n, n)."""
    return features @ features.t()


def rbf_gram(features: Tensor, threshold: float = 1.0) -> Tensor:
    """exp(-D / (2 threshold^2 m)), (n, n); m is the median of all n^2 squared distances D.

    Args:
        features: (n, d).
        threshold: bandwidth in units of the root of the median squared distance.
    """
    norms = features.square().sum(dim=1)
    distances = norms[:, None] + norms[None, :] - 2 * features @ features.t()
    median = torch.quantile(distances.flatten(), 0.5)
    return torch.exp(-distances / (2 * threshold**2 * median))


def hsic_biased(gram_x: Tensor, gram_y: Tensor) -> Tensor:
    """HSIC = tr(K H L H) / (n - 1)^2 with H = I - 1 1^T / n."""
    return (_centre(gram_x) * _centre(gram_y)).sum() / (len(gram_x) - 1) ** 2


def hsic_unbiased(gram_x: Tensor, gram_y: Tensor) -> Tensor:
    """HSIC_1 (Song et al., JMLR 2012): the unbiased estimate, which mini-batches may sum.

    [tr(K~ L~) + 1'K~1 1'L~1 / ((n-1)(n-2)) - 2 / (n-2) 1'K~ L~1] / (n (n-3)), diagonals set to zero.

    Args:
        gram_x: K (n, n), or a stack of them (..., n, n).
        gram_y: L, of a shape that broadcasts with K's.

    Raises:
        ValueError: n < 4, where the estimate does not exist.
    """
    n = gram_x.shape[-1]
    if n < 4:
        raise ValueError(f"The unbiased HSIC needs at least 4 samples a batch, got {n}.")
    k, l = _hollow(gram_x), _hollow(gram_y)  # noqa: E741 - the paper's names
    rows_k, rows_l = k.sum(dim=-1), l.sum(dim=-1)
    trace = (k * l).sum(dim=(-2, -1))
    sums = rows_k.sum(dim=-1) * rows_l.sum(dim=-1) / ((n - 1) * (n - 2))
    cross = 2 / (n - 2) * (rows_k * rows_l).sum(dim=-1)
    return (trace + sums - cross) / (n * (n - 3))


def cka(gram_x: Tensor, gram_y: Tensor, debiased: bool = False) -> Tensor:
    """CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)).

    Args:
        gram_x: K (n, n).
        gram_y: L (n, n).
        debiased: use the unbiased HSIC, which does not grow with the feature dimension.
    """
    hsic = hsic_unbiased if debiased else hsic_biased
    return hsic(gram_x, gram_y) / (hsic(gram_x, gram_x) * hsic(gram_y, gram_y)).sqrt()


def linear_cka(x: Tensor, y: Tensor, debiased: bool = False) -> Tensor:
    """CKA with linear kernels of features (n, d_1) and (n, d_2)."""
    return cka(linear_gram(x), linear_gram(y), debiased)


def rbf_cka(x: Tensor, y: Tensor, threshold: float = 1.0, debiased: bool = False) -> Tensor:
    """CKA with Gaussian kernels, see `rbf_gram`."""
    return cka(rbf_gram(x, threshold), rbf_gram(y, threshold), debiased)


class MinibatchCKA:
    """CKA of every layer of one network with every layer of another, over mini-batches (arXiv 2010.15327,
    section 3).

    Sums the unbiased HSIC of numerator and denominators over the batches and divides once.

    Args:
        rows: layers of the first network.
        columns: layers of the second network.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self.cross = torch.zeros(rows, columns, dtype=torch.float64)
        self.first = torch.zeros(rows, dtype=torch.float64)
        self.second = torch.zeros(columns, dtype=torch.float64)

    def update(self, first: list[Tensor], second: list[Tensor]) -> None:
        """Add a batch.

        Args:
            first: a feature (n, ...) for each layer of the first network, flattened here for each sample.
            second: the same for the second network.
        """
        k, l = _gram_stack(first), _gram_stack(second)  # noqa: E741 - (rows, n, n), (columns, n, n)
        self.cross += torch.stack([hsic_unbiased(gram, l) for gram in k])
        self.first += hsic_unbiased(k, k)
        self.second += hsic_unbiased(l, l)

    def compute(self) -> Tensor:
        """The matrix (rows, columns), float64; not a number where nothing was added."""
        return self.cross / (self.first[:, None] * self.second[None, :]).sqrt()


def _gram_stack(features: list[Tensor]) -> Tensor:
    """Gram matrices (layers, n, n), float64 on the CPU."""
    return torch.stack([_gram(feature.flatten(1)) for feature in features])


def _gram(flat: Tensor) -> Tensor:
    flat = flat if flat.dtype == torch.float64 else flat.float()
    # neither the mean nor the scale counts for CKA; without them float32 loses nothing that matters
    flat = (flat - flat.mean(dim=0)) / flat.shape[1] ** 0.5
    return linear_gram(flat).cpu().double()


def _centre(gram: Tensor) -> Tensor:
    means = gram.mean(dim=0)
    return gram - means[:, None] - means[None, :] + means.mean()


def _hollow(gram: Tensor) -> Tensor:
    return gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
