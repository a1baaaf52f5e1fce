"""The other packages: each driven as its documentation says, with all settings in its favour.

The settings that decide about a residual (``tol`` of eigsh, the basis size of hessian-eigenthings) are
searched for before anything is timed, so that the true residual ends just below the one asked for and none of
the top k is missing. A user does not have this knowledge: what is measured here is the best a peer can do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn
from torch.nn import functional as F

from tests.benchmarks.curvature_states import State
from tests.benchmarks.true_residuals import RESIDUAL, SAME_VALUE, Demand, Matrix, Pairs

DISTRIBUTIONS = {
    "curvlinops": "curvlinops-for-pytorch",
    "hessian_eigenthings": "hessian-eigenthings",
    "nngeometry": "nngeometry",
}
EXTRA = "bench"
# From loose to tight. eigsh looks at its residuals once a restart, so the true ones move in jumps.
_EIGSH_TOLERANCES = (1e-2, 5e-3, 2e-3, 1e-3, 5e-4, 2e-4, 1e-4)


@dataclass(frozen=True)
class Found:
    """What a solver returns for all blocks of a task, and the matrix-vector products it took."""

    blocks: tuple[Pairs, ...]
    products: int


Solver = Callable[[], Found]


def missing(*names: str) -> str | None:
    """Say which of the packages are not installed and how to get them, or return None."""
    absent = [DISTRIBUTIONS[name] for name in names if find_spec(name) is None]
    if not absent:
        return None
    return f"{' and '.join(absent)} not installed: pip install 'hild-xr[{EXTRA}]', or run `make bench`"


@contextmanager
def quiet() -> Iterator[None]:
    """Let the peers' own warnings (deprecations, jit) pass: they are not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Curvlinops:
    """Products by curvlinops, eigenpairs by SciPy's ARPACK: what its documentation recommends.

    Parameters
    ----------
    state, matrix
        What of.
    blocks
        The parameters of each block.
    k
        Number of pairs.
    """

    name = "curvlinops"

    def __init__(self, state: State, matrix: Matrix, blocks: Sequence[tuple[str, ...]], k: int) -> None:
        self._state, self._matrix, self._blocks, self._k = state, matrix, blocks, k
        self._tolerances = [1e-3] * len(blocks)

    def __call__(self) -> Found:
        """Solve all blocks."""
        return _joined([self.solve(*each) for each in zip(self._blocks, self._tolerances, strict=True)])

    def solve(self, names: tuple[str, ...], tol: float) -> Found:
        """Solve one block."""
        with quiet():
            product = self._operator(names)
        count = 0

        def counted(vector: np.ndarray) -> np.ndarray:
            nonlocal count
            count += 1
            return np.asarray(product @ vector)

        operator = LinearOperator(product.shape, matvec=counted, dtype=np.float32)
        start = np.random.default_rng(0).standard_normal(product.shape[0]).astype(np.float32)
        values, vectors = eigsh(operator, k=self._k, which="LM", tol=tol, v0=start)
        order = np.argsort(-np.abs(values))
        pairs = Pairs(names, torch.from_numpy(values[order]), torch.from_numpy(vectors.T[order]))
        return Found((pairs,), count)

    def search(self, demand: Demand) -> None:
        """Find for each block the loosest tolerance whose result is right."""
        for i, names in enumerate(self._blocks):
            for tol in _EIGSH_TOLERANCES:
                self._tolerances[i] = tol
                if demand.of(i).met(self.solve(names, tol).blocks):
                    break

    def _operator(self, names: tuple[str, ...]) -> Any:
        from curvlinops import EFLinearOperator, HessianLinearOperator

        kind = HessianLinearOperator if self._matrix == "hessian" else EFLinearOperator
        named = dict(self._state.model.named_parameters())
        batches = [(self._state.inputs, self._state.targets)]
        # Its check multiplies twice and compares: left out, in its favour.
        operator = kind(
            self._state.model,
            nn.CrossEntropyLoss(),
            [named[name] for name in names],
            batches,
            check_deterministic=False,
        )
        return operator.to_scipy(dtype=np.dtype(np.float32))


class Eigenthings:
    """hessian-eigenthings: one Lanczos run with full reorthogonalisation, of a length given.

    Parameters
    ----------
    state, blocks, k
        As for :class:`Curvlinops`; the matrix is the Hessian.
    """

    name = "hessian-eigenthings"

    def __init__(self, state: State, blocks: Sequence[tuple[str, ...]], k: int) -> None:
        self._state, self._blocks, self._k = state, blocks, k
        self._lengths = [2 * k] * len(blocks)

    def __call__(self) -> Found:
        """Solve all blocks."""
        return _joined([self.solve(*each) for each in zip(self._blocks, self._lengths, strict=True)])

    def solve(self, names: tuple[str, ...], length: int) -> Found:
        """Solve one block by so many steps."""
        from hessian_eigenthings import lanczos

        result = lanczos(self._operator(names), k=self._k, max_iter=length, reorthogonalize=True, seed=0)
        return Found((Pairs(names, result.eigenvalues, result.eigenvectors),), result.iterations)

    def search(self, demand: Demand) -> None:
        """Find for each block the smallest number of steps whose result is right."""
        for i, names in enumerate(self._blocks):
            length, size = self._estimate(names, demand.of(i)), self._operator(names).size
            while length < size and not demand.of(i).met(self.solve(names, length).blocks):
                length += 1
            self._lengths[i] = length

    def _estimate(self, names: tuple[str, ...], demand: Demand) -> int:
        """Return the length at which the recurrence's own estimates first meet the demand."""
        from hessian_eigenthings import lanczos_tridiagonal

        operator = self._operator(names)
        start = torch.randn(operator.size, generator=torch.Generator().manual_seed(0))
        longest = min(operator.size, 4 * self._k)
        while True:
            run = lanczos_tridiagonal(operator, start, longest, reorthogonalize=True)
            diagonal, beside = run.alphas.double(), run.betas.double()
            for length in range(self._k, run.iterations):
                tridiagonal = torch.diag(diagonal[:length])
                tridiagonal += torch.diag(beside[: length - 1], 1) + torch.diag(beside[: length - 1], -1)
                values, vectors = torch.linalg.eigh(tridiagonal)
                best = values.abs().argsort(descending=True)[: self._k]
                left = beside[length - 1] * vectors[-1, best].abs()
                small = bool((left <= RESIDUAL * values[best].abs()).all())
                if small and demand.error([values[best]]) <= SAME_VALUE:
                    return length
            if longest == operator.size or run.iterations < longest:
                return int(run.iterations)
            longest = min(operator.size, 2 * longest)

    def _operator(self, names: tuple[str, ...]) -> Any:
        from hessian_eigenthings import HessianOperator, supervised_loss

        batches = [(self._state.inputs, self._state.targets)]
        return HessianOperator(
            self._state.model,
            batches,
            supervised_loss(F.cross_entropy),
            param_filter=lambda name, _: name in names,
        )


class Nngeometry:
    """nngeometry: the Gram matrix of per-sample gradients, and its eigenvalues.

    Parameters
    ----------
    state, k
        As for :class:`Curvlinops`; the matrix is G of the whole model.
    arpack
        Leave the largest eigenvalues to ARPACK. The package's own method is a full eigendecomposition,
        which takes longer than all the rest.
    """

    def __init__(self, state: State, k: int, *, arpack: bool) -> None:
        self._state, self._k, self._arpack = state, k, arpack
        self.name = "nngeometry + eigsh" if arpack else "nngeometry"

    def __call__(self) -> Found:
        """Return the values; eigenvectors would take another pass."""
        from nngeometry.gram import GramMatrix
        from torch.utils.data import DataLoader, TensorDataset

        model, samples = self._state.model, len(self._state.targets)

        def losses(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(model(inputs), targets, reduction="none")[:, None]

        loader = DataLoader(TensorDataset(self._state.inputs, self._state.targets), batch_size=samples)
        with quiet():
            gram = GramMatrix(model, loader, function=losses)
            values = self._by_arpack(gram) if self._arpack else self._whole(gram)
        return Found((Pairs(self._state.names, values / samples, None),), 0)

    def _whole(self, gram: Any) -> torch.Tensor:
        gram.compute_eigendecomposition()
        values: torch.Tensor = gram.get_eigendecomposition()[0].detach()
        return values.flip(0)[: self._k]

    def _by_arpack(self, gram: Any) -> torch.Tensor:
        samples = len(self._state.targets)
        square = gram.to_torch().detach().reshape(samples, samples).numpy()
        start = np.random.default_rng(0).standard_normal(samples).astype(np.float32)
        values = eigsh(square, k=self._k, which="LM", tol=1e-3, v0=start, return_eigenvectors=False)
        return torch.from_numpy(np.sort(values)[::-1].copy())


def _joined(found: Sequence[Found]) -> Found:
    return Found(
        tuple(pairs for each in found for pairs in each.blocks), sum(each.products for each in found)
    )
