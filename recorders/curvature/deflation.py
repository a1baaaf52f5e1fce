"""Known eigenpairs taken out of a matrix, so that random vectors need to see the rest only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hild_xr.recorders.curvature.operators import BlockOperator
    from hild_xr.recorders.curvature.spectrum import BlockSpectrum


class Deflation:
    r"""The projection on the complement of known eigenvectors, for each sub-block.

    Only converged pairs are taken. Their residuals change the eigenvalues of the rest at
    second order.

    Parameters
    ----------
    operator
        The block's matrix.
    known
        Some of its eigenpairs; ``None`` for none.

    Attributes
    ----------
    values
        Shape (count, k), float64 on the CPU: the known eigenvalues, 0 where not taken.
    taken
        Shape (count, k), bool on the CPU.

    Raises
    ------
    ValueError
        If the eigenpairs are those of another block.
    """

    def __init__(self, operator: BlockOperator, known: BlockSpectrum | None) -> None:
        self._vectors: Tensor | None = None
        self.values = torch.zeros(operator.count, 0, dtype=torch.float64)
        self.taken = torch.zeros(operator.count, 0, dtype=torch.bool)
        if known is None:
            return
        if known.block != operator.block:
            raise ValueError(
                f"the known eigenpairs are those of {known.block.label!r} ({known.block.kind}), not of "
                f"{operator.block.label!r} ({operator.block.kind}): take them from the same blocks"
            )
        k = known.eigenvalues.shape[-1]
        taken = known.converged.reshape(operator.count, k).cpu().clone()
        taken[:, operator.size - 1 :] = False  # a dimension is left for the probes
        values = known.eigenvalues.reshape(operator.count, k).to("cpu", torch.float64)
        vectors = known.eigenvectors.reshape(operator.count, k, operator.size).to(operator.dtype)
        mask = taken.to(vectors.device)[..., None]
        self.taken, self.values = taken, torch.where(taken, values, 0.0)
        self._vectors = torch.where(mask, vectors, 0.0)

    @property
    def numbers(self) -> Tensor:
        """How many pairs are taken from each sub-block, shape (count,)."""
        return self.taken.sum(1)

    @property
    def trace(self) -> Tensor:
        """Sum of the eigenvalues taken from each sub-block, shape (count,), float64."""
        return self.values.sum(1)

    @property
    def vectors(self) -> Tensor | None:
        """Their eigenvectors, shape (count, k, p) with zeros where not taken; ``None`` if none are known."""
        return self._vectors

    def project(self, vectors: Tensor, rows: Tensor) -> Tensor:
        """Return the parts of vectors (n, p) orthogonal to what is known of sub-blocks rows (n,)."""
        if self._vectors is None:
            return vectors
        if len(self._vectors) == 1:
            return vectors - (vectors @ self._vectors[0].T) @ self._vectors[0]
        basis = self._vectors[rows]
        return vectors - (basis.mT @ (basis @ vectors[:, :, None]))[:, :, 0]
