"""A loss that is a mean over samples is told from one that is not, at any state of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hild_xr.recorders.curvature import Curvature
from hild_xr.recorders.objective import Objective

N = 24


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Shaped(nn.Module):
    """A linear layer, and what becomes of its outputs."""

    def __init__(self, function: Callable[[Tensor], Any], outputs: int = 3, *, zero: bool = False) -> None:
        super().__init__()
        self.head = nn.Linear(4, outputs)
        self.function = function
        if zero:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, inputs: Tensor) -> Any:
        return self.function(self.head(inputs))


def data(seed: int = 0, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, 4, generator=generator), torch.randint(0, classes, (N,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero", [True, False])
def test_class_weights__are_refused_at_every_seed(zero: bool, dtype: torch.dtype) -> None:
    weights = torch.linspace(0.5, 1.5, 10)
    for seed in range(200):
        torch.manual_seed(seed)
        net = Shaped(lambda o: o, 10, zero=zero).to(dtype)
        x, y = data(seed, 10)
        with pytest.raises(ValueError, match="class weights"):
            Objective(lambda o, t: F.cross_entropy(o, t, weight=weights.to(o.dtype)), x.to(dtype), y).check(
                net
            )


def weighted_bce(probabilities: Tensor, targets: Tensor) -> Tensor:
    weights = 0.5 + targets
    return F.binary_cross_entropy(probabilities, targets, weight=weights, reduction="sum") / weights.sum()


def weighted_covariances(factors: Tensor, targets: Tensor) -> Tensor:
    """A loss that is defined for positive definite outputs only, near which no random ones lie."""
    weights = 1.0 + targets
    each = torch.linalg.cholesky(factors).diagonal(dim1=1, dim2=2).log().sum(1)
    total: Tensor = (weights * each).sum() / weights.sum()
    return total


def covariances(outputs: Tensor) -> Tensor:
    return outputs[:, :, None] * outputs[:, None] + 0.1 * torch.eye(3, dtype=outputs.dtype)


@pytest.mark.parametrize(
    ("function", "loss"),
    [
        (lambda o: o.sigmoid()[:, 0], lambda o, t: weighted_bce(o, (t > 0).float())),
        (lambda o: (o, o.exp()), lambda o, t: F.cross_entropy(o[0], t, weight=torch.arange(1.0, 4.0))),
        (lambda o: {"z": o}, lambda o, t: F.cross_entropy(o["z"], t, weight=torch.arange(1.0, 4.0))),
        (lambda o: o.log_softmax(1), lambda o, t: F.nll_loss(o, t, weight=torch.arange(1.0, 4.0))),
        (lambda o: torch.stack([o, o]), lambda o, t: F.cross_entropy(o[1], t, weight=torch.arange(1.0, 4.0))),
    ],
)
def test_weighted_losses__are_refused_of_a_head_of_zeros(function: Any, loss: Any) -> None:
    x, y = data()
    with pytest.raises(ValueError, match=r"at outputs drawn at random: .* must be a mean over samples"):
        Objective(loss, x, y).check(Shaped(function, zero=True))


@pytest.mark.parametrize("by_time", [True, False])
def test_weighted_loss__of_small_logits_of_tokens_is_refused(by_time: bool) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        labels = targets.T.reshape(-1) if by_time else targets.reshape(-1)
        return F.cross_entropy(outputs, labels, weight=torch.arange(1.0, 4.0))

    def tokens(outputs: Tensor) -> Tensor:
        small = 1e-4 * outputs
        return small.repeat(5, 1) if by_time else small.repeat_interleave(5, 0)

    torch.manual_seed(0)
    x, y = data()
    with pytest.raises(ValueError, match="at outputs drawn at random"):
        Objective(loss, x, y[:, None].expand(-1, 5)).check(Shaped(tokens))


def test_weighted_loss__of_outputs_that_cannot_be_drawn_is_refused() -> None:
    x, y = data()
    torch.manual_seed(0)
    net = Shaped(covariances)
    with pytest.raises(ValueError, match="must be a mean over samples"):
        Objective(weighted_covariances, x, y).check(net)
    Objective(lambda o, t: weighted_covariances(o, torch.zeros_like(t)), x, y).check(net)


def weighted_by_sample(outputs: Tensor, targets: Tensor) -> Tensor:
    classes, weights = targets[:, 0].long(), targets[:, 1]
    return (weights * F.cross_entropy(outputs, classes, reduction="none")).mean()


def gaussian(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    return F.gaussian_nll_loss(outputs[0], targets, outputs[1])


class OutOfDomainError(Exception):
    """Raised by a loss that checks its outputs."""


def of_probabilities(outputs: Tensor, targets: Tensor) -> Tensor:
    if bool((outputs.sum(1) - 1).abs().max() > 1e-3):
        raise OutOfDomainError
    return F.nll_loss(outputs.log(), targets)


GOOD: dict[
    str, tuple[Callable[[Tensor], Any], Callable[[Any, Tensor], Tensor], Callable[[Tensor], Tensor]]
] = {
    "cross entropy": (lambda o: o, F.cross_entropy, lambda y: y),
    "label smoothing": (lambda o: o, lambda o, t: F.cross_entropy(o, t, label_smoothing=0.2), lambda y: y),
    "ignore_index": (lambda o: o, lambda o, t: F.cross_entropy(o, t, ignore_index=7), lambda y: y),
    "masked logits": (
        lambda o: o.index_fill(1, torch.tensor([2]), -torch.inf),
        F.cross_entropy,
        lambda y: y % 2,
    ),
    "squared error": (lambda o: o, F.mse_loss, lambda y: F.one_hot(y, 3).float()),
    "huge targets": (lambda o: o, F.mse_loss, lambda y: 1e4 * F.one_hot(y, 3)),
    "bce": (lambda o: o.sigmoid(), F.binary_cross_entropy, lambda y: F.one_hot(y, 3).float()),
    "bce with logits": (lambda o: o, F.binary_cross_entropy_with_logits, lambda y: F.one_hot(y, 3).float()),
    "negative log-likelihood": (lambda o: o.log_softmax(1), F.nll_loss, lambda y: y),
    "poisson": (
        lambda o: o.exp(),
        lambda o, t: F.poisson_nll_loss(o, t, log_input=False),
        lambda y: F.one_hot(y, 3).float(),
    ),
    "two outputs": (lambda o: (o, o.exp()), gaussian, lambda y: F.one_hot(y, 3).float()),
    "a dict with integers": (
        lambda o: {"logits": o, "best": o.argmax(1)},
        lambda o, t: F.cross_entropy(o["logits"], t),
        lambda y: y,
    ),
    "an unused number of the batch": (
        lambda o: (o, o.var()),
        lambda o, t: F.cross_entropy(o[0], t),
        lambda y: y,
    ),
    "weights of samples": (lambda o: o, weighted_by_sample, lambda y: torch.stack([y, 0.5 + y], 1).float()),
    "a loss with a domain of its own": (lambda o: o.softmax(1), of_probabilities, lambda y: y),
    "a loss that changes outputs": (
        lambda o: o,
        lambda o, t: F.cross_entropy(o.mul_(2).add_(torch.arange(3)), t),
        lambda y: y,
    ),
    "positive definite outputs": (
        covariances,
        lambda o, t: torch.linalg.cholesky(o).diagonal(dim1=1, dim2=2).log().mean() * t[0] ** 0,
        lambda y: y,
    ),
    "tokens in a row": (
        lambda o: o[:, None].expand(-1, 5, -1).reshape(-1, 3),
        lambda o, t: F.cross_entropy(o, t.reshape(-1)),
        lambda y: y[:, None].expand(-1, 5),
    ),
    "time by time": (
        lambda o: o[None].expand(5, -1, -1).reshape(-1, 3),
        lambda o, t: F.cross_entropy(o, t.T.reshape(-1)),
        lambda y: y[:, None].expand(-1, 5),
    ),
}


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", GOOD)
def test_means__are_accepted(name: str, dtype: torch.dtype, zero: bool) -> None:
    if dtype == torch.bfloat16 and name == "positive definite outputs":
        pytest.skip("torch has no Cholesky decomposition in half precision")
    function, loss, target = GOOD[name]
    x, y = data()
    targets = target(y)
    targets = targets.to(dtype) if targets.is_floating_point() else targets
    for seed in range(5):
        torch.manual_seed(seed)
        Objective(loss, x.to(dtype), targets).check(Shaped(function, zero=zero).to(dtype))


def test_loss_in_double_precision__of_a_model_in_single_is_accepted() -> None:
    x, y = data()
    Objective(lambda o, t: F.cross_entropy(o.double(), t), x, y).check(Shaped(lambda o: o))


def test_check__moves_no_global_generator() -> None:
    x, y = data()
    state = torch.get_rng_state()
    Objective(F.cross_entropy, x, y).check(nn.Linear(4, 3))
    torch.set_rng_state(state)
    net = nn.Linear(4, 3)
    state = torch.get_rng_state()
    Objective(F.cross_entropy, x, y).check(net)
    assert torch.equal(torch.get_rng_state(), state)


def test_squeezed_outputs__are_told_how_to_keep_the_samples() -> None:
    x, _ = data()
    objective = Objective(F.mse_loss, x, torch.zeros(N))
    with pytest.raises(ValueError, match=r"\(16,\) for 16 samples but \(\) for one.*squeeze\(-1\)"):
        objective.check(Shaped(lambda o: o.squeeze(), 1))
    objective.check(Shaped(lambda o: o.squeeze(-1), 1))


class Recurrent(nn.Module):
    """Returns the sequence first, or the samples."""

    def __init__(self, *, samples_first: bool) -> None:
        super().__init__()
        self.recurrent, self.head = nn.RNN(3, 4), nn.Linear(4, 2)
        self.samples_first = samples_first

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.recurrent(inputs.transpose(0, 1))[0])
        return outputs.transpose(0, 1) if self.samples_first else outputs


def sequences(*, samples_first: bool, time: int, batch_size: int | None) -> tuple[nn.Module, Objective]:
    torch.manual_seed(0)
    model = Recurrent(samples_first=samples_first)
    x, y = torch.randn(12, time, 3), torch.randint(0, 2, (12, time))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.movedim(-1, 1), targets if samples_first else targets.T)

    return model, Objective(loss, x, y, batch_size=batch_size)


@pytest.mark.filterwarnings("ignore:torch.func.vmap does not support this model")
@pytest.mark.parametrize("matrix", ["hessian", "gmatrix", "ggn"])
@pytest.mark.parametrize("time", [5, 12])
def test_sequence_first_outputs__have_the_curvature_of_samples_first(matrix: Any, time: int) -> None:
    found = []
    for samples_first in (True, False):
        # 12 samples in batches of 8 and 4: 12 time steps are no number of samples
        model, objective = sequences(samples_first=samples_first, time=time, batch_size=8)
        with Curvature(model, objective) as curvature:
            found.append(curvature.eigenpairs(2, matrix, "model")["model"].eigenvalues)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("matrix", ["ggn", "fisher", "fisher_mc"])
@pytest.mark.parametrize(("time", "batch_size"), [(12, None), (8, 8), (4, 8)])
def test_sequence_first_outputs__as_long_as_a_batch_are_told_from_rows(
    matrix: Any, time: int, batch_size: int | None
) -> None:
    model, objective = sequences(samples_first=False, time=time, batch_size=batch_size)
    with Curvature(model, objective) as curvature:
        assert bool(curvature.eigenpairs(1, "hessian", "model")["model"].converged.all())
        with pytest.raises(ValueError, match=rf"first dim .* {time} entries .* samples first"):
            curvature.eigenpairs(1, matrix, "model")


def test_sequence_first_model__that_couples_samples_is_refused() -> None:
    x, y = data()
    net = Shaped(lambda o: (o - o.mean(0)).expand(5, -1, -1))
    with pytest.raises(ValueError, match="changes with the other samples"):
        Objective(lambda o, t: F.cross_entropy(o[0], t), x, y).check(net)
