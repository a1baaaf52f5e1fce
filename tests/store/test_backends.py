from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest
from zarr.storage import LocalStore, LoggingStore, MemoryStore, ZipStore

from hild_xr.store.backends import Location, locate


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


def test_locate__keeps_a_relative_path_when_the_process_changes_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    location = locate("run.zarr")
    monkeypatch.chdir("/")
    assert location.path == tmp_path / "run.zarr"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/run.zarr").path == tmp_path / "run.zarr"


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
