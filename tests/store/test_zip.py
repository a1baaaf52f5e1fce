"""A finished run in one file: zipped, read, never written."""

from __future__ import annotations

import random
import shutil
import zipfile
from pathlib import Path

import pytest

from hild_xr.store import (
    DamagedRecordError,
    NotAStoreError,
    RunWriter,
    create,
    open_run,
    recorded_seeds,
    stored_plan,
)
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


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip__whose_metadata_are_damaged_says_so(folder: Path, compression: int) -> None:
    path = pack(folder, compression=compression)
    with zipfile.ZipFile(path) as packed:
        entry = packed.getinfo("zarr.json")
    content = bytearray(path.read_bytes())
    start = entry.header_offset + 30 + len("zarr.json")
    content[start + 10 : start + 60] = b"\xff" * 50
    path.write_bytes(content)
    with pytest.raises(NotAStoreError, match=r"metadata are damaged: zarr\.json cannot be read") as caught:
        open_run(path)
    assert isinstance(caught.value.__cause__, Exception)


def test_zip__whose_marker_is_damaged_says_so(folder: Path) -> None:
    path = pack(folder)
    with zipfile.ZipFile(path) as packed:
        entry = packed.getinfo("metrics/committed/c/0/0")
    content = bytearray(path.read_bytes())
    content[entry.header_offset + 30 + len(entry.filename)] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DamagedRecordError, match="marker of what is committed"):
        open_run(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip__with_a_flipped_byte_opens_or_says_what_is_wrong(folder: Path, compression: int) -> None:
    path = pack(folder, compression=compression)
    whole, draw, refused = path.read_bytes(), random.Random(0), 0
    with zipfile.ZipFile(path) as packed:
        directory, root = packed.start_dir, packed.getinfo("zarr.json").header_offset
    places = [draw.randrange(directory, len(whole)) for _ in range(150)]
    places += [draw.randrange(root, root + 60) for _ in range(50)]
    for place in places:
        content = bytearray(whole)
        content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        try:
            open_run(path)
        except (NotAStoreError, DamagedRecordError, FileNotFoundError):
            refused += 1
    assert refused > 10
