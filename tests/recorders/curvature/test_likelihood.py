"""The distribution a loss belongs to is read off the loss: right where there is one, refused elsewhere."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hild_xr.recorders.curvature.likelihood import Categorical, Gaussian, Noise, predictive

Loss = Callable[[Tensor, Tensor], Tensor]


def logits(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def scaled(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with a temperature inside: a likelihood whose logits are no outputs."""
    return F.cross_entropy(outputs / 3, targets)


CLASSIFIERS: list[tuple[Loss, Tensor, Tensor]] = [
    (F.cross_entropy, logits(6, 4), logits(6, 4).softmax(1)),
    (nn.CrossEntropyLoss(), logits(6, 4), logits(6, 4).softmax(1)),
    (scaled, logits(6, 4), (logits(6, 4) / 3).softmax(1)),
    (F.nll_loss, logits(6, 4).log_softmax(1), logits(6, 4).softmax(1)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("loss", "outputs", "expected"), CLASSIFIERS)
def test_classes__have_the_models_probabilities(
    loss: Loss, outputs: Tensor, expected: Tensor, dtype: torch.dtype
) -> None:
    found = predictive(loss, outputs.to(dtype), torch.arange(6) % 4)
    assert isinstance(found, Categorical)
    torch.testing.assert_close(found.log_p.exp(), expected.to(dtype), rtol=1e-5, atol=1e-6)
    assert found.candidates.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
@pytest.mark.parametrize("with_logits", [True, False])
def test_labels__are_zero_and_one(shape: tuple[int, ...], with_logits: bool) -> None:
    outputs, targets = logits(*shape), torch.ones(shape, dtype=torch.float64)
    p = outputs.sigmoid().reshape(6)
    loss = F.binary_cross_entropy_with_logits if with_logits else F.binary_cross_entropy
    found = predictive(loss, outputs if with_logits else outputs.sigmoid(), targets)
    assert isinstance(found, Categorical)
    torch.testing.assert_close(found.log_p.exp(), torch.stack([1 - p, p], dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 3), (6, 3, 2)])
def test_squared_error__is_a_gaussian(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    size = math.prod(shape[1:])
    for factor in (0.5, 1.0, 7.0):
        found = predictive(
            lambda o, t, factor=factor: factor * F.mse_loss(o, t),  # type: ignore[misc]
            logits(*shape, dtype=dtype),
            torch.zeros(shape, dtype=dtype),
        )
        assert isinstance(found, Gaussian)
        assert found.precision == pytest.approx(2 * factor / size, rel=1e-3)


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    return (F.cross_entropy(outputs, targets, reduction="none") * (1 + targets)).mean()


REFUSED: list[tuple[Loss, Tensor, Tensor]] = [
    (functools.partial(F.cross_entropy, label_smoothing=0.1), logits(6, 4), torch.arange(6) % 4),
    (weighted, logits(6, 4), torch.arange(6) % 4),
    (F.multi_margin_loss, logits(6, 4), torch.arange(6) % 4),
    (F.cross_entropy, logits(6, 4, 3), torch.zeros(6, 3, dtype=torch.long)),  # a target for each token
    (F.binary_cross_entropy_with_logits, logits(6, 3), torch.zeros(6, 3, dtype=torch.float64)),
    (F.smooth_l1_loss, logits(6, 3), torch.zeros(6, 3, dtype=torch.float64)),
    (F.l1_loss, logits(6, 1), torch.zeros(6, 1, dtype=torch.float64)),
    (functools.partial(F.huber_loss, delta=50.0), logits(6, 1), torch.zeros(6, 1, dtype=torch.float64)),
    (lambda o, t: (o.square() * (t - o).square()).mean(), logits(6, 1), torch.zeros(6, 1).double()),
    (lambda o, t: o.sum() * 0 + t.double().mean(), logits(6), torch.zeros(6, dtype=torch.long)),
]


@pytest.mark.parametrize(("loss", "outputs", "targets"), REFUSED)
def test_no_likelihood__is_refused_with_a_way_out(loss: Loss, outputs: Tensor, targets: Tensor) -> None:
    with pytest.raises(ValueError, match=r"negative log-likelihood.*Take matrix='ggn'"):
        predictive(loss, outputs, targets)


@pytest.mark.parametrize("vectorised", [True, False])
def test_columns__are_the_slopes_for_each_target_with_the_root_of_its_probability(vectorised: bool) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if not vectorised and float(outputs.detach().sum()) > 1e9:  # needs values, which vmap has not
            raise AssertionError
        return scaled(outputs, targets)

    outputs = logits(5, 3)
    columns = predictive(loss, outputs, torch.zeros(5, dtype=torch.long)).columns(loss, outputs)
    p = (outputs / 3).softmax(1)
    slopes = (p[:, None] - torch.eye(3)) / 3
    torch.testing.assert_close(columns, slopes * p.sqrt()[:, :, None])


def test_drawn_targets__give_the_same_columns_for_few_and_many_draws() -> None:
    outputs = logits(4, 6)
    found = predictive(F.cross_entropy, outputs, torch.zeros(4, dtype=torch.long))
    few, one = found.drawn_columns(F.cross_entropy, outputs, Noise(2, 3, 4, 0)), logits(4, 6).softmax(1)
    chosen = few.argmin(2)
    torch.testing.assert_close(few * 2**0.5, one[:, None] - F.one_hot(chosen, 6))
    noise = Noise(8, 3, 4, 0)
    uniform = noise.uniform(outputs)
    many = found.drawn_columns(F.cross_entropy, outputs, noise).argmin(2)
    assert torch.equal(many, (uniform[:, :, None] > one.cumsum(1)[:, None]).sum(2))


def test_drawn_targets__have_the_frequencies_of_the_prediction() -> None:
    outputs = logits(4, 3)
    found = predictive(F.cross_entropy, outputs, torch.zeros(4, dtype=torch.long))
    draws = 20_000
    columns = found.drawn_columns(F.cross_entropy, outputs, Noise(draws, 3, 4, 0)) * draws**0.5
    p = outputs.softmax(1)
    # the column for class c is p - e_c, so its most negative entry tells the class
    chosen = columns.argmin(2)
    frequencies = F.one_hot(chosen, 3).double().mean(1)
    error = (frequencies - p) / (p * (1 - p) / draws).sqrt()
    assert float(error.abs().max()) < 4.5
    torch.testing.assert_close(columns, p[:, None] - F.one_hot(chosen, 3))


def test_drawn_gaussian_targets__have_the_precision_as_variance_of_their_slopes() -> None:
    outputs = logits(3, 2)
    found = predictive(F.mse_loss, outputs, torch.zeros(3, 2, dtype=torch.float64))
    columns = found.drawn_columns(F.mse_loss, outputs, Noise(40_000, 0, 3, 0))
    moments = columns.mT @ columns  # (3, 2, 2)
    torch.testing.assert_close(moments, torch.eye(2).double().expand(3, 2, 2), atol=0.03, rtol=0)


def test_noise__does_not_depend_on_the_batches_or_the_global_generator() -> None:
    outputs = logits(7, 2)
    whole = Noise(3, 5, 7, 0)
    for draw in ("uniform", "normal"):
        torch.manual_seed(1)
        state = torch.get_rng_state()
        together = getattr(whole, draw)(outputs)
        apart = [getattr(Noise(3, 5, 7, first), draw)(outputs[first : first + 3]) for first in (0, 3, 6)]
        assert torch.equal(together, torch.cat(apart))
        assert torch.equal(torch.get_rng_state(), state)
        assert not torch.equal(together, getattr(Noise(3, 6, 7, 0), draw)(outputs))
