from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import assume, given
from hypothesis import strategies as st

from hild_xr.analysis import outliers

NAN, INF = np.nan, np.inf


def found(values: list[float], **options: Any) -> tuple[int, float, float, bool]:
    """Count, gap ratio, edge and whether the bulk was reached, for one spectrum."""
    ds = outliers(xr.DataArray(values, dims="eig"), **options)
    return int(ds.outlier_count), float(ds.gap_ratio), float(ds.bulk_edge), bool(ds.bulk_reached)


def close(*expected: float) -> Any:
    return pytest.approx(expected, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        # the largest ratio ends the outliers
        ([8.0, 7.0, 6.0, 1.0, 0.9], {}, (3, 6.0, 1.0, True)),
        ([8.0, 1.0, 0.9, 0.1], {}, (3, 9.0, 0.1, True)),
        # nothing is twice as large as the next one: all is bulk, and the ratio says so
        ([1.2, 1.1, 0.9, 0.8], {}, (0, 1.1 / 0.9, 1.2, True)),
        ([1.2, 1.1, 0.9, 0.8], {"threshold": 1.2}, (2, 1.1 / 0.9, 0.9, True)),
        # k fixes the position
        ([8.0, 7.0, 2.0, 0.9], {"k": 3}, (3, 2 / 0.9, 0.9, True)),
        ([8.0, 7.0, 1.0, 0.9], {"k": 3}, (0, 1 / 0.9, 8.0, True)),
        # the regulariser is taken off before ratios, and put back on the edge
        ([3.0, 2.0, 1.1, 1.05], {"regularizer": 1.0}, (2, 10.0, 1.1, True)),
        # a bulk that is zero, exactly or up to the rounding of float64
        ([3.0, 2.0, 0.0, 0.0], {}, (2, INF, 0.0, True)),
        ([3.0, 2.0, 1e-17, -1e-19], {}, (2, INF, 0.0, True)),
        ([3.1, 2.1, 0.1 + 1e-17, 0.1], {"regularizer": 0.1}, (2, INF, 0.1, True)),
        ([0.0, 0.0], {}, (0, NAN, 0.0, True)),
        # sizes count: negative eigenvalues are outliers or bulk as positive ones are
        ([5.0, -4.0, 3.0, 0.1], {}, (3, 30.0, 0.1, True)),
        ([5.0, 4.0, -0.5, 0.4], {}, (2, 8.0, 0.5, True)),
        # too few recorded
        ([5.0], {}, (-1, NAN, NAN, False)),
        ([5.0, NAN, NAN], {}, (-1, NAN, NAN, False)),
        ([5.0, 1.0, NAN], {}, (1, 5.0, 1.0, True)),
        ([5.0, 1.0, NAN], {"k": 2}, (-1, NAN, NAN, False)),
        ([5.0, NAN, 1.0], {}, (-1, NAN, NAN, False)),
        ([NAN, NAN, NAN], {}, (-1, NAN, NAN, False)),
        ([INF, 1.0, 0.1], {}, (-1, NAN, NAN, False)),
    ],
)
def test_outliers__gap(values: list[float], options: dict[str, Any], expected: tuple[Any, ...]) -> None:
    assert found(values, **options) == close(*expected)


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        ([100.0, 50.0, 5.5, 4.5, 1.0], {}, (3, 5.5 / 4.5, 5.0, True)),
        ([100.0, 50.0, 5.0, 1.0], {}, (2, 10.0, 5.0, True)),  # above, not at the threshold
        ([100.0, 50.0, 5.5], {"threshold": 0.5}, (1, 2.0, 50.0, True)),
        ([101.0, 51.0, 6.5, 5.5], {"regularizer": 1.0}, (3, 5.5 / 4.5, 6.0, True)),
        ([100.0, -50.0, 1.0], {}, (2, 50.0, 5.0, True)),
        ([100.0, 50.0, 1.0], {"k": 1}, (2, 2.0, 5.0, True)),
        # every recorded eigenvalue is an outlier: the count is a lower bound
        ([100.0, 50.0, 20.0], {}, (3, NAN, 5.0, False)),
        ([100.0, 50.0, NAN], {}, (2, NAN, 5.0, False)),
        ([100.0, 50.0, NAN], {"k": 2}, (2, NAN, 5.0, False)),
        ([0.0, 0.0], {}, (0, NAN, 0.0, True)),
        ([1.0, 0.0], {}, (1, INF, 0.05, True)),
        ([NAN, NAN], {}, (-1, NAN, NAN, False)),
        ([NAN, 1.0], {}, (-1, NAN, NAN, False)),
    ],
)
def test_outliers__relative(values: list[float], options: dict[str, Any], expected: tuple[Any, ...]) -> None:
    assert found(values, method="relative", **options) == close(*expected)


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        ([5.0, 3.0, 2.0, 1.0], {"edge": 2.5}, (2, 1.5, 2.5, True)),
        ([5.0, 3.0, 2.0, 1.0], {"edge": 2.0}, (2, 1.5, 2.0, True)),
        ([6.0, 4.0, 3.0, 2.0], {"edge": 3.5, "regularizer": 1.0}, (2, 1.5, 3.5, True)),
        # what lies to the left of the bulk is no outlier, but belongs to the rest
        ([5.0, -4.0, 3.0, 1.0], {"edge": 2.5}, (2, 0.75, 2.5, True)),
        ([5.0, 3.0], {"edge": 6.0}, (0, NAN, 6.0, True)),
        ([5.0, 3.0], {"edge": 1.0}, (2, NAN, 1.0, False)),
        ([5.0, 3.0, 2.0, 1.0], {"edge": 2.5, "k": 1}, (2, 5 / 3, 2.5, True)),
        ([5.0, 3.0], {"edge": NAN}, (-1, NAN, NAN, False)),
        ([5.0, 3.0], {"edge": 4.0, "regularizer": NAN}, (-1, NAN, NAN, False)),
        ([NAN, NAN], {"edge": 1.0}, (-1, NAN, NAN, False)),
    ],
)
def test_outliers__edge(values: list[float], options: dict[str, Any], expected: tuple[Any, ...]) -> None:
    assert found(values, method="edge", **options) == close(*expected)


METHODS: list[dict[str, Any]] = [
    {"method": "gap"},
    {"method": "gap", "k": 2},
    {"method": "relative"},
    {"method": "edge", "edge": 1.7},
]


@pytest.mark.parametrize("options", METHODS)
@given(
    values=st.lists(st.floats(-10, 10).filter(lambda x: x == 0 or abs(x) > 1e-3), min_size=3, max_size=8),
    seed=st.integers(0, 99),
    beta=st.sampled_from([0.0, 0.5]),
)
def test_outliers__laws(options: dict[str, Any], values: list[float], seed: int, beta: float) -> None:
    lam = np.array(values)
    expected = found(values, regularizer=beta, **options)
    count, ratio, edge, reached = expected
    shuffled = np.random.default_rng(seed).permutation(lam)
    assert found(list(shuffled), regularizer=beta, **options) == pytest.approx(expected, nan_ok=True)
    scaled = {**options, **({"edge": 1.7 * 4} if "edge" in options else {})}
    again = found(list(4 * lam), regularizer=4 * beta, **scaled)
    assert again == pytest.approx((count, ratio, 4 * edge, reached), nan_ok=True)
    padded = found([*values, NAN, NAN], regularizer=beta, **options)
    assert padded == pytest.approx(expected, nan_ok=True)
    above = lam - edge if options["method"] == "edge" else np.abs(lam - beta) - (edge - beta)
    if options["method"] == "relative":
        assume(np.abs(above).min() > 1e-12)  # rounding of the edge itself decides nothing
    assert count == np.sum(above > 1e-12)
    assert reached == (count < len(values))


def spectra() -> xr.DataArray:
    rng = np.random.default_rng(0)
    values = np.sort(rng.exponential(size=(2, 3, 4, 6)), axis=-1)[..., ::-1]
    coords = {"seed": [0, 1], "step": [0, 5, 9], "layer": list("abcd")}
    return xr.DataArray(values, dims=("seed", "step", "layer", "eig"), coords=coords)


@pytest.mark.parametrize("options", METHODS)
def test_outliers__of_many_spectra_are_those_of_each(options: dict[str, Any]) -> None:
    lam = spectra()
    lam[{"seed": 1, "step": 2}] = np.nan
    ds = outliers(lam, regularizer=0.01, **options)
    assert set(ds.data_vars) == {"outlier_count", "gap_ratio", "bulk_edge", "bulk_reached"}
    assert ds["outlier_count"].dtype.kind == "i"
    assert ds["outlier_count"].dims == ("seed", "step", "layer")
    for index in np.ndindex(2, 3, 4):
        got = tuple(ds[name].values[index].item() for name in ds)
        one = found(list(lam.values[index]), regularizer=0.01, **options)
        assert got == pytest.approx(one, nan_ok=True)


def test_outliers__edge_and_regularizer_may_change_along_the_run() -> None:
    lam = spectra()
    edge = xr.DataArray([0.5, 1.0, 1.5], dims="step", coords={"step": lam["step"]})
    beta = xr.DataArray([0.0, 0.1], dims="seed", coords={"seed": lam["seed"]})
    ds = outliers(lam, method="edge", edge=edge, regularizer=beta)
    xr.testing.assert_equal(ds["outlier_count"].drop_attrs(), (lam > edge).sum("eig"))
    xr.testing.assert_equal(ds["bulk_edge"].drop_attrs(), edge.broadcast_like(ds["bulk_edge"]))
    one = outliers(lam.sel(seed=1, step=9, drop=True), method="edge", edge=1.5, regularizer=0.1)
    xr.testing.assert_allclose(
        ds["gap_ratio"].sel(seed=1, step=9, drop=True), one["gap_ratio"], check_dim_order=False
    )


def test_outliers__other_dim_name_and_provenance_in_attrs() -> None:
    ds = outliers(spectra().rename(eig="singular"), dim="singular", method="relative", k=2)
    assert ds["outlier_count"].attrs["method"] == "relative"
    assert ds["outlier_count"].attrs["threshold"] == 0.05
    assert ds["gap_ratio"].attrs["k"] == 2
    edges = outliers(spectra(), method="edge", edge=1.0)["bulk_edge"].attrs
    assert "threshold" not in edges
    assert "k" not in edges


def test_outliers__float32_rounding_counts_as_zero() -> None:
    lam = xr.DataArray(np.array([1.0, 0.5, 3e-8, 1e-8], dtype=np.float32), dims="eig")
    ds = outliers(lam)
    assert int(ds.outlier_count) == 2
    assert float(ds.gap_ratio) == np.inf
    assert int(outliers(lam.astype(float)).outlier_count) == 2
    assert float(outliers(lam.astype(float)).gap_ratio) == pytest.approx(0.5 / 3e-8, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "largest"}, "expected method 'gap' or 'relative' or 'edge' or .*, came 'largest'"),
        ({"method": "edge"}, "expected edge=... with method 'edge'"),
        ({"edge": 1.0}, "expected edge=... with method 'edge' and only then"),
        ({"method": "edge", "edge": 1.0, "threshold": 0.1}, "no threshold with method 'edge'"),
        ({"threshold": 0.05}, "a ratio of at least 1 as threshold of method 'gap', came 0.05"),
        ({"method": "relative", "threshold": 2.0}, r"a fraction in \[0, 1\)"),
        ({"k": 6}, "expected 1 <= k < 6.*record more eigenvalues"),
        ({"k": 0}, "expected 1 <= k < 6"),
        ({"dim": "rank"}, r"missing \['rank'\]"),
        ({"regularizer": spectra()}, "one regularizer for a spectrum, came one with dim 'eig'"),
        (
            {"regularizer": xr.DataArray([0.1], dims="step")},
            "eigenvalues and regularizer differ along dim 'step'",
        ),
    ],
)
def test_outliers__refuses_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        outliers(spectra(), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"k": 2.5},
        {"k": "2"},
        {"k": True},
        {"threshold": "2"},
        {"threshold": True},
        {"method": "edge", "edge": "3"},
        {"regularizer": "0.1"},
    ],
)
def test_outliers__refuses_options_that_are_no_numbers(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"expected a (whole|real) number as .*, came"):
        outliers(spectra(), **options)


def test_outliers__refuses_complex_and_empty_spectra() -> None:
    with pytest.raises(TypeError, match="complex128"):
        outliers(spectra() * 1j)
    with pytest.raises(ValueError, match="at least one eigenvalue"):
        outliers(spectra().isel(eig=slice(0)))


def test_outliers__of_a_mixture_leave_the_marchenko_pastur_bulk() -> None:
    """Four planted spikes above the bulk of a sample covariance: every method finds the four."""
    rng = np.random.default_rng(0)
    n, d, means = 4000, 400, 10 * np.eye(400)[:4]
    Y = rng.standard_normal((n, d)) + means[rng.integers(0, 4, n)]
    lam = xr.DataArray(np.linalg.eigvalsh(Y.T @ Y / n)[::-1][:20], dims="eig")
    edge = (1 + np.sqrt(d / n)) ** 2
    for options in (
        {},
        {"k": 4},
        {"method": "relative", "threshold": 0.2},
        {"method": "edge", "edge": edge * 1.02},
    ):
        assert int(outliers(lam, **options).outlier_count) == 4
