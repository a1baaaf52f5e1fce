"""What an eigensolver returns: pairs in the order asked for, with honest residuals; and the dense solver."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from hild_xr.recorders.curvature.arguments import real_number, whole_number
from hild_xr.recorders.curvature.errors import NonFiniteCurvatureError

Which = Literal["magnitude", "largest", "smallest", "both"]
"""Which eigenvalues: largest absolute, largest, smallest, or from both ends in turn."""


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenpairs of a batch of symmetric matrices.

    Parameters
    ----------
    eigenvalues
        Shape (*batch, k), float64, in the order asked for.
    eigenvectors
        Shape (*batch, k, p), orthonormal rows.
    residuals
        Shape (*batch, k), float64: ``|A v - lambda v|`` from a real product, divided by
        the pair's own absolute eigenvalue, or by a thousandth of the largest one found for the matrix if
        that is more.
    converged
        Shape (*batch, k): whether the residual is finite and at most the tolerance.
    n_matvec
        Shape (*batch,), int64: products spent, also rounded ones; 0 for a dense solve.
    n_certain
        Shape (*batch,), int64: how many of the pairs, from the first on, are surely the leading ones; see
        :func:`~hild_xr.recorders.curvature.certainty.certain_pairs`.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    residuals: Tensor
    converged: Tensor
    n_matvec: Tensor
    n_certain: Tensor


def ranking(eigenvalues: Tensor, which: Which) -> Tensor:
    """Return the indices that bring eigenvalues (last dim) into the order asked for.

    ``"both"`` takes the largest, the smallest, the second largest, and so on: k of them are k/2 of each end.

    Raises
    ------
    ValueError
        If ``which`` is unknown.

    Examples
    --------
    >>> ranking(torch.tensor([1.0, -3.0, 2.0]), "magnitude")
    tensor([1, 2, 0])
    >>> ranking(torch.tensor([1.0, -3.0, 2.0]), "both")
    tensor([2, 1, 0])
    """
    if which not in get_args(Which):
        raise ValueError(f"which must be one of {', '.join(map(repr, get_args(Which)))}; got {which!r}")
    if which == "both":
        falling, n = (-eigenvalues).argsort(dim=-1, stable=True), eigenvalues.shape[-1]
        turns = torch.arange(n, device=eigenvalues.device)
        return falling[..., torch.where(turns % 2 == 0, turns // 2, n - 1 - turns // 2)]
    key = {"magnitude": -eigenvalues.abs(), "largest": -eigenvalues, "smallest": eigenvalues}[which]
    return key.argsort(dim=-1, stable=True)


def dense_eigenpairs(
    matrix: Tensor, k: int, *, which: Which = "magnitude", tol: float = 1e-3, name: str = "matrix"
) -> Eigenpairs:
    """Solve whole symmetric matrices in float64 on the CPU.

    The CPU is used for any device: the matrices are small, and GPU libraries fail
    on some low-rank ones.

    Parameters
    ----------
    matrix
        Shape (*batch, p, p); symmetrised before the solve, while the residuals are
        those of the matrix as given.
    k
        Number of eigenpairs, 1 to p.
    which
        End of the spectrum.
    tol
        Relative residual up to which a pair counts as converged.
    name
        Name in error messages.

    Returns
    -------
    Eigenpairs
        Of batch shape (*batch,), on the matrix's device.

    Raises
    ------
    NonFiniteCurvatureError
        If the matrix holds NaN or infinity.
    ValueError
        If k is out of range.

    Examples
    --------
    >>> pairs = dense_eigenpairs(torch.diag(torch.tensor([1.0, -3.0, 2.0])), 2)
    >>> pairs.eigenvalues
    tensor([-3., 2.], dtype=torch.float64)
    """
    size = matrix.shape[-1]
    check_arguments(size, k, tol)
    if not bool(matrix.isfinite().all()):
        raise NonFiniteCurvatureError(name, "an entry of the matrix")
    exact = matrix.detach().to("cpu", torch.float64)
    eigenvalues, columns = torch.linalg.eigh((exact + exact.mT) / 2)
    scale = eigenvalues.abs().amax(-1)
    order = ranking(eigenvalues, which)[..., :k]
    eigenvalues = eigenvalues.gather(-1, order)
    vectors = columns.mT.gather(-2, order[..., None].expand(*order.shape, size))
    norms = (vectors @ exact.mT - eigenvalues[..., None] * vectors).norm(dim=-1)
    count = torch.zeros(matrix.shape[:-2], dtype=torch.int64)
    return certified(eigenvalues, vectors.to(matrix), norms, scale, tol, count, torch.full_like(count, k))


def rayleigh_ritz(
    vectors: Tensor,
    products: Tensor,
    *,
    which: Which,
    tol: float,
    scale: Tensor,
    n_matvec: Tensor,
    n_certain: Tensor,
    name: str = "matrix",
) -> Eigenpairs:
    """Return the Ritz pairs of the span of orthonormal vectors whose products are known.

    Parameters
    ----------
    vectors, products
        Shape (n, k, p): orthonormal rows, and the matrix times them.
    which
        Order of the result.
    tol
        Relative residual up to which a pair counts as converged.
    scale
        Shape (n,): largest absolute Ritz value known so far; see :func:`own_scale`.
    n_matvec
        Shape (n,): products spent.
    n_certain
        Shape (n,): pairs known to be the leading ones.
    name
        Name in error messages.

    Returns
    -------
    Eigenpairs
        Of batch shape (n,), with residuals from the products given.

    Raises
    ------
    NonFiniteCurvatureError
        If the products hold NaN or infinity.

    Examples
    --------
    >>> matrix, vectors = torch.diag(torch.tensor([4.0, 1.0, 0.0])), torch.eye(3)[None, :2]
    >>> pairs = rayleigh_ritz(
    ...     vectors,
    ...     vectors @ matrix,
    ...     which="largest",
    ...     tol=1e-3,
    ...     scale=torch.zeros(1),
    ...     n_matvec=torch.tensor([2]),
    ...     n_certain=torch.tensor([2]),
    ... )
    >>> pairs.eigenvalues
    tensor([[4., 1.]], dtype=torch.float64)
    """
    if not bool(products.isfinite().all()):
        raise NonFiniteCurvatureError(name, "a product")
    projected = (vectors @ products.mT).to("cpu", torch.float64)
    eigenvalues, rotation = torch.linalg.eigh((projected + projected.mT) / 2)
    order = ranking(eigenvalues, which)
    eigenvalues = eigenvalues.gather(-1, order)
    rotation = rotation.gather(-1, order[:, None, :].expand_as(rotation)).mT.to(vectors)
    vectors, products = rotation @ vectors, rotation @ products
    difference = products - eigenvalues.to(vectors)[..., None] * vectors
    norms = torch.linalg.vector_norm(difference, dim=-1, dtype=torch.float64).cpu()
    scale = torch.maximum(scale.cpu(), eigenvalues.abs().amax(-1))
    return certified(eigenvalues, vectors, norms, scale, tol, n_matvec, n_certain)


def check_arguments(size: int, k: int, tol: float) -> None:
    """Raise an error unless k pairs of a matrix of this size can be asked for at this tolerance."""
    whole_number("k, the number of eigenpairs,", k)
    if not 1 <= k <= size:
        raise ValueError(f"k must be between 1 and the size {size} of the matrix; got {k}")
    if not 0 < real_number("tol, the relative residual to reach,", tol) < math.inf:
        raise ValueError(f"tol, the relative residual to reach, must be a positive number; got {tol}")


def own_scale(eigenvalues: Tensor, scale: Tensor) -> Tensor:
    """Return what the residual of each pair is divided by: its own size, down to a floor.

    A residual relative to the largest eigenvalue says nothing of a pair that is 1000 times
    smaller: beside one huge outlier every other vector would pass. Below a thousandth of the
    largest, products in float32 are not exact enough to ask for more.

    Parameters
    ----------
    eigenvalues
        Shape (*batch, k).
    scale
        Shape (*batch, 1): largest absolute eigenvalue found.

    Examples
    --------
    >>> own_scale(torch.tensor([-8.0, 2.0, 0.0]), torch.tensor([8.0]))
    tensor([8.0000, 2.0000, 0.0080])
    """
    return torch.maximum(eigenvalues.abs(), 1e-3 * scale)


def certified(
    eigenvalues: Tensor,
    vectors: Tensor,
    norms: Tensor,
    scale: Tensor,
    tol: float,
    n_matvec: Tensor,
    n_certain: Tensor,
) -> Eigenpairs:
    """Flag pairs by the norms of their residuals.

    Parameters
    ----------
    eigenvalues, norms
        Shape (*batch, k), float64, on the CPU.
    vectors
        Shape (*batch, k, p), on the device of the result.
    scale
        Shape (*batch,): largest absolute eigenvalue found; see :func:`own_scale`.
    tol
        Relative residual up to which a pair counts as converged.
    n_matvec, n_certain
        Shape (*batch,).

    Examples
    --------
    >>> one = torch.ones(1, 1, dtype=torch.float64)
    >>> count = torch.tensor([1])
    >>> pairs = certified(one, torch.ones(1, 1, 1), 0.1 * one, one[0], 0.2, count, count)
    >>> pairs.residuals, pairs.converged
    (tensor([[0.1000]], dtype=torch.float64), tensor([[True]]))
    """
    # The zero matrix has residual 0, not 0 / 0.
    own = own_scale(eigenvalues, scale[..., None])
    residuals = torch.where(norms == 0, 0.0, norms / own)
    converged, device = (residuals <= tol) & residuals.isfinite(), vectors.device
    numbers = (part.to(device) for part in (residuals, converged, n_matvec, n_certain))
    return Eigenpairs(eigenvalues.to(device), vectors, *numbers)
