from __future__ import annotations

from itertools import pairwise

import holoviews as hv
import pytest

from hild_xr.plots.palette import OKABE_ITO, legend_columns, looks, ticks_of_eigenpairs, title_of


def curve(label: str, group: str = "Median") -> hv.Curve:
    return hv.Curve([1, 2], label=label, group=group)


@pytest.mark.parametrize("number", [1, len(OKABE_ITO), len(OKABE_ITO) + 1, 20])
def test_looks__every_label_has_a_colour_of_its_own(number: int) -> None:
    found = looks(curve(f"line {index}") for index in range(number))
    assert len({look.colour for look in found}) == number


def test_looks__band_line_and_points_of_one_label_agree() -> None:
    elements = [
        hv.Area([1, 2], group="Range", label="b"),
        curve("a"),
        curve("b"),
        hv.Scatter([1, 2], group="Points", label="b"),
    ]
    band, other, line, points = looks(elements)
    assert band.colour == line.colour == points.colour != other.colour


def test_looks__what_is_not_measured_takes_no_colour() -> None:
    fixed = [curve("x", group) for group in ("Bulk", "Edge", "Baseline", "Expected")]
    found = looks([*fixed, curve("first")])
    assert found[-1].colour == OKABE_ITO[0]
    for look in found[:-1]:
        red, green, blue = (look.colour[at : at + 2] for at in (1, 3, 5))
        assert red == green == blue


def test_looks__lines_that_may_coincide_differ_in_their_dashes() -> None:
    for group in ("Median", "Count"):
        assert len({look.dash for look in looks([curve("a", group), curve("b", group)])}) == 2
    assert {look.dash for look in looks([curve("a", "Outlier"), curve("b", "Outlier")])} == {"solid"}


def test_title_of__is_none_where_the_label_is_that_of_the_elements() -> None:
    assert title_of(hv.Overlay([curve("a"), curve("a", "Edge")])) == ""
    assert title_of(hv.Overlay([curve("a"), curve("b")], label="title")) == "title"
    assert title_of(hv.Overlay([curve("a"), curve("b")])) == ""


def test_legend_columns__are_fewer_for_longer_labels() -> None:
    assert legend_columns([curve("a"), curve("b")]) == 2
    assert legend_columns([curve("a" * 30), curve("b")]) == 1
    assert legend_columns([curve("a" * 200)]) == 1


@pytest.mark.parametrize("number", [1, 2, 10, 11, 99, 500])
def test_ticks_of_eigenpairs__start_at_the_leading_one_and_stay_few(number: int) -> None:
    ticks = ticks_of_eigenpairs(number)
    assert ticks[0] == 1
    assert ticks[-1] <= number
    assert len(ticks) <= 10
    assert len({later - earlier for earlier, later in pairwise(ticks)}) <= 1
