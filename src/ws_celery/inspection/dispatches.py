"""What the outbox knows of the messages in queues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from kombu.serialization import loads, prepare_accept_content

from ws_celery.exceptions import BrokenRow
from ws_celery.inspection.messages import WaitingMessage, told

__all__ = ("oldest_dispatch", "waiting_dispatches")


def oldest_dispatch(app: Any, messages: Mapping[str, Sequence[Any]]) -> dict[str, datetime]:
    """Return when the first of some messages was dispatched.

    :param messages: the headers of messages, by anything.
    :return: the times by the same, without those that have no row.
    """
    wanted = {key: app.outbox.row_ids(headers) for key, headers in messages.items()}
    columns = app.outbox.rows.table.c
    ids = [row_id for found in wanted.values() for row_id in found]
    if not ids:
        return {}
    statement = app.outbox.rows.select().with_only_columns(columns.id, columns.created_at)
    with app.outbox.begin() as connection:
        found = connection.execute(statement.where(columns.id.in_(ids))).all()
    times = {row_id: _utc(time) for row_id, time in found}
    return {
        key: min(times[row_id] for row_id in row_ids if row_id in times)
        for key, row_ids in wanted.items()
        if times.keys() & set(row_ids)
    }


def waiting_dispatches(app: Any, queue: str, limit: int) -> list[WaitingMessage]:
    """Return the unfinished dispatches to a queue, the oldest first."""
    columns = app.outbox.rows.table.c
    statement = app.outbox.rows.select(dead=False).where(columns.queue == queue).limit(limit)
    with app.outbox.begin() as connection:
        return [_told(app, row) for row in connection.execute(statement)]


def _told(app: Any, row: Any) -> WaitingMessage:
    try:
        publication = app.outbox.publication_of(row)
    except BrokenRow as error:
        return WaitingMessage(id=row.task_id, task=row.task, problem=error.problem)
    options = publication.options
    accept = prepare_accept_content(app.conf.accept_content)
    content = options["content_type"], options["content_encoding"]
    try:
        body, problem = loads(publication.payload, *content, accept=accept), None
    except Exception as error:  # noqa: BLE001  whatever was written there; it is shown, not run
        body, problem = None, f"its arguments cannot be read: {type(error).__name__}: {error}"
    return told(app, options["headers"], body, problem, options)


def _utc(time: datetime) -> datetime:
    # Not all databases keep the zone.
    return time if time.tzinfo else time.replace(tzinfo=timezone.utc)
