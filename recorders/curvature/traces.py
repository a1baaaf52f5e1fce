"""Trace and Frobenius norm of a block: exact where that is cheap, estimated elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hild_xr.recorders.curvature.arguments import whole_number
from hild_xr.recorders.curvature.deflation import Deflation
from hild_xr.recorders.curvature.estimate import (
    Estimate,
    check_finite,
    exact_estimate,
    mean_of_samples,
    random_directions,
    row_chunks,
)
from hild_xr.recorders.curvature.operators import BlockOperator, SecondMoment

if TYPE_CHECKING:
    from collections.abc import Callable

    from hild_xr.recorders.curvature.spectrum import BlockSpectrum


def trace(
    operator: BlockOperator,
    products: int,
    *,
    seed: int = 0,
    known: BlockSpectrum | None = None,
    max_bytes: int = 2**30,
) -> Estimate:
    r"""Return the trace of each sub-block.

    Exact where the operator knows it or p products give it. Else by Hutch++ (Meyer, Musco, Musco
    and Woodruff 2021, arXiv 2010.09649): a third of the products finds a basis Q of what is
    large, a third takes :math:`\mathrm{tr}\,Q^TAQ` exactly, and the rest estimates the trace on the
    complement from directions z drawn uniformly there, where little is left to vary:
    :math:`\mathrm{tr} A = \sum_{known} \lambda + \mathrm{tr}\,Q^TAQ + m\,E[z^TAz]`, m dimensions.

    Parameters
    ----------
    operator
        The block's matrix.
    products
        Products allowed for each sub-block, at least 2.
    seed
        Seed of the random vectors.
    known
        Eigenpairs of the same matrix; they enter as they are.
    max_bytes
        Memory for the vectors of sub-blocks treated at once.

    Returns
    -------
    Estimate
        Of value shape (*batch,); the standard error comes from the spread of the last third.

    Raises
    ------
    NonFiniteCurvatureError
        If a product is NaN or infinite.
    ValueError
        If ``products`` is below 2, or ``known`` belongs to another block.
    """
    check_products(products)
    free = operator.trace()
    if free is not None:
        return exact_estimate(operator, free)
    if operator.size <= products:
        return exact_estimate(operator, of_matrices(operator, _diagonal_sum, max_bytes), operator.size)
    deflation, generator = Deflation(operator, known), torch.Generator().manual_seed(seed)
    sketched = min(products // 3, operator.size - 1 - deflation.taken.shape[1])
    sketched = max(0, sketched)
    bytes_each = 4 * products * operator.size * torch.finfo(operator.dtype).bits // 8
    samples = [
        _hutch_plus_plus(operator, deflation, generator, rows, sketched, products - 2 * sketched)
        for rows in row_chunks(operator, bytes_each, max_bytes)
    ]
    return mean_of_samples(operator, torch.cat(samples, 1), products)


def frobenius_norm(
    operator: BlockOperator,
    products: int,
    *,
    seed: int = 0,
    known: BlockSpectrum | None = None,
    max_bytes: int = 2**30,
) -> Estimate:
    r"""Return the Frobenius norm of each sub-block.

    Exact where p products give it, or the M x M Gram matrix of a second moment fits the memory.
    Else from :math:`|A|_F^2 = \sum_{known}\lambda^2 + m\,E|Az|^2` for directions z drawn
    uniformly in the m dimensions that are left; the error of the root is that of the square
    divided by twice the root (delta method).

    Parameters
    ----------
    operator, products, seed, known, max_bytes
        As for :func:`trace`.

    Returns
    -------
    Estimate
        Of value shape (*batch,).

    Raises
    ------
    NonFiniteCurvatureError
        If a product is NaN or infinite.
    ValueError
        If ``products`` is below 2, or ``known`` belongs to another block.
    """
    check_products(products)
    if operator.size <= products:
        return exact_estimate(operator, of_matrices(operator, _square_sum, max_bytes).sqrt(), operator.size)
    if isinstance(operator, SecondMoment) and _gram_fits(operator, max_bytes):
        return exact_estimate(operator, operator.norm_from_gram(operator.gram()))
    deflation, generator = Deflation(operator, known), torch.Generator().manual_seed(seed)
    bytes_each = 4 * products * operator.size * torch.finfo(operator.dtype).bits // 8
    parts = []
    for rows in row_chunks(operator, bytes_each, max_bytes):
        owners, starts = _directions(operator, deflation, generator, rows, products, None)
        squares = finite_product(operator, starts, owners).double().square().sum(1).cpu()
        dimensions = operator.size - deflation.numbers[rows.cpu()]
        known_part = deflation.values[rows.cpu()].square().sum(1)
        parts.append(known_part + dimensions * squares.reshape(len(rows), products).T)
    squared = mean_of_samples(operator, torch.cat(parts, 1), products)
    norm = squared.value.sqrt()
    error = torch.where(norm > 0, squared.standard_error / (2 * norm), squared.standard_error)
    return Estimate(squared.block, norm, error, squared.n_matvec)


def check_products(products: int) -> None:
    """Check a budget of products.

    Raises
    ------
    ValueError
        If it is below 2: one sample tells no standard error.
    TypeError
        If it is no whole number.

    Examples
    --------
    >>> check_products(2)
    """
    if whole_number("products, the budget of a sub-block,", products) < 2:
        raise ValueError(
            f"products, the budget of a sub-block, must be at least 2: one sample tells no standard error; "
            f"got {products}"
        )


def finite_product(operator: BlockOperator, vectors: Tensor, rows: Tensor) -> Tensor:
    """Return the products of vectors (n, p) with the sub-blocks of indices rows (n,), finite all of them.

    Raises
    ------
    NonFiniteCurvatureError
        If one is not.
    """
    product = operator.product(vectors, rows)
    check_finite(operator, product)
    return product


def of_matrices(operator: BlockOperator, function: Callable[[Tensor], Tensor], max_bytes: int) -> Tensor:
    """Apply a function to whole sub-blocks (n, p, p) in float64, a few at a time, and join its values.

    Raises
    ------
    NonFiniteCurvatureError
        If an entry is NaN or infinite.
    """
    values = []
    for rows in row_chunks(operator, 20 * operator.size**2, max_bytes):
        matrix = operator.matrix(rows)
        check_finite(operator, matrix, "an entry of the matrix")
        values.append(function(matrix.double()))
    return torch.cat(values)


def _hutch_plus_plus(
    operator: BlockOperator,
    deflation: Deflation,
    generator: torch.Generator,
    rows: Tensor,
    sketched: int,
    probes: int,
) -> Tensor:
    """Return samples (probes, rows) of the trace; what is exact is the same in each."""
    exact, basis = deflation.trace[rows.cpu()], None
    if sketched:
        owners, sketch = _directions(operator, deflation, generator, rows, sketched, None)
        image = deflation.project(finite_product(operator, sketch, owners), owners)
        size = torch.linalg.vector_norm(image, dim=1, keepdim=True)
        # A trace of the sketch keeps the basis of full rank, also where the matrix has less.
        image = torch.where(size > 0, image / size.clamp(min=torch.finfo(image.dtype).tiny), 0.0)
        image = image + torch.finfo(image.dtype).eps ** 0.5 * sketch
        columns = image.reshape(len(rows), sketched, operator.size).mT
        basis = torch.linalg.qr(columns)[0].mT
        flat = basis.reshape(-1, operator.size)
        within = (flat * finite_product(operator, flat, owners)).double().sum(1).cpu()
        exact = exact + within.reshape(len(rows), sketched).sum(1)
    owners, starts = _directions(operator, deflation, generator, rows, probes, basis)
    forms = (starts * finite_product(operator, starts, owners)).double().sum(1).cpu()
    dimensions = operator.size - deflation.numbers[rows.cpu()] - sketched
    return exact + dimensions * forms.reshape(len(rows), probes).T


def _directions(
    operator: BlockOperator,
    deflation: Deflation,
    generator: torch.Generator,
    rows: Tensor,
    n: int,
    basis: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the sub-block of each vector, and n unit vectors for each, uniform in what is left."""
    owners = rows.repeat_interleave(n)
    vectors = random_directions(generator, (len(owners), operator.size), operator)
    if basis is not None:
        shaped = vectors.reshape(len(rows), n, operator.size)
        vectors = (shaped - (shaped @ basis.mT) @ basis).reshape(-1, operator.size)
    vectors = deflation.project(vectors, owners)
    return owners, vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)


def _diagonal_sum(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def _square_sum(matrices: Tensor) -> Tensor:
    return matrices.square().sum((-2, -1))


def _gram_fits(operator: SecondMoment, max_bytes: int) -> bool:
    n = operator.n_samples
    return n < operator.size and 3 * n**2 * torch.finfo(operator.dtype).bits // 8 <= max_bytes
