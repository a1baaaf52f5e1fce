"""Choose how to solve a block, and solve it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hild_xr.recorders.curvature.arguments import check_seconds, real_number, whole_number
from hild_xr.recorders.curvature.errors import NonFiniteCurvatureError
from hild_xr.recorders.curvature.lanczos import ROUNDED_FROM, lanczos_eigenpairs
from hild_xr.recorders.curvature.operators import (
    BlockOperator,
    FactoredRowsSecondMoment,
    SecondMoment,
    WeightedRows,
)
from hild_xr.recorders.curvature.pairs import (
    Eigenpairs,
    Which,
    certified,
    dense_eigenpairs,
    ranking,
    rayleigh_ritz,
)
from hild_xr.recorders.curvature.spectrum import BlockSpectrum, Path

if TYPE_CHECKING:
    from hild_xr.recorders.curvature.blocks import Block

_GRAM_DENSE_UP_TO = 512  # eigh of a matrix that is there anyway takes 20 ms


@dataclass(frozen=True)
class SolveOptions:
    """What is asked of a solve.

    Parameters
    ----------
    k
        Number of eigenpairs.
    which
        End of the spectrum.
    tol
        Relative residual to reach.
    max_matvec
        Products allowed for each sub-block of a matrix-free solve; ``None`` for the solver's default.
    seed
        Seed of random start vectors.
    dense_up_to
        Blocks of at most this size are solved as whole matrices.
    matrix_up_to
        Blocks of at most this size are solved as whole matrices that are returned.
    max_bytes
        Memory that a Gram matrix, or the bases or matrices of rows solved at once, may take.
    max_seconds
        Time allowed for each matrix-free solve.
    guard, probe_steps
        How a search makes sure that it missed no pair; see
        :func:`~hild_xr.recorders.curvature.lanczos.lanczos_eigenpairs`.

    Raises
    ------
    TypeError
        If a number is none, or not whole.
    ValueError
        If one is out of range, or ``which`` is unknown.
    """

    k: int
    which: Which = "magnitude"
    tol: float = 1e-3
    max_matvec: int | None = None
    seed: int = 0
    dense_up_to: int = 128
    matrix_up_to: int = 0
    max_bytes: int = 2**30
    max_seconds: float = math.inf
    guard: int = 2
    probe_steps: int = 8

    def __post_init__(self) -> None:
        set_to = partial(object.__setattr__, self)  # plain numbers in place of NumPy's
        # how many there are, the blocks know
        set_to("k", whole_number("k, the number of eigenpairs,", self.k))
        ranking(torch.zeros(1), self.which)
        if not 0 < real_number("tol, the relative residual to reach,", self.tol) < math.inf:
            raise ValueError(
                f"tol, the relative residual to reach, must be a positive number; got {self.tol}"
            )
        check_seconds(self.max_seconds)
        set_to("max_seconds", float(self.max_seconds))
        if self.max_matvec is not None:
            set_to("max_matvec", whole_number("max_matvec, a budget of products,", self.max_matvec, 1))
        set_to("seed", whole_number("seed", self.seed))
        for name in ("dense_up_to", "matrix_up_to", "max_bytes", "guard", "probe_steps"):
            set_to(name, whole_number(name, getattr(self, name), 0))

    def check_budget(self, block: Block, matrix: str, n_samples: int) -> None:
        """Check that the products allowed suffice for a block, if it is sure to be searched.

        Parameters
        ----------
        block
            The block.
        matrix
            Name of the curvature matrix.
        n_samples
            Samples of the objective.

        Raises
        ------
        ValueError
            If a search needs more.
        """
        needed = min(self.k + self.guard, block.size) + 1
        if self.max_matvec is None or self.max_matvec >= needed or self.takes_whole(block.size):
            return
        perhaps_linear = block.kind == "rows" and self.takes_whole_rows(block.size)
        ends = self.which in ("magnitude", "largest")
        small_gram = n_samples < block.size and n_samples <= max(_GRAM_DENSE_UP_TO, 3 * self.k + 2)
        if perhaps_linear or (matrix != "hessian" and ends and small_gram):
            return  # the operator decides
        raise ValueError(
            f"max_matvec={self.max_matvec} is too small for k={self.k} eigenpairs of block {block.label!r}: "
            f"a search takes at least {needed} products, and is allowed {40 * self.k + 200} by default. "
            f"Raise it, or solve the block as a whole matrix with dense_up_to={block.size}"
        )

    def takes_whole(self, size: int) -> bool:
        """Whether a block of this size is solved as a whole matrix, whatever the matrix."""
        return size <= max(self.dense_up_to, self.matrix_up_to, 3 * self.k + 2)

    def takes_whole_rows(self, size: int) -> bool:
        """Whether rows of a linear layer of this size are, too."""
        return bool(self.dense_up_to) and size <= 32 * self.k


def choose_path(operator: BlockOperator, options: SolveOptions) -> Path:
    """Choose how to solve a block of size p.

    * ``"dense"`` if p is at most ``dense_up_to`` or ``matrix_up_to``, or if a Lanczos
      basis of 3 k + 2 vectors would span the whole space; rows of a linear layer up
      to p = 32 k (unless ``dense_up_to`` is 0), where the matrix costs no more than the
      products and no pair can be skipped;
    * ``"gram"`` for a G-matrix of fewer samples than parameters, unless its smallest
      eigenvalues (zeros) are asked for or the M x M matrix takes more than ``max_bytes``;
    * ``"lanczos"`` otherwise.

    Parameters
    ----------
    operator
        The block's matrix.
    options
        What is asked for.

    Returns
    -------
    str
        The path.
    """
    if options.takes_whole(operator.size):
        return "dense"
    rows_of_linear_layer = isinstance(operator, WeightedRows | FactoredRowsSecondMoment)
    if rows_of_linear_layer and options.takes_whole_rows(operator.size):
        return "dense"
    if isinstance(operator, SecondMoment) and options.which in ("magnitude", "largest"):
        gram_bytes = operator.n_samples**2 * torch.finfo(operator.dtype).bits // 8
        if operator.n_samples < operator.size and gram_bytes <= options.max_bytes:
            return "gram"
    return "lanczos"


def solve(operator: BlockOperator, options: SolveOptions, start: Tensor | None = None) -> BlockSpectrum:
    """Return the eigenpairs of a block.

    Parameters
    ----------
    operator
        The block's matrix.
    options
        What is asked for.
    start
        Eigenvectors found some training steps before, shape (*batch, s, *vector_shape). A search
        begins there; a path that does not search, or vectors that are not finite, do without.

    Returns
    -------
    BlockSpectrum
        Of the block's batch and vector shapes.

    Raises
    ------
    NonFiniteCurvatureError
        If a product or an entry is NaN or infinite.
    """
    path = choose_path(operator, options)
    keep = operator.size <= options.matrix_up_to
    trace = operator.trace() if path != "dense" else None
    matrix = None
    if path == "dense":
        pairs, trace, matrix = _solve_dense(operator, options, keep)
    elif path == "gram" and isinstance(operator, SecondMoment):
        pairs = gram_eigenpairs(operator, options)
    else:
        vectors = _start_vectors(operator, start)
        path = "lanczos" if vectors is None else "warm"
        pairs = _solve_lanczos(operator, options, vectors)
    block = operator.block
    batch = block.batch_shape
    if trace is None:
        trace = torch.full((operator.count,), torch.nan, device=operator.device)
    return BlockSpectrum(
        block=block,
        eigenvalues=pairs.eigenvalues.reshape(*batch, options.k),
        residuals=pairs.residuals.reshape(*batch, options.k),
        converged=pairs.converged.reshape(*batch, options.k),
        n_matvec=pairs.n_matvec.reshape(batch),
        n_certain=pairs.n_certain.reshape(batch),
        trace=trace.to(torch.float64).reshape(batch),
        eigenvectors=pairs.eigenvectors.reshape(*batch, options.k, *block.vector_shape),
        matrix=None if matrix is None else matrix.reshape(*batch, operator.size, operator.size),
        path=path,
    )


def gram_eigenpairs(operator: SecondMoment, options: SolveOptions) -> Eigenpairs:
    r"""Solve :math:`\frac1M J^TJ` through the smaller :math:`K = \frac1M JJ^T`.

    Both have the same nonzero eigenvalues; an eigenvector u of K lifts to
    :math:`J^Tu`. Where G has fewer than k nonzero eigenvalues, vectors of its null
    space complete the set. Residuals come from products with K where its rounding does
    not matter, else from products with G.

    Parameters
    ----------
    operator
        G-matrix of M samples and p > M parameters.
    options
        What is asked for; ``which`` must be ``"magnitude"`` or ``"largest"``.

    Returns
    -------
    Eigenpairs
        Of batch shape (1,).

    Raises
    ------
    NonFiniteCurvatureError
        If a gradient or a product is NaN or infinite.
    """
    gram = operator.gram()
    name, n = operator.block.label, min(options.k, operator.n_samples)
    if operator.n_samples <= max(_GRAM_DENSE_UP_TO, 3 * n + 2):
        pairs = dense_eigenpairs(gram[None], n, tol=options.tol, name=name)
    else:
        # A product costs next to nothing, so u is taken 100 times more exactly: lifting
        # divides its errors by the square root of lambda / lambda_max.
        tol = max(options.tol / 100, 20 * torch.finfo(gram.dtype).eps)
        pairs = lanczos_eigenpairs(
            lambda vectors, _: vectors @ gram,
            operator.n_samples,
            n,
            tol=tol,
            max_matvec=options.max_matvec,
            guard=options.guard,
            probe_steps=options.probe_steps,
            dtype=gram.dtype,
            device=gram.device,
            seed=options.seed,
            name=name,
        )
    if not _lifts_exactly(pairs.eigenvalues[0], operator, options):
        return _multiplied(operator, _completed(operator, pairs, options), pairs, options)
    return _lifted(operator, gram, pairs, options)


def _lifts_exactly(eigenvalues: Tensor, operator: SecondMoment, options: SolveOptions) -> bool:
    """Whether rounding of K leaves the residuals of all lifted vectors well below the tolerance."""
    if len(eigenvalues) < options.k or not bool(eigenvalues[-1] > 0):
        return False
    spread = float(eigenvalues[0] / eigenvalues[-1])
    rounding = 10 * torch.finfo(operator.dtype).eps * spread**1.5
    return bool(rounding <= options.tol)


def _lifted(operator: SecondMoment, gram: Tensor, pairs: Eigenpairs, options: SolveOptions) -> Eigenpairs:
    r"""Return the vectors :math:`v = J^Tw`, whose products :math:`\frac1M J^TJv = J^TKw` need no pass over J.

    So the residual is :math:`J^T(Kw - \lambda w)`, of squared length :math:`M r^TKr`.
    """
    weights, m = pairs.eigenvectors[0], operator.n_samples
    # The basis is orthonormal where w_i^T K w_j = delta_ij / M.
    lower = torch.linalg.cholesky((m * (weights @ gram @ weights.T)).to("cpu", torch.float64))
    weights = torch.linalg.solve_triangular(lower, weights.cpu().double(), upper=False).to(gram)
    rest = weights @ gram - pairs.eigenvalues[0][:, None].to(gram) * weights
    norms = (m * ((rest @ gram) * rest).sum(1, dtype=torch.float64)).clamp(min=0).sqrt().cpu()
    eigenvalues = pairs.eigenvalues.cpu() + operator.ridge
    vectors = operator.adjoint(weights)
    if not bool(vectors.isfinite().all()):
        raise NonFiniteCurvatureError(operator.block.label, "a product")
    return certified(
        eigenvalues,
        vectors[None],
        norms[None],
        eigenvalues[:, 0],
        options.tol,
        pairs.n_matvec.cpu(),
        pairs.n_certain.cpu(),
    )


def _multiplied(
    operator: SecondMoment, vectors: Tensor, pairs: Eigenpairs, options: SolveOptions
) -> Eigenpairs:
    """Return the Ritz pairs of some orthonormal vectors, with residuals from products."""
    rows = torch.zeros(options.k, dtype=torch.int64, device=vectors.device)
    return rayleigh_ritz(
        vectors[None],
        operator.product(vectors, rows)[None],
        which=options.which,
        tol=options.tol,
        scale=torch.zeros(1, dtype=torch.float64),
        n_matvec=pairs.n_matvec + options.k,
        # beyond all eigenvalues of K there are only zeros
        n_certain=torch.where(pairs.n_certain == pairs.eigenvalues.shape[1], options.k, pairs.n_certain),
        name=operator.block.label,
    )


def _completed(operator: SecondMoment, pairs: Eigenpairs, options: SolveOptions) -> Tensor:
    """Return k orthonormal vectors: J^T u for nonzero eigenvalues, completed at random."""
    eigenvalues = pairs.eigenvalues[0]
    nonzero = eigenvalues > torch.finfo(operator.dtype).eps * eigenvalues[0].clamp(min=0)
    lifted = torch.zeros((0, operator.size), dtype=operator.dtype, device=operator.device)
    if bool(nonzero.any()):
        lifted = operator.adjoint(pairs.eigenvectors[0][nonzero])
        lifted = lifted / torch.linalg.vector_norm(lifted, dim=1, keepdim=True)
    generator = torch.Generator().manual_seed(options.seed)
    shape = (options.k - len(lifted), operator.size)
    filling = torch.randn(shape, generator=generator, dtype=operator.dtype).to(operator.device)
    orthonormal: Tensor = torch.linalg.qr(torch.cat([lifted, filling]).T)[0]
    return orthonormal.T


def _solve_dense(
    operator: BlockOperator, options: SolveOptions, keep: bool
) -> tuple[Eigenpairs, Tensor, Tensor | None]:
    # The matrix, its float64 copy and the workspace of eigh.
    chunk = max(1, options.max_bytes // (40 * operator.size**2))
    pairs, traces, matrices = [], [], []
    for rows in _chunks(operator, chunk):
        matrix = operator.matrix(rows)
        pairs.append(
            dense_eigenpairs(
                matrix, options.k, which=options.which, tol=options.tol, name=operator.block.label
            )
        )
        traces.append(matrix.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64))
        if keep:
            matrices.append(matrix)
    return _joined(pairs), torch.cat(traces), torch.cat(matrices) if keep else None


def _start_vectors(operator: BlockOperator, start: Tensor | None) -> Tensor | None:
    """Return the earlier eigenvectors, shape (count, s, p), if they can serve."""
    if start is None:
        return None
    block, vector_shape = operator.block, operator.block.vector_shape
    batch_dims, vector_dims = len(block.batch_shape), len(vector_shape)
    fits = start.ndim == batch_dims + 1 + vector_dims and start.shape[:batch_dims] == block.batch_shape
    if not fits or start.shape[batch_dims + 1 :] != vector_shape:
        raise ValueError(
            f"the start of block {block.label!r} must have the shape of its eigenvectors, "
            f"{(*block.batch_shape, 'k', *vector_shape)}; got {tuple(start.shape)}"
        )
    vectors = start.reshape(operator.count, -1, operator.size).to(operator.device, operator.dtype)
    return vectors if bool(vectors.isfinite().all()) else None


def _solve_lanczos(operator: BlockOperator, options: SolveOptions, start: Tensor | None) -> Eigenpairs:
    bytes_per_vector = operator.size * torch.finfo(operator.dtype).bits // 8
    # A single large block takes a smaller basis rather than more memory, and some products more.
    wanted = options.k + options.guard
    large, small = max(3 * options.k + 2, 20, wanted + 8), options.k + wanted + 2
    basis = max(small, min(large, options.max_bytes // (2 * bytes_per_vector)))
    chunk = max(1, options.max_bytes // (2 * (basis + 2) * bytes_per_vector))
    # not where memory, time or products are short: it takes some more of each at the end
    ample = basis == large and math.isinf(options.max_seconds) and options.max_matvec is None
    may_round = ample and basis >= 2 * wanted and options.tol >= ROUNDED_FROM
    rounded = operator.rounded() if may_round else None
    pairs = []
    for rows in _chunks(operator, chunk):
        pairs.append(
            lanczos_eigenpairs(
                partial(_product_of_rows, operator, rows),
                operator.size,
                options.k,
                n_problems=len(rows),
                which=options.which,
                tol=options.tol,
                max_matvec=options.max_matvec,
                max_seconds=options.max_seconds,
                max_basis=basis,
                guard=options.guard,
                probe_steps=options.probe_steps,
                start=None if start is None else start[rows],
                dtype=operator.dtype,
                device=operator.device,
                seed=options.seed,
                name=operator.block.label,
                rounded=None if rounded is None else partial(_product_of_rows, rounded, rows),
            )
        )
    return _joined(pairs)


def _product_of_rows(operator: BlockOperator, rows: Tensor, vectors: Tensor, problems: Tensor) -> Tensor:
    """Multiply vectors with some of the sub-blocks of an operator."""
    return operator.product(vectors, rows[problems])


def _chunks(operator: BlockOperator, size: int) -> tuple[Tensor, ...]:
    """Return the indices of the sub-blocks, at most ``size`` at a time."""
    rows = torch.arange(operator.count, device=operator.device)
    return tuple(rows[start : start + size] for start in range(0, operator.count, size))


def _joined(pairs: list[Eigenpairs]) -> Eigenpairs:
    if len(pairs) == 1:
        return pairs[0]
    return Eigenpairs(*(torch.cat([getattr(p, field.name) for p in pairs]) for field in fields(Eigenpairs)))
