from __future__ import annotations

from pathlib import Path

import pytest
from zarr.storage import LocalStore, MemoryStore

from hild_xr.store.backends import locate


def test_locate__takes_local_paths_through_the_atomic_local_store(tmp_path: Path) -> None:
    for target in (tmp_path, str(tmp_path), LocalStore(tmp_path)):
        location = locate(target)
        assert isinstance(location.store, LocalStore)
        assert location.path == tmp_path


def test_locate__takes_any_zarr_store() -> None:
    store = MemoryStore()
    assert locate(store).store is store
    assert locate(store).path is None


def test_locate__says_what_to_pass_instead_of_a_url() -> None:
    with pytest.raises(ValueError, match="FsspecStore"):
        locate("file:///tmp/run.zarr")
    with pytest.raises(TypeError, match="a path or a zarr store"):
        locate(3)
