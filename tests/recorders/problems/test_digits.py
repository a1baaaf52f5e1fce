from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from hild_xr.recorders.problems import Digits

pytest.importorskip("sklearn")


def test_samples__split_all_images_between_training_and_test() -> None:
    problem = Digits(centred=False)
    (train, train_classes), (test, test_classes) = problem.samples("train"), problem.samples("test")
    assert (train.shape, test.shape) == ((1437, 64), (360, 64))
    assert (train.dtype, train_classes.dtype) == (torch.float32, torch.int64)
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    assert sorted(torch.cat([train, test]).tolist()) == sorted(images.tolist())
    counts = torch.bincount(torch.cat([train_classes, test_classes]))
    assert counts.tolist() == torch.bincount(torch.tensor(load_digits().target)).tolist()


def test_samples__keep_images_with_their_classes() -> None:
    from sklearn.datasets import load_digits

    images = load_digits()
    known = {tuple(image): int(target) for image, target in zip(images.data / 16, images.target, strict=True)}
    inputs, targets = Digits(centred=False).samples("test")
    assert [known[tuple(image)] for image in inputs.double().tolist()] == targets.tolist()


def test_split__belongs_to_the_problem_and_changes_with_split_seed() -> None:
    assert torch.equal(Digits().samples("test")[0], Digits(hidden=3).samples("test")[0])
    assert not torch.equal(Digits().samples("test")[1], Digits(split_seed=1).samples("test")[1])


def test_centred__subtracts_the_mean_training_image_from_both_parts() -> None:
    raw, centred = Digits(centred=False), Digits()
    mean = raw.samples("train")[0].mean(0)
    for split in ("train", "test"):
        torch.testing.assert_close(centred.samples(split)[0], raw.samples(split)[0] - mean)
    assert centred.samples("train")[0].mean(0).abs().max() < 1e-5


def test_model__is_one_layer_without_bias_or_a_relu_network_with_biases() -> None:
    softmax = {name: tuple(p.shape) for name, p in Digits().model(0).named_parameters()}
    assert softmax == {"linear.weight": (10, 64)}
    network = {name: tuple(p.shape) for name, p in Digits(hidden=32).model(0).named_parameters()}
    assert network == {"fc1.weight": (32, 64), "fc1.bias": (32,), "fc2.weight": (10, 32), "fc2.bias": (10,)}


def test_model__starts_within_torch_s_own_bounds() -> None:
    model = Digits(hidden=32).model(0)
    for layer, bound in ((model.fc1, 1 / 8), (model.fc2, 32**-0.5)):
        assert 0.95 * bound < layer.weight.abs().max() <= bound
        assert layer.bias.abs().max() <= bound
        assert abs(layer.weight.mean()) < 0.1 * bound


def test_network__computes_relu_between_its_layers() -> None:
    model = Digits(hidden=5).model(0)
    inputs = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    hidden = (inputs @ model.fc1.weight.T + model.fc1.bias).clamp(min=0)
    torch.testing.assert_close(model(inputs), hidden @ model.fc2.weight.T + model.fc2.bias)


def test_train__shows_every_training_image_once_an_epoch_in_an_order_of_the_seed() -> None:
    problem = Digits(batch_size=5)
    orders = []
    for seed in (0, 1):
        model = problem.model(seed)
        seen: list[torch.Tensor] = []
        model.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].clone()))
        problem.train(model, problem.optimizer(model), steps=2 * 288, seed=seed)  # 1437 = 287 * 5 + 2
        assert [len(batch) for batch in seen] == ([5] * 287 + [2]) * 2
        epochs = torch.cat(seen).reshape(2, 1437, 64)
        images = sorted(problem.samples("train")[0].tolist())
        assert all(sorted(epoch.tolist()) == images for epoch in epochs)
        assert not torch.equal(*epochs)
        orders.append(epochs[0])
    assert not torch.equal(*orders)


@pytest.mark.parametrize("hidden", [None, 32])
def test_train__learns_to_read_digits(hidden: int | None) -> None:
    problem = Digits(hidden=hidden)
    model = problem.model(0)
    assert problem.accuracy(model, *problem.samples("test")) < 0.3
    problem.train(model, problem.optimizer(model), steps=4000, seed=0)
    assert problem.accuracy(model, *problem.samples("test")) > 0.88


def test_objective__takes_training_or_test_images() -> None:
    problem = Digits()
    assert torch.equal(problem.objective().inputs, problem.samples("train")[0])
    assert torch.equal(problem.objective("test").targets, problem.samples("test")[1])
    with pytest.raises(ValueError, match="split must be one of 'train', 'test', got 'all'"):
        problem.objective("all")


def test_samples__name_the_extra_when_scikit_learn_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hild-xr\[examples\]'"):
        Digits().samples("train")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"hidden": 0}, "hidden must be an integer of at least 1"),
        ({"beta": -1.0}, "beta must be a finite number of at least 0"),
        ({"learning_rate": 0.0}, "learning_rate must be a finite number above 0"),
        ({"batch_size": 0}, "batch_size must be an integer from 1 to 1437"),
        ({"batch_size": 1438}, "batch_size must be an integer from 1 to 1437, got 1438"),
        ({"test_samples": 1797}, "test_samples must be an integer from 1 to 1796"),
        ({"split_seed": -1}, "split_seed must be an integer of at least 0"),
    ],
)
def test_digits__refuses_what_makes_no_problem(other: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Digits(**other)
