"""Records in the order of training: which record comes before which, and which labels forbid the question."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hild_xr.analysis.base.arguments import require_dims

if TYPE_CHECKING:
    import xarray as xr


def require_unique_labels(name: str, array: xr.DataArray, dim: str) -> None:
    """Raise if two records carry the same label: pairs of records could not be told apart.

    Raises
    ------
    ValueError
        If a label along `dim` occurs twice, naming it.

    Examples
    --------
    >>> import xarray as xr
    >>> require_unique_labels("u", xr.DataArray([0.0, 0.0], coords={"step": [7, 7]}), "step")
    Traceback (most recent call last):
    ...
    ValueError: expected one record for each label of dim 'step' of u, came several for [7]; drop the
    others with u.drop_duplicates('step')
    """
    index = array.indexes.get(dim)
    if index is not None and not index.is_unique:
        twice = index[index.duplicated()].unique().tolist()
        raise ValueError(
            f"expected one record for each label of dim {dim!r} of {name}, came several for {twice}; "
            f"drop the others with {name}.drop_duplicates({dim!r})"
        )


def earlier_and_later(name: str, array: xr.DataArray, dim: str) -> tuple[xr.DataArray, xr.DataArray]:
    """All records but the last and all but the first, both labelled by the later one of each pair.

    Parameters
    ----------
    name
        Name of the argument, for messages.
    array
        Records with increasing labels along `dim`; without labels their order counts.
    dim
        Dim of the records, for example ``step``.

    Returns
    -------
    earlier, later
        Arrays with one record less and equal labels. The first has no other coords along `dim`.

    Raises
    ------
    ValueError
        If the array lacks the dim, or if its labels do not increase.

    Examples
    --------
    >>> import xarray as xr
    >>> earlier, later = earlier_and_later("w", xr.DataArray([1.0, 4.0], coords={"step": [0, 10]}), "step")
    >>> (later - earlier).values, later["step"].values
    (array([3.]), array([10]))
    """
    require_dims(name, array, (dim,), "dim")
    require_unique_labels(name, array, dim)
    index = array.indexes.get(dim)
    if index is not None and not index.is_monotonic_increasing:
        labels = index.to_numpy()
        at = int(np.argmax(labels[1:] < labels[:-1]))
        raise ValueError(
            f"expected increasing labels along dim {dim!r} of {name}: each record is compared with the one "
            f"before; came {labels[at + 1]} after {labels[at]}; sort them with {name}.sortby({dim!r})"
        )
    later = array.isel({dim: slice(1, None)})
    earlier = array.isel({dim: slice(None, -1)})
    earlier = earlier.drop_vars([coord for coord in earlier.coords if dim in earlier[coord].dims])
    return (earlier if index is None else earlier.assign_coords({dim: later[dim].variable})), later
