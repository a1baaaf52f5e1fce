"""The objective: its value, its checks, and that evaluating it leaves no trace."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hild_xr.recorders.objective import Objective


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))


def data(n: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=generator), torch.arange(n) % 3


@pytest.mark.parametrize("batch_size", [None, 1, 3, 10, 99])
def test_value__is_the_mean_over_samples_plus_regulariser_for_any_batch_size(batch_size: int | None) -> None:
    net, (x, y) = model().double(), data()
    objective = Objective(F.cross_entropy, x.double(), y, batch_size=batch_size, l2=0.3)
    expected = F.cross_entropy(copy.deepcopy(net).eval()(x.double()), y)
    expected = expected + 0.15 * sum(p.square().sum() for p in net.parameters())
    assert objective.value(net) == pytest.approx(expected.item(), rel=1e-12)


def test_value__takes_frozen_parameters_out_of_the_regulariser_and_counts_tied_ones_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 2)
            self.b = nn.Linear(2, 2)
            self.b.weight = self.a.weight
            self.a.bias.requires_grad_(False)

        def forward(self, inputs: Tensor) -> Tensor:
            output: Tensor = 0 * self.b(self.a(inputs))
            return output

    net = Tied()
    objective = Objective(F.mse_loss, torch.ones(3, 2), torch.zeros(3, 2), l2=2.0)
    expected = net.a.weight.square().sum() + net.b.bias.square().sum()
    assert objective.value(net) == pytest.approx(expected.item(), rel=1e-6)


def test_outputs__are_those_of_eval_mode() -> None:
    net, (x, y) = model(), data()
    outputs = Objective(F.cross_entropy, x, y, batch_size=4).outputs(net)
    assert not outputs.requires_grad
    torch.testing.assert_close(outputs, copy.deepcopy(net).eval()(x).detach())


def test_outputs__refuses_a_model_that_returns_no_tensor() -> None:
    class Pair(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs), inputs  # type: ignore[return-value]

    objective = Objective(F.mse_loss, torch.ones(2, 2), torch.ones(2, 2))
    with pytest.raises(TypeError, match="one tensor, got tuple"):
        objective.outputs(Pair(2, 2))


@pytest.mark.parametrize("method", ["value", "outputs"])
def test_evaluation__leaves_model_gradients_buffers_flags_and_rng_as_they_were(method: str) -> None:
    net, (x, y) = model(), data()
    F.cross_entropy(net(x), y).backward()
    net[0].eval()
    state = copy.deepcopy(net.state_dict())
    gradients = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    flags = [module.training for module in net.modules()]
    rng = torch.get_rng_state()
    getattr(Objective(F.cross_entropy, x, y, batch_size=4, l2=0.1), method)(net)
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == flags
    assert torch.equal(torch.get_rng_state(), rng)
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        assert gradient is not None
        assert torch.equal(parameter.grad, gradient)


def test_inputs__may_be_positional_or_keyword_tensors() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.scale * (left - right)

    left, right, targets = torch.ones(5, 1), torch.full((5, 1), 0.5), torch.zeros(5, 1)
    by_position = Objective(F.mse_loss, (left, right), targets, batch_size=2)
    by_name = Objective(F.mse_loss, {"right": right, "left": left}, targets, batch_size=2)
    assert by_position.value(Sum()) == by_name.value(Sum()) == pytest.approx(1.0)


def test_inputs__made_in_inference_mode_are_accepted() -> None:
    with torch.inference_mode():
        objective = Objective(F.mse_loss, torch.ones(3, 2), torch.ones(3, 1))
    assert not objective.inputs.is_inference()
    assert not objective.targets.is_inference()


def test_to__moves_the_data_and_keeps_the_rest() -> None:
    objective = Objective(F.mse_loss, torch.ones(3, 2), torch.ones(3, 1), batch_size=2, l2=0.5)
    moved = objective.to("meta")
    assert moved.device == torch.device("meta")
    assert objective.device == torch.device("cpu")
    assert (len(moved), moved.batch_size, moved.l2, moved.loss) == (3, 2, 0.5, F.mse_loss)


def test_init__refuses_lengths_that_differ() -> None:
    with pytest.raises(ValueError, match=r"inputs hold 5 samples .* targets hold 4"):
        Objective(F.mse_loss, torch.ones(5, 1), torch.ones(4, 1))


def test_init__refuses_an_empty_data_set() -> None:
    with pytest.raises(ValueError, match="no samples"):
        Objective(F.mse_loss, torch.ones(0, 1), torch.ones(0, 1))


def test_init__refuses_data_on_two_devices() -> None:
    with pytest.raises(ValueError, match=r"different devices .cpu, meta."):
        Objective(F.mse_loss, torch.ones(2, 1, device="meta"), torch.ones(2, 1))


def test_init__refuses_what_is_no_tensor() -> None:
    with pytest.raises(TypeError, match=r"got list: convert with torch.as_tensor"):
        Objective(F.mse_loss, [[1.0]], torch.ones(1, 1))


@pytest.mark.parametrize("l2", [-1.0, float("nan"), float("inf")])
def test_init__refuses_a_bad_regulariser(l2: float) -> None:
    with pytest.raises(ValueError, match="l2 must be"):
        Objective(F.mse_loss, torch.ones(2, 1), torch.ones(2, 1), l2=l2)


def test_init__refuses_a_bad_batch_size() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        Objective(F.mse_loss, torch.ones(2, 1), torch.ones(2, 1), batch_size=0)


def test_check__names_both_devices_and_the_remedy() -> None:
    objective = Objective(F.mse_loss, torch.ones(2, 4), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"data lie on cpu but the model on meta: .*objective.to\('meta'\)"):
        objective.value(nn.Linear(4, 3, device="meta"))


def test_check__finds_a_loss_that_sums() -> None:
    x, y = data()
    with pytest.raises(ValueError, match="must be a mean over samples"):
        Objective(lambda o, t: F.cross_entropy(o, t, reduction="sum"), x, y).value(model())


def test_check__finds_class_weights_even_if_almost_all_samples_are_of_one_class() -> None:
    x, _ = data(500)
    y = torch.zeros(500, dtype=torch.long)
    y[321] = 2
    weight = torch.tensor([1.0, 1.0, 5.0])
    with pytest.raises(ValueError, match="class weights"):
        Objective(lambda o, t: F.cross_entropy(o, t, weight=weight), x, y).value(model())


def test_check__finds_ignored_targets() -> None:
    x, y = data()
    y[3] = -100
    with pytest.raises(ValueError, match="ignored targets"):
        Objective(F.cross_entropy, x, y).value(model())
    padded = torch.stack([y, y], 1)
    padded[3] = torch.tensor([0, -100])
    padded[5] = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="ignored targets"):
        Objective(lambda o, t: F.cross_entropy(torch.stack([o, o], 2), t), x, padded).value(model())


class Centred(nn.Module):
    """Subtracts the mean of the batch."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs - inputs.mean(0)


def test_check__finds_a_model_that_couples_the_batch() -> None:
    x, y = data()
    with pytest.raises(ValueError, match="changes with the other samples"):
        Objective(F.cross_entropy, x, y).value(nn.Sequential(nn.Linear(4, 3), Centred()))


def test_check__finds_batch_norm_without_running_statistics() -> None:
    x, y = data()
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ValueError, match=r"fails on a single sample .*BatchNorm with running statistics"):
        Objective(F.cross_entropy, x, y).value(net)


def test_check__finds_a_model_that_is_random_in_eval_mode() -> None:
    class Noisy(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs) + torch.randn(len(inputs), 3)

    x, y = data()
    with pytest.raises(ValueError, match="random"):
        Objective(F.cross_entropy, x, y).value(Noisy(4, 3))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda o, t: F.cross_entropy(o, t, reduction="none"), r"shape \(10,\)"),
        (lambda o, t: F.cross_entropy(o, t).item(), "got float"),
    ],
)
def test_mean_loss__must_be_a_scalar_tensor(loss: object, message: str) -> None:
    x, y = data()
    with pytest.raises(TypeError, match=message):
        Objective(loss, x, y).value(model())


def test_check__accepts_one_sample_and_infinite_logits() -> None:
    class Masked(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs).index_fill(1, torch.tensor([2]), -torch.inf)

    x, y = data()
    assert Objective(F.cross_entropy, x[:1], y[:1]).value(model()) > 0
    assert Objective(F.cross_entropy, x, y % 2).value(Masked(4, 3)) > 0


def test_value__works_under_inference_mode() -> None:
    x, y = data()
    objective, net = Objective(F.cross_entropy, x, y), model()
    expected = objective.value(net)
    with torch.inference_mode():
        assert objective.value(net) == expected


def test_check__is_made_of_every_model() -> None:
    x, y = data()
    objective, good, coupled = Objective(F.cross_entropy, x, y), model(), nn.Sequential(model(), Centred())
    for known in (objective, objective.to("cpu")):
        known.check(good)
        for _ in range(2):
            with pytest.raises(ValueError, match="changes with the other samples"):
                known.check(coupled)


def test_check__is_made_once_of_a_model_and_keeps_none_alive() -> None:
    x, y = data()
    calls: list[int] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(len(targets))
        return F.cross_entropy(outputs, targets)

    objective, net = Objective(loss, x, y), model()
    objective.check(nn.DataParallel(net))
    seen = len(calls)
    objective.check(net)
    objective.to("cpu").check(net)
    assert len(calls) == seen > 0
    alive = weakref.ref(net)
    del net
    gc.collect()
    assert alive() is None


def test_objective__can_be_pickled_and_copied_after_a_check() -> None:
    x, y = data()
    objective, net = Objective(F.cross_entropy, x, y, l2=0.1), model()
    value = objective.value(net)
    for other in (pickle.loads(pickle.dumps(objective)), copy.deepcopy(objective)):
        assert other.value(net) == value


def test_check__of_a_single_sample_finds_a_random_model() -> None:
    class Noisy(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs) + torch.randn(len(inputs), 3)

    x, y = data(1)
    with pytest.raises(ValueError, match=r"two passes of the same sample .* random"):
        Objective(F.cross_entropy, x, y).check(Noisy(4, 3))
    Objective(F.cross_entropy, x, y).check(nn.Linear(4, 3))
