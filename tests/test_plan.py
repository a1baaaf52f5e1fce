from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hild_xr.plan import ArrayPlan, CoordPlan, NodePlan, ProbePlan, RunPlan


def _plan(steps: tuple[int, ...] = (0, 1), seeds: tuple[int, ...] = (0,), **config: int) -> RunPlan:
    loss = ArrayPlan(variable="train_loss", dtype="float64")
    return RunPlan(
        seeds=seeds,
        probes={"metrics": ProbePlan(steps=steps, nodes={"": NodePlan(arrays={"train_loss": loss})})},
        config=dict(config),
    )


def test_plan__survives_json() -> None:
    coords = {
        "layer": CoordPlan(dim="layer", values=("a.weight", "b")),
        "eig": CoordPlan(dim="eig", values=(0, 1)),
    }
    weight = ArrayPlan(variable="weight", dims=("out",), shape=(3,), attrs={"vector_dims": ["out"]})
    nodes = {"": NodePlan(coords=coords), "a.weight": NodePlan(arrays={"weight": weight})}
    plan = RunPlan(
        seeds=(3, 1), probes={"weights": ProbePlan(steps=(0, 7), nodes=nodes)}, config={"lr": 0.1, "x": [1]}
    )
    assert RunPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@given(
    st.lists(st.integers(1, 3000), max_size=3).map(tuple),
    st.sampled_from(["float16", "float32", "float64"]),
)
def test_block_steps__is_the_largest_power_of_two_that_fits_a_megabyte(
    shape: tuple[int, ...], dtype: str
) -> None:
    array = ArrayPlan(
        variable="weight", dims=tuple(f"d{i}" for i in range(len(shape))), shape=shape, dtype=dtype
    )
    steps = array.block_steps
    assert steps & (steps - 1) == 0
    assert 1 <= steps <= 64
    assert steps == 1 or steps * array.record_nbytes <= 1_000_000
    assert steps == 64 or 2 * steps * array.record_nbytes > 1_000_000


def test_nbytes__counts_every_seed_step_and_array() -> None:
    assert _plan(steps=(0, 1, 2), seeds=(0, 1)).nbytes == 2 * 3 * 8


def test_differences__name_the_place_and_both_values() -> None:
    differences = _plan(steps=(0, 2), lr=1).differences(_plan(steps=tuple(range(50)), lr=2, width=3))
    text = "\n".join(differences)
    assert "config/lr: 1 asked for, 2 in the store" in text
    assert "config/width: in the store, not asked for" in text
    assert "probes/metrics/steps: (0, 2) asked for, 50 values from 0 to 49 in the store" in text
    assert len(differences) == 3


def test_differences__of_equal_plans_are_none() -> None:
    assert _plan(lr=1).differences(_plan(lr=1)) == []


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"seeds": ()}, "at least one seed"),
        ({"seeds": (1, 1)}, "no seed twice"),
        ({"steps": ()}, "increase strictly"),
        ({"steps": (3, 2)}, "increase strictly"),
    ],
)
def test_plan__refuses_what_makes_no_sense(kwargs: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _plan(**kwargs)


def test_array__refuses_an_unregistered_variable_and_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'eigenvalues'"):
        ArrayPlan(variable="eigenvalue")


def test_array__refuses_a_dtype_of_another_kind() -> None:
    with pytest.raises(ValueError, match="kind 'f'"):
        ArrayPlan(variable="weight", dtype="int32")


@pytest.mark.parametrize("name", ["a/b", "committed", "step", "train_loss"])
def test_probe__refuses_layer_names_that_the_store_cannot_hold(name: str) -> None:
    own = NodePlan(arrays={"train_loss": ArrayPlan(variable="train_loss")})
    with pytest.raises(ValueError, match="layer"):
        ProbePlan(steps=(0,), nodes={"": own, name: NodePlan()})
