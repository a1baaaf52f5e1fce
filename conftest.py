"""What holds for the tests and for the docstring examples alike."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from collections.abc import Iterator

# Read by BLAS, by torch and by every process a test starts, so it has to stand before any of them is loaded.
# The tests share the cores as processes (pytest -n); threads on top of that only slow them down.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

# No deadline: the machine is shared, and the first example of a law compiles or imports something.
settings.register_profile("hild-xr", deadline=None)
settings.register_profile("hild-xr-ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("hild-xr-ci" if os.environ.get("CI") else "hild-xr")

# What cannot be imported, or has nothing left to say, without an optional package. Everything that is not
# named here has to pass in the core-only job too (`make core-test`).
NEEDS = {
    "torch": (
        "hild_xr/recorders",
        "hild_xr/reproduce",
        "tests/recorders",
        "tests/reproduce",
        "tests/test_examples.py",
        "tests/test_readme.py",
        "tests/benchmarks",
    ),
    "holoviews": (
        "hild_xr/plots",
        "hild_xr/report.py",
        "hild_xr/dashboard.py",
        "tests/plots",
        "tests/test_report.py",
        "tests/test_report_browser.py",
        "tests/test_dashboard.py",
    ),
    "lightning": ("hild_xr/recorders/adapters/lightning.py", "tests/recorders/adapters/test_lightning.py"),
    "transformers": (
        "hild_xr/recorders/adapters/transformers.py",
        "tests/recorders/adapters/test_transformers.py",
    ),
    "accelerate": ("tests/recorders/adapters/test_transformers.py",),
    "build": ("tests/test_packaging.py",),
    "icechunk": ("tests/store/test_icechunk.py",),
    "hmmlearn": (
        "hild_xr/analysis/features/latent_states.py",
        "tests/analysis/features/test_latent_states.py",
    ),
    "moto": ("tests/store/test_object_store.py",),
}
collect_ignore = [path for package, paths in NEEDS.items() if find_spec(package) is None for path in paths]


@pytest.fixture(autouse=True)
def _examples_write_into_a_temporary_folder(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let a docstring say ``hx.create("runs/digits.zarr")`` and leave nothing behind."""
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(request.getfixturevalue("tmp_path"))
        yield
