from __future__ import annotations

import holoviews as hv
import pytest

from hild_xr.plots import side_by_side


def test_side_by_side__titles_panels_and_leaves_them_alone() -> None:
    first, second = hv.Curve([1, 2], label="line"), hv.Overlay([hv.Curve([1, 2], label="line")])
    layout = side_by_side({"optimal": first, "sub-optimal": second})
    assert [panel.label for panel in layout] == ["optimal", "sub-optimal"]
    assert [element.label for element in list(layout)[1]] == ["line"]
    assert first.label == "line"


def test_side_by_side__wraps_after_the_columns() -> None:
    panels = {f"class {number}": hv.Curve([1, 2]) for number in range(5)}
    assert side_by_side(panels).shape == (3, 2)
    assert side_by_side(panels, columns=5).shape == (1, 5)
    assert side_by_side({"alone": hv.Curve([1, 2])}).shape == (1, 1)


def test_side_by_side__refuses_nothing() -> None:
    with pytest.raises(ValueError, match="at least one panel"):
        side_by_side({})
