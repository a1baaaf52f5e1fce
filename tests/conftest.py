"""Fixtures of the tests."""

from __future__ import annotations

import os
import shutil

import pytest

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def chromium_path() -> str:
    """Return the path of the browser; without one a test is skipped here and fails in CI."""
    wanted = os.environ.get("HILD_XR_CHROMIUM")
    found = filter(None, map(shutil.which, [wanted] if wanted else CHROMIUM_NAMES))
    path = next(found, None)
    if path is not None:
        return path
    looked_for = f"HILD_XR_CHROMIUM={wanted}" if wanted else f"{', '.join(CHROMIUM_NAMES)} on the PATH"
    reason = (
        f"no browser (looked for {looked_for}): install Debian's package chromium, "
        "or set HILD_XR_CHROMIUM to the path of a Chromium"
    )
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
