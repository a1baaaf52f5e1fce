"""The store contract: planned, single-writer per seed, committed last.

``create`` makes all arrays of a plan, ``RunWriter`` writes the records of one
seed, ``open_run`` shows what is committed. Nothing here knows torch.
"""

from hild_xr.store.backends import StoreLike, UnusableTargetError
from hild_xr.store.create import create, stored_plan
from hild_xr.store.errors import (
    DamagedRecordError,
    MissingRecordsWarning,
    NotAStoreError,
    NotEnoughSpaceError,
    PlanMismatchError,
    RecordsExistError,
    RecordsWithdrawnWarning,
    StoreError,
    StoreWriteError,
    WriterBusyError,
)
from hild_xr.store.icechunk_session import BranchStore
from hild_xr.store.reader import open_run, recorded_seeds, refresh_run
from hild_xr.store.space import check_space
from hild_xr.store.validation import Finding, ValidationReport, validate
from hild_xr.store.writer import Record, RunWriter

__all__ = [
    "BranchStore",
    "DamagedRecordError",
    "Finding",
    "MissingRecordsWarning",
    "NotAStoreError",
    "NotEnoughSpaceError",
    "PlanMismatchError",
    "Record",
    "RecordsExistError",
    "RecordsWithdrawnWarning",
    "RunWriter",
    "StoreError",
    "StoreLike",
    "StoreWriteError",
    "UnusableTargetError",
    "ValidationReport",
    "WriterBusyError",
    "check_space",
    "create",
    "open_run",
    "recorded_seeds",
    "refresh_run",
    "stored_plan",
    "validate",
]
