"""Where a run came from: versions, machine, git commit, command line, time."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from datetime import UTC, datetime

_PACKAGES = ("hild-xr", "numpy", "scipy", "xarray", "zarr", "dask", "torch")


def provenance(**more: object) -> dict[str, object]:
    """Describe this process for the attributes of a store.

    Parameters
    ----------
    **more
        Further entries, e.g. ``device``.

    Returns
    -------
    dict
        JSON values: ``created`` (UTC, ISO 8601), ``command_line``,
        ``platform``, ``python``, ``versions`` of the packages that matter, and
        ``git_commit`` of the working folder with ``git_dirty`` if it is a git
        checkout.

    Examples
    --------
    >>> provenance(device="cpu")["device"]
    'cpu'
    """
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command_line": list(sys.argv),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        **_git(),
        **more,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, object]:
    commit = _run_git("rev-parse", "HEAD")
    if commit is None:
        return {}
    return {
        "git_commit": commit,
        "git_dirty": bool(_run_git("status", "--porcelain", "--untracked-files=no")),
    }


def _run_git(*arguments: str) -> str | None:
    """Output of a git command, None where git or a checkout is missing."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip()
