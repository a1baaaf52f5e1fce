"""The theory's claims at the sizes and thresholds of the reference runs, recorded, stored and analysed.

Each run is recorded at its start and its end (and where a claim names a time), opened as a user would, and
measured by the labelled analysis. The thresholds are looser than every value seen over the seeds.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import hild_xr as hx
from hild_xr import recorders as rec
from hild_xr.analysis import alignment, outliers, random_alignment_baseline, subspace_alignment
from hild_xr.recorders import experiments
from hild_xr.recorders.experiments import Experiment
from hild_xr.recorders.problems import GaussianMixture, Problem, XorMixture
from hild_xr.reproduce import kgmm, xor


def _recorded(
    experiment: Experiment[Problem], path: Path, seeds: int, times: tuple[float, ...] = ()
) -> xr.DataTree:
    """Record start, the times named (t = learning rate x steps) and end."""
    steps = [round(t / experiment.problem.learning_rate) for t in times]
    at = rec.at([0, *steps, experiment.steps])
    experiments.record(replace(experiment, schedule=at), path, seeds=range(seeds), progress=False)
    return hx.open(path)


@pytest.fixture(scope="module")
def kgmm_measured(tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    """k-GMM d=200, k=3, lambda=50, beta=.05, delta=1/d, t=20, M=4000, eight seeds."""
    experiment = experiments.kgmm()
    problem = experiment.problem
    assert (problem.dimension, problem.classes, problem.snr, problem.beta) == (200, 3, 50.0, 0.05)
    assert experiment.steps == 4000
    run = _recorded(experiment, tmp_path_factory.mktemp("kgmm") / "run.zarr", seeds=8)
    assert run["hessian_rows"].attrs["samples"] == 4000
    return kgmm.measure(run, problem.centres).load()


@pytest.mark.heavy
def test_d1__class_vectors_align_with_the_outlier_eigenspaces_of_their_own_blocks(
    kgmm_measured: xr.Dataset,
) -> None:
    start, end = kgmm_measured.isel(step=0), kgmm_measured.isel(step=-1)
    assert end["hessian"].shape == (8, 3)
    assert end["hessian"].min() >= 0.95
    assert end["gmatrix"].min() >= 0.94
    assert start["hessian"].max() <= 0.23
    assert start["gmatrix"].max() <= 0.23
    assert abs(start["hessian"].mean() - random_alignment_baseline(3, 200)) < 0.05


@pytest.mark.heavy
def test_d2__outlier_eigenspaces_are_the_span_of_the_means(kgmm_measured: xr.Dataset) -> None:
    end = kgmm_measured.isel(step=-1)
    assert end["hessian_span"].min() >= 0.995
    assert end["gmatrix_span"].min() >= 0.99
    assert end["hessian_gap"].min() >= 6
    assert end["gmatrix_gap"].min() >= 3


@pytest.mark.heavy
def test_d3__top_eigenvector_is_the_own_mean_and_the_vector_only_partly_aligned_with_it(
    kgmm_measured: xr.Dataset,
) -> None:
    end = kgmm_measured.isel(step=-1)
    assert end["top_is_mean"].min() >= 0.98
    assert end["top"].min() > 0.65
    assert end["top"].max() < 0.85


@pytest.mark.heavy
def test_d6__without_signal_there_are_no_outliers(tmp_path: Path) -> None:
    problem = GaussianMixture(dimension=500, classes=4, snr=2.0, beta=0.01)
    experiment = replace(
        experiments.kgmm(),
        problem=problem,
        steps=problem.steps(20),
        objective=lambda seed: problem.objective(10_000, seed),
        probes=lambda: [rec.Weights(), *(p(8, blocks="rows") for p in (rec.Hessian, rec.GMatrix))],
    )
    run = _recorded(experiment, tmp_path / "run.zarr", seeds=1)
    measured = kgmm.measure(run, problem.centres).isel(step=-1).load()
    assert measured["hessian_span"].max() < 0.3
    assert measured["hessian_gap"].max() < 1.05


@pytest.fixture(scope="module", params=[4, 3, 2])
def xor_measured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, xr.Dataset]:
    """XOR d=100, K=4, lambda=100, beta=.1, t=40, M=5000, overlap .3, eight seeds on 4, 3 or 2 centres."""
    planted: int = request.param
    problem = XorMixture(dimension=100, hidden=4, snr=100.0, beta=0.1, planted_centres=planted, warm=0.3)
    experiment = replace(
        experiments.xor(), problem=problem, objective=lambda seed: problem.objective(5000, seed)
    )
    assert experiment.steps == 4000
    run = _recorded(experiment, tmp_path_factory.mktemp("xor") / "run.zarr", seeds=8)

    def covered(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return problem.covered_centres(first, second, threshold=problem.fixed_point_margin / 2)

    return planted, xor.measure(run, problem.span, covered).isel(step=-1).load()


ACCURACY = {4: (1.0, 1.0), 3: (0.73, 0.77), 2: (0.58, 0.70)}


@pytest.mark.heavy
def test_d9__second_layer_has_as_many_outliers_as_centres_are_covered(
    xor_measured: tuple[int, xr.Dataset],
) -> None:
    planted, end = xor_measured
    assert end["covered"].values.tolist() == [planted] * 8
    assert end["hessian_count"].values.tolist() == [planted] * 8
    assert end["gmatrix_count"].values.tolist() == [planted] * 8
    lower, upper = ACCURACY[planted]
    assert end["accuracy"].min() >= lower
    assert end["accuracy"].max() <= upper


@pytest.mark.heavy
def test_d10__both_layers_lie_in_their_outlier_eigenspaces(xor_measured: tuple[int, xr.Dataset]) -> None:
    _, end = xor_measured
    for name in ("span", "hessian", "gmatrix"):
        assert end[name].min() >= 0.99, name
    for name in ("hessian_span", "gmatrix_span"):
        assert end[name].min() >= 0.998, name
    for name in ("hessian_gap", "gmatrix_gap"):
        assert end[name].min() >= 20, name
    for name in ("hessian_second", "gmatrix_second"):
        assert end[name].min() >= 0.999, name
    assert end["span"].notnull().any("out").all(), "every seed has living neurons"


@pytest.mark.heavy
def test_d11__four_outliers_emerge_in_the_second_layer(tmp_path: Path) -> None:
    experiment = experiments.xor_wide()
    problem = experiment.problem
    assert (problem.dimension, problem.hidden, problem.snr, problem.beta) == (250, 20, 100.0, 0.05)
    assert problem.planted_centres is None
    run = _recorded(experiment, tmp_path / "run.zarr", seeds=1, times=(5.0,))
    np.testing.assert_allclose(run["weights/step"].values * problem.learning_rate, [0, 5, 60])
    measured = xor.measure_second_layer(run, 4).isel(seed=0).load()
    start, early, end = measured["hessian"].values
    assert start < 0.6
    assert early > 0.9
    assert end > 0.99
    assert measured["hessian_count"].values[0] > 8
    assert measured["hessian_count"].values[1:].tolist() == [4, 4]


def test_a6__recorded_blocks_of_an_exact_design_have_the_population_eigenvalues(tmp_path: Path) -> None:
    """Inputs mu_b +- sqrt(d/lambda) e_j have mean mu_b and covariance I/lambda exactly."""
    import torch
    from torch.nn import functional as F

    d, k, snr, beta = 30, 4, 10.0, 0.02
    problem = GaussianMixture(dimension=d, classes=k, snr=snr, beta=beta)
    offsets = np.sqrt(d / snr) * np.concatenate([np.eye(d), -np.eye(d)])
    inputs = torch.tensor(np.concatenate([mean + offsets for mean in problem.centres]))
    targets = torch.arange(k).repeat_interleave(2 * d)
    model = problem.model(0).double()
    with torch.no_grad():
        model.linear.weight.zero_()
    objective = rec.Objective(F.cross_entropy, inputs, targets, l2=beta)
    probes = [rec.Hessian(d, blocks="rows"), rec.GMatrix(d, blocks="rows", include_regularizer=False)]
    with rec.Recorder(tmp_path / "run.zarr", model, objective=objective, probes=probes, schedule=rec.at([0])):
        pass
    run = hx.open(tmp_path / "run.zarr")
    bulk = (k - 1) / (k**2 * snr)
    hessian = run["hessian_rows/linear.weight/eigenvalues"].isel(seed=0, step=0).values
    expected = beta + np.array([(k - 1) / k**2 * (1 / k + 1 / snr)] * k + [bulk] * (d - k))
    np.testing.assert_allclose(hessian, np.tile(expected, (k, 1)), atol=1e-6)
    gmatrix = run["gmatrix_rows/linear.weight/eigenvalues"].isel(seed=0, step=0).values
    expected = bulk + np.array([(k - 1) ** 2 / k**3] + [1 / k**3] * (k - 1) + [0] * (d - k))
    np.testing.assert_allclose(gmatrix, np.tile(expected, (k, 1)), atol=1e-6)
    leading = run["hessian_rows/linear.weight/eigenvectors"].isel(eig=slice(k))
    means = xr.DataArray(problem.centres, dims=("centre", "in"))
    aligned = subspace_alignment(leading, means, vector_dims=["in"], number_dim=("eig", "centre"))
    np.testing.assert_allclose(aligned.values, 1, atol=1e-6)
    top = run["gmatrix_rows/linear.weight/eigenvectors"].isel(eig=[0])
    own = xr.DataArray(problem.centres, dims=("out", "in"))
    np.testing.assert_allclose(alignment(own, top, vector_dims=["in"], number_dim="eig").values, 1, atol=1e-6)
    gmatrix_rows = run["gmatrix_rows/linear.weight/eigenvalues"]
    counted = outliers(gmatrix_rows, method="gap", k=k, threshold=1.5)  # the gap ratio is 1.83 here
    assert (counted["outlier_count"].values == k).all()
