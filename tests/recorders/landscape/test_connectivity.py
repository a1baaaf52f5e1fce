"""Loss between two models: closed forms, convexity layer by layer, and what cannot be compared."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from hild_xr import recorders as rec
from hild_xr.recorders.landscape import fit_bend, linear_connectivity, mode_connectivity

ALPHAS = [0.0, 0.2, 0.5, 0.9, 1.0]


def deep_linear(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 2)).double()


def mlp(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 2)).double()


def regression(seed: int = 0, l2: float = 0.0) -> rec.Objective:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(15, n, dtype=torch.float64, generator=generator) for n in (3, 2))
    return rec.Objective(F.mse_loss, x, y, l2=l2)


def by_hand(
    first: nn.Module, second: nn.Module, objective: rec.Objective, alpha: float, moved: list[str]
) -> float:
    """Build the model on the path as a state dict."""
    start, end = first.state_dict(), second.state_dict()
    model = copy.deepcopy(first)
    model.load_state_dict(
        {
            name: alpha * start[name] + (1 - alpha) * end[name] if name in moved else start[name]
            for name in start
        }
    )
    return objective.value(model)


@pytest.mark.parametrize("blocks", ["model", "module", "layer", {"ends": ["0.*", "3.*"]}])
@pytest.mark.parametrize("cumulative", [False, True])
def test_path__is_that_of_models_mixed_by_hand(blocks: Any, cumulative: bool) -> None:
    first, second, objective = mlp(1), mlp(2), regression(l2=0.1)
    found = linear_connectivity(first, second, objective, alphas=ALPHAS, blocks=blocks, cumulative=cumulative)
    sets = rec.curvature.resolve_blocks(first, blocks)
    assert list(found.layer.values) == [block.label for block in sets]
    moved: list[str] = []
    for block in sets:
        moved = [*(moved if cumulative else []), *block.parameters]
        losses = [by_hand(first, second, objective, alpha, moved) for alpha in ALPHAS]
        of_block = found.sel(layer=block.label)
        np.testing.assert_allclose(of_block.path_loss, losses, rtol=1e-12)
        excess = [loss - a * losses[-1] - (1 - a) * losses[0] for a, loss in zip(ALPHAS, losses, strict=True)]
        np.testing.assert_allclose(of_block.excess_loss, excess, atol=1e-12)
        assert float(of_block.loss_barrier) == pytest.approx(max(excess), abs=1e-12)


def test_last_cumulative_path__is_that_of_the_whole_model() -> None:
    first, second, objective = mlp(1), mlp(2), regression()
    whole = linear_connectivity(first, second, objective)
    cumulative = linear_connectivity(first, second, objective, blocks="module", cumulative=True)
    np.testing.assert_allclose(cumulative.path_loss.isel(layer=-1), whole.path_loss.isel(layer=0), rtol=1e-12)


def test_path__between_equal_models_has_no_barrier_at_all() -> None:
    # item 15 of the catalogue
    model, objective = mlp(1), regression(l2=0.3)
    for blocks in ("model", "module", "layer"):
        found = linear_connectivity(model, copy.deepcopy(model), objective, blocks=blocks)
        assert (found.excess_loss == 0).all()
        assert (found.loss_barrier == 0).all()


@settings(max_examples=15)
@given(st.integers(0, 1000), st.floats(0, 0.5))
def test_deep_linear_network__has_no_barrier_in_any_single_layer(seed: int, l2: float) -> None:
    # the squared error is convex in each layer alone, though not in all together
    first, second = deep_linear(2 * seed), deep_linear(2 * seed + 1)
    found = linear_connectivity(first, second, regression(seed, l2), blocks="module")
    assert (found.excess_loss <= 1e-12 * found.path_loss.max()).all()
    assert (found.loss_barrier >= 0).all()
    assert (found.loss_barrier <= 1e-12).all()


def test_mirrored_network__has_a_barrier_as_a_whole_but_not_in_a_layer() -> None:
    first = deep_linear(0)
    second = copy.deepcopy(first)
    with torch.no_grad():
        for index in (0, 1):  # the same function: two signs cancel
            for parameter in second[index].parameters():
                parameter.neg_()
        second[0].bias.copy_(-first[0].bias)
    x = regression().inputs
    objective = rec.Objective(F.mse_loss, x, first(x).detach() + 0.01)
    assert objective.value(first) == pytest.approx(1e-4)
    assert objective.value(second) == pytest.approx(1e-4)
    whole = linear_connectivity(first, second, objective)
    # in the middle both layers vanish, and the last bias is all that is left
    middle = F.mse_loss(first[2].bias.expand(15, 2), objective.targets).item()
    assert float(whole.path_loss.sel(layer="model", alpha=0.5)) == pytest.approx(middle, rel=1e-10)
    assert float(whole.loss_barrier[0]) > 20 * objective.value(first)
    layers = linear_connectivity(first, second, objective, blocks="module")
    assert (layers.loss_barrier < 1e-12).all()
    found = mode_connectivity(first, second, objective)
    assert float(found.mode_connectivity) == pytest.approx(-float(whole.loss_barrier[0]), rel=0.1)
    assert float(found.mode_connectivity_alpha) == pytest.approx(0.5, abs=0.26)


def parabola(weight: float) -> nn.Linear:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, weight)
    return model


def quadratic(target: float) -> rec.Objective:
    one = torch.ones(1, 1, dtype=torch.float64)
    return rec.Objective(lambda out, y: (out - y).square().mean(), one, target * one)


def test_mode_connectivity__of_under_trained_models_is_positive() -> None:
    found = mode_connectivity(parabola(1.0), parabola(-1.0), quadratic(0.0))
    assert float(found.mode_connectivity) == pytest.approx(1.0)
    assert float(found.mode_connectivity_alpha) == pytest.approx(0.5)
    assert found.attrs["path"] == "line"


def test_mode_connectivity__of_equal_models_is_zero() -> None:
    model = mlp(1)
    for bend in (None, model):
        assert float(mode_connectivity(model, model, regression(), bend=bend).mode_connectivity) == 0


def test_mode_connectivity__takes_the_largest_difference_of_either_sign() -> None:
    double_well = rec.Objective(
        lambda out, y: ((out**2 - 1) ** 2).mean(),
        torch.ones(1, 1, dtype=torch.float64),
        torch.zeros(1, 1, dtype=torch.float64),
    )
    found = mode_connectivity(parabola(1.0), parabola(-1.0), double_well)
    assert float(found.mode_connectivity) == pytest.approx(-1.0)
    assert float(found.mode_connectivity_alpha) == pytest.approx(0.5)
    assert float(found.path_loss.sel(alpha=0.0)) == pytest.approx(0.0)


def test_bend__shapes_the_curve() -> None:
    found = mode_connectivity(
        parabola(1.0), parabola(-1.0), quadratic(0.0), bend=parabola(4.0), alphas=[0.0, 0.25, 0.5, 1.0]
    )
    a = np.array([0.0, 0.25, 0.5, 1.0])
    curve = a**2 * 1.0 + 2 * a * (1 - a) * 4.0 - (1 - a) ** 2
    np.testing.assert_allclose(found.path_loss, curve**2, rtol=1e-12)
    assert found.attrs["path"] == "bezier"


class Ring(nn.Module):
    """A point of the plane: minima on a circle, so a straight line between two crosses a hill."""

    def __init__(self, x: float, y: float) -> None:
        super().__init__()
        self.point = nn.Parameter(torch.tensor([x, y], dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.point.square().sum() - 1) * inputs


def test_fit_bend__goes_round_the_hill() -> None:
    first, second = Ring(1.0, 0.1), Ring(-1.0, 0.1)
    one = torch.ones(1, 1, dtype=torch.float64)
    objective = rec.Objective(F.mse_loss, one, 0 * one)
    rng = torch.get_rng_state()
    bend = fit_bend(first, second, objective, steps=150, learning_rate=0.1)
    assert torch.equal(torch.get_rng_state(), rng)
    straight = mode_connectivity(first, second, objective)
    curved = mode_connectivity(first, second, objective, bend=bend)
    assert float(straight.mode_connectivity) < -0.9
    assert abs(float(curved.mode_connectivity)) < 0.2
    again = fit_bend(first, second, objective, steps=150, learning_rate=0.1)
    assert torch.equal(bend.get_parameter("point"), again.get_parameter("point"))
    assert first.point[0] == 1.0


def normed(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    model(torch.randn(30, 3, dtype=torch.float64) * (seed + 1))
    return model


def test_buffers__that_differ_ask_for_a_way_to_set_them() -> None:
    first, second, objective = normed(1), normed(2), regression()
    for function in (linear_connectivity, mode_connectivity, fit_bend):
        with pytest.raises(ValueError, match=r"1\.running_mean, 1\.running_var: .*prepare="):
            function(first, second, objective)
    data = [objective.inputs]

    def update(model: nn.Module) -> None:
        torch.optim.swa_utils.update_bn(data, model)

    found = linear_connectivity(first, second, objective, alphas=3, prepare=update)
    middle = copy.deepcopy(first)
    with torch.no_grad():
        for p, q in zip(middle.parameters(), second.parameters(), strict=True):
            p.copy_((p + q) / 2)
    update(middle)
    assert float(found.path_loss[0, 1]) == pytest.approx(objective.value(middle), rel=1e-10)
    assert np.isfinite(mode_connectivity(first, second, objective, prepare=update).mode_connectivity)


def test_frozen_parameters__that_differ_are_refused() -> None:
    first, second = mlp(1), mlp(2)
    for model in (first, second):
        model[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"0\.weight, 0\.bias: frozen"):
        linear_connectivity(first, second, regression())
    second[0].load_state_dict(first[0].state_dict())
    assert np.isfinite(linear_connectivity(first, second, regression()).loss_barrier).all()


def test_models__are_left_as_they_are() -> None:
    first, second = mlp(1), mlp(2)
    states = [{n: v.clone() for n, v in m.state_dict().items()} for m in (first, second)]
    linear_connectivity(first, second, regression(), blocks="layer")
    mode_connectivity(first, second, regression(), bend=mlp(3))
    fit_bend(first, second, regression(), steps=2)
    for model, state in zip((first, second), states, strict=True):
        assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
        assert model.training


def test_diverged_model__gives_a_barrier_that_is_missing() -> None:
    first, second = mlp(1), mlp(2)
    with torch.no_grad():
        second[0].weight.fill_(torch.nan)
    layers = linear_connectivity(first, second, regression(), blocks="module")
    assert np.isnan(layers.loss_barrier.sel(layer="0"))
    assert np.isfinite(layers.loss_barrier.sel(layer="3"))
    found = mode_connectivity(first, second, regression())
    assert np.isnan(found.mode_connectivity)
    assert np.isnan(found.mode_connectivity_alpha)


def test_labels_and_attrs__come_from_the_registry() -> None:
    found = linear_connectivity(mlp(1), mlp(2), regression(l2=0.1), alphas=3, blocks="module")
    assert found.path_loss.dims == ("layer", "alpha")
    assert found.loss_barrier.attrs["long_name"] == "loss barrier"
    assert found.alpha.attrs["long_name"] == "place on the path"
    assert found.attrs == {"cumulative": 0, "samples": 15, "regularizer": 0.1}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alphas": 1}, "at least 2 places"),
        ({"alphas": [0.0, 1.2]}, "between 0"),
        ({"alphas": []}, "between 0"),
        ({"blocks": "rows-and-columns"}, "rows-and-columns"),
    ],
)
def test_settings__that_cannot_be_are_refused(options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        linear_connectivity(mlp(1), mlp(2), regression(), **options)


def permuted(model: nn.Sequential, order: list[int]) -> nn.Sequential:
    """Return the same function with its hidden units in another order."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied[0].weight.copy_(model[0].weight[order])
        copied[0].bias.copy_(model[0].bias[order])
        copied[3].weight.copy_(model[3].weight[:, order])
    return copied


@settings(max_examples=10)
@given(st.permutations(range(6)), st.floats(0.1, 10))
def test_path__does_not_depend_on_the_order_of_units_and_scales_with_the_loss(
    order: list[int], scale: float
) -> None:
    first, second, objective = mlp(1), mlp(2), regression(l2=0.1)
    found = linear_connectivity(first, second, objective, alphas=5, blocks="module")
    turned = linear_connectivity(
        permuted(first, order), permuted(second, order), objective, alphas=5, blocks="module"
    )
    np.testing.assert_allclose(turned.excess_loss, found.excess_loss, atol=1e-12)
    scaled = rec.Objective(
        lambda out, y: scale * F.mse_loss(out, y), objective.inputs, objective.targets, l2=scale * 0.1
    )
    larger = linear_connectivity(first, second, scaled, alphas=5, blocks="module")
    np.testing.assert_allclose(larger.excess_loss, scale * found.excess_loss, rtol=1e-9, atol=1e-12)


@settings(max_examples=10)
@given(st.floats(0, 1))
def test_path__from_the_other_end_is_the_same(alpha: float) -> None:
    first, second, objective = mlp(1), mlp(2), regression()
    there = linear_connectivity(first, second, objective, alphas=[alpha])
    back = linear_connectivity(second, first, objective, alphas=[1 - alpha])
    np.testing.assert_allclose(there.excess_loss, back.excess_loss, atol=1e-12)


def test_single_precision__agrees_with_double() -> None:
    first, second, objective = mlp(1), mlp(2), regression()
    exact = linear_connectivity(first, second, objective)
    single = rec.Objective(F.mse_loss, objective.inputs.float(), objective.targets.float())
    found = linear_connectivity(first.float(), second.float(), single)
    np.testing.assert_allclose(found.path_loss, exact.path_loss, rtol=1e-5)


def test_models__of_two_architectures_are_refused() -> None:
    for function in (linear_connectivity, mode_connectivity, fit_bend):
        with pytest.raises(ValueError, match=r"'0\.bias' has shape \(6,\) in the first and \(4,\)"):
            function(mlp(1), deep_linear(1), regression())
    with pytest.raises(ValueError, match="steps of SGD"):
        fit_bend(mlp(1), mlp(2), regression(), steps=0)
