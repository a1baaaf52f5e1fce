"""Is a stored run sound? Metadata against the plan, every checksum, and what the numbers must obey."""

from hild_xr.store.validation.findings import Finding, ValidationReport
from hild_xr.store.validation.validate import validate

__all__ = ["Finding", "ValidationReport", "validate"]
