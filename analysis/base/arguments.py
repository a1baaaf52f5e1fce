"""What every labelled function does with its arguments, in one place.

Which dims span a vector and which one numbers the vectors is written in the
attrs of a recorded array (``vector_dims``, ``number_dim``); arguments of a
function go before attrs. :func:`apply_kernel` carries a kernel on stacked
arrays over to labelled, possibly dask-backed arrays without computing
anything.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import xarray as xr

from hild_xr.analysis.base.threads import on_one_blas_thread
from hild_xr.variables import DIM_SKETCH, attrs

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

Dims = str | Iterable[str] | None

_MATRIX = ("scheme", "m", "nonzeros", "seed", "layers", "sizes")
"""What a sketch's matrix follows from, in its attr ``sketch``."""

FLOAT = np.dtype(np.float64)


def vector_dims_of(arrays: Mapping[str, xr.DataArray], given: Dims = None) -> tuple[str, ...]:
    """Dims that span a vector: the argument, else the attr ``vector_dims`` of the arrays.

    Parameters
    ----------
    arrays
        The arrays of one call by the name of their argument.
    given
        The function's argument ``vector_dims``.

    Raises
    ------
    ValueError
        If neither the argument nor an attr says it, if two attrs disagree, or
        if an array lacks one of the dims.

    Examples
    --------
    >>> u = xr.DataArray(np.eye(2), dims=("eig", "in"), attrs={"vector_dims": ["in"]})
    >>> vector_dims_of({"u": u})
    ('in',)
    """
    if given is not None:
        dims = _names(given)
    else:
        stated = {
            name: _names(array.attrs["vector_dims"])
            for name, array in arrays.items()
            if "vector_dims" in array.attrs
        }
        if not stated:
            raise ValueError(
                f"no vector dims: expected an attr 'vector_dims' on {_or(arrays)}, came none; pass "
                f"vector_dims=[...], the dims that span one vector, for example ['out', 'in']"
            )
        if len({frozenset(dims) for dims in stated.values()}) > 1:
            came = ", ".join(f"{list(dims)} on {name}" for name, dims in stated.items())
            raise ValueError(
                f"expected the same attr vector_dims on {_or(arrays)}, came {came}; "
                f"pass vector_dims=[...] to say which dims span a vector here"
            )
        dims = next(iter(stated.values()))
    if not dims:
        raise ValueError("expected at least one vector dim, came none; pass vector_dims=[...]")
    for name, array in arrays.items():
        require_dims(name, array, dims, "vector_dims")
    if DIM_SKETCH in dims:
        require_same_sketch(arrays)
    return dims


def require_same_sketch(arrays: Mapping[str, xr.DataArray]) -> None:
    """Raise if two arrays are sketches by different matrices: their inner products mean nothing.

    Arrays without the attr ``sketch`` (results of arithmetic, say) are left to the caller.

    Raises
    ------
    ValueError
        If the matrices differ, naming in what.

    Examples
    --------
    >>> sketched = xr.DataArray(np.ones(4), dims="sketch")
    >>> u, v = (sketched.assign_attrs(sketch={"layers": [name]}) for name in "ab")
    >>> require_same_sketch({"u": u, "v": v})
    Traceback (most recent call last):
    ...
    ValueError: u and v are sketches by different matrices: layers ['a'] against ['b']. Compare ...
    """
    stated = [(name, array.attrs["sketch"]) for name, array in arrays.items() if "sketch" in array.attrs]
    for name, matrix in stated[1:]:
        first_name, first = stated[0]
        differ = [key for key in _MATRIX if matrix.get(key) != first.get(key)]
        if differ:
            words = ", ".join(f"{key} {first.get(key)} against {matrix.get(key)}" for key in differ)
            raise ValueError(
                f"{first_name} and {name} are sketches by different matrices: {words}. Compare records of "
                "one layer (or row, or the model) made with the same sketch=..., or see hild_xr.sketch"
            )


def number_dim_of(name: str, array: xr.DataArray, given: str | None = None) -> str:
    """Dim that numbers the vectors of a basis: the argument, else the attr ``number_dim``.

    Raises
    ------
    ValueError
        If neither says it, or the array lacks the dim.

    Examples
    --------
    >>> u = xr.DataArray(np.eye(2), dims=("eig", "in"), attrs={"number_dim": "eig"})
    >>> number_dim_of("u", u)
    'eig'
    """
    dim = array.attrs.get("number_dim") if given is None else given
    if dim is None:
        raise ValueError(
            f"no number dim: expected an attr 'number_dim' on {name} with dims {array.dims}, came none; pass "
            f"number_dim='...', the dim that numbers the vectors, for example 'eig'"
        )
    require_dims(name, array, (str(dim),), "number_dim")
    return str(dim)


def require_dims(name: str, array: xr.DataArray, dims: Iterable[str], argument: str) -> None:
    """Raise unless the array has the dims.

    Raises
    ------
    ValueError
        If it lacks one.

    Examples
    --------
    >>> require_dims("u", xr.DataArray(np.eye(2), dims=("eig", "in")), ["out"], "vector_dims")
    Traceback (most recent call last):
    ...
    ValueError: expected dims ['out'] on u, came ('eig', 'in'); missing ['out']: pass vector_dims=...
    """
    wanted = list(dims)
    missing = [dim for dim in wanted if dim not in array.dims]
    if missing:
        raise ValueError(
            f"expected dims {wanted} on {name}, came {array.dims}; missing {missing}: pass {argument}=..."
        )


def require_real(name: str, array: object) -> xr.DataArray:
    """Return the array if it is a DataArray of real numbers.

    Raises
    ------
    TypeError
        If it is no DataArray, or complex, or not numeric.

    Examples
    --------
    >>> require_real("u", xr.DataArray([1j]))
    Traceback (most recent call last):
    ...
    TypeError: expected real numbers in u, came dtype complex128; pass u.real if it is real
    """
    if not isinstance(array, xr.DataArray):
        raise TypeError(
            f"expected an xarray.DataArray as {name}, came {type(array).__name__}; plain arrays go to the "
            f"*_kernel functions, Datasets by their variable (ds['eigenvectors'])"
        )
    if np.issubdtype(array.dtype, np.complexfloating):
        raise TypeError(
            f"expected real numbers in {name}, came dtype {array.dtype}; pass {name}.real if it is real"
        )
    if not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
        raise TypeError(
            f"expected real numbers in {name}, came dtype {array.dtype}; convert with {name}.astype(float)"
        )
    return array


def require_same_labels(arrays: Mapping[str, xr.DataArray]) -> None:
    """Raise unless the arrays have equal sizes and labels along every dim they share.

    Never aligns by itself: dropping or filling records is the caller's choice.

    Raises
    ------
    ValueError
        If they differ along a dim.

    Examples
    --------
    >>> a = xr.DataArray([1.0, 2.0], dims="step", coords={"step": [0, 10]})
    >>> require_same_labels({"u": a, "v": a.isel(step=[0])})
    Traceback (most recent call last):
    ...
    ValueError: u and v differ along dim 'step': 2 labels (0 ... 10) against 1 label (0). Bring them to
    common labels first, for example with u, v = xr.align(u, v, join="inner").
    """
    first: dict[Hashable, tuple[str, xr.DataArray]] = {}
    for name, array in arrays.items():
        for dim in array.dims:
            other_name, other = first.setdefault(dim, (name, array))
            mine, theirs = array.indexes.get(dim), other.indexes.get(dim)
            same = array.sizes[dim] == other.sizes[dim]
            if mine is not None and theirs is not None:
                same = same and mine.equals(theirs)
            if not same:
                raise ValueError(
                    f"{other_name} and {name} differ along dim {dim!r}: {_labels(other, dim)} against "
                    f"{_labels(array, dim)}. Bring them to common labels first, for example with "
                    f'{other_name}, {name} = xr.align({other_name}, {name}, join="inner").'
                )


def number_of(name: str) -> str:
    """Name that :func:`as_basis` gives to the number dim of an argument.

    Two bases may number their vectors by the same dim, or one by a dim along
    which the other has records; own names keep them apart.

    Examples
    --------
    >>> number_of("u")
    '__number_of_u__'
    """
    return f"__number_of_{name}__"


def as_basis(
    name: str, array: xr.DataArray, vector: tuple[str, ...], number_dim: str | None = None
) -> xr.DataArray:
    """Rename the number dim of a basis to :func:`number_of` and drop its coords.

    Raises
    ------
    ValueError
        If the number dim is unknown, missing, one of the vector dims, or empty.

    Examples
    --------
    >>> u = xr.DataArray(np.eye(2), dims=("eig", "in"))
    >>> as_basis("u", u, ("in",), "eig").dims
    ('__number_of_u__', 'in')
    """
    number = number_dim_of(name, array, number_dim)
    if number in vector:
        raise ValueError(
            f"expected a number dim of {name} beside its vector dims {list(vector)}, came {number!r}; "
            f"pass number_dim=... and vector_dims=[...]"
        )
    empty = [dim for dim in (number, *vector) if array.sizes[dim] == 0]
    if empty:
        raise ValueError(f"expected at least one vector with one entry in {name}, came size 0 of {empty}")
    return array.drop_vars([c for c in array.coords if number in array[c].dims]).rename(
        {number: number_of(name)}
    )


def subspaces(
    arrays: Mapping[str, xr.DataArray],
    vector_dims: Dims = None,
    number_dim: str | tuple[str, str] | None = None,
) -> tuple[dict[str, xr.DataArray], tuple[str, ...]]:
    """Check one or two arrays of bases and return them by :func:`as_basis`, and their vector dims.

    Raises
    ------
    TypeError, ValueError
        As :func:`require_real`, :func:`vector_dims_of` and :func:`as_basis`,
        and if a basis has more vectors than a vector has entries.

    Examples
    --------
    >>> u = xr.DataArray(np.eye(2), dims=("eig", "in"))
    >>> bases, vector = subspaces({"u": u}, ["in"], "eig")
    >>> bases["u"].dims, vector
    (('__number_of_u__', 'in'), ('in',))
    """
    for name, array in arrays.items():
        require_real(name, array)
    vector = vector_dims_of(arrays, vector_dims)
    given = (number_dim,) * len(arrays) if number_dim is None or isinstance(number_dim, str) else number_dim
    if len(given) != len(arrays):
        raise ValueError(f"expected one number dim for each of {_or(arrays)}, came {given!r}")
    bases = {}
    for (name, array), number in zip(arrays.items(), given, strict=True):
        basis = as_basis(name, array, vector, number)
        k, p = basis.sizes[number_of(name)], math.prod(basis.sizes[dim] for dim in vector)
        if k > p:
            raise ValueError(
                f"expected at most {p} vectors in {name}, the size of {list(vector)}, came {k}: they are "
                f"linearly dependent; select fewer along the number dim"
            )
        bases[name] = basis
    return bases, vector


def on_stacked(
    kernel: Callable[..., Any], n_vector_axes: int, bases: tuple[bool, ...] = (True, True)
) -> Callable[..., Any]:
    """Let a kernel on bases (..., p, k) and vectors (..., p) take the vector axes unflattened.

    The number axis of a basis comes before the vector axes because recorded
    eigenvectors have it before the layer's dims: the reshape then copies
    nothing.

    Parameters
    ----------
    kernel
        Function of stacked arrays.
    n_vector_axes
        Number of axes that span a vector.
    bases
        Which arguments are bases (..., k, *vector axes); the others are
        vectors (..., *vector axes).

    Examples
    --------
    >>> on_stacked(np.shape, 2)(np.ones((7, 3, 2, 5)))
    (7, 10, 3)
    """
    return functools.partial(_call_on_stacked, kernel, n_vector_axes, bases)


def _call_on_stacked(
    kernel: Callable[..., Any], n_vector_axes: int, bases: tuple[bool, ...], *arrays: NDArray[Any]
) -> Any:
    flat = [a.reshape(*a.shape[:-n_vector_axes], math.prod(a.shape[-n_vector_axes:])) for a in arrays]
    return kernel(*(np.swapaxes(a, -1, -2) if basis else a for a, basis in zip(flat, bases, strict=False)))


def apply_kernel(
    kernel: Callable[..., Any],
    arrays: Sequence[xr.DataArray],
    core_dims: Sequence[Sequence[str]],
    *,
    output_dims: Sequence[Sequence[str]] = ((),),
    output_sizes: Mapping[str, int] | None = None,
    output_dtypes: Sequence[np.dtype[Any]] = (FLOAT,),
) -> Any:
    """Apply a kernel on stacked arrays to labelled ones, block by block if they are dask-backed.

    Core dims are rechunked to one chunk each, since a kernel sees whole
    vectors; the chunks along all other dims are kept (made common where the
    arrays differ). Nothing is computed for dask-backed arrays; their kernels run on
    one BLAS thread each (:mod:`hild_xr.analysis.base.threads`).

    Parameters
    ----------
    kernel
        Function of arrays whose last axes are the core dims.
    arrays, core_dims
        Arguments and the dims that become their last axes, in that order.
    output_dims, output_sizes, output_dtypes
        New last dims, their sizes and the dtypes of what the kernel returns.

    Returns
    -------
    xarray.DataArray or tuple of xarray.DataArray
        With the coords of the arguments along the dims that are left; those
        without index are taken from the first argument that has them, and
        scalar ones are left out where they differ.

    Raises
    ------
    ValueError
        If an argument has a dim of the result's own beside its core dims.

    Examples
    --------
    >>> a = xr.DataArray(np.ones((2, 3)), dims=("in", "step")).chunk({"in": 1})
    >>> apply_kernel(lambda x: x.sum(-1), [a], [["in"]]).compute().values
    array([2., 2., 2.])
    """
    _require_no_own_dims(arrays, core_dims, output_dims)
    arrays = _first_coords_only(arrays)
    if any(array.size == 0 for array in arrays):
        # a run without records yet: the result is empty whatever the others hold. dask refuses to
        # broadcast dims of size 0, so the kernel runs on zeros in memory
        arrays = [array.copy(data=np.zeros(array.shape, dtype=array.dtype)) for array in arrays]
    if any(array.chunks is not None for array in arrays):
        arrays = [array.chunk(dict.fromkeys(dims, -1)) for array, dims in zip(arrays, core_dims, strict=True)]
        arrays = cast("list[xr.DataArray]", list(xr.unify_chunks(*arrays)))
        kernel = on_one_blas_thread(kernel)
    return xr.apply_ufunc(
        kernel,
        *arrays,
        input_core_dims=[list(dims) for dims in core_dims],
        output_core_dims=[list(dims) for dims in output_dims],
        join="exact",
        dask="parallelized",
        output_dtypes=list(output_dtypes),
        dask_gufunc_kwargs={"output_sizes": dict(output_sizes or {})},
    )


def _first_coords_only(arrays: Sequence[xr.DataArray]) -> list[xr.DataArray]:
    """Leave each coord without index to the first array that has it, and scalar ones that differ to none.

    xarray would compute lazy ones to compare them.
    """
    named: dict[Hashable, list[xr.Variable]] = {}
    for array in arrays:
        for name, coord in array.coords.items():
            named.setdefault(name, []).append(coord.variable)
    seen: set[Hashable] = set()
    kept = []
    for array in arrays:
        dropped = [
            name
            for name, coord in array.coords.items()
            if name not in array.indexes and (name in seen or _is_denied(coord.variable, named[name]))
        ]
        kept.append(array.drop_vars(dropped))
        seen.update(kept[-1].coords)
    return kept


def _is_denied(coord: xr.Variable, others: Iterable[xr.Variable]) -> bool:
    """Whether a scalar coord differs from another of its name, or may do so."""
    return coord.ndim == 0 and not all(_known_equal(coord, other) for other in others)


def _known_equal(a: xr.Variable, b: xr.Variable) -> bool:
    """Whether two coords are equal, told without computing: lazy ones are if they are one task's result."""
    if a.chunks is None and b.chunks is None:
        return bool(a.equals(b))  # type: ignore[no-untyped-call]
    return a.chunks is not None and b.chunks is not None and a.data.name == b.data.name


def _require_no_own_dims(
    arrays: Sequence[xr.DataArray], core_dims: Sequence[Sequence[str]], output_dims: Sequence[Sequence[str]]
) -> None:
    own = {dim for dims in output_dims for dim in dims}
    for array, dims in zip(arrays, core_dims, strict=True):
        clash = sorted(str(dim) for dim in array.dims if dim in own and dim not in dims)
        if clash:
            raise ValueError(
                f"expected arguments without the dims {clash}, the result's own, came {array.dims}; "
                f"rename them first, for example with array.rename({clash[0]}='other')"
            )


def declared(result: xr.DataArray, name: str, **more: object) -> xr.DataArray:
    """Give a result the name and the attributes of its variable in the registry.

    Examples
    --------
    >>> declared(xr.DataArray(0.5), "alignment").attrs["long_name"]
    'alignment'
    """
    result = result.rename(name)
    result.attrs = attrs(name, **more)
    return result


def _names(dims: str | Iterable[str]) -> tuple[str, ...]:
    """Dims as a tuple; some file formats give back a list of one name as the bare name."""
    return (dims,) if isinstance(dims, str) else tuple(str(dim) for dim in dims)


def _or(names: Iterable[str]) -> str:
    return " or ".join(names)


def _labels(array: xr.DataArray, dim: Hashable) -> str:
    n = array.sizes[dim]
    count = f"{n} label" if n == 1 else f"{n} labels"
    index: pd.Index[Any] | None = array.indexes.get(dim)
    if index is None or n == 0:
        return f"{count} without coordinate" if index is None else count
    return f"{count} ({index[0]})" if n == 1 else f"{count} ({index[0]} ... {index[-1]})"
