from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from hild_xr.plots import alignment_curves


def test_alignment_curves__shows_median_and_range_over_classes_and_seeds(alignment: xr.DataArray) -> None:
    band, line = alignment_curves({"E_k(H)": alignment})
    others = ["seed", "out"]
    assert line.dimension_values("alignment") == pytest.approx(alignment.median(others).values)
    assert band.dimension_values("alignment") == pytest.approx(alignment.max(others).values)
    assert band.dimension_values("alignment_lower") == pytest.approx(alignment.min(others).values)
    assert (band.label, line.label) == ("E_k(H)", "E_k(H)")


def test_alignment_curves__takes_the_labels_of_a_dim(alignment: xr.DataArray) -> None:
    both = xr.concat([alignment, 0.5 * alignment], xr.Variable("subspace", ["E_k(H)", "E_k(G)"]))
    by_dim, by_name = (
        alignment_curves(both),
        alignment_curves({"E_k(H)": alignment, "E_k(G)": 0.5 * alignment}),
    )
    assert [(e.group, e.label) for e in by_dim] == [(e.group, e.label) for e in by_name]
    for one, other in zip(by_dim, by_name, strict=True):
        assert one.dimension_values(1) == pytest.approx(other.dimension_values(1))


def test_alignment_curves__baseline_is_level_from_the_first_to_the_last_step(alignment: xr.DataArray) -> None:
    short = alignment.isel(step=slice(2, 5))
    *_, line = alignment_curves({"long": alignment, "short": short}, baseline=0.141)
    assert line.group == "Baseline"
    assert line.dimension_values("alignment").tolist() == [0.141, 0.141]
    assert line.dimension_values("step").tolist() == [0, 1000]
    assert line.label == "random subspace"


def test_alignment_curves__subspaces_may_have_steps_of_their_own(alignment: xr.DataArray) -> None:
    sparse = alignment.isel(seed=0, out=0, step=slice(None, None, 3))
    *_, line = alignment_curves({"all": alignment, "sparse": sparse})
    assert line.dimension_values("step").tolist() == sparse.step.values.tolist()
    assert line.dimension_values("alignment").tolist() == sparse.values.tolist()


def test_alignment_curves__leaves_out_dead_neurons(alignment: xr.DataArray) -> None:
    alive = alignment.where(alignment.out != 1)
    band, line = alignment_curves({"a": alive})
    others = alignment.sel(out=[0, 2, 3])
    assert line.dimension_values("alignment") == pytest.approx(others.median(["seed", "out"]).values)
    assert np.isfinite(band.dimension_values("alignment")).all()


def test_alignment_curves__axis_is_from_zero_to_one(alignment: xr.DataArray) -> None:
    for element in alignment_curves({"a": 0.5 * alignment}, baseline=0.1):
        assert element.vdims[0].range == (0, 1)
        assert element.vdims[0].label == "alignment"


@pytest.mark.parametrize("wrong", [1.2, -0.3])
def test_alignment_curves__refuses_what_the_axis_would_hide(alignment: xr.DataArray, wrong: float) -> None:
    with pytest.raises(ValueError, match=r"alignment with E_k\(H\) between 0 and 1"):
        alignment_curves({"E_k(H)": alignment.where(alignment.step != 5, wrong)})
    with pytest.raises(ValueError, match="baseline between 0 and 1"):
        alignment_curves({"E_k(H)": alignment}, baseline=wrong)


def test_alignment_curves__refuses_nothing() -> None:
    with pytest.raises(ValueError, match="at least one array of alignments"):
        alignment_curves({})
