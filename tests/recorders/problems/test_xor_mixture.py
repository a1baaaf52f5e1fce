from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from hild_xr.recorders.problems import XorMixture
from hild_xr.recorders.problems.xor_mixture import CENTRES

SMALL = XorMixture(dimension=20, hidden=4, snr=9.0)


def _weights(model: torch.nn.Module) -> tuple[np.ndarray, np.ndarray]:
    first, second = (parameter.detach().double().numpy() for parameter in model.parameters())
    return first, second


def test_sample__draws_the_four_centres_alike_with_noise_of_covariance_one_over_snr() -> None:
    n = 40_000
    inputs, targets = SMALL.sample(n, torch.Generator().manual_seed(0))
    Y, labels = inputs.double().numpy(), targets.numpy()[:, 0]
    overlaps = Y @ SMALL.centres.T
    sides = np.where(labels == 1, np.where(overlaps[:, 0] > 0, 0, 1), np.where(overlaps[:, 2] > 0, 2, 3))
    share = np.bincount(sides, minlength=4) / n
    assert abs(share - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / n)
    noise = Y - SMALL.centres[sides]
    perpendicular = noise - noise @ SMALL.span.T @ SMALL.span
    covariance = perpendicular.T @ perpendicular / n * 9
    projector = np.eye(20) - SMALL.span.T @ SMALL.span
    assert abs(covariance - projector).max() < 4.5 * np.sqrt(2 / n)
    assert kstest(3 * (Y[labels == 1] @ SMALL.span[1]), "norm").pvalue > 1e-3


def test_sample__gives_targets_in_the_shape_of_the_outputs() -> None:
    inputs, targets = SMALL.sample(7, torch.Generator().manual_seed(0))
    assert SMALL.model(0)(inputs).shape == targets.shape == (7, 1)
    assert set(targets.flatten().tolist()) <= {0.0, 1.0}


def test_centres__are_plus_and_minus_two_orthonormal_vectors() -> None:
    mu, nu = SMALL.span
    np.testing.assert_allclose(SMALL.span @ SMALL.span.T, np.eye(2), atol=1e-12)
    np.testing.assert_array_equal(SMALL.centres, [mu, -mu, nu, -nu])
    assert CENTRES == ("+mu", "-mu", "+nu", "-nu")


def test_model__starts_from_the_papers_gaussians() -> None:
    problem = XorMixture(dimension=500, hidden=400)
    first, second = _weights(problem.model(0))
    assert (first.shape, second.shape) == ((400, 500), (1, 400))
    assert kstest(first[:20].ravel() * np.sqrt(500), "norm").pvalue > 1e-3
    assert kstest(second.ravel(), "norm").pvalue > 1e-3
    assert [name for name, _ in problem.model(0).named_parameters()] == ["first.weight", "second.weight"]


def test_gradient__has_the_closed_form_of_the_two_layer_network() -> None:
    """grad_v = mean (sigma-y) g(WY) + beta v; grad_{W_i} = mean (sigma-y) v_i 1{W_i.Y>0} Y + beta W_i."""
    objective = SMALL.objective(60, seed=1)
    Y, y = objective.inputs.double(), objective.targets.double()
    model = SMALL.model(0).double()
    W, v = model.first.weight, model.second.weight
    loss = SMALL.loss(model(Y), y) + SMALL.beta / 2 * (W.square().sum() + v.square().sum())
    found_W, found_v = torch.autograd.grad(loss, [W, v])
    with torch.no_grad():
        hidden = Y @ W.T
        residual = torch.sigmoid(hidden.clamp(min=0) @ v.T) - y
        grad_v = (residual * hidden.clamp(min=0)).mean(0, keepdim=True) + SMALL.beta * v
        grad_W = (residual * v * (hidden > 0)).T @ Y / 60 + SMALL.beta * W
    torch.testing.assert_close(found_v, grad_v, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(found_W, grad_W, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("hidden", [4, 20])
@pytest.mark.parametrize("planted", [1, 2, 3, 4])
def test_planted_start__puts_each_neuron_on_one_centre_in_turn(planted: int, hidden: int) -> None:
    problem = XorMixture(dimension=30, hidden=hidden, planted_centres=planted, warm=0.4)
    first, second = _weights(problem.model(5))
    order = ["+mu", "+nu", "-nu", "-mu"][:planted]
    overlaps = first @ problem.centres.T
    for i in range(hidden):
        own = CENTRES.index(order[i % planted])
        expected = np.zeros(4)
        expected[own], expected[own ^ 1] = 0.4, -0.4  # the opposite centre is the neighbour in CENTRES
        np.testing.assert_allclose(overlaps[i], expected, atol=1e-6)
        assert second[0, i] == (1 if own < 2 else -1)
    assert problem.covered_centres(first, second) == planted


def test_planted_start__keeps_the_rest_of_the_first_layer_gaussian() -> None:
    gaussian, planted = (
        _weights(XorMixture(dimension=300, planted_centres=number).model(2))[0] for number in (None, 4)
    )
    span = XorMixture(dimension=300).span
    np.testing.assert_allclose(
        planted - planted @ span.T @ span, gaussian - gaussian @ span.T @ span, atol=1e-6
    )


def test_planted_centres__given_as_several_numbers_go_round_the_seeds() -> None:
    problem = XorMixture(dimension=30, planted_centres=(4, 3, 2))
    counts = [int(problem.covered_centres(*_weights(problem.model(seed)))) for seed in range(7)]
    assert counts == [problem.planted(seed) for seed in range(7)] == [4, 3, 2, 4, 3, 2, 4]
    assert XorMixture(dimension=30).planted(0) is None


def test_planted_centres__may_be_a_list_and_still_compare_and_hash() -> None:
    problem = XorMixture(planted_centres=[4, 3])
    assert problem == XorMixture(planted_centres=(4, 3))
    assert hash(problem) == hash(XorMixture(planted_centres=(4, 3)))


def _brute_force_covered(problem: XorMixture, first: np.ndarray, second: np.ndarray) -> int:
    """The rule in words: v_i > 0 sits on +mu or -mu, v_i < 0 on +nu or -nu, the overlap's sign says which."""
    mu, nu = problem.span
    cells = set()
    for weight, v in zip(first, second[0], strict=True):
        name, direction = ("mu", mu) if v > 0 else ("nu", nu)
        cells.add(("+" if weight @ direction > 0 else "-") + name)
    return len(cells)


def test_covered_centres__follows_the_rule_of_signs_from_the_gaussian_start() -> None:
    problem = XorMixture(dimension=15, hidden=5)
    weights = [_weights(problem.model(seed)) for seed in range(200)]
    expected = [_brute_force_covered(problem, *pair) for pair in weights]
    first, second = (np.stack(parts) for parts in zip(*weights, strict=True))
    np.testing.assert_array_equal(problem.covered_centres(first, second), expected)
    assert set(expected) == {1, 2, 3, 4}


def test_covered_centres__keeps_leading_dims() -> None:
    first, second = _weights(SMALL.model(0))
    stacked = SMALL.covered_centres(
        np.broadcast_to(first, (2, 3, 4, 20)), np.broadcast_to(second, (2, 3, 1, 4))
    )
    assert stacked.shape == (2, 3)
    assert (stacked == SMALL.covered_centres(first, second)).all()


def test_covered_centres__counts_no_neuron_of_the_wrong_sign() -> None:
    # +mu with v < 0 answers neither mu (wrong sign) nor nu (no overlap)
    first = SMALL.centres[[0, 0, 2, 3]]
    second = np.array([[1.0, -1.0, -1.0, 1.0]])
    np.testing.assert_allclose(SMALL.centre_margins(first, second), [1, 0, 1, 0], atol=1e-12)
    assert SMALL.covered_centres(first, second, threshold=0.01) == 2


def test_covered_centres__leaves_out_dead_neurons_below_the_threshold() -> None:
    sizes = np.array([0.6, 0.6, 0.6, 0.01])
    first = SMALL.centres * sizes[:, None]
    second = np.array([[1.0, 1.0, -1.0, -1.0]]) * sizes
    assert SMALL.covered_centres(first, second) == 4
    assert SMALL.covered_centres(first, second, threshold=0.03 * SMALL.fixed_point_margin) == 3


def test_centre_margins__are_the_fixed_point_margin_at_the_fixed_point() -> None:
    size = math.sqrt(SMALL.fixed_point_margin)
    margins = SMALL.centre_margins(size * SMALL.centres, size * np.array([[1.0, 1.0, -1.0, -1.0]]))
    np.testing.assert_allclose(margins, SMALL.fixed_point_margin)


@pytest.mark.parametrize("beta", [0.02, 0.05, 0.1, 0.12])
def test_fixed_point_margin__is_where_the_noiseless_gradient_vanishes(beta: float) -> None:
    """m = v = sqrt(C) on one centre: the data term (v/4) sigma(-v m) equals beta m."""
    margin = XorMixture(beta=beta).fixed_point_margin
    size = math.sqrt(margin)
    assert size / 4 / (1 + math.exp(margin)) == pytest.approx(beta * size)


@pytest.mark.parametrize("beta", [0.0, 0.125, 0.2])
def test_fixed_point_margin__is_nan_where_there_is_no_such_fixed_point(beta: float) -> None:
    assert math.isnan(XorMixture(beta=beta).fixed_point_margin)


@pytest.mark.parametrize("hidden", [1, 2, 4, 6])
def test_covered_centres_probabilities__count_all_ways_to_pick_centres(hidden: int) -> None:
    counts = np.bincount(
        [len(set(cells)) for cells in itertools.product(range(4), repeat=hidden)], minlength=5
    )
    np.testing.assert_allclose(XorMixture(hidden=hidden).covered_centres_probabilities, counts / 4**hidden)


def test_covered_centres_probabilities__are_the_papers_for_four_neurons() -> None:
    expected = [0, 1 / 64, 21 / 64, 9 / 16, 3 / 32]
    np.testing.assert_allclose(XorMixture(hidden=4).covered_centres_probabilities, expected)


def test_hidden_centres__are_the_relu_answers_to_the_centres() -> None:
    first, _ = _weights(SMALL.model(0))
    expected = np.array([[max(w @ c, 0) for w in first] for c in SMALL.centres])
    np.testing.assert_allclose(SMALL.hidden_centres(first), expected)
    assert SMALL.hidden_centres(np.stack([first] * 3)).shape == (3, 4, 4)


def test_bayes_accuracy__is_that_of_the_larger_overlap() -> None:
    problem = XorMixture(dimension=5, snr=3.0)
    n = 40_000
    inputs, targets = problem.sample(n, torch.Generator().manual_seed(0))
    overlap = abs(inputs.double().numpy() @ problem.span.T)
    right = (overlap[:, 0] > overlap[:, 1]) == targets.bool().numpy()[:, 0]
    p = problem.bayes_accuracy
    assert 0.75 < p < 0.85
    assert abs(right.mean() - p) < 4 * np.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ((4, 19), (1, 4), r"first_weight must have shape \(..., 4, 20\), as stored, got \(4, 19\)"),
        ((5, 20), (1, 5), r"second_weight must have shape \(..., 1, 4\)"),
        ((4, 20), (4,), r"second_weight must have shape \(..., 1, 4\), as stored, got \(4,\)"),
    ],
)
def test_covered_centres__refuses_other_shapes(
    first: tuple[int, ...], second: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SMALL.covered_centres(np.ones(first), np.ones(second))


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        ({"dimension": 1}, ValueError, "dimension must be an integer of at least 2"),
        ({"hidden": 0}, ValueError, "hidden must be an integer of at least 1"),
        ({"snr": -1.0}, ValueError, "snr must be a finite number above 0"),
        ({"warm": 0.0}, ValueError, "warm must be a finite number above 0"),
        ({"planted_centres": 5}, ValueError, "planted_centres must be an integer from 1 to 4, got 5"),
        ({"planted_centres": (4, 0)}, ValueError, "planted_centres must be an integer from 1 to 4, got 0"),
        ({"planted_centres": ()}, ValueError, "for the Gaussian start give None"),
        ({"planted_centres": 3, "hidden": 2}, ValueError, "planted_centres must be an integer from 1 to 2"),
        ({"planted_centres": 2.5}, TypeError, "planted_centres must be an integer from 1 to 4, got 2.5"),
    ],
)
def test_xor_mixture__refuses_what_makes_no_problem(
    other: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        XorMixture(**other)


@pytest.mark.parametrize(("planted", "lowest", "highest"), [(4, 0.999, 1.0), (3, 0.7, 0.82), (2, 0.54, 0.7)])
def test_training__from_a_planted_start_covers_as_many_centres(
    planted: int, lowest: float, highest: float
) -> None:
    """Sub-optimal on purpose: the rank of the second layer's block is the number of centres covered."""
    problem = XorMixture(dimension=100, snr=100.0, planted_centres=planted)
    model = problem.model(0)
    problem.train(model, problem.optimizer(model), steps=problem.steps(40.0), seed=0)
    first, second = _weights(model)
    objective = problem.objective(2000, seed=0)
    assert problem.covered_centres(first, second, threshold=0.1 * problem.fixed_point_margin) == planted
    assert lowest <= problem.accuracy(model, objective.inputs, objective.targets) <= highest
    hidden = np.maximum(objective.inputs.double().numpy() @ first.T, 0)
    sigma = 1 / (1 + np.exp(-hidden @ second[0]))
    values = np.linalg.eigvalsh((hidden * (sigma * (1 - sigma))[:, None]).T @ hidden)
    assert (values > 0.05 * values.max()).sum() == planted
    along = np.linalg.norm(first @ problem.span.T, axis=1) / np.linalg.norm(first, axis=1)
    assert along.min() > 0.99
