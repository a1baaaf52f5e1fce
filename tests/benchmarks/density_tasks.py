"""T4: the spectral density of the Hessian by stochastic Lanczos quadrature, at equal Wasserstein error.

The distance of a density from the true one is their Wasserstein-1 distance, relative to the largest absolute
eigenvalue. The truth is the whole spectrum where it can be had, and a long quadrature elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor
from torch.nn import functional as F

from hild_xr.recorders.curvature import Curvature
from tests.benchmarks.curvature_states import State
from tests.benchmarks.curvature_tasks import FLOORS, GEMM, Facts, Gemm, Interleaved, floors
from tests.benchmarks.peers import quiet
from tests.benchmarks.true_residuals import Exact, flat

STEPS, PROBES = 50, 10
_WHOLE_UP_TO = 3000
_FEWER = (1, 2, 3, 5, PROBES)


@dataclass(frozen=True)
class Measure:
    """The average of discrete probability measures on the line, one for each probe.

    Parameters
    ----------
    nodes, weights
        Shape (probes, n); the weights of a probe sum to 1. Where one ended early stand NaN and weight 0.
    """

    nodes: np.ndarray
    weights: np.ndarray

    def of_first(self, probes: int) -> Measure:
        """Return the average over the first probes only, as a run with so many would have given it."""
        return Measure(self.nodes[:probes], self.weights[:probes])

    def flat(self) -> tuple[np.ndarray, np.ndarray]:
        """Return nodes and weights of the average, shape (n,) each."""
        there = np.isfinite(self.nodes)
        return self.nodes[there], self.weights[there] / self.weights[there].sum()


Quadrature = Callable[[int, int], Measure]
"""Takes a number of probes and a seed."""


def wasserstein(first: Measure, second: Measure) -> float:
    """Return the Wasserstein-1 distance of two measures."""
    (nodes, weights), (other_nodes, other_weights) = first.flat(), second.flat()
    return float(wasserstein_distance(nodes, other_nodes, weights, other_weights))


def hild_xr(state: State, gemm: Gemm, steps: int, probes: int, seed: int) -> Measure:
    """Return the density as ``Curvature.density`` finds it, from nothing."""
    with Curvature(state.model, state.objective, **GEMM[gemm]) as curvature:
        (found,) = curvature.density("hessian", "model", k_steps=steps, probes=probes, seed=seed).values()
    return _measure(found.nodes, found.weights)


def curvlinops(state: State, steps: int, probes: int, seed: int) -> Measure:
    """Run the Lanczos iterations that curvlinops' spectral density averages, without its smoothing."""
    from curvlinops import HessianLinearOperator
    from curvlinops.papyan2020traces.spectrum import fast_lanczos

    batches, parameters = [(state.inputs, state.targets)], list(state.model.parameters())
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        operator = HessianLinearOperator(
            state.model, torch.nn.CrossEntropyLoss(), parameters, batches, check_deterministic=False
        )
        runs = [fast_lanczos(operator, steps) for _ in range(probes)]
    return _measure(
        torch.stack([values for values, _ in runs]), torch.stack([vectors[0] ** 2 for _, vectors in runs])
    )


def hessian_eigenthings(state: State, steps: int, probes: int, seed: int) -> Measure:
    """Return the nodes and weights behind hessian-eigenthings' spectral density."""
    from hessian_eigenthings import HessianOperator, spectral_density, supervised_loss

    operator = HessianOperator(state.model, [(state.inputs, state.targets)], supervised_loss(F.cross_entropy))
    # Of a grid for its smoothing, which is not looked at, the least.
    found = spectral_density(
        operator, num_runs=probes, lanczos_steps=steps, num_grid_points=2, seed=1000 * seed
    )
    return _measure(found.raw_eigenvalues, found.raw_weights)


def truth(state: State, probes: int = 8, steps: int = 200) -> Measure:
    """Return the spectrum, or a quadrature of so many steps, reorthogonalised in float64."""
    exact, names = Exact(state), state.names
    size = sum(parameter.numel() for parameter in state.model.parameters())
    if size <= _WHOLE_UP_TO:
        spectrum = torch.linalg.eigvalsh(exact.matrix("hessian", names)).numpy()
        return Measure(spectrum[None], np.full((1, size), 1 / size))
    product, generator = _product(state), torch.Generator().manual_seed(987)
    runs = [_lanczos(product, torch.randn(size, generator=generator), steps) for _ in range(probes)]
    return _measure(torch.stack([nodes for nodes, _ in runs]), torch.stack([weights for _, weights in runs]))


def _lanczos(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return the Gauss quadrature of a start vector by Lanczos with two full Gram-Schmidt passes."""
    basis = torch.zeros(steps, len(start), dtype=torch.float64)
    projected = torch.zeros(steps, steps, dtype=torch.float64)
    vector = torch.nn.functional.normalize(start.double(), dim=0)
    for j in range(steps):
        basis[j] = vector
        vector = product(vector.float()).double()
        for _ in range(2):
            coefficients = basis[: j + 1] @ vector
            projected[: j + 1, j] += coefficients
            vector = vector - basis[: j + 1].T @ coefficients
        vector = torch.nn.functional.normalize(vector, dim=0)
    nodes, vectors = torch.linalg.eigh(torch.triu(projected) + torch.triu(projected, 1).T)
    return nodes, vectors[0] ** 2


def _product(state: State) -> Callable[[Tensor], Tensor]:
    leaves = list(state.model.parameters())
    loss = F.cross_entropy(state.model(state.inputs), state.targets)
    gradient = flat(torch.autograd.grad(loss, leaves, create_graph=True))
    return lambda vector: flat(torch.autograd.grad(gradient, leaves, vector, retain_graph=True))


def _measure(nodes: Tensor, weights: Tensor) -> Measure:
    return Measure(nodes.double().numpy(), weights.double().numpy())


class DensityComparison:
    """T4 on one state: each peer as T4 says, and with the fewest probes that are as exact; ours likewise.

    Parameters
    ----------
    state
        The state.
    gemm
        See :data:`GEMM`.
    steps, probes
        Of the quadrature.
    seeds
        Seeds over which errors are averaged before anything is timed; the first is the one timed.
    """

    def __init__(
        self, state: State, gemm: Gemm = "same", *, steps: int = STEPS, probes: int = PROBES, seeds: int = 2
    ) -> None:
        self._seeds, self._truth = range(seeds), truth(state)
        self._scale = np.nanmax(np.abs(self._truth.nodes))
        peers: dict[str, Quadrature] = {
            "curvlinops": partial(curvlinops, state, steps),
            "hessian-eigenthings": partial(hessian_eigenthings, state, steps),
        }
        own: Quadrature = partial(hild_xr, state, gemm, steps)
        self._probes, self._errors = {}, {}
        timed: dict[str, Callable[[], Any]] = {}
        runs = {name: [peer(probes, seed) for seed in self._seeds] for name, peer in peers.items()}
        full = {name: self._error(measures) for name, measures in runs.items()}
        # All are to be as exact as the better of the peers at the full number of probes.
        self._wanted = min(full.values())
        for name, peer in peers.items():
            self._probes[name], self._errors[name] = probes, full[name]
            timed[name] = partial(peer, probes, 0)
            label = f"{name}, fewest probes"
            few = self._fewest(label, probes, partial(_first_of, runs[name]))
            timed[label] = partial(peer, few, 0)
        few = self._fewest("hild-xr", probes, lambda n: [own(n, seed) for seed in self._seeds])
        timed["hild-xr"] = partial(own, few, 0)
        self.solvers = tuple(timed)
        self._others = [name for name in timed if name != "hild-xr"]
        self._timed = Interleaved({**timed, **floors(state)})

    def ours(self) -> Measure:
        """Find the density with hild-xr, timed."""
        self._timed.run("hild-xr")
        measure: Measure = self._timed.results["hild-xr"]
        return measure

    def others(self) -> None:
        """Find the density with the peers and run the floors, timed."""
        self._timed.run(*self._others, *FLOORS)

    def facts(self) -> Facts:
        """Return seconds, probes, Wasserstein errors and ratios."""
        facts: Facts = {"Wasserstein error asked for": self._wanted}
        for name in ("hild-xr", *self._others):
            facts |= self._timed.facts(name)
            facts[f"{name}: probes"] = self._probes[name]
            facts[f"{name}: Wasserstein error"] = self._errors[name]
        for peer in self._others:
            if self._errors["hild-xr"] > _allowed(self._wanted):
                facts[f"times faster than {peer}"] = "not compared: hild-xr misses the error"
                continue
            facts[f"times faster than {peer}"] = self._timed.ratio(peer, "hild-xr")
            facts[f"times faster than {peer}, CPU time"] = self._timed.ratio(peer, "hild-xr", cpu=True)
        for floor in FLOORS:
            facts |= self._timed.facts(floor)
            facts[f"times as long as a {floor}"] = self._timed.ratio("hild-xr", floor)
        return facts

    def _fewest(self, name: str, most: int, measures: Callable[[int], list[Measure]]) -> int:
        """Find the smallest number of probes as exact as asked for, or the largest."""
        for probes in sorted({*(few for few in _FEWER if few < most), most}):
            self._probes[name], self._errors[name] = probes, self._error(measures(probes))
            if self._errors[name] <= _allowed(self._wanted):
                break
        return self._probes[name]

    def _error(self, measures: list[Measure]) -> float:
        return float(np.mean([wasserstein(measure, self._truth) for measure in measures]) / self._scale)


def _first_of(runs: list[Measure], probes: int) -> list[Measure]:
    return [run.of_first(probes) for run in runs]


def _allowed(wanted: float) -> float:
    """Equal, up to what the mean over a few seeds can tell."""
    return 1.05 * wanted
