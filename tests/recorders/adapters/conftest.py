"""Two processes for the tests of distributed training, and what one process records."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import xarray as xr

import hild_xr as hx
from hild_xr import recorders as rec

SCENARIOS = Path(__file__).with_name("two_ranks.py")


@pytest.fixture(scope="session")
def scenarios() -> ModuleType:
    """Return the module of the scenarios; test folders are no packages, so it is loaded by its path."""
    spec = spec_from_file_location("two_ranks", SCENARIOS)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def run_two_ranks() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs a scenario in a folder; warnings are errors there unless told otherwise."""

    def run(scenario: str, folder: Path, *, warn: str = "error") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", warn, str(SCENARIOS), scenario, str(folder)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    return run


@pytest.fixture(scope="session")
def one_process(scenarios: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> xr.DataTree:
    """Return what a plain recorder records of the same training in one process, on the full batch."""
    path = tmp_path_factory.mktemp("one") / "run.zarr"
    model = scenarios.network()
    optimizer = scenarios.optimizer_of(model)
    with rec.Recorder(path, model, optimizer, **scenarios.settings()):
        scenarios.train(model, optimizer)
    run: xr.DataTree = hx.open(path).load()
    return run


@pytest.fixture
def assert_same_records() -> Callable[[xr.DataTree, xr.DataTree], None]:
    """Compare: two processes average gradients in another order, so equal up to rounding and sign."""

    def compare(found: xr.DataTree, expected: xr.DataTree) -> None:
        compared = 0
        for node in expected.subtree:
            for name, array in node.to_dataset(inherit=False).data_vars.items():
                other = found[node.path][name]
                assert other.dims == array.dims
                if name in ("residuals", "n_matvec", "committed"):
                    continue
                values, others = array.values, other.values
                if name == "eigenvectors":
                    values, others = np.abs(values), np.abs(others)
                slack = 1e-6 if name == "eigenvectors" else 1e-9
                np.testing.assert_allclose(
                    others, values, rtol=1e-8, atol=slack, err_msg=f"{node.path}/{name}"
                )
                compared += 1
        assert compared > 15

    return compare
