"""Runs written by earlier versions keep opening, with the same numbers.

Each archive holds the run that :func:`write_run` made under that schema version. When the schema changes, add
an archive (``python tests/store/test_backwards.py``) and keep the old ones.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import hild_xr as hx
from hild_xr.plan import RunPlan
from hild_xr.store import Record, RunWriter
from hild_xr.testing import spectrum_plan
from hild_xr.variables import SCHEMA_VERSION

DATA = Path(__file__).parent / "data"
ARCHIVES = sorted(DATA.glob("run-schema-*.zip"))


def drawn(plan: RunPlan, probe: str, *, seed: int, step: int) -> Record:
    """Draw the numbers that the archives hold; they obey no law of a spectrum, and need not here."""
    rng = np.random.default_rng([seed, step, 1])
    record: dict[str, dict[str, np.ndarray]] = {node: {} for node in plan.probes[probe].nodes}
    for node, name, array in plan.probes[probe].arrays():
        record[node][name] = np.asarray(rng.integers(0, 100, size=array.shape) / 7).astype(array.dtype)
    return record


def write_run(path: Path) -> None:
    """Write two seeds, one of them unfinished."""
    plan = spectrum_plan(steps=(0, 1, 2, 5, 10), seeds=(0, 1))
    for seed, steps in ((0, (0, 1, 2, 5, 10)), (1, (0, 1, 2))):
        with RunWriter(path, plan, seed) as writer:
            for step in steps:
                for probe in plan.probes:
                    writer.write(probe, step, drawn(plan, probe, seed=seed, step=step))


def test_archives__hold_the_present_schema() -> None:
    assert f"run-schema-{SCHEMA_VERSION}.zip" in [path.name for path in ARCHIVES]


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.stem)
def test_run_of_an_earlier_version__opens_with_the_same_numbers(archive: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(archive, tmp_path / "run.zarr")
    write_run(tmp_path / "now.zarr")
    stored, now = hx.open(tmp_path / "run.zarr"), hx.open(tmp_path / "now.zarr")
    assert {node.path for node in stored.subtree} == {node.path for node in now.subtree}
    for node in now.subtree:
        for name, array in node.to_dataset(inherit=False).variables.items():
            earlier = stored[node.path].to_dataset(inherit=False).variables[name]
            assert earlier.dims == array.dims, (node.path, name)
            np.testing.assert_array_equal(earlier.values, array.values, err_msg=f"{node.path}/{name}")


if __name__ == "__main__":
    import tempfile

    folder = Path(tempfile.mkdtemp()) / "run.zarr"
    write_run(folder)
    shutil.make_archive(str(DATA / f"run-schema-{SCHEMA_VERSION}"), "zip", folder)
