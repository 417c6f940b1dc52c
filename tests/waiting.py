"""How long tests wait for what must happen: a limit for failures, and never a measure of speed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

__all__ = ("SOON", "wait_for")

#: Seconds until something must have happened.
SOON = 60


def wait_for(condition: Callable[[], Any], what: str = "it", timeout: float = SOON) -> Any:
    """Return what ``condition`` returns as soon as it is true."""
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not happen within {timeout} s")
        time.sleep(0.02)
    return result
