"""The store contract: planned, single-writer per seed, committed last.

``create`` makes all arrays of a plan, ``RunWriter`` writes the records of one
seed, ``open_run`` shows what is committed. Nothing here knows torch.
"""

from hild_xr.store.backends import StoreLike
from hild_xr.store.create import create, stored_plan
from hild_xr.store.errors import (
    MissingRecordsWarning,
    NotAStoreError,
    PlanMismatchError,
    RecordsExistError,
    StoreError,
    StoreWriteError,
    WriterBusyError,
)
from hild_xr.store.reader import open_run, recorded_seeds
from hild_xr.store.writer import Record, RunWriter

__all__ = [
    "MissingRecordsWarning",
    "NotAStoreError",
    "PlanMismatchError",
    "Record",
    "RecordsExistError",
    "RunWriter",
    "StoreError",
    "StoreLike",
    "StoreWriteError",
    "WriterBusyError",
    "create",
    "open_run",
    "recorded_seeds",
    "stored_plan",
]
