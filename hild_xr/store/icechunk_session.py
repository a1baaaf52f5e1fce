"""A branch of an Icechunk repository as a store: one commit a flush, rebased on what other seeds committed.

Icechunk keeps every commit as a snapshot: an older state of a run can be opened, and a
crash in the middle of a flush leaves nothing behind. Nothing here imports icechunk before
something is committed.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from zarr.abc.store import Store
from zarr.storage import WrapperStore

from hild_xr.store.errors import StoreWriteError


@runtime_checkable
class Session(Protocol):
    """What is used of an ``icechunk.Session``."""

    @property
    def store(self) -> Any:
        """Its zarr store."""

    @property
    def read_only(self) -> bool:
        """Whether it is a snapshot to read."""

    @property
    def snapshot_id(self) -> str:
        """The snapshot it stands on."""

    @property
    def has_uncommitted_changes(self) -> bool:
        """Whether something was written since."""

    def commit(self, message: str, *, rebase_with: Any) -> str:
        """Make what was written a new snapshot of the branch."""


@runtime_checkable
class Repository(Protocol):
    """What is used of an ``icechunk.Repository``."""

    def readonly_session(self, branch: str) -> Any:
        """Open the last snapshot of a branch for reading."""

    def writable_session(self, branch: str) -> Any:
        """Start to write on a branch."""


class BranchStore(WrapperStore[Store]):
    """A branch of a repository that goes on after each commit.

    A session of Icechunk ends with its commit. This store then takes the next
    one, so that zarr arrays which were opened from it stay valid.

    Parameters
    ----------
    repository
        An ``icechunk.Repository``.
    branch
        Name of the branch.
    read_only
        Show the last snapshot of the branch, until :meth:`renew` shows the one that is last then.
        :meth:`latest` shows that one in another store.

    Examples
    --------
    A run on another branch than ``main``::

        store = BranchStore(repository, "dev")
        with RunWriter(store, plan, seed=0) as writer:
            ...
    """

    def __init__(self, repository: Repository, branch: str = "main", *, read_only: bool = False) -> None:
        self._repository, self._branch, self._only_reads = repository, branch, read_only
        self._session = self._next_session()
        super().__init__(self._session.store)

    def commit(self, message: str) -> None:
        """Make what was written since the last commit a snapshot; do nothing if nothing was written.

        Snapshots that others committed meanwhile are kept: this one is put on
        top of them, if no array chunk and no node was written by both.

        Raises
        ------
        StoreWriteError
            If another writer committed the same chunks or nodes. Nothing of this
            session is committed then, and :meth:`renew` gives it up.
        """
        from icechunk import ConflictDetector, ConflictError, RebaseFailedError

        if not self._session.has_uncommitted_changes:
            return
        try:
            self._session.commit(message, rebase_with=ConflictDetector())
        except (ConflictError, RebaseFailedError) as error:
            raise StoreWriteError(
                f"{self}: another writer has committed what this one wrote too ({error}); nothing of "
                f"{message!r} was committed. One process writes one seed: end the other one, or record "
                "into another branch."
            ) from error
        self.renew()

    def renew(self) -> None:
        """Go on from the last snapshot of the branch; what was not committed is given up."""
        self._session = self._next_session()
        self._store = self._session.store

    @property
    def snapshot_id(self) -> str:
        """The snapshot that it shows, or that writing goes on from."""
        return self._session.snapshot_id

    def latest(self) -> BranchStore:
        """Return another store, read-only, on the last snapshot of the branch.

        This one stays where it is, and so does what was opened from it.
        """
        return BranchStore(self._repository, self._branch, read_only=True)

    def with_read_only(self, read_only: bool = False) -> Any:
        """Return this store, or a read-only view of what it shows now."""
        return WrapperStore(self._store.with_read_only(True)) if read_only else self

    def __eq__(self, value: object) -> bool:
        return isinstance(value, BranchStore) and self._store == value._store

    def __str__(self) -> str:
        return f"branch {self._branch!r} of an Icechunk repository"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._repository!r}, {self._branch!r})"

    def _next_session(self) -> Session:
        repository = self._repository
        session: Session = (
            repository.readonly_session(self._branch)
            if self._only_reads
            else repository.writable_session(self._branch)
        )
        return session
