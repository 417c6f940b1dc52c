"""The right of one run to its effect: the deletion of its row, in its own transaction."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from sqlalchemy import Connection, Row

from ws_celery.dispatch import ROW_HEADER
from ws_celery.exceptions import OutboxDetached
from ws_celery.outbox.journal import connection_of, join
from ws_celery.outbox.run import Run

if TYPE_CHECKING:
    from ws_celery.outbox.store import Outbox

__all__ = ("Claim",)

_ELSEWHERE = "has run elsewhere, or was given up"

#: Error of the row of what comes after a function's own commit, until it ends.
_CUT_SHORT = (
    "the function has committed by itself, which was its effect, and what it does after that has "
    "not ended: its process was killed, or it takes longer than the lease"
)


class Claim(Run):
    """A run of a TransactionalTask.

    Its row is deleted at the beginning, so that no other run can begin, or just before the commit,
    so that only one run can commit: with the task's option ``acknowledge="late"``, and in SQLite,
    which has no row locks. A function that aborts by itself gives the row back; it is claimed in
    the transaction that commits. If the function commits by itself, that is the effect, and another
    row takes the place of the first in the same commit: it stands for the rest of the run, which
    ends, is tried again or becomes a dead letter, and is never sent as it is.

    :param outbox: the outbox.
    :param task: the task that runs.
    :param row_id: id of the row that the message names.
    """

    def __init__(self, outbox: Outbox, task: Any, row_id: UUID) -> None:
        super().__init__(outbox, task, row_id)
        late = getattr(task, "acknowledge", "early") == "late"
        self._late = late or outbox.engine.dialect.name == "sqlite"
        self._request: Any = None
        #: The transaction that the row is deleted in.
        self._txn: Any = None
        #: The row of the rest of the run, once the function commits by itself.
        self._rest: UUID | None = None
        #: Whether the function has committed by itself: the run must not be made again in place.
        self.has_committed = False

    def begin(self, request: Any, txn: Any) -> None:
        """Claim the row, or look whether it is there if that comes later.

        :param request: the request of the run.
        :param txn: the transaction of the run.
        :raises Duplicate: if it is not, or another run has it.
        :raises ForeignMessage: if it is not, and the message is another outbox's.
        """
        self._request, self._txn, self._rest = request, None, None
        if not self._late:
            self._take(txn, "runs elsewhere, has run, or is a dead letter")
            return
        if self._task.request.expires is not None:
            self._outbox.begun(self._row_id)
        if not self._tell(self._outbox.rows.is_there, txn):
            raise self.without_row("has run, or is a dead letter")

    def end(self, txn: Any) -> None:
        """Claim the row if the transaction that commits next does not have it yet.

        :raises Duplicate: if another run has committed meanwhile.
        """
        if self._txn is not txn:
            self._take(txn, _ELSEWHERE)

    # What the function does by itself

    def before_completion(self, txn: Any) -> None:
        """Let the session belong to a transaction of the function: it could not join its commit."""
        if not self.has_committed:
            with suppress(OutboxDetached):
                join(self._session, txn, self._task.name)

    def commit(self, txn: Any) -> None:
        """Claim the row with a commit of the function, and write the row of what comes after it.

        :raises Duplicate: if another run has committed meanwhile.
        """
        if self.has_committed:
            return
        connection = connection_of(self._session, self._outbox.rows.table, txn)
        row = self._row(connection, txn)
        self.end(txn)
        self._rest = uuid4()
        self._outbox.rows.insert_rest(connection, row, self._rest, self._outbox.lease, _CUT_SHORT)

    def _row(self, connection: Connection, txn: Any) -> Row[Any]:
        rows = self._outbox.rows
        if self._txn is txn:
            # Its own transaction does not see any more what it has deleted.
            with self._outbox.begin() as other:
                row = rows.get(other, self._row_id)
        else:
            row = rows.get(connection, self._row_id)
        if row is None:
            raise self.without_row(_ELSEWHERE)
        return row

    def after_completion(self, txn: Any) -> None:
        """Take the row of the rest for the run's own, if this was the commit that wrote it."""
        if self.has_committed or self._rest is None or txn.status != "Committed":
            return
        self.has_committed = True
        self._row_id, self._txn = self._rest, None
        context = self._task.request
        context.headers = {**context.headers, ROW_HEADER: str(self._rest)}
        context.ws_celery_attempts = 0

    @property
    def _session(self) -> Any:
        return self._outbox.session_of(self._request, self._task.name)

    def _take(self, txn: Any, otherwise: str) -> None:
        rows = self._outbox.rows
        # Nobody but this run has the row of its rest, which may have become a dead letter.
        taken = self._tell(rows.delete_one if self.has_committed else rows.claim, txn)
        if not taken:
            raise self.without_row(otherwise)
        self._txn = txn

    def _tell(self, statement: Any, txn: Any) -> bool:
        with self._outbox.explaining():
            connection = connection_of(self._session, self._outbox.rows.table, txn)
            found = bool(statement(connection, self._row_id))
            if not found:
                self._outbox.look(connection)
            return found
