from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from hild_xr.analysis.base.records import earlier_and_later, require_unique_labels


def records(labels: list[int] | None, n: int = 4) -> xr.DataArray:
    coords = {} if labels is None else {"step": labels, "attempt": ("step", np.arange(len(labels)))}
    return xr.DataArray(np.arange(float(n)), dims="step", coords=coords)


def test_earlier_and_later__both_carry_the_labels_of_the_later() -> None:
    earlier, later = earlier_and_later("w", records([0, 1, 10, 100]), "step")
    assert earlier.values.tolist() == [0, 1, 2]
    assert later.values.tolist() == [1, 2, 3]
    assert earlier["step"].values.tolist() == later["step"].values.tolist() == [1, 10, 100]
    assert later["attempt"].values.tolist() == [1, 2, 3]
    assert "attempt" not in earlier.coords  # it is that of the earlier record: no label of the pair


def test_earlier_and_later__without_labels_the_order_counts() -> None:
    earlier, later = earlier_and_later("w", records(None), "step")
    assert (later - earlier).values.tolist() == [1, 1, 1]


@pytest.mark.parametrize("n", [0, 1])
def test_earlier_and_later__of_fewer_than_two_records_are_empty(n: int) -> None:
    earlier, later = earlier_and_later("w", records(list(range(n)), n), "step")
    assert earlier.sizes["step"] == later.sizes["step"] == 0


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [0, 10, 5, 20],
            r"increasing labels along dim 'step' of w.*came 5 after 10; sort them with w\.sortby",
        ),
        ([0, 10, 10, 20], r"several for \[10\]; drop the\s+others with w\.drop_duplicates\('step'\)"),
        ([20, 10, 10, 20], r"several for \[10, 20\]"),
        ([3, 2, 1, 0], "came 2 after 3"),
    ],
)
def test_earlier_and_later__refuses_labels_out_of_order(labels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        earlier_and_later("w", records(labels), "step")


def test_earlier_and_later__refuses_a_missing_dim() -> None:
    with pytest.raises(ValueError, match=r"missing \['time'\]: pass dim="):
        earlier_and_later("w", records(None), "time")


def test_require_unique_labels__takes_any_order_and_no_labels() -> None:
    require_unique_labels("w", records([3, 1, 2, 0]), "step")
    require_unique_labels("w", records(None), "step")
