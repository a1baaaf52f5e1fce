"""The tasks that eigensolvers of networks are compared on, and how one is compared with the others.

All solvers see equal data on one thread, in turn, so that drift of the machine meets all of them. What they
return is checked in float64 by code of nobody's solver: a result whose true residual misses the one asked for
is shown as such and enters no ratio.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hild_xr.recorders.curvature import Curvature
from hild_xr.recorders.curvature.precision import matrix_products, may_round, other_library_is_better
from tests.benchmarks.curvature_states import State
from tests.benchmarks.peers import Curvlinops, Eigenthings, Found, Nngeometry, Solver
from tests.benchmarks.true_residuals import RESIDUAL, SAME_VALUE, Demand, Exact, Matrix, Pairs, flat

Gemm = Literal["same", "as shipped"]
# What Curvature is given. "same": all multiply float32 matrices by torch's default. "as shipped": what a user
# gets who sets nothing.
GEMM: dict[Gemm, dict[str, Any]] = {"same": {"matrix_products": "default"}, "as shipped": {}}

FLOORS = ("Hessian product", "forward and backward")

Facts = dict[str, float | int | str | bool]


@dataclass(frozen=True)
class Task:
    """Top k pairs, by absolute value, of some blocks of a matrix.

    Parameters
    ----------
    k
        Number of pairs.
    matrix
        Hessian or G.
    blocks
        The whole model as one block, or one block a parameter tensor.
    peers
        The packages it is compared with, as they are imported.
    """

    k: int
    matrix: Matrix
    blocks: Literal["model", "layer"]
    peers: tuple[str, ...]

    def names(self, state: State) -> list[tuple[str, ...]]:
        """Return the parameters of each block."""
        return [state.names] if self.blocks == "model" else [(name,) for name in state.names]

    def solvers(self, state: State) -> dict[str, Solver]:
        """Return the peers' solvers by their names."""
        names = self.names(state)
        made: list[Curvlinops | Eigenthings | Nngeometry] = []
        if "curvlinops" in self.peers:
            made.append(Curvlinops(state, self.matrix, names, self.k))
        if "hessian_eigenthings" in self.peers:
            made.append(Eigenthings(state, names, self.k))
        if "nngeometry" in self.peers:
            made += [Nngeometry(state, self.k, arpack=arpack) for arpack in (False, True)]
        return {solver.name: solver for solver in made}


TASKS = {
    "T1": Task(10, "hessian", "model", ("curvlinops", "hessian_eigenthings")),
    "T2": Task(5, "hessian", "layer", ("curvlinops", "hessian_eigenthings")),
    # The empirical Fisher of hessian-eigenthings forms all per-sample gradients for each product: 2.2 GB
    # and about a second each time here, so it is left out.
    "T3": Task(10, "gmatrix", "model", ("curvlinops", "nngeometry")),
}


def gemms() -> list[Gemm]:
    """Return the settings to compare at: the fair one, and as shipped where that is another."""
    with matrix_products("fastest"):
        differ = other_library_is_better() or may_round(torch.device("cpu"))
    return ["same", "as shipped"] if differ else ["same"]


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread and in torch's default float32, whatever was set before."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


OURS: dict[str, dict[str, int]] = {"hild-xr": {}, "hild-xr unguarded": {"guard": 0, "probe_steps": 0}}
"""As it is, and stopping where the peers stop: when the pairs have converged, whatever may be missing."""


def ours(state: State, task: Task, gemm: Gemm = "same", **options: int) -> Found:
    """Solve a task with hild-xr, from nothing: no graph, no factor and no vector is there before."""
    with Curvature(state.model, state.objective, **GEMM[gemm]) as curvature:
        spectra = curvature.eigenpairs(task.k, task.matrix, task.blocks, tol=RESIDUAL, **options)
    blocks = [
        Pairs(found.block.parameters, found.eigenvalues, found.eigenvectors.reshape(task.k, -1))
        for found in spectra.values()
    ]
    return Found(tuple(blocks), sum(int(found.n_matvec) for found in spectra.values()))


class Interleaved:
    """Functions timed in turn, round by round, by the clock and by the processor time of this process.

    On a machine that others use too, the clock also counts their turns; all here runs on one thread, so that
    the processor time is what the clock would show if they were not there, caches aside.

    Parameters
    ----------
    functions
        By name.
    """

    def __init__(self, functions: dict[str, Callable[[], Any]]) -> None:
        self._functions = functions
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self.cpu_seconds: defaultdict[str, list[float]] = defaultdict(list)
        self.results: dict[str, Any] = {}

    def run(self, *names: str) -> None:
        """Run the functions named once each."""
        for name in names:
            began, cpu_began = time.perf_counter(), time.process_time()
            self.results[name] = self._functions[name]()
            self.cpu_seconds[name].append(time.process_time() - cpu_began)
            self.seconds[name].append(time.perf_counter() - began)

    def ratio(self, above: str, below: str, *, cpu: bool = False) -> float:
        """Return the median over the rounds of how many times as long one took as the other."""
        times = self.cpu_seconds if cpu else self.seconds
        return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))

    def facts(self, name: str) -> Facts:
        """Return the medians of a function's times."""
        return {
            f"{name}: seconds": statistics.median(self.seconds[name]),
            f"{name}: CPU seconds": statistics.median(self.cpu_seconds[name]),
        }


class Comparison:
    """One task on one state, solved by hild-xr, by the peers, and held against the floors.

    The floors are what nobody can go below: a Hessian product by plain double backward through a graph that
    is there already, of which k pairs take k at least, and one forward and backward pass.

    Parameters
    ----------
    task, state
        What to solve.
    gemm
        See :data:`GEMM`.
    """

    def __init__(self, task: Task, state: State, gemm: Gemm = "same") -> None:
        self.task, self.state = task, state
        self._demand = Demand(Exact(state), task.matrix, task.names(state), task.k)
        self.peers = task.solvers(state)
        for peer in self.peers.values():
            if isinstance(peer, Curvlinops | Eigenthings):
                peer.search(self._demand)
        own = {name: partial(ours, state, task, gemm, **options) for name, options in OURS.items()}
        self._timed = Interleaved({**own, **self.peers, **floors(state)})
        ours(state, task, gemm)  # the first call of a kernel pays for more than itself

    def ours(self) -> Found:
        """Solve with hild-xr, timed."""
        self._timed.run("hild-xr")
        found: Found = self._timed.results["hild-xr"]
        return found

    def others(self) -> None:
        """Solve with the peers, and unguarded, and run the floors, timed."""
        self._timed.run(*self.peers, *list(OURS)[1:], *FLOORS)

    def found(self, solver: str) -> Found:
        """Return the last result of a solver."""
        found: Found = self._timed.results[solver]
        return found

    def facts(self) -> Facts:
        """Return seconds, products, true residuals and ratios."""
        facts: Facts = {}
        right = {}
        for solver in (*OURS, *self.peers):
            found = self.found(solver)
            facts |= self._timed.facts(solver)
            if found.products:
                facts[f"{solver}: products"] = found.products
            residual = self._demand.residual(found.blocks)
            if residual is not None:
                facts[f"{solver}: true residual"] = residual
            error = self._demand.error([pairs.eigenvalues for pairs in found.blocks])
            facts[f"{solver}: error of values"] = error
            facts[f"{solver}: top k complete"] = error <= SAME_VALUE
            right[solver] = self._demand.met(found.blocks)
        for peer, own in itertools.product(self.peers, OURS):
            title = f"{own}: times faster than {peer}"
            if right[own] and right[peer]:
                facts[title] = self._timed.ratio(peer, own)
                facts[f"{title}, CPU time"] = self._timed.ratio(peer, own, cpu=True)
            else:
                wrong = " and ".join(solver for solver in (own, peer) if not right[solver])
                facts[title] = f"not compared: {wrong} misses a pair or the residual"
        for floor in FLOORS:
            facts |= self._timed.facts(floor)
            facts[f"times as long as a {floor}"] = self._timed.ratio("hild-xr", floor)
        return facts


class RowBlocks:
    """All rows of a network, Hessian and G together, as a multiple of one T1.

    Parameters
    ----------
    state
        The state.
    k
        Number of pairs of each row.
    gemm
        See :data:`GEMM`.
    """

    def __init__(self, state: State, k: int, gemm: Gemm = "same") -> None:
        self.state, self._k, self._gemm = state, k, gemm
        task = Task(2 * k, "hessian", "model", ())
        self._timed = Interleaved({"rows": self._rows, "T1": partial(ours, state, task, gemm)})
        self._rows()

    def ours(self) -> None:
        """Solve all rows, timed."""
        self._timed.run("rows")

    def others(self) -> None:
        """Solve the top pairs of the whole Hessian, timed."""
        self._timed.run("T1")

    def facts(self) -> Facts:
        """Return seconds, the multiple of T1, and the true residuals of some rows of each layer."""
        worst, count = 0.0, 0
        exact = Exact(self.state)
        for matrix, layers in self._timed.results["rows"].items():
            for found in layers.values():
                count += len(found.eigenvalues) if matrix == "hessian" else 0
                for row in {0, len(found.eigenvalues) // 2, len(found.eigenvalues) - 1}:
                    worst = max(worst, self._residual(exact, matrix, found, row))
        return {
            "rows": count,
            **self._timed.facts("rows"),
            **self._timed.facts("T1"),
            "hild-xr: true residual": worst,
            "times as long as T1": self._timed.ratio("rows", "T1"),
            "times as long as T1, CPU time": self._timed.ratio("rows", "T1", cpu=True),
        }

    def _rows(self) -> dict[str, Any]:
        with Curvature(self.state.model, self.state.objective, **GEMM[self._gemm]) as curvature:
            matrices: tuple[Matrix, ...] = ("hessian", "gmatrix")
            return {
                matrix: curvature.eigenpairs(self._k, matrix, "rows", tol=RESIDUAL) for matrix in matrices
            }

    @staticmethod
    def _residual(exact: Exact, matrix: Matrix, found: Any, row: int) -> float:
        """Return the worst residual of one row's pairs, taken in the block of its whole layer."""
        values, vectors = found.eigenvalues[row], found.eigenvectors[row].double()
        vectors = vectors / vectors.norm(dim=1, keepdim=True)
        padded = torch.zeros(len(values), *found.block.shapes[0], dtype=torch.float64)
        padded[:, row] = vectors
        products = exact.products(matrix, found.block.parameters, padded.flatten(1))
        products = products.reshape(padded.shape)[:, row]
        norms = (products - values[:, None] * vectors).norm(dim=1)
        # A row can have fewer nonzero eigenvalues than pairs: a thousandth of the largest is the least scale.
        return float((norms / torch.maximum(values.abs(), 1e-3 * values.abs().max())).max())


def floors(state: State) -> dict[str, Callable[[], object]]:
    """Return a Hessian product through a graph that is there, and a forward and backward pass."""
    leaves = list(state.model.parameters())

    def passes() -> object:
        return torch.autograd.grad(F.cross_entropy(state.model(state.inputs), state.targets), leaves)

    return dict(zip(FLOORS, (_product(state), passes), strict=True))


def _product(state: State) -> Callable[[], Tensor]:
    leaves = list(state.model.parameters())
    loss = F.cross_entropy(state.model(state.inputs), state.targets)
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    vectors = [torch.randn(leaf.shape, generator=torch.Generator().manual_seed(0)) for leaf in leaves]
    return lambda: flat(torch.autograd.grad(gradients, leaves, vectors, retain_graph=True))
