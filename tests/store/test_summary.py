from __future__ import annotations

from pathlib import Path

import pytest

from hild_xr.store import DamagedRecordError, RunWriter, recorded_seeds
from hild_xr.store.summary import summarise
from hild_xr.testing import random_record, spectrum_plan


def test_summary_and_recorded_seeds__count_committed_records(tmp_path: Path) -> None:
    plan, path = spectrum_plan(steps=(0, 3), seeds=(4, 7)), tmp_path / "run.zarr"
    assert recorded_seeds(path) == set()
    for seed, steps in ((4, (0, 3)), (7, (0,))):
        with RunWriter(path, plan, seed, root_attrs={"provenance": {"device": "cpu"}}) as writer:
            for step in steps:
                for probe in plan.probes:
                    writer.write(probe, step, random_record(plan, probe, seed=seed, step=step))
    assert recorded_seeds(path) == {4}
    held = summarise(path)
    assert held["seeds"] == [4, 7]
    assert held["config"] == {"learning_rate": 0.1}
    assert held["provenance"] == {"device": "cpu"}
    assert held["nbytes"] == plan.nbytes
    assert held["probes"]["hessian"]["committed"] == 3
    assert held["probes"]["hessian"]["planned"] == 4
    assert held["probes"]["hessian"]["layers"] == ["fc.weight"]
    assert held["probes"]["hessian"]["steps"] == [0, 3]


def test_summary__of_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run at"):
        summarise(tmp_path / "absent.zarr")


def test_summary_and_recorded_seeds__name_a_damaged_marker(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    RunWriter(path, spectrum_plan(), 0).close()
    (path / "weights/committed/c/0/0").write_bytes(b"damaged")
    for read in (summarise, recorded_seeds):
        with pytest.raises(DamagedRecordError, match="weights/committed"):
            read(path)
