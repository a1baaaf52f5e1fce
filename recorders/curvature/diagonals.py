"""Diagonal of a block: exact where that is cheap, estimated elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hild_xr.recorders.curvature.deflation import Deflation
from hild_xr.recorders.curvature.estimate import (
    Estimate,
    check_finite,
    exact_estimate,
    random_signs,
    row_chunks,
)
from hild_xr.recorders.curvature.operators import (
    BlockOperator,
    FactoredRowsSecondMoment,
    RowsSecondMoment,
    WeightedRows,
)
from hild_xr.recorders.curvature.traces import check_products

if TYPE_CHECKING:
    from hild_xr.recorders.curvature.spectrum import BlockSpectrum

OF_ROWS = (WeightedRows, FactoredRowsSecondMoment, RowsSecondMoment)
"""Operators of rows whose diagonal is a sum over the samples."""


def diagonal(
    operator: BlockOperator,
    products: int,
    *,
    seed: int = 0,
    known: BlockSpectrum | None = None,
    max_bytes: int = 2**30,
) -> Estimate:
    r"""Return the diagonal of each sub-block.

    Exact for rows of linear layers, for rows of held per-sample gradients, and where p products
    give it. Else from :math:`E[z \odot Az]` for random signs z (Bekas, Kokiopoulou and Saad
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
    if isinstance(operator, OF_ROWS):
        return _shaped(exact_estimate(operator, of_rows(operator)))
    if operator.size <= products:
        return _shaped(exact_estimate(operator, _of_matrix(operator, max_bytes), operator.size))
    deflation, generator = Deflation(operator, known), torch.Generator().manual_seed(seed)
    bytes_each = 40 * operator.size
    parts = [
        _estimated(operator, deflation, generator, rows, products)
        for rows in row_chunks(operator, bytes_each, max_bytes)
    ]
    value, error = map(torch.cat, zip(*parts, strict=True))
    spent = torch.full(operator.block.batch_shape, products + deflation.taken.shape[1])
    return _shaped(Estimate(operator.block, value, error, spent))


def of_rows(operator: BlockOperator) -> Tensor:
    """Return the diagonals of rows from their factors, shape (count, p), one pass over the samples."""
    if isinstance(operator, WeightedRows):
        return operator._weights.T @ operator._h.square() + operator._l2
    if isinstance(operator, FactoredRowsSecondMoment):
        delta, h, shift = operator._delta, operator._h, operator._shift
        squares = delta.square().T @ h.square() / len(h)
        return squares if shift is None else squares + 2 * shift * (delta.T @ h) / len(h) + shift.square()
    if isinstance(operator, RowsSecondMoment):
        return operator._gradients.square().mean(1) + operator._ridge
    raise TypeError(f"no diagonal is known in closed form for {type(operator).__name__}")


def _estimated(
    operator: BlockOperator, deflation: Deflation, generator: torch.Generator, rows: Tensor, products: int
) -> tuple[Tensor, Tensor]:
    """Return estimates and standard errors (rows, p); samples are summed as they come, none is kept."""
    mean = torch.zeros(len(rows), operator.size, dtype=torch.float64)
    squares = torch.zeros_like(mean)
    for n in range(1, products + 1):
        signs = random_signs(generator, (len(rows), operator.size), operator)
        image = operator.product(signs, rows)
        check_finite(operator, image)
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
        image = operator.product(vectors, rows)
        check_finite(operator, image)
        known += (vectors * image).double().cpu()
    return known


def _of_matrix(operator: BlockOperator, max_bytes: int) -> Tensor:
    values = [
        operator.matrix(rows).diagonal(dim1=-2, dim2=-1)
        for rows in row_chunks(operator, 8 * operator.size**2, max_bytes)
    ]
    return torch.cat(values)


def _shaped(estimate: Estimate) -> Estimate:
    shape = (*estimate.block.batch_shape, *estimate.block.vector_shape)
    return Estimate(
        estimate.block,
        estimate.value.reshape(shape),
        estimate.standard_error.reshape(shape),
        estimate.n_matvec,
    )
