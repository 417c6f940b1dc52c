"""``overlap = skip``: whether the task that was sent last has come to its end."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from celery import states
from celery.backends.base import DisabledBackend

from ws_celery.beat.entry import Entry
from ws_celery.locks import SKIPPED

__all__ = ("is_kept", "is_unfinished", "nothing_tells", "unfinished_rows")

#: Celery's own ends, and that of a run that another one has kept from running.
_ENDED = states.READY_STATES | {SKIPPED}


def is_kept(app: Any, entry: Entry) -> bool:
    """Tell whether the row that the task of an entry has in the outbox tells its end."""
    if app.outbox is None or app.eager is not None:
        return False
    return bool(getattr(app.tasks.get(entry.task), "outbox", True))


def nothing_tells(app: Any, entry: Entry) -> str | None:
    """Return why nothing can tell when the task of an entry has ended; ``None`` if something can.

    :param entry: its task is one of the application's.
    """
    if app.eager is not None or is_kept(app, entry):
        return None
    if isinstance(app.backend, DisabledBackend):
        return "the application has no result_backend"
    if entry.options.get("ignore_result", app.tasks[entry.task].ignore_result):
        return f"the results of {entry.task} are ignored"
    return None


def unfinished_rows(app: Any, connection: Any, task_ids: Mapping[str, str]) -> set[str]:
    """Return which tasks still have their row: they wait, or run.

    :param task_ids: name of the entry to the id of the task.
    """
    if not task_ids:
        return set()
    waiting = app.outbox.rows.waiting(connection, task_ids.values())
    return {name for name, task_id in task_ids.items() if task_id in waiting}


def is_unfinished(app: Any, task_id: str, since: datetime, now: datetime) -> bool:
    """Tell by its result whether a task waits, or runs.

    A result that has not come within ``result_expires`` is not waited for any longer: the task was
    lost.

    :param since: when it was sent.
    """
    longest = app.conf.result_expires or timedelta(days=1)
    if not isinstance(longest, timedelta):
        longest = timedelta(seconds=longest)
    if now - since > longest:
        return False
    return app.AsyncResult(task_id).state not in _ENDED
