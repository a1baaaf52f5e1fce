"""What can go wrong with a store, each with a type of its own."""

from __future__ import annotations


class StoreError(Exception):
    """Base of everything that the store raises about itself."""


class NotAStoreError(StoreError):
    """The target exists but was not written by hild-xr."""


class PlanMismatchError(StoreError):
    """The store exists and was created from another plan.

    Attributes
    ----------
    differences
        One line a difference.
    """

    def __init__(self, where: str, differences: list[str]) -> None:
        self.differences = differences
        listed = "\n".join(f"  - {line}" for line in differences)
        super().__init__(
            f"{where} exists and was created from another plan; nothing was written.\n{listed}\n"
            "Choose another path, or record with the plan that the store was made with."
        )


class RecordsExistError(StoreError):
    """The seed already has committed records and resuming was not asked for."""


class WriterBusyError(StoreError):
    """Another live process writes the same seed."""


class NotEnoughSpaceError(StoreError):
    """The disk has no room for what is planned."""


class StoreWriteError(StoreError):
    """A flush failed; what was committed before is untouched."""


class MissingRecordsWarning(UserWarning):
    """A seed goes on from a checkpoint before which records were lost; they stay NaN in the data."""


class DamagedRecordError(StoreError):
    """A committed record cannot be read: its file is gone, or its checksum differs."""


class RecordsWithdrawnWarning(UserWarning):
    """Records that a tree saw at opening were withdrawn by a resume; they read as missing in it."""
