"""Analyse a stored run and write the results as a labelled store.

The run is opened lazily, each analysis asked for adds its arrays to one tree of results, and
the tree is computed chunk by chunk as it is written: what several analyses read is read
once, and neither the run nor the results have to fit into memory. Dask does it, on the
threads of this process or on the cluster whose client is active.

A result store is a plain Zarr store with a group for each analysis::

    /                                  attrs: what was analysed, how, by what, from which state
    /outliers/hessian                  outlier_count, gap_ratio, ...        (seed, step, layer)
    /angles/hessian/fc1.weight         principal_angles                     (seed, step, step_, angle)
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import shutil
import sys
import uuid
import warnings
from collections.abc import Iterable, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask.base
import dask.callbacks
import numpy as np
import xarray as xr
import zarr
from tqdm import tqdm

from hild_xr.analysis.named import AnalysisError, NotRecordedError, find_analysis
from hild_xr.analysis.whole_run import select_run
from hild_xr.provenance import provenance
from hild_xr.store.backends import UnusableTargetError, locate
from hild_xr.store.contents import MARKER
from hild_xr.store.errors import NotAStoreError
from hild_xr.store.fingerprint import FINGERPRINT
from hild_xr.store.reader import open_run
from hild_xr.variables import SCHEMA_VERSION

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from hild_xr.analysis.named import NamedAnalysis
    from hild_xr.store.backends import StoreLike

# dask declares no types
_compute: Any = dask.base.compute
_get_scheduler: Any = dask.base.get_scheduler
_Callback: Any = dask.callbacks.Callback

RESULT = "hild_xr_analyses"
"""Attr of the root of a result store: the analyses in it, with their options."""


def analyze(
    run: StoreLike | xr.DataTree,
    what: str | Iterable[str],
    out: str | os.PathLike[str] | None = None,
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    seeds: Iterable[int] | None = None,
    layers: Iterable[str] | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> xr.DataTree:
    """Apply analyses of whole runs by name.

    Parameters
    ----------
    run
        Path of a stored run, anything else that ``hx.open`` takes, or a tree from it.
    what
        Names of analyses, as a list or with commas between them; see
        :func:`hild_xr.analysis.named.list_analyses`.
    out
        Folder for the results. It gets its name when all is written: what has this name is
        complete. By default nothing is written and the results are lazy.
    options
        Options by the name of the analysis, ``{"outliers": {"method": "relative"}}``.
    seeds, layers
        As in :func:`hild_xr.analysis.whole_run.select_run`.
    overwrite
        Replace an earlier result. Anything else is never replaced.
    progress
        Show a progress bar on the standard error.

    Returns
    -------
    xarray.DataTree
        A child for each analysis. Attrs of the root: ``hild_xr_analyses`` (names and
        options), ``seeds`` and ``layers`` if some were chosen, ``source`` (where the run
        lies), ``source_metadata_sha256`` and ``source_committed_sha256`` (its plan and
        metadata, and which records were committed when it was opened), ``provenance`` and
        ``schema_version``.

    Raises
    ------
    AnalysisError
        If an analysis is unknown, lacks what it needs in this run, fails, or has no such
        option; see its subclasses in :mod:`hild_xr.analysis.named`.
    FileExistsError
        If `out` exists and `overwrite` is not given, or another analysis wrote it meanwhile.
    NotAStoreError
        If the run is none, or `out` holds something else than results.
    UnusableTargetError
        If `out` is no local folder, or lies inside a store.

    Examples
    --------
    >>> from zarr.storage import MemoryStore
    >>> from hild_xr.store import RunWriter
    >>> from hild_xr.testing import random_record, spectrum_plan
    >>> store, plan = MemoryStore(), spectrum_plan()
    >>> with RunWriter(store, plan, seed=0) as writer:
    ...     writer.write("hessian", 0, random_record(plan, "hessian", seed=0, step=0))
    >>> results = analyze(store, "outliers,angles", "results.zarr")
    >>> results["outliers/hessian/outlier_count"].dims
    ('seed', 'step', 'layer')
    >>> xr.open_datatree("results.zarr", engine="zarr").attrs["hild_xr_analyses"]
    {'outliers': {}, 'angles': {}}
    """
    names = _names(what)
    options = _options_of(names, options or {})
    path = None if out is None else _free(out, overwrite=overwrite)
    # all of them before the run is opened: a name that is wrong should not cost a look at the store
    analyses = [find_analysis(name) for name in names]
    tree = run if isinstance(run, xr.DataTree) else open_run(run)
    chosen: dict[str, list[Any]] = {}
    if seeds is not None:
        chosen["seeds"] = [int(seed) for seed in seeds]
    if layers is not None:
        chosen["layers"] = list(layers)
    try:
        selected = select_run(tree, **chosen)
    except ValueError as error:
        raise AnalysisError(str(error)) from error
    try:
        results = {made.name: made(selected, **options.get(made.name, {})) for made in analyses}
    except NotRecordedError as error:
        if not chosen:
            raise
        said = " and ".join(f"{what} {values}" for what, values in chosen.items())
        raise NotRecordedError(f"{error}. Of the run only the {said} were taken, as asked for") from error
    result = _joined(results)
    result.attrs = _about(tree, {name: dict(options.get(name, {})) for name in names}) | chosen
    if path is None:
        return result
    with _new_folder(path, overwrite=overwrite) as scratch, _named_in_failures(analyses):
        _write(result, scratch, progress=progress)
    return xr.open_datatree(path, engine="zarr", chunks={})


def _names(what: str | Iterable[str]) -> list[str]:
    names = what.split(",") if isinstance(what, str) else list(what)
    names = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not names:
        raise AnalysisError("expected at least one analysis, came none; hild-xr analyze --list shows all")
    return names


def _options_of(
    names: Sequence[str], options: Mapping[str, Mapping[str, Any]]
) -> Mapping[str, Mapping[str, Any]]:
    without = sorted(options.keys() - set(names))
    if without:
        raise AnalysisError(f"options of {without} were given, but only {list(names)} are asked for")
    return options


def _joined(results: Mapping[str, xr.DataTree]) -> xr.DataTree:
    """One tree with a child for each analysis."""
    nodes = {
        f"/{name}/{node.path[len(tree.path) :].strip('/')}".rstrip("/"): node.to_dataset(inherit=False)
        for name, tree in results.items()
        for node in tree.subtree
    }
    return xr.DataTree.from_dict(nodes)


def _about(run: xr.DataTree, analyses: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Attributes that say what the results were made from."""
    root = run.root
    committed = hashlib.sha256()
    for name, group in root.children.items():
        if MARKER in group.data_vars:
            committed.update(name.encode() + np.ascontiguousarray(group[MARKER].values).tobytes())
    source = {
        "source": root.encoding.get("source"),
        "source_metadata_sha256": root.attrs.get(FINGERPRINT),
        "source_committed_sha256": committed.hexdigest(),
    }
    return {
        RESULT: dict(analyses),
        **{name: value for name, value in source.items() if value is not None},
        "schema_version": SCHEMA_VERSION,
        "provenance": provenance(),
    }


# ---------------------------------------------------------------------------- writing


def _free(out: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """Return the path for the results, if it is free or holds results to be replaced."""
    location = locate(out)
    if location.path is None:
        raise UnusableTargetError(
            f"{location}: results are written into a local folder, which is renamed when it is complete; "
            "write there and copy it"
        )
    for folder in location.path.resolve().parents:
        if (folder / "zarr.json").exists():
            raise UnusableTargetError(
                f"{location.path} lies inside the store {folder}, which is left as it is; choose a path "
                "outside"
            )
    _require_free(location.path, overwrite=overwrite)
    return location.path


def _require_free(path: Path, *, overwrite: bool) -> None:
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists; choose another path, or overwrite it (--overwrite)")
    if not _holds_results(path):
        raise NotAStoreError(f"{path} holds no results of an analysis and is not overwritten")


def _holds_results(path: Path) -> bool:
    try:
        return RESULT in zarr.open_group(path, mode="r").attrs
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False


@contextmanager
def _new_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a folder beside the path that gets its name at the end, or is deleted on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}.analyzing")
    try:
        yield scratch
        _require_free(path, overwrite=overwrite)  # much may have been written since it was
        _give_name(scratch, path, overwrite=overwrite)
    except BaseException:
        # tasks on other threads may write on; all of them have ended when the process does
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _give_name(scratch: Path, path: Path, *, overwrite: bool) -> None:
    """Rename the folder. What had its name is deleted then, or gets it back if that fails."""
    old = scratch.with_suffix(".replaced")
    try:
        if overwrite:
            with suppress(FileNotFoundError):
                path.rename(old)
        scratch.rename(path)
    except BaseException as error:
        if old.exists() and not path.exists():
            old.rename(path)
        if isinstance(error, OSError) and error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise FileExistsError(
                f"{path} was written by another analysis at the same time; choose another path"
            ) from error
        raise
    finally:
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _named_in_failures(analyses: Iterable[NamedAnalysis]) -> Iterator[None]:
    """Add to what is raised which analyses were computed: the traceback of a lazy one names none."""
    try:
        yield
    except Exception as error:
        listed = ", ".join(f"{made.name!r} of the distribution {made.distribution}" for made in analyses)
        error.add_note(f"while computing {listed}")
        raise


def _write(result: xr.DataTree, folder: Path, *, progress: bool) -> None:
    stored = result.map_over_datasets(_storable)
    stored.attrs = result.attrs
    with warnings.catch_warnings():
        # all readers take the copy of the metadata in the root, and opening then needs one file
        warnings.filterwarnings("ignore", "Consolidated metadata")
        delayed: Any = stored.to_zarr(folder, mode="w-", zarr_format=3, compute=False)
    client = _active_client()
    if client is None:
        with _bar() if progress else nullcontext():
            _compute(delayed)
        return
    future = client.compute(delayed)
    if progress:
        import distributed

        show: Any = distributed.progress
        with redirect_stdout(sys.stderr):  # the standard output is for results
            show(future, notebook=False)
    future.result()


def _storable(dataset: xr.Dataset) -> xr.Dataset:
    """Make chunks even, as Zarr needs them: those of dask may be as uneven as the records of a run."""
    arrays = {}
    for name, array in dataset.variables.items():
        chunks = array.chunksizes
        uneven = {dim: max(sizes) for dim, sizes in chunks.items() if len(set(sizes[:-1])) > 1}
        uneven |= {dim: max(sizes) for dim, sizes in chunks.items() if sizes[-1] > sizes[0]}
        arrays[name] = array.chunk(uneven) if uneven else array
        arrays[name].encoding = {}
    coords = {name: arrays.pop(name) for name in dataset.coords}
    return xr.Dataset(arrays, coords, dataset.attrs)


def _active_client() -> Any:
    """Return the client of a dask cluster that dask would use, if there is one."""
    client = getattr(_get_scheduler(), "__self__", None)
    return client if type(client).__module__.partition(".")[0] == "distributed" else None


@contextmanager
def _bar() -> Iterator[None]:
    """Show how many tasks of the scheduler of this process are done."""
    waiting = ("ready", "waiting", "running")
    with (
        tqdm(total=0, unit="task", desc="analyzing") as bar,
        _Callback(
            start_state=lambda _, state: bar.reset(total=sum(len(state[key]) for key in waiting)),
            posttask=lambda *_: bar.update(),
        ),
    ):
        yield
