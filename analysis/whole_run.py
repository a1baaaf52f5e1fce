"""Analyses of a whole run: from the tree that ``hx.open`` gives to a tree of results.

Each function finds the nodes of the run that hold what it needs, hands their arrays to the
labelled function of this package, and puts the results at the same places of a new tree:
what was computed of ``/hessian/fc1.weight`` lies at ``/hessian/fc1.weight``. A result
carries the attributes of the group it was made from (matrix, blocks, samples, regulariser).
What could not be compared is named, with the reason, in the attr ``left_out`` of the
result's root; where only some of the records could be, the attr ``records`` of the result
says how many. Nothing is computed.

They are called by name through :mod:`hild_xr.analysis.named`.
"""

from __future__ import annotations

import fnmatch
import functools
from typing import TYPE_CHECKING, Any

import xarray as xr

from hild_xr.analysis.spectra.outliers import outliers as outliers_of
from hild_xr.analysis.spectra.rank import rank as rank_of
from hild_xr.analysis.subspaces.alignment import alignment as alignment_of
from hild_xr.analysis.subspaces.alignment import subspace_alignment, subspace_overlap
from hild_xr.analysis.subspaces.angles import angles_to_reference as angles_to
from hild_xr.analysis.subspaces.angles import consecutive_angles as angles_between_records
from hild_xr.analysis.subspaces.angles import pairwise_angles
from hild_xr.analysis.subspaces.flattening import flatten_like
from hild_xr.analysis.subspaces.projection import projection as projection_of
from hild_xr.analysis.trajectories.tracking import track
from hild_xr.variables import DIM_EIG, DIM_LAYER, DIM_SEED, DIM_STEP

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from hild_xr.analysis.spectra.outliers import Method

Result = xr.DataArray | xr.Dataset

EIGENVECTORS, EIGENVALUES, WEIGHT, GRADIENT = "eigenvectors", "eigenvalues", "weight", "gradient"

DEFAULT_GROUPS = {WEIGHT: "weights", GRADIENT: "gradients"}
"""Groups that the probes of weights and gradients write to if they are given no other name."""


# ---------------------------------------------------------------------------- finding and placing


def nodes_with(run: xr.DataTree, variable: str) -> Iterator[tuple[str, xr.DataArray]]:
    """Iterate over the arrays of that name in a run, with the paths of their nodes.

    Parameters
    ----------
    run
        Tree of a run.
    variable
        Name of a variable in the registry.

    Yields
    ------
    path, array
        The path is that of the node, from the tree's own root and without a leading slash;
        the array carries the coordinates of the nodes above.

    Examples
    --------
    >>> run = xr.DataTree.from_dict({"/weights/fc1.weight": xr.Dataset({"weight": ("out", [1.0])})})
    >>> [path for path, array in nodes_with(run, "weight")]
    ['weights/fc1.weight']
    """
    for node in run.subtree:
        if variable in node.data_vars:
            path = node.path[len(run.path) :].strip("/")
            yield path, node.to_dataset()[variable]


def select_run(
    run: xr.DataTree, *, seeds: Iterable[int] | None = None, layers: Iterable[str] | None = None
) -> xr.DataTree:
    """Select seeds and layers of a run, in all its groups.

    Parameters
    ----------
    run
        Tree of a run.
    seeds
        Seeds to keep; by default all.
    layers
        Names of layers or blocks, or patterns as of file names (``"fc1.*"``); by default all.
        Groups that speak of no layer, such as ``metrics``, stay, and so do the weights and
        gradients of the layers that a block is made of.

    Returns
    -------
    xarray.DataTree
        The rest of the run, as lazy as it was.

    Raises
    ------
    ValueError
        If a seed or a layer is not there, with those that are.

    Examples
    --------
    >>> weight = xr.DataArray([[1.0], [2.0]], dims=("seed", "out"), coords={"seed": [0, 7]})
    >>> run = xr.DataTree.from_dict({"/weights/fc1.weight": weight.to_dataset(name="weight")})
    >>> select_run(run, seeds=[7], layers=["fc1.*"])["weights/fc1.weight/weight"].values
    array([[2.]])
    """
    held = _layers_of(run)
    kept = held if layers is None else _matching(list(layers), held)
    wanted = None if seeds is None else list(seeds)
    there = _seeds_of(run)
    missing = [seed for seed in wanted or () if seed not in there]
    if missing:
        raise ValueError(f"expected seeds of the run, came {missing}; it has {there}")
    parts = _parts_of(run, kept)
    nodes: dict[str, xr.Dataset] = {}
    for node in run.subtree:
        path = node.path[len(run.path) :].strip("/")
        layer = path.rpartition("/")[2] if "/" in path else None
        is_part = layer in parts and not DEFAULT_GROUPS.keys().isdisjoint(node.data_vars)
        if layer is None or layer in kept or is_part:
            nodes[f"/{path}"] = _selected(node.to_dataset(), wanted, kept)
    selected = xr.DataTree.from_dict(nodes, name=run.name)
    selected.encoding = dict(run.encoding)
    return selected


def _selected(dataset: xr.Dataset, seeds: list[int] | None, layers: list[str]) -> xr.Dataset:
    if seeds is not None and DIM_SEED in dataset.indexes:
        dataset = dataset.sel({DIM_SEED: seeds})
    if DIM_LAYER in dataset.indexes:
        dataset = dataset.isel({DIM_LAYER: dataset.indexes[DIM_LAYER].isin(layers)})
    return dataset


def _layers_of(run: xr.DataTree) -> list[str]:
    """Names of all layers and blocks, of nodes and along the dim ``layer``, in the order of the run."""
    names: dict[str, None] = {}
    for group in run.children.values():
        index = group.indexes.get(DIM_LAYER)
        names |= dict.fromkeys([*group.children, *([] if index is None else map(str, index))])
    return list(names)


def _parts_of(run: xr.DataTree, blocks: Sequence[str]) -> set[str]:
    """Layers that blocks over several tensors are made of."""
    found: set[str] = set()
    for path, basis in nodes_with(run, EIGENVECTORS):
        if path.rpartition("/")[2] in blocks:
            found.update(_names_in(basis.attrs.get("layers", ())))
    return found


def _names_in(attr: str | Sequence[str]) -> list[str]:
    """Names in an attr: some formats store a list of one as the name itself."""
    return [attr] if isinstance(attr, str) else list(attr)


def _seeds_of(run: xr.DataTree) -> list[int]:
    seeds: dict[int, None] = {}
    for node in run.subtree:
        if DIM_SEED in node.indexes:
            seeds |= dict.fromkeys(node.indexes[DIM_SEED].tolist())
    return list(seeds)


def _matching(patterns: list[str], names: list[str]) -> list[str]:
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"expected layers of the run, came {pattern!r}; it has {names}")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _group_of(run: xr.DataTree, path: str) -> Mapping[str, Any]:
    """Attributes of the group that a node belongs to."""
    group = path.partition("/")[0]
    return {str(name): value for name, value in (run[group] if group else run).attrs.items()}


def _regularizer_in(run: xr.DataTree, path: str) -> float:
    """Return what the group of a node says was added to the diagonal of its matrix."""
    return float(_group_of(run, path).get("regularizer") or 0.0)


class _LeftOutError(Exception):
    """Why a node has no result; ends in the attr ``left_out``."""


def _results(run: xr.DataTree, jobs: Iterable[tuple[str, Callable[[], Result]]]) -> xr.DataTree:
    """Place the results of all jobs at their paths, with the attributes of their groups."""
    results, left_out = {}, {}
    for path, job in jobs:
        try:
            result = job()
        except _LeftOutError as reason:
            left_out[path] = str(reason)
            continue
        dataset = result.to_dataset() if isinstance(result, xr.DataArray) else result
        about = _group_of(run, path) if path.partition("/")[0] in run.children else {}
        results[f"/{path}"] = dataset.assign_attrs(about)
    tree = xr.DataTree.from_dict(results)
    if left_out:
        tree.attrs["left_out"] = left_out
    return tree


def _at_each(
    run: xr.DataTree, variable: str, function: Callable[[str, xr.DataArray], Result]
) -> Iterator[tuple[str, Callable[[], Result]]]:
    for path, array in nodes_with(run, variable):
        yield path, functools.partial(function, path, array)


def _leading(vectors: xr.DataArray, k: int | None) -> xr.DataArray:
    """Keep the first k eigenvectors."""
    if k is None:
        return vectors
    number = str(vectors.attrs.get("number_dim", DIM_EIG))
    if k < 1:
        raise ValueError(f"expected at least one eigenvector, came k={k}")
    if k > vectors.sizes[number]:
        raise _LeftOutError(f"{vectors.sizes[number]} eigenvectors recorded, k={k} asked for")
    return vectors.isel({number: slice(k)})


# ---------------------------------------------------------------------------- subspaces


def angles(run: xr.DataTree, *, k: int | None = None) -> xr.DataTree:
    """Principal angles between the eigenspaces of all pairs of steps.

    Work and result grow with the square of the number of steps.

    Parameters
    ----------
    run
        Tree of a run with ``eigenvectors``.
    k
        Number of leading eigenvectors that span the eigenspace; by default all recorded. Groups
        that recorded fewer are left out.

    Returns
    -------
    xarray.DataTree
        ``principal_angles`` (..., step, step_, angle) at the path of each node; see
        :func:`hild_xr.analysis.pairwise_angles`.

    Raises
    ------
    ValueError
        If k is less than 1.
    """
    jobs = _at_each(run, EIGENVECTORS, lambda _, u: pairwise_angles(_leading(u, k)))
    return _results(run, jobs)


def angles_to_reference(
    run: xr.DataTree, *, reference: int | None = None, k: int | None = None
) -> xr.DataTree:
    """Principal angles of the eigenspaces at every step to those at one step.

    Parameters
    ----------
    run
        Tree of a run with ``eigenvectors``.
    reference
        The step; by default the first one of each group.
    k
        As in :func:`angles`.

    Returns
    -------
    xarray.DataTree
        ``principal_angles`` (..., step, angle) at the path of each node; see
        :func:`hild_xr.analysis.angles_to_reference`. Groups without a record at the
        reference are left out.

    Raises
    ------
    ValueError
        If k is less than 1.
    """

    def of(_: str, u: xr.DataArray) -> xr.DataArray:
        steps = u.indexes[DIM_STEP]
        at = int(steps[0]) if reference is None and len(steps) else reference
        if at not in steps:
            raise _LeftOutError("no record" if at is None else f"no record at step {at}")
        return angles_to(_leading(u, k), at)

    return _results(run, _at_each(run, EIGENVECTORS, of))


def consecutive_angles(run: xr.DataTree, *, k: int | None = None) -> xr.DataTree:
    """Principal angles of the eigenspaces of each record to those of the record before.

    Parameters
    ----------
    run
        Tree of a run with ``eigenvectors``.
    k
        As in :func:`angles`.

    Returns
    -------
    xarray.DataTree
        ``principal_angles`` (..., step, angle) at the path of each node, without the first
        step; see :func:`hild_xr.analysis.consecutive_angles`.

    Raises
    ------
    ValueError
        If k is less than 1.
    """

    def of(_: str, u: xr.DataArray) -> xr.DataArray:
        if u.sizes[DIM_STEP] < 2:
            raise _LeftOutError("fewer than two records")
        return angles_between_records(_leading(u, k))

    return _results(run, _at_each(run, EIGENVECTORS, of))


def overlap(run: xr.DataTree, *, k: int | None = None) -> xr.DataTree:
    """Overlap of the eigenspaces of two matrices, such as Hessian and G, of the same blocks.

    Parameters
    ----------
    run
        Tree of a run with ``eigenvectors`` of two matrices.
    k
        As in :func:`angles`.

    Returns
    -------
    xarray.DataTree
        ``subspace_overlap`` and ``subspace_alignment`` at ``/<group>_<other group>/<layer>``,
        at the steps and seeds that both have.

    Raises
    ------
    ValueError
        If k is less than 1.
    """
    found = dict(nodes_with(run, EIGENVECTORS))

    def of(first: str, other: str) -> xr.Dataset:
        whole = {path.partition("/")[0]: _leading(found[path], k) for path in (first, other)}
        u, v = _common_records(*whole.values())
        compared = (subspace_overlap(u, v), subspace_alignment(u, v))
        (mine, theirs), (of_mine, of_theirs) = whole, whole.values()
        told = [_what_is_left(of_mine, u, mine, theirs), _what_is_left(of_theirs, v, theirs, mine)]
        return _with_records(xr.Dataset({str(array.name): array for array in compared}), *told)

    def jobs() -> Iterator[tuple[str, Callable[[], Result]]]:
        for first, other in _pairs_of_matrices(run, list(found)):
            group, _, layer = first.partition("/")
            yield f"{group}_{other.partition('/')[0]}/{layer}", functools.partial(of, first, other)

    return _results(run, jobs())


def _pairs_of_matrices(run: xr.DataTree, paths: list[str]) -> Iterator[tuple[str, str]]:
    """Pairs of nodes of one block and layer, of different matrices."""
    for i, first in enumerate(paths):
        for other in paths[i + 1 :]:
            mine, theirs = _group_of(run, first), _group_of(run, other)
            same_block = mine.get("blocks") == theirs.get("blocks")
            same_layer = first.partition("/")[2] == other.partition("/")[2]
            if same_layer and same_block and mine.get("matrix") != theirs.get("matrix"):
                yield first, other


def _common_records(a: xr.DataArray, b: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    """Keep the seeds and steps that both arrays have; other dims must agree anyway."""
    others = {*a.dims, *b.dims} - {DIM_SEED, DIM_STEP}
    kept = xr.align(a, b, join="inner", copy=False, exclude=others)
    for dim, said in ((DIM_STEP, "no step at which"), (DIM_SEED, "no seed of which")):
        if kept[0].sizes.get(dim) == 0 and a.sizes[dim] and b.sizes.get(dim):
            raise _LeftOutError(f"{said} both were recorded")
    return kept


def _what_is_left(whole: xr.DataArray, kept: xr.DataArray, what: str, other: str) -> str | None:
    """Say how many steps and seeds are compared, if not all are."""
    dims = [dim for dim in (DIM_STEP, DIM_SEED) if kept.sizes.get(dim) != whole.sizes.get(dim)]
    counts = " and ".join(f"{kept.sizes[dim]} of {whole.sizes[dim]} {dim}s" for dim in dims)
    return f"{counts} of {what}; the others have no {other}" if dims else None


def _with_records(result: Result, *told: str | None) -> xr.Dataset:
    """Note in the attr ``records`` that not all records could be compared."""
    dataset = result.to_dataset() if isinstance(result, xr.DataArray) else result
    said = ". ".join(text for text in told if text is not None)
    return dataset.assign_attrs(records=said) if said else dataset


# ---------------------------------------------------------------------------- vectors and subspaces


def alignment(
    run: xr.DataTree, *, k: int | None = None, min_norm: float = 0.0, weights: str | None = None
) -> xr.DataTree:
    """Alignment of the weights with the eigenspaces of their own blocks.

    Parameters
    ----------
    run
        Tree of a run with ``weight`` and ``eigenvectors``.
    k
        As in :func:`angles`.
    min_norm
        As in :func:`hild_xr.analysis.alignment`.
    weights
        Group of the weights. By default the one that holds them in the form of the
        eigenvectors, whole or sketched alike; of several such groups ``weights``.

    Returns
    -------
    xarray.DataTree
        ``alignment`` at the path of each node with eigenvectors, at the steps and seeds that
        both have; the attr ``weights`` is the group. Blocks whose weights were not recorded,
        or in another form (sketched), are left out.

    Raises
    ------
    ValueError
        If k is less than 1, min_norm is not in [0, 1), there is no such group of weights, or
        several that fit, none of them ``weights``.
    """

    def of(weight: xr.DataArray, basis: xr.DataArray, vector_dims: Sequence[str]) -> xr.DataArray:
        return alignment_of(weight, basis, vector_dims=vector_dims, min_norm=min_norm)

    return _results(run, _with_eigenvectors(run, WEIGHT, weights, k, of))


def projection(run: xr.DataTree, *, k: int | None = None, gradients: str | None = None) -> xr.DataTree:
    """Part of the gradient that lies in the dominant eigenspace of its own block.

    Parameters
    ----------
    run
        Tree of a run with ``gradient`` and ``eigenvectors``.
    k
        As in :func:`angles`; the papers take the number of classes.
    gradients
        Group of the gradients, by default chosen as the weights are in :func:`alignment`.

    Returns
    -------
    xarray.DataTree
        ``chi`` and ``f_top`` at the path of each node with eigenvectors, at the steps and
        seeds that both have; see :func:`hild_xr.analysis.projection`, which also gives the
        two parts themselves; the attr ``gradients`` is the group. Blocks whose gradients were
        not recorded, or in another form (sketched), are left out.

    Raises
    ------
    ValueError
        If k is less than 1, there is no such group of gradients, or several that fit, none of
        them ``gradients``.
    """

    def of(gradient: xr.DataArray, basis: xr.DataArray, vector_dims: Sequence[str]) -> xr.Dataset:
        return projection_of(gradient, basis, vector_dims=vector_dims)[["chi", "f_top"]]

    return _results(run, _with_eigenvectors(run, GRADIENT, gradients, k, of))


def _with_eigenvectors(
    run: xr.DataTree,
    variable: str,
    asked: str | None,
    k: int | None,
    function: Callable[[xr.DataArray, xr.DataArray, Sequence[str]], Result],
) -> Iterator[tuple[str, Callable[[], Result]]]:
    """Bring the vectors of each layer together with the eigenvectors of its blocks."""
    groups = _by_group(run, variable, asked)

    def of(path: str, basis: xr.DataArray) -> Result:
        layer = path.rpartition("/")[2]
        group = _group_in_form_of(basis, groups, layer, variable)
        vector, vectors = _in_layout_of(basis, groups[group], layer), _leading(basis, k)
        kept_vector, kept = _common_records(vector, vectors)
        result = function(kept_vector, kept, basis.attrs["vector_dims"])
        dataset = _with_records(result, _what_is_left(vectors, kept, EIGENVECTORS, variable))
        return dataset.assign_attrs({DEFAULT_GROUPS[variable]: group})

    return _at_each(run, EIGENVECTORS, of)


def _by_group(run: xr.DataTree, variable: str, asked: str | None) -> dict[str, dict[str, xr.DataArray]]:
    """Vectors of the layers by group, of all groups or of the one asked for."""
    groups: dict[str, dict[str, xr.DataArray]] = {}
    for path, vector in nodes_with(run, variable):
        group, _, layer = path.rpartition("/")
        groups.setdefault(group, {})[layer] = vector
    if asked is None:
        return groups
    if asked not in groups:
        raise ValueError(f"expected a group that holds {variable!r}, came {asked!r}; there are {[*groups]}")
    return {asked: groups[asked]}


def _group_in_form_of(
    basis: xr.DataArray, groups: Mapping[str, Mapping[str, xr.DataArray]], layer: str, variable: str
) -> str:
    """Choose the group that holds all layers of a block in the form of its eigenvectors."""
    names = _layers_in(basis, layer)
    holding = [group for group, vectors in groups.items() if vectors.keys() >= set(names)]
    if not holding:
        nowhere = [name for name in names if not any(name in vectors for vectors in groups.values())]
        reason = (
            f"no {variable} of {nowhere}" if nowhere else f"no group has the {variable} of all of {names}"
        )
        raise _LeftOutError(reason)
    sketched = basis.attrs.get("sketch")
    alike = [
        group
        for group in holding
        if all(groups[group][name].attrs.get("sketch") == sketched for name in names)
    ]
    if not alike:
        raise _LeftOutError(f"{variable} and eigenvectors are not sketched alike")
    default = DEFAULT_GROUPS[variable]
    if default in alike or len(alike) == 1:
        return default if default in alike else alike[0]
    raise ValueError(
        f"{layer!r} has its {variable} in the groups {alike}: choose one, for example {default}={alike[0]!r}"
    )


def _layers_in(basis: xr.DataArray, layer: str) -> list[str]:
    """Layers whose vectors make up that of a block; sketches of blocks are stored under its own name."""
    return [layer] if "sketch" in basis.attrs else _names_in(basis.attrs.get("layers", layer))


def _in_layout_of(basis: xr.DataArray, vectors: Mapping[str, xr.DataArray], layer: str) -> xr.DataArray:
    """Weights or gradients in the layout of the eigenvectors."""
    if "sketch" not in basis.attrs and "layers" in basis.attrs:
        return flatten_like({name: vectors[name] for name in _layers_in(basis, layer)}, basis)
    return vectors[layer]


# ---------------------------------------------------------------------------- spectra


def outliers(
    run: xr.DataTree,
    *,
    method: Method = "gap",
    k: int | None = None,
    threshold: float | None = None,
    edge: float | None = None,
    ratio: float | None = None,
) -> xr.DataTree:
    """Outliers of every recorded spectrum: their number, the gap behind them, the edge.

    Eigenvalues are measured from the regulariser that the group says is in its matrix.

    Parameters
    ----------
    run
        Tree of a run with ``eigenvalues``.
    method, k, threshold, edge, ratio
        As in :func:`hild_xr.analysis.outliers`.

    Returns
    -------
    xarray.DataTree
        ``outlier_count``, ``gap_ratio``, ``bulk_edge`` and ``bulk_reached`` at the path of
        each node.

    Raises
    ------
    ValueError
        As :func:`hild_xr.analysis.outliers`.
    """

    def of(path: str, eigenvalues: xr.DataArray) -> xr.Dataset:
        if k is not None and k >= eigenvalues.sizes[DIM_EIG]:
            raise _LeftOutError(f"{eigenvalues.sizes[DIM_EIG]} eigenvalues recorded, k={k} needs one more")
        beta = _regularizer_in(run, path)
        return outliers_of(
            eigenvalues, method=method, k=k, threshold=threshold, edge=edge, ratio=ratio, regularizer=beta
        )

    return _results(run, _at_each(run, EIGENVALUES, of))


def tracks(
    run: xr.DataTree,
    *,
    min_overlap: float | None = None,
    degenerate: float | None = None,
    max_tracks: int | None = None,
) -> xr.DataTree:
    """Eigenpairs followed along training, through crossings and near-degeneracies.

    Parameters
    ----------
    run
        Tree of a run with ``eigenvalues`` and ``eigenvectors``.
    min_overlap, degenerate, max_tracks
        As in :func:`hild_xr.analysis.track`, with its defaults.

    Returns
    -------
    xarray.DataTree
        What :func:`hild_xr.analysis.track` gives, at the path of each node with eigenvectors.

    Raises
    ------
    ValueError
        If an option is out of range.
    """
    given = {"min_overlap": min_overlap, "degenerate": degenerate, "max_tracks": max_tracks}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    values = dict(nodes_with(run, EIGENVALUES))

    def of(path: str, vectors: xr.DataArray) -> xr.Dataset:
        group, _, layer = path.partition("/")
        eigenvalues = values.get(path, values.get(group))
        if eigenvalues is None or (path not in values and layer not in eigenvalues[DIM_LAYER]):
            raise _LeftOutError("eigenvectors without eigenvalues")
        if path not in values:  # those of all layers lie in the group itself
            eigenvalues = eigenvalues.sel({DIM_LAYER: layer}, drop=True)
        return track(eigenvalues, vectors, **options)

    return _results(run, _at_each(run, EIGENVECTORS, of))


def rank(run: xr.DataTree, *, rtol: float | None = None) -> xr.DataTree:
    """Ranks and participation ratio of the recorded spectra and of the weight matrices.

    The regulariser that a group says is in its matrix is subtracted from the eigenvalues.

    Parameters
    ----------
    run
        Tree of a run with ``eigenvalues`` or ``weight``.
    rtol
        As in :func:`hild_xr.analysis.rank`.

    Returns
    -------
    xarray.DataTree
        ``numerical_rank``, ``stable_rank``, ``effective_rank`` and ``participation_ratio`` at
        the path of each node with eigenvalues, and of each with a weight matrix; of more than
        two dims, the first is taken against all others. Weights of one dim are left out.

    Raises
    ------
    ValueError
        If rtol is not in [0, 1).
    """

    def of_weight(_: str, weight: xr.DataArray) -> xr.Dataset:
        dims = weight.attrs.get("vector_dims", ())
        if isinstance(dims, str) or len(dims) < 2 or "sketch" in weight.attrs:
            raise _LeftOutError("no matrix")
        return rank_of(*_as_matrix(weight, *dims), rtol=rtol)

    def of_spectrum(path: str, eigenvalues: xr.DataArray) -> xr.Dataset:
        return rank_of(eigenvalues, rtol=rtol, regularizer=_regularizer_in(run, path))

    jobs = [*_at_each(run, EIGENVALUES, of_spectrum), *_at_each(run, WEIGHT, of_weight)]
    return _results(run, jobs)


def _as_matrix(weight: xr.DataArray, first: str, *rest: str) -> tuple[xr.DataArray, tuple[str, str]]:
    if len(rest) == 1:
        return weight, (first, rest[0])
    bare = weight.drop_vars([name for name, coord in weight.coords.items() if set(coord.dims) & set(rest)])
    return bare.stack({"__inputs__": rest}, create_index=False), (first, "__inputs__")
