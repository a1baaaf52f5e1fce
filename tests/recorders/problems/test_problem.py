"""What holds for every problem: determinism, resumption, the plain loop, the loss that is descended."""

from __future__ import annotations

import importlib.util
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from hild_xr.recorders.problems import Digits, GaussianMixture, Problem, XorMixture

if TYPE_CHECKING:
    from hild_xr.recorders.objective import Objective

_needs_sklearn = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="no scikit-learn")

PROBLEMS = [
    pytest.param(GaussianMixture(dimension=12, classes=3, snr=5.0, beta=0.05), id="kgmm"),
    pytest.param(XorMixture(dimension=10, hidden=5, snr=20.0), id="xor"),
    pytest.param(XorMixture(dimension=10, hidden=5, planted_centres=(4, 2)), id="xor-planted"),
    pytest.param(Digits(), id="softmax", marks=_needs_sklearn),
    pytest.param(Digits(hidden=8, batch_size=4, centred=False), id="network", marks=_needs_sklearn),
]
every_problem = pytest.mark.parametrize("problem", PROBLEMS)


def _objective(problem: Problem) -> Objective:
    assert isinstance(problem, Digits | GaussianMixture | XorMixture)
    return problem.objective("train") if isinstance(problem, Digits) else problem.objective(64, seed=0)


def _trained(problem: Problem, seed: int, *pieces: int, **options: Any) -> list[torch.Tensor]:
    """Weights after training in pieces of these numbers of steps."""
    model = problem.model(seed)
    optimizer = problem.optimizer(model)
    done = 0
    for steps in pieces:
        problem.train(model, optimizer, steps=steps, seed=seed, start_step=done, **options)
        done += steps
    return [parameter.detach().clone() for parameter in model.parameters()]


def _equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_problem
def test_train__is_bit_identical_for_the_same_seed_and_differs_for_another(problem: Problem) -> None:
    first = _trained(problem, 1, 40)
    assert _equal(first, _trained(problem, 1, 40))
    assert not _equal(first, _trained(problem, 2, 40))
    assert not _equal(first, [parameter.detach() for parameter in problem.model(1).parameters()])


@every_problem
def test_train__in_pieces_is_bit_identical_to_training_at_once(problem: Problem) -> None:
    # pieces end inside a block, at its end (1024 samples; 360 batches of 4 of 1437 images) and beyond
    whole = _trained(problem, 3, 1500)
    assert _equal(whole, _trained(problem, 3, 17, 343, 663, 1, 476))


@every_problem
def test_train__takes_other_samples_after_another_number_of_steps(problem: Problem) -> None:
    model = problem.model(0)
    problem.train(model, problem.optimizer(model), steps=5, seed=0, start_step=5)
    assert not _equal(_trained(problem, 0, 5), [parameter.detach() for parameter in model.parameters()])


@every_problem
def test_everything__leaves_the_global_random_states_alone(problem: Problem) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    _trained(problem, 0, 3)
    _objective(problem)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()  # noqa: NPY002


@every_problem
def test_train__fires_the_step_hook_once_a_step_and_counts_progress(problem: Problem) -> None:
    model = problem.model(0)
    optimizer = problem.optimizer(model)
    hooks: list[int] = []
    progress: list[int] = []
    optimizer.register_step_post_hook(lambda *_: hooks.append(1))
    problem.train(model, optimizer, steps=75, seed=0, progress=progress.append)
    assert len(hooks) == 75
    assert progress == [32, 32, 11]


@every_problem
def test_train__takes_no_step_when_asked_for_none(problem: Problem) -> None:
    assert _equal(
        _trained(problem, 0, 0), [parameter.detach() for parameter in problem.model(0).parameters()]
    )


@every_problem
@pytest.mark.parametrize("name", ["steps", "start_step", "seed"])
def test_train__refuses_negative_numbers(problem: Problem, name: str) -> None:
    model = problem.model(0)
    numbers = {"steps": 1, "seed": 0, name: -1}
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 0, got -1"):
        problem.train(model, problem.optimizer(model), **numbers)


@every_problem
def test_train__sees_the_same_samples_in_float64(problem: Problem) -> None:
    model = problem.model(0).double()
    problem.train(model, problem.optimizer(model), steps=20, seed=0)
    for double, single in zip(model.parameters(), _trained(problem, 0, 20), strict=True):
        torch.testing.assert_close(double.detach(), single.double(), rtol=1e-4, atol=1e-5)


@every_problem
def test_train__descends_the_gradient_of_the_regularised_loss(problem: Problem) -> None:
    """One step changes theta by minus the learning rate times the gradient of loss + (beta/2) |theta|^2."""
    model = problem.model(0).double()
    seen: list[torch.Tensor] = []
    handle = model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    start = [parameter.detach().clone() for parameter in model.parameters()]
    problem.train(model, problem.optimizer(model), steps=1, seed=0)
    handle.remove()
    (inputs,) = seen

    objective = _train_objective(problem)
    found = (objective.inputs[:, None].double() == inputs[None]).all(-1).nonzero()  # which samples they were
    assert len(found) == len(inputs)
    targets = objective.targets[found[found[:, 1].argsort(), 0]]
    theta = [parameter.clone().requires_grad_() for parameter in start]
    names = [name for name, _ in model.named_parameters()]
    outputs = torch.func.functional_call(model, dict(zip(names, theta, strict=True)), (inputs,))
    penalty = sum((parameter.square().sum() for parameter in theta), torch.zeros(()))
    targets = targets.double() if targets.is_floating_point() else targets
    gradient = torch.autograd.grad(problem.loss(outputs, targets) + problem.beta / 2 * penalty, theta)
    for new, old, slope in zip(model.parameters(), start, gradient, strict=True):
        expected = old - problem.learning_rate * slope
        torch.testing.assert_close(new.detach(), expected, rtol=1e-12, atol=1e-14)


def _train_objective(problem: Problem) -> Objective:
    assert isinstance(problem, Digits | GaussianMixture | XorMixture)
    return (
        problem.objective("train") if isinstance(problem, Digits) else problem.objective(5, 0, data="train")
    )


@every_problem
def test_objective__is_the_regularised_mean_loss(problem: Problem) -> None:
    objective = _objective(problem)
    model = problem.model(0)
    with torch.no_grad():
        loss = problem.loss(model(objective.inputs), objective.targets)
    penalty = sum(parameter.detach().square().sum().item() for parameter in model.parameters())
    assert objective.value(model) == pytest.approx(float(loss) + problem.beta / 2 * penalty, rel=1e-5)


@every_problem
def test_accuracy__is_the_fraction_predicted_right(problem: Problem) -> None:
    objective = _objective(problem)
    model = problem.model(0)
    outputs = model(objective.inputs).detach().numpy()
    predicted = outputs[:, 0] > 0 if outputs.shape[1] == 1 else outputs.argmax(1)
    expected = (predicted == objective.targets.numpy().reshape(-1)).mean()
    assert problem.accuracy(model, objective.inputs, objective.targets) == pytest.approx(expected)


@every_problem
def test_problem__is_frozen_and_equal_to_one_with_the_same_hyperparameters(problem: Any) -> None:
    twin = type(problem)(**{name: getattr(problem, name) for name in problem.__dataclass_fields__})
    assert twin == problem
    assert hash(twin) == hash(problem)
    with pytest.raises(AttributeError):
        problem.beta = 0.5


@every_problem
def test_hyperparameters__as_json_make_the_same_problem_again(problem: Problem) -> None:
    config = json.loads(json.dumps(problem.hyperparameters()))
    assert type(problem)(**config) == problem
