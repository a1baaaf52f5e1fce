"""The matrix against a slow one in plain integers, its law over many keys, and the labelled helpers."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import dask.array
import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from hild_xr import analysis
from hild_xr import sketch as sk
from hild_xr.sketch import JohnsonLindenstrauss, Sketch

WORD = 2**64 - 1

FROZEN_KEY = 8063688829713272487
FROZEN_BUCKETS = [
    [1066, 460, 1708, 2026],
    [1050, 371, 1688, 824],
    [1054, 294, 1724, 778],
    [149, 470, 1542, 2044],
    [1143, 444, 1597, 904],
    [1082, 1379, 684, 1927],
]
FROZEN_BITS = "2ce7546b1356b1c0"

numbers = st.floats(-1e3, 1e3, allow_subnormal=False)


def splitmix64_stream(state: int, n: int) -> list[int]:
    """The generator as its authors wrote it, with Python's integers."""
    drawn = []
    for _ in range(n):
        state = (state + 0x9E3779B97F4A7C15) & WORD
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
        drawn.append(z ^ (z >> 31))
    return drawn


def slow_matrix(name: str, size: int, m: int, seed: int, nonzeros: int) -> NDArray[np.float64]:
    """S entry by entry, from the rule in the docstring of buckets."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
    words, width = math.ceil(nonzeros / 2), m // nonzeros
    stream = splitmix64_stream(key, words * size)
    S = np.zeros((m, size))
    for j in range(size):
        for r in range(nonzeros):
            half = (stream[words * j + r // 2] >> (32 * (r % 2))) & 0xFFFFFFFF
            row = r * width + (((half >> 1) * width) >> 31)
            S[row, j] += (-1 if half & 1 else 1) / math.sqrt(nonzeros)
    return S


# ---------------------------------------------------------------------------- the scheme


def test_splitmix64__gives_the_published_numbers() -> None:
    # the test vector of Rosetta Code, made with the authors' C code
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [int(z) for z in sk.splitmix64(1234567, np.arange(5, dtype=np.uint64))] == expected
    assert splitmix64_stream(1234567, 5) == expected


def test_scheme__never_changes_silently() -> None:
    # Stored sketches can be compared with later ones only while these numbers stay. Another rule
    # needs another SCHEME, and the old one must go on being read.
    assert sk.SCHEME == "osnap-splitmix64-1"
    assert sk.layer_key("fc1.weight", 0) == FROZEN_KEY
    assert sk.buckets(FROZEN_KEY, 0, 6, m=1024, nonzeros=4).T.tolist() == FROZEN_BUCKETS
    sketch = JohnsonLindenstrauss(m=64, seed=7).over({"fc1.weight": 300, "fc1.bias": 20})
    bits = hashlib.sha256(sketch.apply(np.arange(320.0)).astype("<f8").tobytes()).hexdigest()
    assert bits[:16] == FROZEN_BITS


@pytest.mark.parametrize("nonzeros", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("seed", [0, 3, -1])
def test_sketch__is_the_matrix_of_the_written_rule(nonzeros: int, seed: int) -> None:
    sketch = JohnsonLindenstrauss(m=6 * nonzeros, seed=seed, nonzeros=nonzeros).over({"fc.wéight": 40})
    S = sketch.apply(np.eye(40)).T
    np.testing.assert_array_equal(S, slow_matrix("fc.wéight", 40, 6 * nonzeros, seed, nonzeros))
    assert (np.count_nonzero(S, axis=0) == nonzeros).all()
    np.testing.assert_allclose((S**2).sum(axis=0), 1, rtol=1e-15)


def test_rows_and_signs__are_uniform() -> None:
    table = sk.buckets(sk.layer_key("a", 0), 0, 200_000, m=40, nonzeros=4)
    negative, row = table // 40, table % 40
    assert abs(negative.mean() - 0.5) < 5 * 0.5 / math.sqrt(negative.size)
    for r in range(4):
        counts = np.bincount(row[r], minlength=40)
        assert counts[: 10 * r].sum() == counts[10 * r + 10 :].sum() == 0
        expected = 20_000
        chi2 = ((counts[10 * r : 10 * r + 10] - expected) ** 2 / expected).sum()
        assert chi2 < 9 + 5 * math.sqrt(18)
    signs = 1 - 2 * negative.astype(float)
    assert np.abs(np.corrcoef(signs) - np.eye(4)).max() < 5 / math.sqrt(200_000)


# ---------------------------------------------------------------------------- the law


def pairs_of_vectors() -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 60))
    two = np.zeros(60)
    two[:2] = 1.0
    return {"spread": (x, y), "close": (x, x + 0.3 * y), "same": (x, x), "two coordinates": (two, two)}


@pytest.mark.parametrize(("m", "nonzeros"), [(16, 4), (16, 1), (15, 5)])
@pytest.mark.parametrize("pair", pairs_of_vectors().values(), ids=pairs_of_vectors())
def test_inner_products__have_the_stated_mean_and_variance(
    pair: tuple[NDArray[np.float64], NDArray[np.float64]], m: int, nonzeros: int
) -> None:
    x, y = pair
    seeds, both = 3000, np.stack(pair)
    errors = np.empty(seeds)
    for seed in range(seeds):
        Sx, Sy = JohnsonLindenstrauss(m=m, seed=seed, nonzeros=nonzeros).over({"a": 60}).apply(both)
        errors[seed] = Sx @ Sy - x @ y
    law = (x @ x * (y @ y) + (x @ y) ** 2 - 2 * (x**2 @ y**2)) / m
    assert abs(errors.mean()) < 5 * math.sqrt(law / seeds)
    fourth = np.mean(errors**4) / law**2  # how far a variance from so many errors may be off
    assert abs(np.mean(errors**2) / law - 1) < 5 * math.sqrt(fourth / seeds)
    assert sk.standard_error(x @ x, y @ y, x @ y, m) ** 2 >= law
    for t in (0.5, 1.0):  # Chebyshev
        assert np.mean(np.abs(errors) >= t * np.linalg.norm(x) * np.linalg.norm(y)) <= 2 / (m * t**2)


def test_layers__are_sketched_independently() -> None:
    # one matrix for two layers would add their errors up instead of averaging them out
    x = np.random.default_rng(0).normal(size=60)
    errors = []
    for seed in range(1000):
        sketch = JohnsonLindenstrauss(m=16, seed=seed).over({"a": 60, "b": 60})
        Sx = sketch.apply(np.concatenate([x, x]))
        errors.append(Sx @ Sx - 2 * x @ x)
    law = 2 * ((2 * x @ x) ** 2 - 2 * (x**4).sum()) / 16
    assert np.mean(np.square(errors)) == pytest.approx(law, rel=0.25)


def distortion(sketch: Sketch, *vectors: NDArray[np.float64]) -> float:
    """Largest relative error of squared norms on the span of the rows."""
    Q = np.linalg.qr(np.concatenate([np.atleast_2d(v) for v in vectors]).T)[0]
    return float(np.abs(np.linalg.svd(sketch.apply(Q.T), compute_uv=False) ** 2 - 1).max())


def test_distortion__of_a_subspace_obeys_its_bound() -> None:
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(400, 6)))[0].T
    deltas = [
        distortion(JohnsonLindenstrauss(m=128, seed=seed).over({"a": 400}), basis) for seed in range(200)
    ]
    assert np.mean(np.square(deltas)) < 6 * 7 / 128
    assert np.median(deltas) == pytest.approx(2 * math.sqrt(6 / 128), rel=0.3)


@pytest.mark.parametrize("seed", range(5))
def test_angles__keep_their_sines_within_the_distortion(seed: int) -> None:
    rng = np.random.default_rng(seed)
    k, p, m = 3, 2000, 512
    sketch = JohnsonLindenstrauss(m=m, seed=seed).over({"fc.weight": p})
    U = rng.normal(size=(k, p))
    V = U + np.array([[0.001], [0.1], [1.0]]) * rng.normal(size=(k, p))
    attrs = {"number_dim": "eig", "vector_dims": ["in"]}
    u, v = (xr.DataArray(w, dims=("eig", "in"), attrs=attrs) for w in (U, V))
    stored = {**sketch.to_json(), "dims": ["in"], "shape": [p]}
    like = xr.DataArray(np.zeros(m), dims="sketch", attrs={"sketch": stored})
    su, sv = (sk.sketch(w, like) for w in (u, v))

    delta = distortion(sketch, U, V)
    assert delta < 0.5
    factor = math.sqrt((1 + delta) / (1 - delta))
    exact, found = (np.sin(analysis.principal_angles(*pair).values) for pair in ((u, v), (su, sv)))
    assert (found <= exact * factor * (1 + 1e-6)).all()
    assert (found >= exact / factor * (1 - 1e-6)).all()
    assert found[0] == pytest.approx(exact[0], rel=5 * math.sqrt(2 * k / m))  # a small angle stays small

    weight = u.isel(eig=0, drop=True)
    rho = 1 - analysis.alignment(weight, v).item() ** 2
    sketched = 1 - analysis.alignment(su.isel(eig=0, drop=True), sv).item() ** 2
    assert rho / factor**2 * (1 - 1e-6) <= sketched <= rho * factor**2 * (1 + 1e-6)


def test_random_alignment__is_that_of_m_dimensions() -> None:
    rng = np.random.default_rng(0)
    p, m, k = 20_000, 200, 8
    sketch = JohnsonLindenstrauss(m=m).over({"fc.weight": p})
    rho = analysis.alignment(
        xr.DataArray(sketch.apply(rng.normal(size=(100, p))), dims=("record", "sketch")),
        xr.DataArray(sketch.apply(rng.normal(size=(k, p))), dims=("eig", "sketch")),
        vector_dims=["sketch"],
        number_dim="eig",
    )
    baseline = analysis.random_alignment_baseline(k, m)
    assert math.sqrt((rho**2).mean().item()) == pytest.approx(float(baseline), rel=0.1)


# ---------------------------------------------------------------------------- laws of the arithmetic


@given(arrays(np.float64, (2, 30), elements=numbers), numbers, numbers)
def test_sketch__is_linear(x: NDArray[np.float64], a: float, b: float) -> None:
    sketch = JohnsonLindenstrauss(m=12).over({"a": 30})
    Sx, Sy = sketch.apply(x)
    scale = 1 + np.abs(a * x[0]).sum() + np.abs(b * x[1]).sum()
    np.testing.assert_allclose(sketch.apply(a * x[0] + b * x[1]), a * Sx + b * Sy, atol=1e-13 * scale)


@given(arrays(np.float64, (2, 3, 30), elements=numbers), st.integers(-300, 300))
def test_sketch__of_a_stack_is_the_stack_of_sketches_at_any_scale(
    x: NDArray[np.float64], exponent: int
) -> None:
    sketch = JohnsonLindenstrauss(m=12).over({"a": 30})
    one_by_one = np.stack([[sketch.apply(vector) for vector in row] for row in x])
    scaled, expected = sketch.apply(np.ldexp(x, exponent)), np.ldexp(one_by_one, exponent)
    # Below the smallest normal number there are fewer digits, and powers of two round too.
    subnormal = np.abs(expected) < 2**12 * np.finfo(np.float64).tiny
    np.testing.assert_array_equal(scaled[~subnormal], expected[~subnormal])
    np.testing.assert_allclose(scaled[subnormal], expected[subnormal], rtol=0, atol=1e-320)


@given(arrays(np.float32, (40,), elements=st.floats(-8, 8, width=32)), st.integers(1, 39))
def test_sketch__of_the_whole_is_the_sum_of_its_layers(x: NDArray[np.float32], cut: int) -> None:
    family = JohnsonLindenstrauss(m=12)
    whole = family.over({"a": cut, "b": 40 - cut}).apply(x)
    parts = family.over({"a": cut}).apply(x[:cut]) + family.over({"b": 40 - cut}).apply(x[cut:])
    np.testing.assert_allclose(parts, whole, atol=1e-12)
    np.testing.assert_array_equal(family.over({"a": cut, "b": 40 - cut}).apply(x.astype(np.float64)), whole)


def test_chunks__do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).normal(size=(5, 1000)) * 10.0 ** np.arange(-2, 3)[:, None]
    sketch = JohnsonLindenstrauss(m=48).over({"a": 700, "b": 300})
    whole = sketch.apply(x)
    for chunk in (64, 999, 2500):
        monkeypatch.setattr(sk, "CHUNK", chunk)
        np.testing.assert_array_equal(sketch.apply(x), whole)


def test_sums__are_exact_up_to_the_stated_rounding_of_each_coordinate() -> None:
    x, m = np.random.default_rng(0).normal(size=5000), 8
    S = slow_matrix("a", 5000, m, 0, 1)
    exact = [math.fsum(row * x) for row in S]
    allowed = np.count_nonzero(S, axis=1).max() * 5000 * 2**-61 * np.abs(x).max()
    found = JohnsonLindenstrauss(m=m, nonzeros=1).over({"a": 5000}).apply(x)
    np.testing.assert_allclose(found, exact, rtol=1e-15, atol=allowed)


def test_small_numbers_beside_a_large_one__are_kept() -> None:
    x = np.full(4000, 1e-4)
    x[7] = 1e4
    S = slow_matrix("a", 4000, 16, 0, 4)
    found = JohnsonLindenstrauss(m=16).over({"a": 4000}).apply(x)
    np.testing.assert_allclose(found, S @ x, rtol=0, atol=4000 * 4000 * 2**-61 * 1e4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_vector_that_is_not_finite__has_no_sketch(bad: float) -> None:
    x = np.ones((3, 50))
    x[1, 20] = bad
    found = JohnsonLindenstrauss(m=8).over({"a": 50}).apply(x)
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(found[0], found[2])
    assert np.isfinite(found[[0, 2]]).all()


def test_zeros_integers_and_empty_stacks__are_vectors_too() -> None:
    sketch = JohnsonLindenstrauss(m=8).over({"a": 50})
    np.testing.assert_array_equal(sketch.apply(np.zeros(50)), np.zeros(8))
    counts = np.arange(50, dtype=np.uint8)
    np.testing.assert_array_equal(sketch.apply(counts), sketch.apply(counts.astype(float)))
    assert sketch.apply(np.zeros((0, 3, 50))).shape == (0, 3, 8)


def test_tables__take_bounded_memory_and_can_be_made_anew() -> None:
    kept = sk._Kept(limit=1000)
    for key in range(10):
        kept.get(key, lambda: np.zeros(50))
        assert kept.nbytes <= 1000
    last = kept.get(9, lambda: np.ones(50))
    assert not last.any()  # kept
    first = kept.get(0, lambda: np.ones(50))
    assert first.all()  # dropped, and made anew
    assert kept.get("large", lambda: np.zeros(10_000)).size == 10_000
    assert kept.nbytes <= 1000


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"m": 10}, "take m=12"),
        ({"m": 0}, "take m=4"),
        ({"m": 8, "nonzeros": 0}, "blocks"),
        ({"m": 8.0}, "whole numbers"),
        ({"m": 2**30}, "no saving"),
    ],
)
def test_family__refuses_what_has_no_law(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        JohnsonLindenstrauss(**settings)


def test_sketch__refuses_other_vectors() -> None:
    sketch = JohnsonLindenstrauss(m=8).over({"a": 50})
    with pytest.raises(ValueError, match=r"vectors of 50 numbers.*got shape \(2, 49\)"):
        sketch.apply(np.ones((2, 49)))
    with pytest.raises(ValueError, match="real numbers; got dtype complex128"):
        sketch.apply(np.ones(50, dtype=complex))
    with pytest.raises(ValueError, match="at least one layer"):
        JohnsonLindenstrauss(m=8).over({})


def test_attributes__of_another_scheme_are_refused() -> None:
    stored = JohnsonLindenstrauss(m=8).over({"a": 50}).to_json()
    with pytest.raises(ValueError, match="scheme 'osnap-md5-1'"):
        Sketch.from_json({**stored, "scheme": "osnap-md5-1"})


# ---------------------------------------------------------------------------- labelled


def stored_like(sketch: Sketch, dims: list[str], shape: list[int]) -> xr.DataArray:
    attrs = {"sketch": {**sketch.to_json(), "dims": dims, "shape": shape}, "vector_dims": ["sketch"]}
    return xr.DataArray(np.zeros((2, sketch.m)), dims=("step", "sketch"), name="weight", attrs=attrs)


FC = JohnsonLindenstrauss(m=16).over({"fc.weight": 60})


def test_labelled_sketch__finds_its_dims_by_name() -> None:
    means = np.random.default_rng(0).normal(size=(5, 3, 20))
    array = xr.DataArray(
        means.transpose(2, 0, 1),
        dims=("in", "class", "out"),
        coords={"class": list("abcde")},
        attrs={"number_dim": "class"},
    )
    found = sk.sketch(array, like=stored_like(FC, ["out", "in"], [3, 20]))
    assert found.dims == ("class", "sketch")
    assert list(found["class"].values) == list("abcde")
    assert found.attrs["vector_dims"] == ["sketch"]
    assert found.attrs["number_dim"] == "class"
    np.testing.assert_array_equal(found.values, FC.apply(means.reshape(5, 60)))
    again = sk.sketch(found, like=stored_like(FC, ["out", "in"], [3, 20]))
    assert again.identical(found)


def test_labelled_sketch__is_lazy_and_the_same_in_chunks() -> None:
    x = np.random.default_rng(0).normal(size=(6, 3, 20))
    array = xr.DataArray(x, dims=("step", "out", "in"))
    like = stored_like(FC, ["out", "in"], [3, 20])
    lazy = sk.sketch(array.chunk({"step": 2, "in": 7}), like=like)
    assert isinstance(lazy.data, dask.array.Array)
    assert lazy.chunks[0] == (2, 2, 2)
    np.testing.assert_array_equal(lazy.values, sk.sketch(array, like=like).values)


def test_labelled_sketch__leaves_alone_what_is_stored_whole() -> None:
    array = xr.DataArray(np.ones((3, 20)), dims=("out", "in"))
    assert sk.sketch(array, like=xr.zeros_like(array)) is array


def test_labelled_sketch__refuses_other_shapes_and_other_matrices() -> None:
    like = stored_like(FC, ["out", "in"], [3, 20])
    with pytest.raises(ValueError, match=r"expected the dims \{'out': 3, 'in': 20\}.*came \{'out': 3\}"):
        sk.sketch(xr.DataArray(np.ones(3), dims="out"), like=like)
    other = stored_like(JohnsonLindenstrauss(m=16, seed=1).over({"fc.weight": 60}), ["out", "in"], [3, 20])
    with pytest.raises(ValueError, match="differ in seed 1 against 0"):
        sk.sketch(other, like=like)


def test_model_sketch__adds_layers_sketched_and_whole() -> None:
    rng = np.random.default_rng(0)
    family = JohnsonLindenstrauss(m=16)
    weight, bias = rng.normal(size=(4, 3, 20)), rng.normal(size=(4, 3))
    steps = {"step": [0, 1, 5, 9]}
    model = family.over({"fc.weight": 60, "fc.bias": 3})
    like = stored_like(model, ["param"], [63])
    stored = sk.sketch(
        xr.DataArray(weight, dims=("step", "out", "in"), coords=steps),
        stored_like(FC, ["out", "in"], [3, 20]),
    )
    whole = xr.DataArray(bias, dims=("step", "out"), coords=steps, attrs={"vector_dims": ["out"]})
    frozen = xr.DataArray(0.0)
    found = sk.sketch_model({"frozen": frozen, "fc.bias": whole, "fc.weight": stored}, like)
    flat = np.concatenate([weight.reshape(4, 60), bias], axis=1)
    assert found.dims == ("step", "sketch")
    np.testing.assert_allclose(found.values, model.apply(flat), atol=1e-12)
    assert found.attrs == {"vector_dims": ["sketch"], "sketch": like.attrs["sketch"]}

    with pytest.raises(KeyError, match=r"also hold \['fc.bias'\]"):
        sk.sketch_model({"fc.weight": stored}, like)
    with pytest.raises(ValueError, match="vectors of 2 numbers"):
        sk.sketch_model({"fc.weight": stored, "fc.bias": whole[:, :2]}, like)
    with pytest.raises(ValueError, match="no sketch"):
        sk.sketch_model({}, whole)
    rows = sk.sketch(
        xr.DataArray(np.ones((3, 20)), dims=("out", "in")),
        stored_like(family.over({"fc.weight": 20}), ["in"], [20]),
    )
    with pytest.raises(ValueError, match=r"differ in sizes \[20\] against \[60\]"):
        sk.sketch_model({"fc.weight": rows, "fc.bias": whole}, like)
    with pytest.raises(ValueError, match="cannot align"):
        sk.sketch_model({"fc.weight": stored, "fc.bias": whole[:3]}, like)
