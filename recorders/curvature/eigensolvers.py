"""Eigenpairs of symmetric matrices: dense, or through products only.

Nothing here knows networks. Both solvers work on a batch of independent
problems at once and return the same :class:`Eigenpairs`, with a residual
computed from a real product and an honest ``converged`` flag.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from hild_xr.recorders.curvature.errors import NonFiniteCurvatureError

if TYPE_CHECKING:
    from collections.abc import Callable

Which = Literal["magnitude", "largest", "smallest"]
"""Which end of the spectrum: largest absolute, largest or smallest eigenvalues."""

_STOP = (
    0.9  # the estimated residual must be this far below the tolerance, so that the true one is below it too
)
_CHECK_EVERY = 4  # products between two looks at the Ritz values of a batch, whose small eigh is not free


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
        Shape (*batch,), int64: products spent; 0 for a dense solve.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    residuals: Tensor
    converged: Tensor
    n_matvec: Tensor


def ranking(eigenvalues: Tensor, which: Which) -> Tensor:
    """Return the indices that bring eigenvalues (last dim) into the order asked for.

    Raises
    ------
    ValueError
        If ``which`` is unknown.

    Examples
    --------
    >>> ranking(torch.tensor([1.0, -3.0, 2.0]), "magnitude")
    tensor([1, 2, 0])
    """
    if which not in get_args(Which):
        raise ValueError(f"which must be one of {', '.join(map(repr, get_args(Which)))}; got {which!r}")
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
    _check_arguments(size, k, tol)
    if not bool(matrix.isfinite().all()):
        raise NonFiniteCurvatureError(name, "an entry of the matrix")
    exact = matrix.detach().to("cpu", torch.float64)
    eigenvalues, columns = torch.linalg.eigh((exact + exact.mT) / 2)
    scale = eigenvalues.abs().amax(-1, keepdim=True)
    order = ranking(eigenvalues, which)[..., :k]
    eigenvalues = eigenvalues.gather(-1, order)
    vectors = columns.mT.gather(-2, order[..., None].expand(*order.shape, size))
    own = own_scale(eigenvalues, scale)
    residuals = _relative((vectors @ exact.mT - eigenvalues[..., None] * vectors).norm(dim=-1), own)
    count = torch.zeros(matrix.shape[:-2], dtype=torch.int64)
    return _to_device(eigenvalues, vectors.to(matrix.dtype), residuals, tol, count, matrix.device)


def lanczos_eigenpairs(
    matvec: Callable[[Tensor, Tensor], Tensor],
    size: int,
    k: int,
    *,
    n_problems: int = 1,
    which: Which = "magnitude",
    tol: float = 1e-3,
    max_matvec: int | None = None,
    max_basis: int | None = None,
    guard: int = 1,
    probe_steps: int = 8,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    name: str = "matrix",
) -> Eigenpairs:
    r"""Solve symmetric matrices through products, by thick-restart Lanczos.

    Single-vector Lanczos with full reorthogonalisation: a basis V of the Krylov
    space, the projected matrix :math:`V^T A V` in float64, a restart from the best
    Ritz vectors when the basis is full (Wu and Simon 2000, "Thick-restart Lanczos
    method for large symmetric eigenvalue problems"), a stop once the Ritz residuals
    of the pairs asked for are below the tolerance. When the Krylov space is
    exhausted a random orthogonal vector continues it.

    Small residuals do not prove that the pairs are the top k: one can be skipped, above
    all in a cluster. Two things guard against it. A pair more than asked for must converge
    too (of 900 solves simulated on spectra measured before and during training, 11 skipped
    one of the top 5 to 10 without, 2 with it, for 5 % more products). And, since a single
    vector cannot see a second copy of a multiple eigenvalue, the found set is
    probed: some steps from a random vector orthogonal to it, and on with the search if a
    Ritz value displaces one of the set. A skipped member of a dense cluster can still be
    missed, and is less likely so with a smaller tolerance.

    Parameters
    ----------
    matvec
        ``matvec(vectors, problems)`` returns the products of vectors, shape (n, p),
        with the matrices of indices ``problems``, shape (n,), each in
        ``range(n_problems)``. An index can occur more than once.
    size
        Dimension p.
    k
        Number of eigenpairs, 1 to p.
    n_problems
        Number of independent matrices, solved in lockstep.
    which
        End of the spectrum.
    tol
        Relative residual to reach.
    max_matvec
        Products allowed for each matrix, the k for the residuals included; default ``40 k + 200``.
    max_basis
        Basis vectors kept before a restart; default ``max(3 k + 2, 20)``. Memory is
        ``n_problems * (max_basis + k + guard + 1) * p`` numbers.
    guard
        Pairs beyond k that must converge before the search stops.
    probe_steps
        Steps of the probe; 0 leaves it out.
    dtype, device
        Of the vectors.
    seed
        Seed of the random vectors; the global RNG is neither read nor moved.
    name
        Name in error messages.

    Returns
    -------
    Eigenpairs
        Of batch shape (n_problems,). Where the budget ran out the best Ritz pairs
        come back, not flagged converged unless their true residuals say so.

    Raises
    ------
    NonFiniteCurvatureError
        If a product holds NaN or infinity.
    ValueError
        If k, the budget or the basis size is out of range.

    Examples
    --------
    >>> matrix = torch.diag(torch.arange(100.0))
    >>> pairs = lanczos_eigenpairs(lambda vectors, problems: vectors @ matrix, 100, 2, tol=1e-5)
    >>> pairs.eigenvalues.round(decimals=3), bool(pairs.converged.all())
    (tensor([[99., 98.]], dtype=torch.float64), True)
    """
    _check_arguments(size, k, tol)
    ranking(torch.zeros(1), which)
    budget = 40 * k + 200 if max_matvec is None else max_matvec
    wanted = min(k + guard, size)
    if budget < k + wanted + 1:
        raise ValueError(
            f"max_matvec={budget} is too small for k={k}: a search takes more than {wanted} products and the "
            f"residuals {k}, so allow at least {k + wanted + 1}"
        )
    basis_size = min(size, max(3 * k + 2, 20) if max_basis is None else max_basis)
    if basis_size < min(size, wanted + 2):
        raise ValueError(
            f"max_basis={max_basis} is too small for k={k}: allow at least {wanted + 2}, better 3 k"
        )
    solver = _Lanczos(
        matvec, size, k, wanted, which, tol, budget - k, basis_size, dtype, torch.device(device), seed, name
    )
    return solver.solve(n_problems, probe_steps)


class _Lanczos:
    """The settings of a solve, and its phases: search, probe, residuals."""

    def __init__(
        self,
        matvec: Callable[[Tensor, Tensor], Tensor],
        size: int,
        k: int,
        wanted: int,
        which: Which,
        tol: float,
        budget: int,
        basis_size: int,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
        name: str,
    ) -> None:
        self.matvec, self.size, self.k, self.wanted, self.which, self.tol = (
            matvec,
            size,
            k,
            wanted,
            which,
            tol,
        )
        self.budget, self.basis_size, self.dtype, self.device, self.name = (
            budget,
            basis_size,
            dtype,
            device,
            name,
        )
        # Shrinking to 0.7 of the length calls for a second Gram-Schmidt pass ("twice is enough", Giraud
        # et al. 2005). A laxer bound saves nothing: what one pass leaves grows with every restart until
        # the basis is no basis and the Ritz values are made up, also in float64 at a loose tolerance.
        self.cancellation = 0.7
        # Random numbers are drawn on the CPU, so that every device starts from the same vectors.
        self.generator = torch.Generator().manual_seed(seed)

    def solve(self, n_problems: int, probe_steps: int) -> Eigenpairs:
        found = _Found.empty(n_problems, self.wanted, self.size, self.dtype, self.device)
        active = torch.arange(n_problems)
        self.search(_Basis.fresh(self, active), found, min_steps=0)
        while probe_steps and self.size > self.wanted:
            # Probe all whose search was not cut short; those that change are probed again.
            active = active[(found.count[active] + probe_steps <= self.budget) & ~found.exhausted[active]]
            if len(active) == 0:
                break
            before = found.eigenvalues[active]
            self.search(_Basis.around(self, active, found), found, min_steps=probe_steps)
            moved = (found.eigenvalues[active] - before).abs().amax(-1)
            active = active[moved > self.tol * found.scale[active]]
        return self.certify(found)

    def search(self, basis: _Basis, found: _Found, min_steps: int) -> None:
        """Extend the basis until every problem is done, and write what was found."""
        steps = 0
        while len(basis.problems):
            basis.extend()
            steps += 1
            found.count[basis.problems] += 1
            out_of_budget = int(found.count[basis.problems].max()) >= self.budget
            due = len(basis.problems) == 1 or steps % _CHECK_EVERY == 0 or basis.full or out_of_budget
            if (
                not due
                or basis.filled < self.wanted
                or (steps < min_steps and not basis.full and not out_of_budget)
            ):
                continue
            ritz = basis.ritz()
            exhausted = basis.filled == self.size
            own = own_scale(ritz.eigenvalues, ritz.scale[:, None])
            small = ritz.residuals <= _STOP * self.tol * own
            done = small[:, : self.wanted].all(-1)
            done = (done & (steps >= min_steps)) | exhausted | out_of_budget
            if bool(done.any()):
                found.store(basis, ritz, done, exhausted)
                basis, ritz = basis.select(~done), ritz.select(~done)
            if basis.full and len(basis.problems):
                basis.restart(ritz)

    def product(self, vectors: Tensor, problems: Tensor) -> Tensor:
        return self.matvec(vectors, problems.to(vectors.device))

    def random(self, n: int) -> Tensor:
        return torch.randn(n, self.size, generator=self.generator, dtype=self.dtype).to(self.device)

    def certify(self, found: _Found) -> Eigenpairs:
        """Multiply every vector found once more, for its true residual."""
        n, k = len(found.vectors), self.k
        vectors = found.vectors[:, :k]
        problems = torch.arange(n).repeat_interleave(k)
        products = self.product(vectors.reshape(n * k, self.size), problems).reshape(n, k, self.size)
        return rayleigh_ritz(
            vectors,
            products,
            which=self.which,
            tol=self.tol,
            scale=found.scale,
            n_matvec=found.count + k,
            name=self.name,
        )


def rayleigh_ritz(
    vectors: Tensor,
    products: Tensor,
    *,
    which: Which,
    tol: float,
    scale: Tensor,
    n_matvec: Tensor,
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
    own = own_scale(eigenvalues, scale[:, None])
    return _to_device(eigenvalues, vectors, _relative(norms, own), tol, n_matvec, vectors.device)


@dataclass
class _Ritz:
    """Ritz values in the order asked for, with estimated residuals and the coefficients of the vectors."""

    eigenvalues: Tensor  # (n, filled)
    coefficients: Tensor  # (n, filled, filled), row i belongs to value i
    residuals: Tensor  # (n, filled), absolute
    scale: Tensor  # (n,)

    def select(self, mask: Tensor) -> _Ritz:
        return _Ritz(self.eigenvalues[mask], self.coefficients[mask], self.residuals[mask], self.scale[mask])


@dataclass
class _Found:
    """What is known of all problems so far; small numbers on the CPU."""

    eigenvalues: Tensor  # (n, k)
    residuals: Tensor  # (n, k), absolute
    vectors: Tensor  # (n, k, p)
    scale: Tensor  # (n,)
    count: Tensor  # (n,)
    exhausted: Tensor  # (n,): the basis spans the whole space

    @classmethod
    def empty(cls, n: int, k: int, size: int, dtype: torch.dtype, device: torch.device) -> _Found:
        return cls(
            torch.zeros(n, k, dtype=torch.float64),
            torch.zeros(n, k, dtype=torch.float64),
            torch.zeros(n, k, size, dtype=dtype, device=device),
            torch.zeros(n, dtype=torch.float64),
            torch.zeros(n, dtype=torch.int64),
            torch.zeros(n, dtype=torch.bool),
        )

    def store(self, basis: _Basis, ritz: _Ritz, done: Tensor, exhausted: bool) -> None:
        k, problems = self.eigenvalues.shape[1], basis.problems[done]
        self.eigenvalues[problems] = ritz.eigenvalues[done, :k]
        self.residuals[problems] = ritz.residuals[done, :k]
        self.scale[problems] = torch.maximum(self.scale[problems], ritz.scale[done])
        self.exhausted[problems] = exhausted
        coefficients = ritz.coefficients[done, :k].to(basis.vectors)
        where = done.to(basis.vectors.device)
        filled = (
            basis.vectors[:, : basis.filled] if bool(done.all()) else basis.vectors[where, : basis.filled]
        )
        self.vectors[problems.to(self.vectors.device)] = coefficients @ filled


class _Basis:
    """Orthonormal bases of equal length for the problems still active, and the projected matrices.

    ``vectors`` (n, basis_size + 1, p) hold ``filled`` multiplied vectors and the next
    one; ``projected`` is V^T A V as measured by the Gram-Schmidt coefficients.
    """

    def __init__(self, solver: _Lanczos, problems: Tensor) -> None:
        n, m = len(problems), solver.basis_size
        self.solver, self.problems, self.filled = solver, problems, 0
        self.vectors = torch.empty(n, m + 1, solver.size, dtype=solver.dtype, device=solver.device)
        self.projected = torch.zeros(n, m, m, dtype=torch.float64)
        self.next_norm = torch.zeros(n, dtype=torch.float64)
        self.largest_product = torch.zeros(n, dtype=torch.float64)
        # Residuals that a basis vector brings along from an earlier search and that the
        # recurrence cannot see; the estimates add them.
        self.inherited = torch.zeros(n, m, dtype=torch.float64)

    @classmethod
    def fresh(cls, solver: _Lanczos, problems: Tensor) -> _Basis:
        """Start from random vectors."""
        basis = cls(solver, problems)
        basis._append_random(torch.ones(len(problems), dtype=torch.bool))
        return basis

    @classmethod
    def around(cls, solver: _Lanczos, problems: Tensor, found: _Found) -> _Basis:
        """Start from what was found, continued by random vectors orthogonal to it."""
        basis = cls(solver, problems)
        basis.filled = solver.wanted
        basis.vectors[:, : solver.wanted] = found.vectors[problems.to(found.vectors.device)]
        basis.projected[:, : solver.wanted, : solver.wanted] = torch.diag_embed(found.eigenvalues[problems])
        basis.inherited[:, : solver.wanted] = found.residuals[problems]
        basis.largest_product = found.scale[problems].clone()
        basis._append_random(torch.ones(len(problems), dtype=torch.bool))
        return basis

    @property
    def full(self) -> bool:
        return self.filled == self.solver.basis_size

    def extend(self) -> None:
        """Multiply the newest vector and make the next one."""
        j = self.filled
        product = self.solver.product(self.vectors[:, j], self.problems)
        before = torch.linalg.vector_norm(product, dim=-1).to("cpu", torch.float64)
        if not bool(before.isfinite().all()):
            raise NonFiniteCurvatureError(self.solver.name, "a product")
        self.filled = j + 1
        product, coefficients, after = self._orthogonalised(product, before)
        self.projected[:, : j + 1, j] = coefficients
        self.projected[:, j, : j + 1] = coefficients
        self.largest_product = torch.maximum(self.largest_product, before)
        # Below this the direction is rounding noise of the product: the Krylov space is exhausted.
        noise = 50 * torch.finfo(product.dtype).eps * self.largest_product
        exhausted = after <= noise
        self.next_norm = torch.where(exhausted, 0.0, after)
        if self.filled == self.solver.size:
            return
        self.vectors[:, j + 1] = product / torch.where(exhausted, 1.0, after).to(product)[:, None]
        if bool(exhausted.any()):
            self._append_random(exhausted)

    def ritz(self) -> _Ritz:
        projected = self.projected[:, : self.filled, : self.filled]
        eigenvalues, columns = torch.linalg.eigh(projected)
        order = ranking(eigenvalues, self.solver.which)
        coefficients = columns.mT.gather(1, order[..., None].expand_as(columns))
        inherited = coefficients * self.inherited[:, None, : self.filled]
        residuals = ((self.next_norm[:, None] * coefficients[..., -1]) ** 2 + (inherited**2).sum(-1)).sqrt()
        return _Ritz(eigenvalues.gather(1, order), coefficients, residuals, eigenvalues.abs().amax(-1))

    def restart(self, ritz: _Ritz) -> None:
        """Keep the best Ritz vectors and the next vector of the recurrence."""
        wanted, m = self.solver.wanted, self.solver.basis_size
        keep = min(m - 1, wanted + (m - wanted) // 2)
        coefficients = ritz.coefficients[:, :keep]
        newest = self.vectors[:, m].clone()
        rotate_in_place(self.vectors, coefficients.to(self.vectors), m)
        self.vectors[:, keep] = newest
        self.projected.zero_()
        self.projected[:, :keep, :keep] = torch.diag_embed(ritz.eigenvalues[:, :keep])
        inherited = ((coefficients * self.inherited[:, None]) ** 2).sum(-1).sqrt()
        self.inherited.zero_()
        self.inherited[:, :keep] = inherited
        self.filled = keep

    def select(self, mask: Tensor) -> _Basis:
        chosen = object.__new__(_Basis)
        chosen.solver, chosen.problems, chosen.filled = self.solver, self.problems[mask], self.filled
        chosen.vectors = self.vectors[mask.to(self.vectors.device)]
        chosen.projected, chosen.inherited = self.projected[mask], self.inherited[mask]
        chosen.next_norm, chosen.largest_product = self.next_norm[mask], self.largest_product[mask]
        return chosen

    def _orthogonalised(self, vector: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project the basis out of a vector: once, and again where most of it cancelled."""
        basis = self.vectors[:, : self.filled]
        total = torch.zeros(len(vector), self.filled, dtype=torch.float64)
        for _ in range(3):
            coefficients = torch.bmm(basis, vector[:, :, None])
            vector = torch.baddbmm(vector[:, :, None], basis.mT, coefficients, alpha=-1)[:, :, 0]
            total += coefficients[:, :, 0].to("cpu", torch.float64)
            after = torch.linalg.vector_norm(vector, dim=-1).to("cpu", torch.float64)
            if bool((after > self.solver.cancellation * before).all()):
                break
            before = after
        return vector, total, after

    def _append_random(self, where: Tensor) -> None:
        """Put random unit vectors orthogonal to the basis after it, in the problems of the mask."""
        device_mask = where.to(self.vectors.device)
        basis = self.vectors[device_mask, : self.filled]
        vector = self.solver.random(int(where.sum()))
        for _ in range(3):
            vector = vector - (basis.mT @ (basis @ vector[:, :, None]))[:, :, 0]
            vector = vector / torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
        self.vectors[device_mask, self.filled] = vector


def rotate_in_place(vectors: Tensor, coefficients: Tensor, length: int, chunk: int = 1 << 16) -> None:
    """Replace the first rows of ``vectors`` (n, m, p) by combinations of its first ``length`` rows.

    ``coefficients`` has shape (n, r, length) with r <= length. Columns are done in
    chunks, so no second basis is held.

    Examples
    --------
    >>> vectors = torch.eye(2)[None].clone()
    >>> rotate_in_place(vectors, torch.tensor([[[0.0, 1.0]]]), 2)
    >>> vectors[0, 0]
    tensor([0., 1.])
    """
    rows, size = coefficients.shape[1], vectors.shape[2]
    for start in range(0, size, chunk):
        part = slice(start, start + chunk)
        vectors[:, :rows, part] = coefficients @ vectors[:, :length, part]


def _check_arguments(size: int, k: int, tol: float) -> None:
    if not 1 <= k <= size:
        raise ValueError(f"k must be between 1 and the size {size} of the matrix; got {k}")
    if not (math.isfinite(tol) and tol > 0):
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


def _relative(norms: Tensor, scale: Tensor) -> Tensor:
    # The zero matrix has residual 0, not 0 / 0.
    return torch.where(norms == 0, 0.0, norms / scale)


def _to_device(
    eigenvalues: Tensor,
    vectors: Tensor,
    residuals: Tensor,
    tol: float,
    n_matvec: Tensor,
    device: torch.device,
) -> Eigenpairs:
    converged = (residuals <= tol) & residuals.isfinite()
    return Eigenpairs(
        eigenvalues.to(device),
        vectors.to(device),
        residuals.to(device),
        converged.to(device),
        n_matvec.to(device),
    )
