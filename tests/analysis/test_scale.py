"""Analysis of runs larger than memory, and how the work grows with their length."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import xarray as xr
import zarr

import hild_xr as hx
from hild_xr.analysis import angles_to_reference
from hild_xr.plan import ArrayPlan, CoordPlan, NodePlan, ProbePlan, RunPlan
from hild_xr.store import RunWriter

if TYPE_CHECKING:
    from types import ModuleType

    from hild_xr.store import Record


# ---------------------------------------------------------------------------- task graphs


def laws(path: str) -> ModuleType:
    """Load the tests of the laws: they hold a call of every public function."""
    file = Path(__file__).parent / path / "test_laws.py"
    spec = importlib.util.spec_from_file_location(f"laws_{path}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LAWS = {path: laws(path) for path in ("", "features")}
CASES = [(path, case) for path, module in LAWS.items() for case in module.CASES]


def tasks(path: str, case: str, n_chunks: int) -> int:
    """Count the tasks of a result for n chunks along ``step``, each as long as the run of the laws."""
    run = {}
    for name, array in LAWS[path].recorded_run(missing=False).items():
        if "step" in array.dims:
            copies = [array.assign_coords(step=array["step"] + 1000 * i) for i in range(n_chunks)]
            array = xr.concat(copies, "step").chunk(step=array.sizes["step"])
        run[name] = array
    found = LAWS[path].CASES[case](run)
    arrays = [found] if isinstance(found, xr.DataArray) else found.data_vars.values()
    graphs = [array.__dask_graph__() for array in arrays]
    return sum(len(dict(graph)) for graph in graphs if graph is not None)


@pytest.mark.parametrize(("path", "case"), CASES)
def test_task_graph__is_linear_in_the_number_of_chunks(path: str, case: str) -> None:
    """Of all pairs of steps, linear in the number of pairs of chunks."""
    few, twice, four_times = (tasks(path, case, n) for n in (2, 4, 8))
    assert twice - few > 0
    growth = 4 if case.startswith("pairwise") and path == "" else 2
    assert four_times - twice <= growth * (twice - few)


# ---------------------------------------------------------------------------- out of core


GIGABYTE = 1_000_000_000
K, P = 10, 100_000
RECORD_BYTES = 4 * K * P
DIFFERENT = 4
"""Records that are written; the others are links to their files."""

SIZE = float(os.environ.get("HILD_XR_SCALE_GB", "2"))
"""Size of the run in GB. 30 is that of the claim, within 2 GB of memory; CI takes 2 within 0.7."""

LIMIT = 2.0 if SIZE > 4 else 0.7


def records() -> list[Record]:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((P, K)))[0].T
    made: list[Record] = []
    for i in range(DIFFERENT):
        drifted = np.linalg.qr((basis + 1e-3 * i * rng.standard_normal((K, P))).T)[0].T
        values = np.sort(rng.exponential(size=(1, K)))[:, ::-1] + [[50.0] * i + [0.0] * (K - i)]
        made.append({"": {"eigenvalues": values}, "model": {"eigenvectors": drifted.astype(np.float32)}})
    return made


def make_long_run(path: Path, n: int) -> None:
    """Record a run of n records, most of them hard links to the files of the first few."""
    attrs = {"vector_dims": ["param"], "number_dim": "eig"}
    own = NodePlan(
        arrays={
            "eigenvalues": ArrayPlan(
                variable="eigenvalues", dims=("layer", "eig"), shape=(1, K), dtype="float64"
            )
        },
        coords={
            "layer": CoordPlan(dim="layer", values=("model",)),
            "eig": CoordPlan(dim="eig", values=tuple(range(K))),
        },
    )
    vectors = ArrayPlan(
        variable="eigenvectors", dims=("eig", "param"), shape=(K, P), dtype="float32", attrs=attrs
    )
    probe = ProbePlan(
        steps=tuple(range(n)), nodes={"": own, "model": NodePlan(arrays={"eigenvectors": vectors})}
    )
    made = records()
    with RunWriter(path, RunPlan(seeds=(0,), probes={"hessian_model": probe}), 0) as writer:
        for step in range(DIFFERENT):
            writer.write("hessian_model", step, made[step])
    group = zarr.open_group(path, mode="r+", use_consolidated=False)["hessian_model"]
    eigenvectors, values = group["model/eigenvectors"], group["eigenvalues"]
    assert eigenvectors.chunks == (1, 1, K, P)
    files = path / "hessian_model/model/eigenvectors/c/0"
    for i in range(DIFFERENT, n):
        (files / f"{i}/0").mkdir(parents=True)
        (files / f"{i}/0/0").hardlink_to(files / f"{i % DIFFERENT}/0/0")
    values[0] = np.resize([record[""]["eigenvalues"] for record in made], (n, 1, K))
    group["committed"][0] = 1


ANALYSE = """
import json, sys, dask, xarray as xr
from hild_xr.analyze import analyze

with dask.config.set(scheduler="threads", num_workers=2):
    analyze(sys.argv[1], "angles_to_reference,outliers", sys.argv[2])
status = open("/proc/self/status").read()
print(json.dumps({"peak": int(status.partition("VmHWM:")[2].split()[0]) * 1024}))
"""


@pytest.mark.heavy
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
def test_run_larger_than_memory__is_analysed_within_it(tmp_path: Path) -> None:
    n = int(SIZE * GIGABYTE / RECORD_BYTES)
    run, out = tmp_path / "run.zarr", tmp_path / "results.zarr"
    make_long_run(run, n)
    opened = hx.open(run)["hessian_model"]
    assert (
        sum(array.nbytes for node in opened.subtree for array in node.data_vars.values())
        > 0.99 * SIZE * GIGABYTE
    )
    done = subprocess.run(
        [sys.executable, "-c", ANALYSE, str(run), str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    peak = json.loads(done.stdout)["peak"]
    print(f"{SIZE} GB within {peak / GIGABYTE:.2f} GB")
    assert peak < LIMIT * GIGABYTE
    found = xr.open_datatree(out, engine="zarr")
    few = opened["model/eigenvectors"].isel(step=slice(DIFFERENT)).load()
    expected = np.resize(angles_to_reference(few, 0).values[0], (n, K))
    angles = found["angles_to_reference/hessian_model/model/principal_angles"].isel(seed=0).values
    np.testing.assert_allclose(angles, expected, atol=1e-12)
    counts = found["outliers/hessian_model/outlier_count"].isel(seed=0, layer=0).values
    assert (counts.reshape(-1)[1:DIFFERENT] == [1, 2, 3]).all()
    np.testing.assert_array_equal(counts, np.resize(counts[:DIFFERENT], n))
