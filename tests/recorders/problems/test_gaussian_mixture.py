from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from hild_xr.recorders.problems import GaussianMixture
from hild_xr.recorders.problems.mixture import BLOCK_STEPS, unit_means

SMALL = GaussianMixture(dimension=20, classes=3, snr=4.0, beta=0.05)


def _samples(problem: GaussianMixture, n: int) -> tuple[np.ndarray, np.ndarray]:
    inputs, targets = problem.sample(n, torch.Generator().manual_seed(0))
    return inputs.double().numpy(), targets.numpy()


@pytest.mark.parametrize("probabilities", [None, (0.2, 0.5, 0.3)])
def test_sample__draws_classes_with_their_probabilities(probabilities: tuple[float, ...] | None) -> None:
    n = 40_000
    problem = GaussianMixture(dimension=20, classes=3, probabilities=probabilities)
    p = np.array(probabilities or [1 / 3] * 3)
    _, classes = _samples(problem, n)
    share = np.bincount(classes, minlength=3) / n
    assert (abs(share - p) < 4 * np.sqrt(p * (1 - p) / n)).all()


@pytest.mark.parametrize("means", ["orthonormal", "general"])
def test_sample__has_the_class_means_and_noise_of_covariance_one_over_snr(means: Any) -> None:
    problem = GaussianMixture(dimension=20, classes=3, snr=4.0, means=means)
    inputs, classes = _samples(problem, 60_000)
    noise = inputs - problem.centres[classes]
    for c in range(3):
        own = noise[classes == c]
        assert abs(own.mean(0)).max() < 4.5 / np.sqrt(4.0 * len(own))
    covariance = noise.T @ noise / len(noise) * 4.0
    assert abs(covariance - np.eye(20)).max() < 4.5 * np.sqrt(2 / len(noise))
    assert kstest(noise[:2000].ravel() * 2, "norm").pvalue > 1e-3


def test_sample__gives_float32_inputs_and_integer_targets_that_the_loss_takes() -> None:
    inputs, targets = SMALL.sample(7, torch.Generator().manual_seed(0))
    assert (inputs.dtype, inputs.shape) == (torch.float32, (7, 20))
    assert (targets.dtype, targets.shape) == (torch.int64, (7,))
    assert SMALL.loss(SMALL.model(0)(inputs), targets).ndim == 0


def test_sample__refuses_no_samples() -> None:
    with pytest.raises(ValueError, match="n must be an integer of at least 1, got 0"):
        SMALL.sample(0, torch.Generator())


def test_centres__are_orthonormal_by_default_and_only_unit_vectors_if_general() -> None:
    np.testing.assert_allclose(SMALL.centres @ SMALL.centres.T, np.eye(3), atol=1e-12)
    general = GaussianMixture(dimension=20, classes=3, means="general").centres
    gram = general @ general.T
    np.testing.assert_allclose(np.diag(gram), 1, atol=1e-12)
    assert abs(gram[0, 1]) > 1e-3


def test_centres__belong_to_the_problem_and_change_with_means_seed() -> None:
    assert (SMALL.centres == GaussianMixture(dimension=20, classes=3).centres).all()
    assert (SMALL.centres != GaussianMixture(dimension=20, classes=3, means_seed=1).centres).any()
    with pytest.raises(ValueError, match="read-only"):
        SMALL.centres[0, 0] = 1.0


def test_unit_means__are_uniform_on_the_sphere() -> None:
    """Each coordinate has mean 0 and mean square 1/d, so no direction is preferred by the QR's signs."""
    draws = np.array([unit_means(2, 4, seed, orthonormal=True) for seed in range(2000)])
    assert abs(draws.mean(0)).max() < 4 * np.sqrt(1 / 4 / 2000)
    assert abs((draws**2).mean(0) - 1 / 4).max() < 4 * np.sqrt(1 / 4 / 2000)


@pytest.mark.parametrize("means", ["orthonormal", "general"])
def test_span__is_an_orthonormal_basis_of_the_means(means: Any) -> None:
    problem = GaussianMixture(dimension=20, classes=3, means=means)
    np.testing.assert_allclose(problem.span @ problem.span.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(problem.centres @ problem.span.T @ problem.span, problem.centres, atol=1e-12)


def test_model__starts_from_independent_gaussians_of_variance_one_over_d() -> None:
    problem = GaussianMixture(dimension=2000, classes=4)
    weight = problem.model(0).linear.weight.detach().double().numpy()
    assert weight.shape == (4, 2000)
    assert kstest(weight.ravel() * np.sqrt(2000), "norm").pvalue > 1e-3
    assert [name for name, _ in problem.model(0).named_parameters()] == ["linear.weight"]


@pytest.mark.parametrize("means", ["orthonormal", "general"])
def test_model__planted_start_has_the_overlap_asked_for(means: Literal["orthonormal", "general"]) -> None:
    problem = GaussianMixture(dimension=200, classes=3, means=means, start="planted", warm=0.25)
    weight = problem.model(seed=4).linear.weight.detach().double().numpy()
    in_span = weight @ problem.span.T @ problem.span
    np.testing.assert_allclose(in_span, 0.25 * problem.centres, atol=1e-6)
    gaussian = GaussianMixture(dimension=200, classes=3, means=means).model(seed=4).linear.weight.detach()
    rest = gaussian.double().numpy()
    np.testing.assert_allclose(weight - in_span, rest - rest @ problem.span.T @ problem.span, atol=1e-6)


def test_model__starts_from_zero_on_request() -> None:
    problem = GaussianMixture(dimension=20, classes=3, start="zero")
    assert not problem.model(0).linear.weight.any()


def test_gradient__has_the_closed_form_of_softmax_regression() -> None:
    """grad_{x^c} = mean of (phi_c - y_c) Y, plus beta x^c."""
    inputs, targets = (
        t.double() if t.is_floating_point() else t for t in SMALL.objective(50, seed=1).samples(slice(None))
    )
    model = SMALL.model(0).double()
    x = model.linear.weight
    loss = SMALL.loss(model(inputs), targets) + SMALL.beta / 2 * x.square().sum()
    (found,) = torch.autograd.grad(loss, x)
    phi = torch.softmax(inputs @ x.detach().T, dim=1)
    onehot = torch.eye(3, dtype=torch.float64)[targets]
    expected = (phi - onehot).T @ inputs / 50 + SMALL.beta * x.detach()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


def test_bayes_accuracy__is_that_of_the_nearest_mean() -> None:
    problem = GaussianMixture(dimension=20, classes=3, snr=4.0)
    n = 40_000
    inputs, classes = _samples(problem, n)
    nearest = ((inputs[:, None] - problem.centres) ** 2).sum(-1).argmin(1)
    p = problem.bayes_accuracy
    assert 0.8 < p < 0.95
    assert abs((nearest == classes).mean() - p) < 4 * np.sqrt(p * (1 - p) / n)


def test_bayes_accuracy__for_two_classes_is_the_normal_law_of_half_their_distance() -> None:
    problem = GaussianMixture(dimension=20, classes=2, snr=3.0)
    assert problem.bayes_accuracy == pytest.approx(0.88966, abs=1e-5)  # Phi(sqrt(3/2)) = Phi(1.2247)


@pytest.mark.parametrize("other", [{"means": "general"}, {"probabilities": (0.5, 0.3, 0.2)}])
def test_bayes_accuracy__is_refused_where_it_has_no_formula(other: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match="only for orthonormal means and equal probabilities"):
        _ = GaussianMixture(dimension=20, classes=3, **other).bayes_accuracy


def test_objective__on_test_data_is_fixed_by_the_seed_and_independent_of_training() -> None:
    # as many as a block of training samples, where a shared stream would give the same numbers
    first, again, other = (SMALL.objective(BLOCK_STEPS, seed) for seed in (0, 0, 1))
    assert torch.equal(first.inputs, again.inputs)
    assert not torch.equal(first.inputs, other.inputs)
    assert not torch.equal(first.inputs, SMALL.objective(BLOCK_STEPS, 0, data="train").inputs)


def test_training_samples__are_all_fresh() -> None:
    inputs = SMALL.objective(3 * BLOCK_STEPS, 0, data="train").inputs
    assert len(set(map(tuple, inputs.tolist()))) == 3 * BLOCK_STEPS


def test_objective__on_training_data_holds_the_samples_sgd_sees_in_their_order() -> None:
    model = SMALL.model(0)
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    SMALL.train(model, SMALL.optimizer(model), steps=1030, seed=0)
    objective = SMALL.objective(1030, 0, data="train")
    assert torch.equal(torch.cat(seen), objective.inputs)
    assert len(objective.targets) == 1030


def test_objective__refuses_other_data() -> None:
    with pytest.raises(ValueError, match="data must be one of 'test', 'train', got 'all'"):
        SMALL.objective(10, 0, data="all")


def test_learning_rate__is_c_delta_over_d_and_time_counts_it() -> None:
    problem = GaussianMixture(dimension=200, c_delta=0.5)
    assert problem.learning_rate == 0.0025
    assert problem.time(4000) == 10.0
    assert problem.steps(10.0) == 4000


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"classes": 1}, "classes must be an integer of at least 2"),
        ({"classes": 30}, "dimension must be an integer of at least 30, got 20"),
        ({"snr": 0.0}, "snr must be a finite number above 0"),
        ({"beta": -0.1}, "beta must be a finite number of at least 0"),
        ({"c_delta": 0.0}, "c_delta must be a finite number above 0"),
        ({"means_seed": -1}, "means_seed must be an integer of at least 0"),
        ({"means": "random"}, "means must be one of 'orthonormal', 'general'"),
        ({"start": "warm"}, "start must be one of 'gaussian', 'zero', 'planted'"),
        ({"probabilities": (0.5, 0.5)}, "probabilities must be 3 positive numbers that sum to 1"),
        ({"probabilities": (0.5, 0.5, 0.0)}, "probabilities must be 3 positive numbers that sum to 1"),
        ({"probabilities": (0.5, 0.4, 0.3)}, "probabilities must be 3 positive numbers that sum to 1"),
    ],
)
def test_gaussian_mixture__refuses_what_makes_no_problem(other: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianMixture(**{"dimension": 20, "classes": 3, **other})


def test_training__aligns_each_row_with_the_top_eigenspace_of_its_own_blocks() -> None:
    """The theorem at a size with known numbers: rho >= .95 for H and .94 for G, at most .23 at the start."""
    problem = GaussianMixture(dimension=200, classes=3, snr=50.0, beta=0.05)
    model = problem.model(0)
    before = _alignments(problem, model.linear.weight)
    problem.train(model, problem.optimizer(model), steps=problem.steps(20.0), seed=0)
    after = _alignments(problem, model.linear.weight)
    assert before.max() < 0.25
    assert after[0].min() > 0.95
    assert after[1].min() > 0.94


def _alignments(problem: GaussianMixture, weight: torch.Tensor) -> np.ndarray:
    """rho(x^c, E_k) of the cc-blocks of Hessian and G-matrix, from their closed forms; shape (2, k)."""
    objective = problem.objective(4000, seed=0)
    Y, x = objective.inputs.double().numpy(), weight.detach().double().numpy()
    phi = torch.softmax(torch.tensor(Y @ x.T), 1).numpy()
    y = np.eye(problem.classes)[objective.targets.numpy()]
    rho = np.empty((2, problem.classes))
    for i, factors in enumerate((phi * (1 - phi), (phi - y) ** 2)):
        for c in range(problem.classes):
            vectors = np.linalg.eigh((Y * factors[:, c, None]).T @ Y)[1][:, -problem.classes :]
            rho[i, c] = np.linalg.norm(vectors.T @ x[c]) / np.linalg.norm(x[c])
    return rho
