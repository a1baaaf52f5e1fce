"""A stranger opens a run where hild_xr cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import hild_xr as hx
from hild_xr.store import RunWriter
from hild_xr.testing import random_record, spectrum_plan

_STRANGER = """
    import importlib.abc, json, sys

    class Absent(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in {"hild_xr", "torch"}:
                raise ModuleNotFoundError(name)

    sys.meta_path.insert(0, Absent())
    try:
        import hild_xr
    except ModuleNotFoundError:
        pass
    else:
        raise SystemExit("hild_xr is importable")

    import xarray as xr, zarr

    tree = xr.open_datatree(sys.argv[1], engine="zarr")
    hessian = tree["hessian"]
    plain = zarr.open_group(sys.argv[1], mode="r")
    print(json.dumps({
        "eigenvalues": hessian["eigenvalues"].sel(seed=1, layer="fc.weight", step=5).values.tolist(),
        "vectors": hessian["fc.weight/eigenvectors"].astype(float).values.sum(),
        "zarr_vectors": plain["hessian/fc.weight/eigenvectors"][:].astype(float).sum(),
        "zarr_layers": [str(name) for name in plain["hessian/layer"][:]],
        "zarr_dims": list(plain["hessian/fc.weight/eigenvectors"].metadata.dimension_names),
        "label": [hessian["eigenvalues"].attrs[key] for key in ("long_name", "units", "description")],
        "vector_dims": hessian["fc.weight/eigenvectors"].attrs["vector_dims"],
        "config": tree.attrs["config"],
        "schema": tree.attrs["schema_version"],
    }))
"""


def test_run__opens_with_plain_xarray_and_zarr(tmp_path: Path) -> None:
    plan, path = spectrum_plan(), tmp_path / "run.zarr"
    for seed in plan.seeds:
        with RunWriter(path, plan, seed) as writer:
            for step in plan.probes["hessian"].steps:
                for probe in plan.probes:
                    writer.write(probe, step, random_record(plan, probe, seed=seed, step=step))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(_STRANGER), str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    run = hx.open(path)
    ours = run["hessian/eigenvalues"].sel(seed=1, layer="fc.weight", step=5)
    assert seen["eigenvalues"] == ours.values.tolist()
    vectors = run["hessian/fc.weight/eigenvectors"].values.astype(float)
    assert seen["vectors"] == seen["zarr_vectors"] == vectors.sum()
    assert seen["zarr_layers"] == ["fc.weight"]
    assert seen["zarr_dims"] == ["seed", "step", "eig", "out", "in"]
    assert seen["label"] == [
        "eigenvalue",
        "1",
        "Eigenvalue of the block, in decreasing order of absolute value.",
    ]
    assert seen["vector_dims"] == ["out", "in"]
    assert seen["config"] == {"learning_rate": 0.1}
    assert seen["schema"] == "1.0"
