"""Diagonal of a block: exact where that is cheap, estimated elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hild_xr.recorders.curvature.deflation import Deflation
from hild_xr.recorders.curvature.estimate import (
    Estimate,
    exact_estimate,
    random_signs,
    row_chunks,
)
from hild_xr.recorders.curvature.traces import check_products, finite_product, of_matrices

if TYPE_CHECKING:
    from hild_xr.recorders.curvature.operators import BlockOperator
    from hild_xr.recorders.curvature.spectrum import BlockSpectrum


def diagonal(
    operator: BlockOperator,
    products: int,
    *,
    seed: int = 0,
    known: BlockSpectrum | None = None,
    max_bytes: int = 2**30,
) -> Estimate:
    r"""Return the diagonal of each sub-block.

    Exact where the operator knows it (rows of linear layers, and of held per-sample gradients), and
    where p products give it. Else from :math:`E[z \odot Az]` for random signs z (Bekas, Kokiopoulou and Saad
    2007), whose variance is the sum of squares beside the diagonal. With known eigenvectors U,
    :math:`A = UU^TA + (I - UU^T)A`: the first part is taken exactly, at a product for each, and
    the signs see the second.

    Parameters
    ----------
    operator, products, seed, known, max_bytes
        As for :func:`~hild_xr.recorders.curvature.traces.trace`; the products for the known
        eigenvectors come on top.

    Returns
    -------
    Estimate
        Of value shape (*batch, *vector_shape): one number for each parameter.

    Raises
    ------
    NonFiniteCurvatureError
        If a product is NaN or infinite.
    ValueError
        If ``products`` is below 2, or ``known`` belongs to another block.
    """
    check_products(products)
    free = operator.diagonal()
    if free is not None:
        return _shaped(exact_estimate(operator, free))
    if operator.size <= products:
        values = of_matrices(operator, lambda matrices: matrices.diagonal(dim1=-2, dim2=-1), max_bytes)
        return _shaped(exact_estimate(operator, values, operator.size))
    deflation, generator = Deflation(operator, known), torch.Generator().manual_seed(seed)
    bytes_each = 40 * operator.size
    parts = [
        _estimated(operator, deflation, generator, rows, products)
        for rows in row_chunks(operator, bytes_each, max_bytes)
    ]
    value, error = map(torch.cat, zip(*parts, strict=True))
    spent = torch.full(operator.block.batch_shape, products + deflation.taken.shape[1])
    return _shaped(Estimate(operator.block, value, error, spent))


def _estimated(
    operator: BlockOperator, deflation: Deflation, generator: torch.Generator, rows: Tensor, products: int
) -> tuple[Tensor, Tensor]:
    """Return estimates and standard errors (rows, p); samples are summed as they come, none is kept."""
    mean = torch.zeros(len(rows), operator.size, dtype=torch.float64)
    squares = torch.zeros_like(mean)
    for n in range(1, products + 1):
        signs = random_signs(generator, (len(rows), operator.size), operator)
        image = finite_product(operator, signs, rows)
        sample = (signs * deflation.project(image, rows)).double().cpu()
        difference = sample - mean
        mean += difference / n
        squares += difference * (sample - mean)
    error = (squares / (products - 1) / products).sqrt()
    return mean + _of_known(operator, deflation, rows), error


def _of_known(operator: BlockOperator, deflation: Deflation, rows: Tensor) -> Tensor:
    """Return the diagonals of U U^T A for the known eigenvectors U, shape (rows, p)."""
    known = torch.zeros(len(rows), operator.size, dtype=torch.float64)
    if deflation.vectors is None:
        return known
    for vectors in deflation.vectors[rows].unbind(1):
        known += (vectors * finite_product(operator, vectors, rows)).double().cpu()
    return known


def _shaped(estimate: Estimate) -> Estimate:
    shape = (*estimate.block.batch_shape, *estimate.block.vector_shape)
    return Estimate(
        estimate.block,
        estimate.value.reshape(shape),
        estimate.standard_error.reshape(shape),
        estimate.n_matvec,
    )
