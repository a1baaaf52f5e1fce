"""Weights as they are, rounded on request, and what is said of it in the attrs."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from torch import nn

import hild_xr as hx
from hild_xr import recorders as rec
from hild_xr.plan import ArrayPlan


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 6), nn.Linear(6, 3))


def planned(probe: rec.Weights, model: nn.Module) -> dict[str, ArrayPlan]:
    return {name: node.arrays["weight"] for name, node in probe.plan(model, None, None).items()}


def recorded(probe: rec.Weights, model: nn.Module, step: int = 0) -> dict[str, NDArray[Any]]:
    values = probe.record(rec.Snapshot(model, None, None, step))
    return {name: np.asarray(node["weight"]) for name, node in values.items()}


def test_weights__without_options_are_those_of_the_model_and_carry_no_note() -> None:
    model, probe = net(), rec.Weights()
    arrays = planned(probe, model)
    found = recorded(probe, model)
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(found[name], parameter.detach().numpy())
        assert arrays[name].attrs == {"vector_dims": list(arrays[name].dims)}


@pytest.mark.parametrize("own", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_dtype__is_stored_and_its_loss_is_stated(own: torch.dtype, dtype: Any) -> None:
    model, probe = net().to(own), rec.Weights(dtype=dtype)
    array = planned(probe, model)["0.weight"]
    found = recorded(probe, model)["0.weight"]
    assert array.dtype == dtype
    assert found.dtype == dtype
    exact = model.get_parameter("0.weight").detach().double().numpy()
    error = np.abs(found - exact)
    if "lossy" not in array.attrs:
        np.testing.assert_array_equal(found, exact)
        return
    lossy: Any = array.attrs["lossy"]
    assert lossy["to"] == dtype
    assert (error <= np.maximum(lossy["relative_error"] * np.abs(exact), lossy["absolute_error"])).all()


def test_loss__of_float16_is_that_of_eleven_bits() -> None:
    probe = rec.Weights(dtype="float16")
    assert planned(probe, net())["0.weight"].attrs["lossy"] == {
        "from": "float32",
        "to": "float16",
        "relative_error": 2**-11,
        "absolute_error": 2**-25,
    }


@given(arrays(np.float64, (6, 20), elements=st.floats(-65504, 65504)))
def test_rounding_to_float16__stays_within_the_stated_error(values: NDArray[np.float64]) -> None:
    model, probe = nn.Linear(20, 6, bias=False).double(), rec.Weights(dtype="float16")
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(values))
    lossy: Any = planned(probe, model)["weight"].attrs["lossy"]
    found = recorded(probe, model)["weight"].astype(np.float64)
    allowed = np.maximum(lossy["relative_error"] * np.abs(values), lossy["absolute_error"])
    assert (np.abs(found - values) <= allowed).all()


def test_number_beyond_the_range__is_nan_with_one_warning_and_infinity_stays() -> None:
    model, probe = net(), rec.Weights(dtype="float16")
    probe.plan(model, None, None)
    with torch.no_grad():
        model.get_parameter("0.weight")[0, :3] = torch.tensor([1e5, -1e5, math.inf])
    with pytest.warns(rec.OutOfRangeWarning, match=r"step 7: .*65504.*stored as NaN, here \{'0.weight': 2\}"):
        found = recorded(probe, model, step=7)["0.weight"]
    assert np.isnan(found[0, :2]).all()
    assert found[0, 2] == np.inf
    assert np.isfinite(found[1:]).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(recorded(probe, model)["0.weight"]).sum() == 2


def test_record__of_rounded_weights_does_not_touch_the_model() -> None:
    model, probe = net(), rec.Weights(dtype="float16", sketch=16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    probe.plan(model, None, None)
    recorded(probe, model)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name])


def test_dtype_and_sketch__go_together() -> None:
    model = net()
    both, alone = rec.Weights(dtype="float16", sketch=16), rec.Weights(sketch=16)
    array = planned(both, model)["0.weight"]
    planned(alone, model)
    assert (array.dtype, array.shape, array.record_nbytes) == ("float16", (16,), 32)
    assert {"sketch", "lossy"} <= array.attrs.keys()
    exact = recorded(alone, model)["0.weight"]
    np.testing.assert_array_equal(recorded(both, model)["0.weight"], exact.astype(np.float16))


def test_sketch_of_half_precision_weights__is_stored_in_float32() -> None:
    assert planned(rec.Weights(sketch=16), net().half())["0.weight"].dtype == "float32"


def test_estimate__halves_with_float16(tmp_path: Path) -> None:
    sizes = {
        dtype: rec.Recorder(
            tmp_path / "run.zarr",
            net(),
            probes=[rec.Weights(dtype=dtype)],
            schedule=rec.every(1, total_steps=9),
        )
        .plan()
        .nbytes
        for dtype in (None, "float16", "float64")
    }
    assert sizes["float16"] * 2 == sizes[None] == sizes["float64"] / 2
    assert sizes[None] == 10 * 4 * sum(p.numel() for p in net().parameters())


def test_rounded_run__opens_with_its_dtype_and_attrs(tmp_path: Path) -> None:
    model = net()
    with rec.Recorder(
        tmp_path / "run.zarr",
        model,
        probes=[rec.Weights(dtype="float16")],
        schedule=rec.every(1, total_steps=2),
    ) as recorder:
        for _ in range(2):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(0.5)
            recorder.step()
    weight = hx.open(tmp_path / "run.zarr")["weights/0.weight/weight"]
    assert weight.dtype == np.float16
    assert weight.attrs["lossy"]["from"] == "float32"
    start = net().get_parameter("0.weight").detach().numpy()
    exact = start * 0.5 ** np.arange(3)[:, None, None]
    np.testing.assert_allclose(weight.values[0], exact, rtol=2**-11, atol=2**-25)


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        ("bfloat16", "zarr and xarray have no bfloat16"),
        ("int8", "got 'int8'"),
        ("f2", "'float16', 'float32'"),
    ],
)
def test_other_dtypes__are_refused_at_once(dtype: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rec.Weights(dtype=dtype)


@pytest.mark.parametrize("own", [torch.int8, torch.complex64])
def test_parameters_that_are_not_real_floats__are_refused_by_name(own: torch.dtype) -> None:
    model = nn.ParameterDict({"table": nn.Parameter(torch.zeros(3, dtype=own), requires_grad=False)})
    for probe in (rec.Weights(), rec.Weights(dtype="float16")):
        with pytest.raises(ValueError, match=r"'table' holds torch\..*leave it out"):
            probe.plan(model, None, None)
