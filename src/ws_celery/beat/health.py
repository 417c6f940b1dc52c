"""``ws-celery beat --health-file``: a file that tells a probe that beat ticks."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path

from ws_celery.outages import Service

__all__ = ("HealthFile",)

#: Seconds between two times that it is written.
_EVERY = 1.0


class HealthFile:
    """Written after each turn in which what beat needs has answered, at most once a second.

    A probe looks at its age; what it holds is for people.

    :param path: the file; none is written without.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._service = Service("Beat", "health file")
        self._written = datetime.min.replace(tzinfo=timezone.utc)
        self._last_tick: datetime | None = None

    def ticked(self) -> None:
        """Take note of a tick that was sent."""
        self._last_tick = datetime.now(timezone.utc)

    def write(self, entries: int, overdue: int) -> None:
        """Tell that beat is alive.

        :param entries: how many entries tick.
        :param overdue: how many of them should have been sent already.
        """
        now = datetime.now(timezone.utc)
        if self._path is None or abs((now - self._written).total_seconds()) < _EVERY:
            return
        self._written = now
        age = self._last_tick and round((now - self._last_tick).total_seconds(), 3)
        text = json.dumps(
            {"at": now.isoformat(), "last_tick_age": age, "entries": entries, "overdue": overdue}
        )
        try:
            beside = self._path.with_name(f".{self._path.name}.new")
            beside.write_text(text + "\n")
            beside.replace(self._path)  # whole, whenever it is read
        except OSError as error:
            self._service.failed(error)
        else:
            self._service.works()
