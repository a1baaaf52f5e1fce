"""The ``.hild`` accessor: analysis as methods of DataArray, Dataset and DataTree.

No maths here: each method finds the variables it speaks of and hands them to the
function of the same name in :mod:`hild_xr.analysis`, which is imported then and
not before. A DataArray is the variable itself; a Dataset or a node of a run
holds it under its name in the registry (``weight``, ``eigenvalues``,
``eigenvectors``). :mod:`hild_xr.forwarding` has the table.

>>> import xarray as xr
>>> node = xr.Dataset({"eigenvalues": ("eig", [5.0, 4.0, 0.2, 0.1])})
>>> int(node.hild.outliers().outlier_count)
2
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import xarray as xr

from hild_xr.forwarding import ANY, FORWARDED, LAYERS, TREE, Forward
from hild_xr.variables import DIM_LAYER

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable

Labelled = xr.DataArray | xr.Dataset | xr.DataTree


def _variable(labelled: Labelled, names: str) -> Labelled:
    """Return the DataArray itself, or the variable of that name in the dataset or node.

    Eigenvalues of all layers lie in the group: for the node of a layer its own are taken there.

    Raises
    ------
    KeyError
        If there is no such variable, with the nodes below that have it.
    TypeError
        If a tree is needed and came something else.
    """
    if names == TREE and not isinstance(labelled, xr.DataTree):
        raise TypeError(
            f"a {type(labelled).__name__} holds one layer; take the node above the layers, as in "
            "run['weights'].hild.flatten_like(...)"
        )
    is_tree = isinstance(labelled, xr.DataTree) and bool(labelled.children)
    if names == TREE or isinstance(labelled, xr.DataArray) or (names == LAYERS and is_tree):
        return labelled
    alternatives = names.strip("/").split("|")
    for name in alternatives:
        if name in labelled.data_vars:
            return labelled.data_vars[name]
    for name in alternatives:
        if (of_layer := _of_own_layer(labelled, name)) is not None:
            return of_layer
    below = labelled.subtree if isinstance(labelled, xr.DataTree) else ()
    paths = [node.path for node in below if any(name in node.data_vars for name in alternatives)]
    hint = f"take one of the nodes {paths}" if paths else "pass the DataArray itself"
    wanted = "" if names == ANY else f" {' or '.join(map(repr, alternatives))}"
    raise KeyError(f"expected a variable{wanted}, came {sorted(map(str, labelled.data_vars))}; {hint}")


def _of_own_layer(labelled: xr.Dataset | xr.DataTree, name: str) -> xr.DataArray | None:
    """Return what the group above holds of this layer, if it does."""
    group = labelled.parent if isinstance(labelled, xr.DataTree) else None
    if group is None or name not in group.data_vars:
        return None
    array = group.data_vars[name]
    if DIM_LAYER not in array.indexes or labelled.name not in array.indexes[DIM_LAYER]:
        return None
    return array.sel({DIM_LAYER: labelled.name}, drop=True)


def _method(name: str, takes: Forward) -> Callable[..., Any]:
    """Make the method that forwards to the function of that name."""

    def method(self: HildAccessor, *arguments: Any, **options: Any) -> Any:
        return self._forward(name, takes, arguments, options)

    method.__name__ = name
    method.__qualname__ = f"HildAccessor.{name}"
    own = ", ".join(takes.own).replace("|", " or ").replace(TREE, "").replace(ANY, "") or "the node itself"
    more = f"; the next arguments hold {', '.join(takes.others)}" if takes.others else ""
    method.__doc__ = f"See :func:`{takes.module}.{name}`; takes {own} from here{more}."
    return method


class HildAccessor:
    """Methods of :mod:`hild_xr.analysis` on labelled data; options are those of the functions.

    Of a tree from ``hx.open`` there are also :meth:`analyze` and :meth:`refresh`.
    """

    def __init__(self, labelled: Labelled) -> None:
        self._labelled = labelled

    def analyze(
        self,
        what: str | Iterable[str],
        out: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> xr.DataTree:
        """Apply analyses of a whole run by name: :func:`hild_xr.analyze.analyze`.

        Raises
        ------
        TypeError
            If this is no tree.
        """
        if not isinstance(self._labelled, xr.DataTree):
            raise TypeError(
                f"a {type(self._labelled).__name__} is no run; analyze the tree that hx.open returned"
            )
        from hild_xr.analyze import analyze

        return analyze(self._labelled, what, out, **options)

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

    def _forward(self, name: str, takes: Forward, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Call the function on the variables of this object and of the arguments."""
        first, *own = takes.own
        variables = [_variable(self._labelled, first)]
        others = takes.others
        if isinstance(self._labelled, xr.DataArray):
            others = (*own, *others)  # an array is one variable: the rest must be given
        else:
            variables += [_variable(self._labelled, variable) for variable in own]
        given = [
            _variable(argument, variable)
            if isinstance(argument, xr.DataArray | xr.Dataset | xr.DataTree)
            else argument
            for argument, variable in zip(arguments, others, strict=False)
        ]
        function: Callable[..., Any] = getattr(importlib.import_module(takes.module), name)
        return function(*variables, *given, *arguments[len(given) :], **options)


for _name, _takes in FORWARDED.items():
    setattr(HildAccessor, _name, _method(_name, _takes))

for _register in (
    xr.register_dataarray_accessor,
    xr.register_dataset_accessor,
    xr.register_datatree_accessor,
):
    _register("hild")(HildAccessor)  # type: ignore[no-untyped-call]  # xarray leaves them untyped
