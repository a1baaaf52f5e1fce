from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from hild_xr.analysis.features import weight_statistics, z_score
from hild_xr.analysis.features.weight_statistics import STATISTICS


def array(values: np.ndarray, *dims: str) -> xr.DataArray:
    lead = ("seed", "step")[2 - (values.ndim - len(dims)) :] if values.ndim > len(dims) else ()
    return xr.DataArray(values, dims=(*lead, *dims), attrs={"vector_dims": list(dims)})


def model(seed: int = 0) -> dict[str, xr.DataArray]:
    rng = np.random.default_rng(seed)
    return {
        "conv.weight": array(rng.standard_normal((2, 3, 4, 3, 2, 2)), "out", "in", "kh", "kw"),
        "conv.bias": array(rng.standard_normal((2, 3, 4)), "out"),
        "norm.weight": array(rng.standard_normal((2, 3, 4)) + 10, "out"),
        "fc.weight": array(rng.standard_normal((2, 3, 5, 7)), "out", "in"),
        "fc.bias": array(rng.standard_normal((2, 3, 5)), "out"),
    }


def test_statistics__are_those_of_their_definitions() -> None:
    weights = model()
    found = weight_statistics(weights)
    assert found.dims == ("seed", "step", "statistic")
    assert tuple(found.statistic.values) == STATISTICS
    assert len(STATISTICS) == 14
    one = found.isel(seed=1, step=2)
    matrices = [weights[n].values[1, 2].reshape(m, -1) for n, m in (("conv.weight", 4), ("fc.weight", 5))]
    entries = np.concatenate([m.ravel() for m in matrices])
    biases = np.concatenate([weights[n].values[1, 2] for n in ("conv.bias", "fc.bias")])
    s = [np.linalg.svd(m, compute_uv=False) for m in matrices]
    expected = {
        "l1": np.mean([np.abs(m).sum() for m in matrices]),
        "l2": np.mean([np.linalg.norm(m) for m in matrices]),
        "trace": np.mean([np.trace(m) for m in matrices]),
        "spectral_norm": np.mean([np.linalg.norm(m, 2) for m in matrices]),
        "l1_by_l2": np.mean([np.abs(m).sum() / np.linalg.norm(m) for m in matrices]),
        "trace_by_spectral_norm": np.mean([np.trace(m) / np.linalg.norm(m, 2) for m in matrices]),
        "singular_value_mean": np.mean([v.mean() for v in s]),
        "singular_value_variance": np.mean([v.var(ddof=1) for v in s]),
        "weight_mean": entries.mean(),
        "weight_median": np.median(entries),
        "weight_variance": entries.var(ddof=1),
        "bias_mean": biases.mean(),
        "bias_median": np.median(biases),
        "bias_variance": biases.var(ddof=1),
    }
    assert tuple(expected) == STATISTICS
    for name, value in expected.items():
        assert float(one.sel(statistic=name)) == pytest.approx(value, rel=1e-12), name


def test_statistics__of_a_node_of_a_run_are_those_of_its_arrays() -> None:
    weights = model()
    node = xr.DataTree.from_dict({f"/{n}": xr.Dataset({"weight": a}) for n, a in weights.items()})
    xr.testing.assert_identical(weight_statistics(node), weight_statistics(weights))


def test_statistics__without_biases_or_of_zero_matrices_are_partly_undefined() -> None:
    zero = {
        "fc.weight": array(np.zeros((3, 2)), "out", "in"),
        "head.weight": array(np.ones((1, 2)), "out", "in"),
    }
    found = weight_statistics(zero)
    undefined = found.statistic[found.isnull().values].values.tolist()
    assert undefined == ["l1_by_l2", "trace_by_spectral_norm", "bias_mean", "bias_median", "bias_variance"]
    row = weight_statistics({"head.weight": zero["head.weight"]})
    assert np.isnan(float(row.sel(statistic="singular_value_variance")))


def test_statistics__of_a_missing_record_are_missing() -> None:
    weights = model()
    weights["fc.bias"][0, 1, 2] = np.nan
    weights["fc.weight"][1, 0] = np.nan
    found = weight_statistics(weights).isnull()
    assert found.values[0, 1].tolist() == [False] * 11 + [True] * 3
    assert found.values[1, 0].tolist() == [True] * 11 + [False] * 3
    assert int(found.sum()) == 14


def test_statistics__refuse_bad_weights() -> None:
    with pytest.raises(ValueError, match=r"one weight with several axes, came layers \['fc.bias'\]"):
        weight_statistics({"fc.bias": array(np.ones(3), "out")})
    with pytest.raises(ValueError, match="attr 'vector_dims' on fc"):
        weight_statistics({"fc": xr.DataArray(np.ones((2, 2)), dims=("out", "in"))})
    with pytest.raises(ValueError, match=r"came sketches in 'fc\.weight'"):
        weight_statistics({"fc.weight": array(np.ones(4), "sketch")})
    with pytest.raises(TypeError, match="complex"):
        weight_statistics({"fc.weight": array(np.ones((2, 2)) * 1j, "out", "in")})
    two = {
        "a.weight": array(np.ones((2, 2)), "out", "in"),
        "b.weight": array(np.ones((3, 2, 2)), "out", "in"),
    }
    assert weight_statistics(two).sizes == {"step": 3, "statistic": 14}
    other = {n: a.assign_coords(step=[s, 5, 9]) for s, (n, a) in enumerate(model().items())}
    with pytest.raises(ValueError, match="differ along dim 'step'"):
        weight_statistics(other)


@given(seed=st.integers(0, 9999), scale=st.sampled_from([1e-200, 1.0, 1e200]), shift=st.sampled_from([0, 3]))
def test_z_score__is_that_of_scipy_and_depends_on_neither_scale_nor_shift(
    seed: int, scale: float, shift: float
) -> None:
    x = np.random.default_rng(seed).standard_normal((3, 7))
    x[0, 4] = np.nan
    found = z_score(xr.DataArray(scale * (x + shift), dims=("seed", "step"), name="weight_statistics"))
    np.testing.assert_allclose(found, scipy.stats.zscore(x, axis=1, nan_policy="omit"), atol=1e-12)
    assert found.name == "weight_statistics"
    assert found.attrs["scored_over"] == "step"


@pytest.mark.parametrize("value", [0.0, 0.1, 1e10])
def test_z_score__of_a_constant_is_undefined(value: float) -> None:
    x = xr.DataArray([[value] * 7, [value] * 6 + [2 * value + 1]], dims=("seed", "step"))
    assert z_score(x).isnull().all("step").values.tolist() == [True, False]
    with pytest.raises(ValueError, match=r"missing \['time'\]"):
        z_score(x, dim="time")
