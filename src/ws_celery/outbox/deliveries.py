"""What the relay takes out of the outbox, batch by batch, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, NamedTuple

from ws_celery.dispatch import Publication
from ws_celery.exceptions import BrokenRow, BrokerUnavailable
from ws_celery.outbox.rows import UNREADABLE
from ws_celery.outbox.table import aware

if TYPE_CHECKING:
    from ws_celery.outbox.store import Outbox

__all__ = ("Batch", "Deliveries")


class Batch(NamedTuple):
    """What one transaction has taken.

    :param publications: what is to be published.
    :param taken: how many rows were due: none if all are in the hands of somebody else.
    """

    publications: list[Publication]
    taken: int


class Deliveries:
    """The relay's transactions: each is short, and none is open while the broker is talked to.

    :param outbox: the outbox.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._rows = outbox.rows

    def take(self, limit: int, length: Callable[[str], int]) -> Batch:
        """Take messages that are due; their delivery is counted, and their lease doubled, before.

        What cannot be sent ends here: a row that is broken or that nobody can read, and one that
        was sent too often, become dead letters, an expired one is deleted. What was sent before and
        still waits in its queue is left for another lease, uncounted; what has a far eta still,
        after a jump of the database's clock, until shortly before it.

        :param limit: how many at most.
        :param length: returns how many messages wait in a queue.
        :raises BrokerUnavailable: if the broker does not tell; nothing is counted then.
        """
        try:
            return self._take(limit, length)
        except UNREADABLE:
            if not self._bury_unreadable(limit):
                raise
            return Batch([], limit)

    def _take(self, limit: int, length: Callable[[str], int]) -> Batch:
        with self._outbox.begin() as connection:
            rows = self._rows.take_due(connection, limit)
            self._outbox.look(connection)
            early = self._early(rows)
            publications, endings = self._sorted([row for row in rows if row.id not in early])
            self._rows.put_off(connection, early)
            self._end(connection, endings)
        ids = {publication.row_id for publication in publications}
        try:
            waiting = self._waiting([row for row in rows if row.id in ids], length)
        except BrokerUnavailable:
            self.give_back(ids)
            raise
        if waiting:
            self.give_back(waiting, now=False)
        left = [each for each in publications if each.row_id not in waiting]
        return Batch(left, len(rows))

    def give_back(self, ids: Iterable[Any], *, now: bool = True) -> None:
        """Undo the count of messages that were not sent; they are due now, or after their lease."""
        with self._outbox.begin() as connection:
            self._rows.give_back(connection, ids, now=now)

    def all_due(self) -> int:
        """Make all that is unfinished due now, but for far etas; return how many that are."""
        with self._outbox.begin() as connection:
            return self._rows.hasten_all(connection, self._outbox.lease)

    def seconds_until_due(self) -> float | None:
        """Return in how many seconds the next row is due, or ``None`` if there is none."""
        with self._outbox.begin() as connection:
            return self._rows.seconds_until_due(connection)

    def _early(self, rows: Sequence[Any]) -> dict[Any, float]:
        """Return what waits for a far eta still: by id, in how many seconds it is due."""
        found = {row.id: self._outbox.when_due(row.eta) for row in rows if row.eta}
        return {row_id: due for row_id, (far, due) in found.items() if far}

    def _sorted(self, rows: Sequence[Any]) -> tuple[list[Publication], dict[Any, str | None]]:
        """Return what can be sent, and why the others cannot: by id, ``None`` if expired."""
        now = datetime.now(timezone.utc)
        publications: list[Publication] = []
        endings: dict[Any, str | None] = {}
        most = self._outbox.max_deliveries
        for row in rows:
            if row.expires is not None and aware(row.expires) <= now:
                endings[row.id] = None
            elif row.error is not None:  # the rest of a run that has committed by itself
                endings[row.id] = row.error
            elif row.deliveries >= most:
                endings[row.id] = (
                    f"sent {row.deliveries} times by the relay (ws_celery.outbox.max_deliveries), "
                    "and no run has ended: it may kill its worker, take longer than the lease, or "
                    "be taken from its queue by the workers of another application"
                )
            else:
                try:
                    publications.append(self._outbox.publication_of(row))
                except BrokenRow as error:
                    endings[row.id] = str(error)
        return publications, endings

    def _bury_unreadable(self, limit: int) -> int:
        """Make a row that stops all others a dead letter; return how many there were."""
        with self._outbox.begin() as connection:
            errors = self._rows.unreadable(connection, limit)
            for row_id, error in errors.items():
                reason = f"the row cannot be read: {error}"
                self._rows.bury_unreadable(connection, row_id, reason)
        return len(errors)

    def _end(self, connection: Any, endings: dict[Any, str | None]) -> None:
        expired = [row_id for row_id, error in endings.items() if not error]
        if expired:
            self._rows.delete(connection, expired)
        for row_id, error in endings.items():
            if error:
                self._rows.bury(connection, row_id, error)

    def _waiting(self, rows: Iterable[Any], length: Callable[[str], int]) -> set[Any]:
        """Return the ids of what was sent before and still waits in its queue."""
        queues: dict[str, list[Any]] = {}
        for row in rows:
            if row.queue and _was_sent(row):
                queues.setdefault(row.queue, []).append(row)
        return {
            row.id
            for queue, sent in queues.items()
            for row in self._still_there(sent, queue, length(queue))
        }

    def _still_there(self, sent: list[Any], queue: str, length: int) -> list[Any]:
        # What is in a queue is what was sent last: as many of the youngest as it is long.
        if not length:
            return []
        with self._outbox.begin() as connection:
            since = self._rows.waiting_since(connection, queue, length, self._outbox.lease)
        return [row for row in sent if since is None or row.created_at >= since]


def _was_sent(row: Any) -> bool:
    """Tell whether a row is due because its lease has run out, not for the first time."""
    if row.deliveries:
        return True
    ready = max(filter(None, (row.created_at, row.eta)))
    waited: float = (row.due_at - ready).total_seconds()
    return waited > row.lease / 2
