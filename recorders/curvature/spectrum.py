"""The result of an eigendecomposition of a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from hild_xr.recorders.curvature.blocks import Block

Path = Literal["dense", "lanczos", "warm", "gram"]
"""How a block was solved: whole matrix, products, products from earlier eigenvectors on, or the Gram matrix
of per-sample gradients."""


@dataclass(frozen=True)
class BlockSpectrum:
    """Eigenpairs of a block of a curvature matrix, or of a batch of sub-blocks.

    All tensors are detached and lie on the model's device. ``batch`` is ``(rows,)``
    for blocks of rows and empty otherwise.

    Parameters
    ----------
    block
        The block.
    eigenvalues
        Shape (*batch, k), float64, in the order asked for.
    residuals
        Shape (*batch, k), float64: ``|A v - lambda v|`` from a real product, divided by the
        pair's own absolute eigenvalue, or by a thousandth of the largest one of the sub-block if that is
        more.
    converged
        Shape (*batch, k), bool: whether the residual is at most the tolerance.
    n_matvec
        Shape (*batch,), int64: matrix-vector products spent; 0 for a dense solve.
    n_certain
        Shape (*batch,), int64: how many of the pairs, from the first on, are surely the leading ones, with
        a probability of 99 %; all after a dense solve, none where corrections of earlier eigenvectors
        looked for no others.
    trace
        Shape (*batch,), float64: NaN where it was not computed exactly.
    eigenvectors
        Shape (*batch, k, *vector_shape): unit vectors on the dims of the weights; signs are arbitrary.
    matrix
        Shape (*batch, p, p) over the flattened vector dims, or ``None`` where not asked for.
    path
        How the block was solved.
    """

    block: Block
    eigenvalues: Tensor
    residuals: Tensor
    converged: Tensor
    n_matvec: Tensor
    n_certain: Tensor
    trace: Tensor
    eigenvectors: Tensor
    matrix: Tensor | None
    path: Path
