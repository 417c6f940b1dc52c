"""What waits in the outbox, and its dead letters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any
from uuid import UUID

from ws_celery.app import PyramidCelery, get_celery_app
from ws_celery.exceptions import BrokenRow, NotFound, NotIncluded
from ws_celery.inspection.messages import Record, Source, body_of, time_of
from ws_celery.masking import masked_text
from ws_celery.shown_arguments import shown_arguments, shown_text

if TYPE_CHECKING:
    from sqlalchemy import Row

    from ws_celery.outbox import Outbox
    from ws_celery.recording import Publication

__all__ = (
    "OutboxRow",
    "OutboxState",
    "Retried",
    "create_outbox",
    "dead_letters",
    "discard_outbox_rows",
    "find_outbox_rows",
    "outbox_row_ids",
    "outbox_rows",
    "outbox_state",
    "retry_outbox_rows",
)

#: How many rows one transaction changes.
_BATCH = 500
_TIMES = ("created_at", "eta", "expires", "due_at", "died_at")


@dataclass(frozen=True)
class OutboxRow(Record):
    """A dispatch that has not taken effect yet, or a dead letter.

    :param id: of the row.
    :param task_id: the id of the task, as ``AsyncResult`` has it.
    :param task: the name of the task.
    :param queue: where it is sent.
    :param is_dead: whether it is a dead letter.
    :param created_at: when it was dispatched, by the database's clock; as all times here, in UTC.
    :param eta: before when it is not to run, if the call said so.
    :param expires: after when it is not to run, if the call said so.
    :param due_at: when the relay sends it again, unless it has ended; ``None`` for a dead letter.
    :param died_at: when it became a dead letter.
    :param deliveries: how often the relay has sent it.
    :param retries: how often the task has asked to be tried again.
    :param error: why it is a dead letter: a traceback, or a sentence; its secrets masked.
    :param problem: what is wrong with the row itself, so that it cannot be sent.
    :param arguments: ``args`` and ``kwargs`` of the call, their secrets masked; ``None`` if they
        cannot be read.
    """

    id: UUID
    task_id: str
    task: str
    queue: str | None
    is_dead: bool
    created_at: datetime
    eta: datetime | None
    expires: datetime | None
    due_at: datetime | None
    died_at: datetime | None
    deliveries: int
    retries: int
    error: str | None = field(repr=False)
    problem: str | None
    arguments: dict[str, Any] | None = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them, without the arguments."""
        fields = super().as_dict()
        del fields["arguments"]
        return {**fields, "id": str(self.id)}


@dataclass(frozen=True)
class OutboxState:
    """The outbox of an application at a glance.

    :param table: the name of its table.
    :param waiting: how many dispatches wait for their end.
    :param dead: how many dead letters there are.
    :param clock_difference: by how many seconds the database's clock is ahead of this machine's.
    """

    table: str
    waiting: int
    dead: int
    clock_difference: float


@dataclass(frozen=True)
class Retried:
    """The outcome of :func:`retry_outbox_rows`.

    :param sent: ids of the rows that were handed to the broker, are due at once, or wait for their
        eta.
    :param busy: ids of the rows that are gone, or that a running task has.
    :param broken: what is wrong with the others, which stay as they are.
    """

    sent: list[UUID] = field(default_factory=list)
    busy: list[UUID] = field(default_factory=list)
    broken: list[BrokenRow] = field(default_factory=list)


def create_outbox(source: Source) -> bool:
    """Create the table of the outbox if it is missing.

    :param source: a registry, or what has one: a request, a Celery app. So it is for all of these
        functions; each of them raises ``NotIncluded``, ``TableError`` and
        ``Unavailable`` (see :mod:`ws_celery.exceptions`).
    :return: whether it was missing.
    :raises TableError: if there is a table of its name with other columns.
    """
    return _outbox(source).create_table()


def outbox_state(source: Source) -> OutboxState:
    """Look whether the table is there and right, and count its rows."""
    outbox = _outbox(source)
    outbox.check_table()
    with outbox.begin() as connection:
        waiting, dead = outbox.rows.count(connection)
        ahead = (outbox.rows.now(connection) - datetime.now(timezone.utc)).total_seconds()
    return OutboxState(outbox.rows.table.fullname, waiting, dead, ahead)


def outbox_rows(
    source: Source, *, dead: bool | None = True, limit: int | None = 100
) -> list[OutboxRow]:
    """Return rows, the oldest first.

    :param dead: only dead letters; with ``False`` only what waits; with ``None`` all.
    :param limit: how many at most.
    """
    outbox = _outbox(source)
    with outbox.begin() as connection:
        statement = outbox.rows.select(dead=dead).limit(limit)
        return [_row(outbox, row) for row in connection.execute(statement)]


def find_outbox_rows(source: Source, name: str) -> list[OutboxRow]:
    """Return the row of an id, or the rows of a task's id: a caller may use one twice.

    :raises NotFound: if there is none.
    """
    outbox = _outbox(source)
    if rows := outbox.execute(outbox.rows.find, name):
        return [_row(outbox, row) for row in rows]
    raise NotFound("row", name)


def outbox_row_ids(source: Source, names: Iterable[str]) -> list[UUID]:
    """Return the ids of rows that are named by their id or by the id of their task.

    :raises NotFound: if there is none, or several tasks have the id.
    """
    ids = []
    for name in names:
        found = [row.id for row in find_outbox_rows(source, name)]
        if len(found) > 1:
            raise NotFound("row", name, found)
        ids += found
    return ids


def dead_letters(source: Source) -> list[UUID]:
    """Return the ids of all dead letters, the oldest first."""
    outbox = _outbox(source)
    with outbox.begin() as connection:
        statement = outbox.rows.select(dead=True).with_only_columns(outbox.rows.table.c.id)
        return list(connection.execute(statement).scalars())


def retry_outbox_rows(source: Source, ids: Iterable[UUID]) -> Retried:
    """Send rows again, as if they had just been dispatched; most of them are dead letters.

    What the broker does not take is due at once, so that a relay sends it. What has a far eta waits
    for it in the table.
    """
    outbox, outcome = _outbox(source), Retried()
    for batch in _batches(ids):
        with outbox.begin() as connection:
            rows = outbox.rows.lock(connection, batch)
            due: dict[UUID, float] = {}
            publications: list[Publication] = []
            for row in rows:
                try:
                    publication = outbox.publication_of(row)
                except BrokenRow as error:
                    outcome.broken.append(error)
                    continue
                publication.waits, due[row.id] = outbox.when_due(row.eta)
                publications.append(publication)
            outbox.rows.requeue(connection, due, outbox.lease)
        outbox.app.publish(publications)
        outcome.sent.extend(due)
        outcome.busy.extend(set(batch) - {row.id for row in rows})
    return outcome


def discard_outbox_rows(source: Source, ids: Iterable[UUID]) -> int:
    """Delete rows: these dispatches are given up.

    Their messages in queues are not run, except those of plain tasks of Celery, which do not look
    for their row.

    :return: how many; what a running task has is not deleted.
    """
    outbox = _outbox(source)
    return sum(outbox.execute(outbox.rows.delete, batch) for batch in _batches(ids))


def _outbox(source: Source) -> Outbox:
    outbox: Outbox | None = get_celery_app(source).outbox
    if outbox is None:
        raise NotIncluded("outbox")
    return outbox


def _batches(ids: Iterable[UUID]) -> Iterator[Sequence[UUID]]:
    wanted = list(dict.fromkeys(ids))
    for start in range(0, len(wanted), _BATCH):
        yield wanted[start : start + _BATCH]


def _row(outbox: Outbox, row: Row[Any]) -> OutboxRow:
    problem, retries, call = None, 0, None
    try:
        publication = outbox.publication_of(row)
        retries = publication.options["headers"].get("retries") or 0
        call = _call(outbox.app, publication)
    except BrokenRow as error:
        problem = error.problem
    times: dict[str, Any] = {name: time_of(getattr(row, name)) for name in _TIMES}
    return OutboxRow(
        id=row.id,
        task_id=row.task_id,
        task=row.task,
        queue=row.queue,
        is_dead=row.due_at is None,
        deliveries=row.deliveries,
        retries=retries,
        error=row.error and shown_text(outbox.app, row.task, call, row.error),
        problem=problem and masked_text(problem),
        arguments=call and shown_arguments(outbox.app, row.task, *call),
        **times,
    )


def _call(app: PyramidCelery, publication: Publication) -> tuple[Any, Any] | None:
    try:
        args, kwargs, _ = body_of(app, publication)
    except Exception:  # noqa: BLE001  whatever was written there; it is shown, not run
        return None
    return args, kwargs
