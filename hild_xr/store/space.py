"""Whether what a run will hold fits the disk, asked before the first record."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import zarr

from hild_xr.plan import RunPlan
from hild_xr.store.backends import StoreLike, locate, zarr_array
from hild_xr.store.errors import NotEnoughSpaceError


def check_space(target: StoreLike, plan: RunPlan) -> None:
    """Refuse a run whose outstanding records do not fit the disk of its folder.

    Parameters
    ----------
    target
        Path of the run, which may not exist yet. Other stores have no disk to ask.
    plan
        What the run will hold, all seeds together.

    Raises
    ------
    NotEnoughSpaceError
        If the disk has less room than the records that are not committed yet need.

    Examples
    --------
    >>> from hild_xr.testing import spectrum_plan
    >>> check_space("runs/digits.zarr", spectrum_plan())
    """
    path = locate(target).path
    if path is None:
        return
    needed, free = _outstanding_nbytes(path, plan), shutil.disk_usage(_nearest_folder(path)).free
    if needed > free:
        raise NotEnoughSpaceError(
            f"{path} needs {needed / 1e9:.2f} GB more for the records of all {len(plan.seeds)} seeds, and "
            f"its disk has {free / 1e9:.2f} GB left. Record fewer steps or layers, weights with "
            'dtype="float16" or sketch=m, or on another disk; check_space=False records what the disk holds.'
        )


def _outstanding_nbytes(path: Path, plan: RunPlan) -> int:
    if not (path / "zarr.json").exists():
        return plan.nbytes
    root = zarr.open_group(path, mode="r")
    missing = {
        name: int((np.asarray(zarr_array(root, f"{name}/committed")[:]) == 0).sum())
        for name in plan.probes
        if name in root
    }
    return sum(count * plan.probes[name].record_nbytes for name, count in missing.items())


def _nearest_folder(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
