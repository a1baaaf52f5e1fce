"""A finished run in one file: zipped, read, never written."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest

from hild_xr.store import NotAStoreError, RunWriter, create, open_run, recorded_seeds, stored_plan
from hild_xr.testing import random_record, spectrum_plan


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Record a whole run."""
    plan = spectrum_plan()
    for seed in plan.seeds:
        with RunWriter(tmp_path / "run.zarr", plan, seed) as writer:
            for probe, contents in plan.probes.items():
                for step in contents.steps:
                    writer.write(probe, step, random_record(plan, probe, seed=seed, step=step))
    return tmp_path / "run.zarr"


def pack(folder: Path, *, inside: str = "", compression: int = zipfile.ZIP_STORED) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", compression) as packed:
        for file in folder.rglob("*"):
            if file.is_file():
                packed.write(file, f"{inside}{file.relative_to(folder)}")
    return path


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip__of_a_run_opens_with_equal_values(folder: Path, compression: int) -> None:
    path = pack(folder, compression=compression)
    expected = open_run(folder).load()
    shutil.rmtree(folder)
    for target in (path, str(path), path.as_uri()):
        assert open_run(target).identical(expected)
    assert stored_plan(path) == spectrum_plan()
    assert recorded_seeds(path) == {0, 1}


def test_zip__is_never_written(folder: Path) -> None:
    path = pack(folder)
    before = path.read_bytes()
    for write in (create, lambda target, plan: RunWriter(target, plan, 0, resume_at=2)):
        with pytest.raises(ValueError, match=r"is a zip file, which is read only.* zip -r -0 "):
            write(path, spectrum_plan())
    assert path.read_bytes() == before


def test_zip__that_holds_the_folder_itself_says_how_to_zip(folder: Path) -> None:
    path = pack(folder, inside="run.zarr/")
    with pytest.raises(NotAStoreError, match=r"holds the run in the folder 'run\.zarr'.* zip -r -0 "):
        open_run(path)


def test_zip__that_is_not_there_or_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run at"):
        open_run(tmp_path / "absent.zip")
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(NotAStoreError, match=r"text\.zip is not a zip file, or is cut off"):
        open_run(tmp_path / "text.zip")
    with zipfile.ZipFile(tmp_path / "foreign.zip", "w") as packed:
        packed.writestr("readme.txt", "hello")
    with pytest.raises(FileNotFoundError, match=r"foreign\.zip: it holds no zarr\.json"):
        open_run(tmp_path / "foreign.zip")
