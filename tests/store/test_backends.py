from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from zarr.abc.store import Store
from zarr.storage import (
    FsspecStore,
    LocalStore,
    LoggingStore,
    MemoryStore,
    ObjectStore,
    WrapperStore,
    ZipStore,
)

from hild_xr.store import RunWriter, StoreError, WriterBusyError, open_run
from hild_xr.store.backends import Location, locate
from hild_xr.testing import random_record, spectrum_plan


def test_locate__takes_local_paths_through_the_atomic_local_store(tmp_path: Path) -> None:
    for target in (tmp_path, str(tmp_path), LocalStore(tmp_path), tmp_path.as_uri(), f"local://{tmp_path}"):
        location = locate(target)
        assert isinstance(location.store, LocalStore)
        assert location.path == tmp_path
        assert str(location) == str(tmp_path)


def test_locate__reads_a_file_url_as_the_path_it_names(tmp_path: Path) -> None:
    folder = tmp_path / "100 % mine" / "run.zarr"
    assert locate(folder.as_uri()).path == folder
    assert locate(f"FILE://localhost{tmp_path}").path == tmp_path
    with pytest.raises(ValueError, match=r"names the host 'server'.*file:///folder"):
        locate("file://server/share/run.zarr")


def test_locate__reads_a_file_url_with_one_slash_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for target in (
        f"file:{tmp_path}/run.zarr",
        Path(f"file://{tmp_path}/run.zarr"),
        f"FILE:{tmp_path}/run.zarr",
    ):
        assert locate(target).path == tmp_path / "run.zarr"


def test_locate__says_that_pathlib_broke_a_url() -> None:
    with pytest.raises(ValueError, match=r"pathlib\.Path.* pass the text 's3://bucket/run\.zarr'"):
        locate(Path("s3://bucket/run.zarr"))


def test_locate__refuses_as_a_value_error_of_the_store() -> None:
    with pytest.raises(ValueError, match="names the host") as caught:
        locate("file://server/run.zarr")
    assert isinstance(caught.value, StoreError)


def test_locate__keeps_a_relative_path_when_the_process_changes_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    location = locate("run.zarr")
    monkeypatch.chdir("/")
    assert location.path == tmp_path / "run.zarr"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/run.zarr").path == tmp_path / "run.zarr"


def test_record__into_a_relative_local_store_outlives_a_change_of_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    plan, store = spectrum_plan(seeds=(0,)), LocalStore("run.zarr")
    with RunWriter(store, plan, 0) as writer:
        monkeypatch.chdir(tmp_path / "elsewhere")
        writer.write("metrics", 0, random_record(plan, "metrics", seed=0, step=0))
    assert open_run(tmp_path / "run.zarr")["metrics"].sizes["step"] == 1
    assert list(Path.cwd().iterdir()) == []
    assert store.root == Path("run.zarr"), "the caller's store is the caller's"


def wrapped(folder: Path) -> Store:
    return WrapperStore(LocalStore(folder))


def logged(folder: Path) -> Store:
    return LoggingStore(WrapperStore(LocalStore(folder)))


def of_obstore(folder: Path) -> Store:
    obstore = pytest.importorskip("obstore")
    return ObjectStore(obstore.store.LocalStore(folder))


def of_fsspec_folder(folder: Path) -> Store:
    pytest.importorskip("fsspec")
    from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
    from fsspec.implementations.dirfs import DirFileSystem
    from fsspec.implementations.local import LocalFileSystem

    inner = DirFileSystem(str(folder.parent), LocalFileSystem())
    return FsspecStore(AsyncFileSystemWrapper(inner, asynchronous=True), path=folder.name)


def of_fsspec_async_folder(folder: Path) -> Store:
    pytest.importorskip("fsspec")
    from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
    from fsspec.implementations.dirfs import DirFileSystem
    from fsspec.implementations.local import LocalFileSystem

    local = AsyncFileSystemWrapper(LocalFileSystem(), asynchronous=True)
    return FsspecStore(DirFileSystem(str(folder), local, asynchronous=True), path="/")


def of_fsspec_cache(folder: Path) -> Store:
    pytest.importorskip("fsspec")
    return FsspecStore.from_url(f"simplecache::file://{folder}")


def cached_url(folder: Path) -> str:
    pytest.importorskip("fsspec")
    return f"simplecache::file://{folder}"


@pytest.mark.parametrize(
    "disguise",
    [wrapped, logged, of_obstore, of_fsspec_folder, of_fsspec_async_folder, of_fsspec_cache, cached_url],
)
def test_second_writer__is_refused_however_the_local_folder_is_reached(disguise: Any, tmp_path: Path) -> None:
    plan, folder = spectrum_plan(seeds=(0,)), tmp_path / "run.zarr"
    with RunWriter(folder, plan, 0) as first:
        for probe in plan.probes:
            first.write(probe, 0, random_record(plan, probe, seed=0, step=0))
        first.flush()
        target = disguise(folder)
        assert locate(target).path == folder
        with pytest.raises(WriterBusyError):
            RunWriter(target, plan, 0, resume_at=0)
    with RunWriter(disguise(folder), plan, 0, resume_at=0) as second:
        second.write("metrics", 1, random_record(plan, "metrics", seed=0, step=1))
    assert open_run(disguise(folder))["metrics"].sizes["step"] == 2


def test_locate__keeps_a_log_of_a_local_folder(tmp_path: Path) -> None:
    store = LoggingStore(LocalStore(tmp_path))
    assert locate(store).store is store


def test_locate__writes_through_no_wrapper_it_does_not_know(tmp_path: Path) -> None:
    class Encrypting(WrapperStore[LocalStore]):
        pass

    store = Encrypting(LocalStore(tmp_path / "run.zarr"))
    with pytest.raises(ValueError, match=r"Encrypting wraps the local folder .*run\.zarr.*pass the path"):
        locate(store)
    assert locate(store, read_only=True).store is store


def test_locate__takes_any_zarr_store() -> None:
    for store in (MemoryStore(), LoggingStore(MemoryStore())):
        assert locate(store).store is store
        assert locate(store).path is None


def test_locate__returns_a_location_as_it_is() -> None:
    location = Location(MemoryStore(), None, name="mine")
    assert locate(location) is location
    assert str(location) == "mine"


def test_locate__says_what_it_takes() -> None:
    with pytest.raises(TypeError, match=r"a path, a URL, a zarr store or an icechunk.Repository; got .*int"):
        locate(3)


def test_locate__opens_a_zip_file_for_reading_only(tmp_path: Path) -> None:
    path = tmp_path / "run.zip"
    with zipfile.ZipFile(path, "w"):
        pass
    location = locate(path, read_only=True)
    assert isinstance(location.store, ZipStore)
    assert location.path is None
    assert str(location) == str(path)
    for target in (path, path.as_uri(), ZipStore(path, mode="a"), tmp_path / "new.ZIP"):
        with pytest.raises(ValueError, match=r"Record into a folder, then zip .* zip -r -0 "):
            locate(target)
    assert [file.name for file in tmp_path.iterdir()] == ["run.zip"]


def test_locate__takes_a_folder_whose_name_ends_in_zip(tmp_path: Path) -> None:
    (tmp_path / "run.zip").mkdir()
    assert locate(tmp_path / "run.zip").path == tmp_path / "run.zip"


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_locate__refuses_to_write_to_a_web_address(scheme: str) -> None:
    with pytest.raises(ValueError, match="can be read only"):
        locate(f"{scheme}://example.org/run.zarr")


@pytest.mark.parametrize(
    ("url", "package"), [("s3://bucket/run.zarr", "obstore"), ("memory://run.zarr", "fsspec")]
)
def test_locate__names_the_extra_that_a_url_needs(
    url: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{url}.*{package}.*hild-xr\[cloud\]") as caught:
        locate(url)
    assert caught.value.name == package


def test_commit__of_a_store_that_shows_each_write_does_nothing(tmp_path: Path) -> None:
    for target in (tmp_path / "run.zarr", MemoryStore()):
        location = locate(target)
        assert not location.is_transactional
        location.commit("nothing to do")
    assert list(tmp_path.iterdir()) == []
