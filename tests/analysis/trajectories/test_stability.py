from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from hild_xr.analysis import edge_of_stability, preconditioned_sharpness, sharpness, stability_threshold
from hild_xr.analysis.trajectories.stability import non_monotone_fraction_kernel

NAN, INF = np.nan, np.inf
METHODS: list[dict[str, Any]] = [
    {"optimizer": "gd"},
    *({"optimizer": name, "momentum": b} for name in ("polyak", "nesterov", "adam") for b in (0.0, 0.5, 0.9)),
]


def grows(a: float, lr: float, optimizer: str, momentum: float = 0.0) -> bool:
    """Run the optimizer on a x^2 / 2 (Adam with a constant preconditioner) and see whether it diverges."""
    x = previous = 1.0
    velocity = 0.0
    sizes = []
    for _ in range(4000):
        if optimizer == "adam":
            velocity = momentum * velocity + (1 - momentum) * a * x
            x -= lr * velocity
        else:
            ahead = x + momentum * (x - previous)
            gradient = a * (ahead if optimizer == "nesterov" else x)
            x, previous = ahead - lr * gradient, x
        sizes.append(abs(x))
        if sizes[-1] > 1e6:
            return True
    return max(sizes[2000:]) > max(sizes[:2000])


@pytest.mark.parametrize("options", METHODS)
@pytest.mark.parametrize("lr", [0.05, 1.0])
def test_threshold__is_where_a_quadratic_starts_to_diverge(options: dict[str, Any], lr: float) -> None:
    """Known answer of item 4: a x^2 / 2 diverges iff the curvature exceeds the threshold."""
    threshold = float(stability_threshold(lr, **options))
    assert not grows(0.99 * threshold, lr, **options)
    assert grows(1.01 * threshold, lr, **options)


def test_threshold__values_of_the_papers() -> None:
    assert float(stability_threshold(0.4)) == pytest.approx(5.0)
    assert float(stability_threshold(1.0, optimizer="adam", momentum=0.9)) == pytest.approx(38.0)
    assert float(stability_threshold(1.0, optimizer="nesterov", momentum=0.9)) == pytest.approx(3.8 / 2.8)
    rates = xr.DataArray([0.1, 0.0, NAN], dims="step", coords={"step": [0, 1, 2]})
    found = stability_threshold(rates)
    np.testing.assert_array_equal(found, [20.0, NAN, NAN])
    assert found.step.values.tolist() == [0, 1, 2]
    assert stability_threshold(rates, optimizer="polyak", momentum=0.5).attrs["momentum"] == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "sgd"}, "expected optimizer 'gd' or 'polyak' or .*, came 'sgd'"),
        ({"momentum": 0.9}, "momentum=... with every optimizer but 'gd'"),
        ({"optimizer": "polyak"}, "momentum=... with every optimizer but 'gd', came 'polyak'"),
        ({"optimizer": "adam", "momentum": 1.0}, r"expected momentum in \[0, 1\)"),
    ],
)
def test_threshold__refuses_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stability_threshold(0.1, **options)


def test_sharpness__is_the_largest_eigenvalue_not_the_largest_size() -> None:
    values = [[-5.0, 3.0, 1.0], [-5.0, NAN, NAN], [NAN, 3.0, 1.0], [NAN, NAN, NAN]]
    lam = xr.DataArray(values, dims=("step", "eig"))
    np.testing.assert_array_equal(sharpness(lam), [3.0, -5.0, NAN, NAN])
    np.testing.assert_array_equal(sharpness(lam.T.astype("f4")), [3.0, -5.0, NAN, NAN])


@settings(max_examples=25)
@given(seed=st.integers(0, 999))
def test_preconditioned_sharpness__is_that_of_the_generalised_problem(seed: int) -> None:
    rng = np.random.default_rng(seed)
    A, P = rng.standard_normal((3, 6, 6)), rng.uniform(0.1, 5, (3, 6))
    H = A + np.swapaxes(A, 1, 2)
    expected = [scipy.linalg.eigh(h, np.diag(p), eigvals_only=True)[-1] for h, p in zip(H, P, strict=True)]
    matrix = xr.DataArray(H, dims=("step", "param", "param_"))
    diagonal = xr.DataArray(P, dims=("step", "param"))
    np.testing.assert_allclose(preconditioned_sharpness(matrix, diagonal), expected, rtol=1e-10)
    chunked = preconditioned_sharpness(
        matrix.chunk(step=1, param=2).transpose("param", "step", "param_"), diagonal
    )
    np.testing.assert_allclose(chunked.compute(scheduler="synchronous"), expected, rtol=1e-10)
    P[1, 2], H[2, 0, 0] = 0.0, NAN
    assert np.isnan(preconditioned_sharpness(matrix, diagonal).values).tolist() == [False, True, True]
    alike = preconditioned_sharpness(matrix[0], xr.ones_like(diagonal[0]))
    assert float(alike) == pytest.approx(np.linalg.eigvalsh(H[0])[-1])


def test_preconditioned_sharpness__refuses_what_is_no_block() -> None:
    with pytest.raises(ValueError, match="square blocks"):
        preconditioned_sharpness(
            xr.DataArray(np.ones((2, 3)), dims=("param", "param_")), xr.DataArray(np.ones(2), dims="param")
        )


@pytest.mark.parametrize(
    ("loss", "fraction"),
    [
        ([3.0, 2.0, 1.0], 0.0),
        ([1.0, 2.0, 1.5, 3.0], 2 / 3),
        ([1.0, NAN, 2.0, NAN], 1.0),  # the gap is bridged
        ([1.0, INF, 2.0], 0.5),
        ([1.0, 1.0], 0.0),
        ([1.0], NAN),
        ([NAN, NAN], NAN),
        ([], NAN),
    ],
)
def test_non_monotone_fraction(loss: list[float], fraction: float) -> None:
    np.testing.assert_array_equal(non_monotone_fraction_kernel(np.array(loss)), fraction)


def gradient_descent(lr: float, steps: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Loss and sharpness of (xy - 1)^2 / 2, whose curvature x^2 + y^2 starts high; from the exact Hessian."""
    x, y = 3.0, 0.4
    losses, sharp = [], []
    for _ in range(steps):
        r = x * y - 1
        losses.append(r * r / 2)
        sharp.append(np.linalg.eigvalsh([[y * y, 2 * x * y - 1], [2 * x * y - 1, x * x]])[-1])
        x, y = x - lr * r * y, y - lr * r * x
    return np.array(losses), np.array(sharp)


def test_edge_of_stability__gradient_descent_leaves_the_unstable_region() -> None:
    losses, sharp = gradient_descent(0.25)
    coords = {"step": 5 * np.arange(400)}
    loss, lam = (xr.DataArray(a, dims="step", coords=coords) for a in (losses, sharp))
    found = edge_of_stability(lam, 0.25, loss)
    np.testing.assert_allclose(found.sharpness_ratio, sharp / 8)
    assert float(found.first_crossing) == 5 * int(np.argmax(sharp >= 8))
    assert float(found.sharpness_ratio[0]) > 1 > float(found.sharpness_ratio[-1]) > 0.5
    assert float(found.non_monotone_fraction) == np.mean(np.diff(losses) > 0) > 0
    stable = edge_of_stability(lam, 0.01, loss)
    assert np.isnan(stable.first_crossing)
    np.testing.assert_array_equal(stable.stability_threshold, 200.0)


def test_edge_of_stability__of_missing_records_and_other_cadence() -> None:
    coords = {"step": [0, 10, 20]}
    lam = xr.DataArray([[NAN, 25.0, 19.0], [NAN] * 3], dims=("seed", "step"), coords=coords)
    rate = xr.DataArray([0.1, 0.05, 0.1], dims="step", coords=coords)
    loss = xr.DataArray([2.0, 1.0], dims="step", coords={"step": [0, 1]})
    found = edge_of_stability(lam, rate, loss)
    np.testing.assert_array_equal(found.sharpness_ratio, [[NAN, 0.625, 0.95], [NAN] * 3])
    np.testing.assert_array_equal(found.first_crossing, [NAN, NAN])
    np.testing.assert_array_equal(edge_of_stability(lam, 0.1).first_crossing, [10.0, NAN])
    with pytest.raises(ValueError, match="differ along dim 'step'"):
        edge_of_stability(lam, rate.isel(step=slice(2)))
    with pytest.raises(ValueError, match="expected increasing labels"):
        edge_of_stability(lam.isel(step=[1, 0]), 0.1)
    with pytest.raises(TypeError, match="complex"):
        edge_of_stability(lam * 1j, 0.1)


@pytest.mark.usefixtures("nothing_computes")
def test_stability__stays_lazy_and_keeps_labels() -> None:
    lam = xr.DataArray(
        np.random.default_rng(0).uniform(5, 30, (2, 6, 3)),
        dims=("seed", "step", "eig"),
        coords={"seed": [1, 5], "step": np.arange(6)},
    )
    rate = xr.DataArray(np.full(6, 0.1), dims="step", coords={"step": np.arange(6)})
    lazy = edge_of_stability(sharpness(lam.chunk(step=2)), rate.chunk(step=3), rate.chunk(step=2))
    eager = edge_of_stability(sharpness(lam), rate, rate)
    for name, array in lazy.items():
        assert array.chunks is not None
        xr.testing.assert_identical(array.compute(scheduler="synchronous"), eager[name])
    assert eager.first_crossing.dims == ("seed",)
    assert eager.sharpness_ratio.attrs["optimizer"] == "gd"
