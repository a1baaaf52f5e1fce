"""The ``.hild`` accessor: analysis as methods of DataArray, Dataset and DataTree.

No maths here: each method finds the variable it speaks of and hands it to the
function of the same name in :mod:`hild_xr.analysis`, which is imported then and
not before. A DataArray is the variable itself; a Dataset or a node of a run
holds it under its name in the registry (``weight``, ``eigenvalues``,
``eigenvectors``).

>>> import xarray as xr
>>> node = xr.Dataset({"eigenvalues": ("eig", [5.0, 4.0, 0.2, 0.1])})
>>> int(node.hild.outliers().outlier_count)
2
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import xarray as xr

if TYPE_CHECKING:
    from collections.abc import Callable

Labelled = xr.DataArray | xr.Dataset | xr.DataTree


def _analysis(name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(importlib.import_module("hild_xr.analysis"), name)
    return function


def _variable(labelled: Labelled, name: str) -> xr.DataArray:
    """Return the DataArray itself, or the variable of that name in the dataset or node.

    Raises
    ------
    KeyError
        If there is no such variable, with the nodes below that have it.
    """
    if isinstance(labelled, xr.DataArray):
        return labelled
    if name in labelled.data_vars:
        return labelled.data_vars[name]
    below = labelled.subtree if isinstance(labelled, xr.DataTree) else ()
    paths = [node.path for node in below if name in node.data_vars]
    hint = f"take one of the nodes {paths}" if paths else "pass the DataArray itself"
    raise KeyError(f"expected a variable {name!r}, came {sorted(map(str, labelled.data_vars))}; {hint}")


class HildAccessor:
    """Methods of :mod:`hild_xr.analysis` on labelled data; options are those of the functions.

    Of a tree from ``hx.open`` there is also :meth:`refresh`.
    """

    def __init__(self, labelled: Labelled) -> None:
        self._labelled = labelled

    def principal_angles(self, other: Labelled, **options: Any) -> xr.DataArray:
        """Angles to the subspaces of another array: :func:`hild_xr.analysis.principal_angles`."""
        return self._subspaces("principal_angles", other, **options)

    def subspace_overlap(self, other: Labelled, **options: Any) -> xr.DataArray:
        """Mean squared cosine of the angles: :func:`hild_xr.analysis.subspace_overlap`."""
        return self._subspaces("subspace_overlap", other, **options)

    def subspace_alignment(self, other: Labelled, **options: Any) -> xr.DataArray:
        """Smallest cosine of the angles: :func:`hild_xr.analysis.subspace_alignment`."""
        return self._subspaces("subspace_alignment", other, **options)

    def pairwise_angles(self, **options: Any) -> xr.DataArray:
        """Angles of all pairs of steps: :func:`hild_xr.analysis.pairwise_angles`."""
        return self._array("pairwise_angles", "eigenvectors", **options)

    def angles_to_reference(self, reference: object, **options: Any) -> xr.DataArray:
        """Angles to one step: :func:`hild_xr.analysis.angles_to_reference`."""
        return self._array("angles_to_reference", "eigenvectors", reference, **options)

    def alignment(self, basis: Labelled, **options: Any) -> xr.DataArray:
        """Alignment of the weight with a subspace: :func:`hild_xr.analysis.alignment`."""
        return self._array("alignment", "weight", _variable(basis, "eigenvectors"), **options)

    def flatten_like(self, block: Labelled) -> xr.DataArray:
        """Bring all layers of a node into a block's flat layout: :func:`hild_xr.analysis.flatten_like`.

        Raises
        ------
        TypeError
            If this is no tree.
        """
        if not isinstance(self._labelled, xr.DataTree):
            raise TypeError(
                f"a {type(self._labelled).__name__} holds one layer; take the node above the layers, as in "
                "run['weights'].hild.flatten_like(...)"
            )
        flat: xr.DataArray = _analysis("flatten_like")(self._labelled, _variable(block, "eigenvectors"))
        return flat

    def outliers(self, **options: Any) -> xr.Dataset:
        """Outliers of the spectrum: :func:`hild_xr.analysis.outliers`."""
        return self._dataset("outliers", "eigenvalues", **options)

    def rank(self, **options: Any) -> xr.Dataset:
        """Numerical, stable and effective rank: :func:`hild_xr.analysis.rank`."""
        return self._dataset("rank", "eigenvalues", **options)

    def refresh(self) -> xr.DataTree:
        """Show what is committed now, without opening anew: :func:`hild_xr.store.refresh_run`.

        Raises
        ------
        TypeError
            If this is no tree.
        ValueError
            If the tree does not come from ``hx.open``.
        """
        if not isinstance(self._labelled, xr.DataTree):
            raise TypeError(
                f"a {type(self._labelled).__name__} does not know its run; refresh the tree that hx.open "
                "returned, or open the run again with hx.open(path)"
            )
        from hild_xr.store import refresh_run

        return refresh_run(self._labelled)

    def _apply(self, function: str, variable: str, *arguments: object, **options: Any) -> Any:
        return _analysis(function)(_variable(self._labelled, variable), *arguments, **options)

    def _array(self, function: str, variable: str, *arguments: object, **options: Any) -> xr.DataArray:
        array: xr.DataArray = self._apply(function, variable, *arguments, **options)
        return array

    def _dataset(self, function: str, variable: str, **options: Any) -> xr.Dataset:
        dataset: xr.Dataset = self._apply(function, variable, **options)
        return dataset

    def _subspaces(self, function: str, other: Labelled, **options: Any) -> xr.DataArray:
        return self._array(function, "eigenvectors", _variable(other, "eigenvectors"), **options)


for _register in (
    xr.register_dataarray_accessor,
    xr.register_dataset_accessor,
    xr.register_datatree_accessor,
):
    _register("hild")(HildAccessor)  # type: ignore[no-untyped-call]  # xarray leaves them untyped
