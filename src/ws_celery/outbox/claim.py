"""The right of one run to its effect: the deletion of its row, in its own transaction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

from ws_celery.outbox.journal import connection_of
from ws_celery.outbox.run import Run

if TYPE_CHECKING:
    from ws_celery.outbox.store import Outbox

__all__ = ("Claim",)


class Claim(Run):
    """A run of a TransactionalTask.

    Its row is deleted at the beginning, so that no other run can begin, or just before the commit,
    so that only one run can commit: with the task's option ``acknowledge="late"``, and in SQLite,
    which has no row locks.

    :param outbox: the outbox.
    :param task: the task that runs.
    :param row_id: id of the row that the message names.
    """

    def __init__(self, outbox: Outbox, task: Any, row_id: UUID) -> None:
        super().__init__(outbox, task, row_id)
        late = getattr(task, "acknowledge", "early") == "late"
        self._late = late or outbox.engine.dialect.name == "sqlite"

    def begin(self, request: Any, txn: Any) -> None:
        """Claim the row, or look whether it is there if that comes later.

        :param request: the request of the run.
        :param txn: the transaction of the run.
        :raises Duplicate: if it is not, or another run has it.
        :raises ForeignMessage: if it is not, and the message is another outbox's.
        """
        rows = self._outbox.rows
        if self._late and self._task.request.expires is not None:
            self._outbox.begun(self._row_id)
        found = rows.is_there if self._late else rows.claim
        if not self._tell(found, request, txn):
            raise self.without_row("runs elsewhere, has run, or is a dead letter")

    def end(self, request: Any, txn: Any) -> None:
        """Claim the row if that was not done; the commit comes next.

        :raises Duplicate: if another run has committed meanwhile.
        """
        if self._late and not self._tell(self._outbox.rows.claim, request, txn):
            raise self.without_row("has run elsewhere")

    def _tell(self, statement: Any, request: Any, txn: Any) -> bool:
        session = self._outbox.session_of(request, self._task.name)
        with self._outbox.explaining():
            connection = connection_of(session, self._outbox.rows.table, txn)
            found = bool(statement(connection, self._row_id))
            if not found:
                self._outbox.look(connection)
            return found
