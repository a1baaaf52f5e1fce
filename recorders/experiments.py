"""The papers' experiments, ready to train and record: a problem, its probes, its schedule.

Sizes are those for which the theory's claims were checked; ``hild-xr reproduce``
trains them and puts the claims beside what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import JsonValue
from tqdm import tqdm

from hild_xr.recorders.objective import Objective
from hild_xr.recorders.probes import GMatrix, Hessian, Metrics, Probe, Weights
from hild_xr.recorders.problems import Digits, GaussianMixture, XorMixture
from hild_xr.recorders.problems.problem import Problem
from hild_xr.recorders.recorder import Recorder
from hild_xr.recorders.schedule import Schedule, log_then_linear
from hild_xr.store import StoreLike, recorded_seeds

RECORDS = 60
"""Records along training: enough for a figure, cheap beside the training itself."""


ProblemT = TypeVar("ProblemT", bound=Problem, covariant=True)


@dataclass(frozen=True, kw_only=True)
class Experiment(Generic[ProblemT]):
    """One configuration: what is trained, for how long, and what is recorded.

    Parameters
    ----------
    name
        Name of the run, and of its store.
    problem
        Network, loss, samples and SGD.
    steps
        Optimizer steps of each seed.
    schedule
        When to record.
    objective
        Data of Hessian and G-matrix for a seed.
    probes
        Makes the probes of one seed.
    """

    name: str
    problem: ProblemT
    steps: int
    schedule: Schedule
    objective: Callable[[int], Objective]
    probes: Callable[[], list[Probe]]

    @property
    def config(self) -> dict[str, JsonValue]:
        """Hyperparameters as JSON values."""
        return {
            "experiment": self.name,
            "problem": type(self.problem).__name__,
            "learning_rate": self.problem.learning_rate,
            "steps": self.steps,
            **self.problem.hyperparameters(),
        }


def record(
    experiment: Experiment[Problem], path: StoreLike, *, seeds: Iterable[int], progress: bool = True
) -> None:
    """Train every seed that the store does not hold yet, and record it.

    Calling it again after an interruption trains what is missing.

    Parameters
    ----------
    experiment
        What to train and record.
    path
        Path of the store, or a zarr store.
    seeds
        Seeds of the run.
    progress
        Show a progress bar over the optimizer steps.

    Raises
    ------
    PlanMismatchError
        If the store was made by another experiment or for other seeds.
    """
    planned = tuple(seeds)
    done = recorded_seeds(path)
    with tqdm(
        total=len(planned) * experiment.steps, desc=experiment.name, unit="step", disable=not progress
    ) as bar:
        for seed in planned:
            if seed in done:
                bar.update(experiment.steps)
            else:
                _record_seed(experiment, path, seed, planned, bar.update)


def _record_seed(
    experiment: Experiment[Problem],
    path: StoreLike,
    seed: int,
    seeds: tuple[int, ...],
    progress: Callable[[int], object],
) -> None:
    problem = experiment.problem
    model = problem.model(seed)
    optimizer = problem.optimizer(model)
    with Recorder(
        path,
        model,
        optimizer,
        objective=experiment.objective(seed),
        probes=experiment.probes(),
        schedule=experiment.schedule,
        seed=seed,
        seeds=seeds,
        config=experiment.config,
        resume=True,
        start_step=0,  # training is deterministic, so what an interrupted attempt left is made anew
        progress=False,
    ):
        problem.train(model, optimizer, steps=experiment.steps, seed=seed, progress=progress)


def kgmm() -> Experiment[GaussianMixture]:
    """k-GMM by softmax regression (arXiv 2310.03010): x^c aligns with the outliers of its block.

    Examples
    --------
    >>> kgmm().config["classes"]
    3
    """
    problem = GaussianMixture(dimension=200, classes=3, snr=50.0, beta=0.05)
    return _mixture_rows("kgmm", problem, time=20, samples=4000, layer="linear.weight")


def xor() -> Experiment[XorMixture]:
    """XOR-GMM with four neurons, started on 4, 3, 4, 2 centres in turn: optimal beside sub-optimal.

    Examples
    --------
    >>> xor().config["planted_centres"]
    [4, 3, 4, 2]
    """
    problem = XorMixture(dimension=100, hidden=4, snr=100.0, beta=0.1, planted_centres=(4, 3, 4, 2))
    return _two_layers("xor", problem, time=40, samples=5000)


def xor_wide() -> Experiment[XorMixture]:
    """XOR-GMM with twenty neurons from the Gaussian start: the second layer's outlier space emerges.

    Examples
    --------
    >>> xor_wide().problem.model(seed=0).first.weight.shape
    torch.Size([20, 250])
    """
    problem = XorMixture(dimension=250, hidden=20, snr=100.0, beta=0.05)
    return _two_layers("xor_wide", problem, time=60, samples=5000, rows=False)


def digits_softmax() -> Experiment[Digits]:
    """Softmax regression on the digits: ten class vectors, as in the k-GMM but on real data.

    Examples
    --------
    >>> digits_softmax().steps
    10000
    """
    return _digits("digits_softmax", Digits(), steps=10_000, layers=["linear.weight"])


def digits_network() -> Experiment[Digits]:
    """64-32-10 ReLU network on the digits: one block a hidden neuron and one a class.

    Examples
    --------
    >>> digits_network().problem.hidden
    32
    """
    return _digits("digits_network", Digits(hidden=32), steps=20_000, layers=["fc1.weight", "fc2.weight"])


def _mixture_rows(
    name: str, problem: GaussianMixture, *, time: float, samples: int, layer: str
) -> Experiment[GaussianMixture]:
    """One block a class: more eigenpairs than outliers, so that the bulk is seen too."""
    k = min(problem.dimension, 2 * problem.classes + 4)
    return Experiment(
        name=name,
        problem=problem,
        steps=problem.steps(time),
        schedule=log_then_linear(total_steps=problem.steps(time), records=RECORDS),
        objective=lambda seed: problem.objective(samples, seed),
        probes=lambda: [
            Metrics(),
            Weights(),
            Hessian(k, blocks="rows", layers=[layer]),
            GMatrix(k, blocks="rows", layers=[layer]),
        ],
    )


def _two_layers(
    name: str, problem: XorMixture, *, time: float, samples: int, rows: bool = True
) -> Experiment[XorMixture]:
    """Record the whole spectrum of the second layer, and with ``rows`` one block a hidden neuron."""
    first, second, hidden = ["first.weight"], ["second.weight"], problem.hidden

    def probes() -> list[Probe]:
        whole: list[Probe] = [
            Metrics(),
            Weights(),
            Hessian(hidden, layers=second, matrix_up_to=hidden),
            GMatrix(hidden, layers=second, matrix_up_to=hidden),
        ]
        per_neuron: list[Probe] = [
            Hessian(6, blocks="rows", layers=first),
            GMatrix(6, blocks="rows", layers=first),
        ]
        return whole + per_neuron if rows else whole

    return Experiment(
        name=name,
        problem=problem,
        steps=problem.steps(time),
        schedule=log_then_linear(total_steps=problem.steps(time), records=RECORDS),
        objective=lambda seed: problem.objective(samples, seed),
        probes=probes,
    )


def _digits(name: str, problem: Digits, *, steps: int, layers: list[str]) -> Experiment[Digits]:
    """One block a row of each layer, two eigenpairs more than there are classes."""
    return Experiment(
        name=name,
        problem=problem,
        steps=steps,
        schedule=log_then_linear(total_steps=steps, records=RECORDS),
        objective=lambda _: problem.objective("train"),
        probes=lambda: [
            Metrics(test=problem.objective("test")),
            Weights(),
            Hessian(12, blocks="rows", layers=layers),
            GMatrix(12, blocks="rows", layers=layers),
        ],
    )
