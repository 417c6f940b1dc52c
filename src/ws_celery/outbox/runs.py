"""A run without a transaction: it may be made twice, and its chain goes on once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from celery.canvas import signature
from sqlalchemy.exc import DBAPIError, OperationalError

from ws_celery.exceptions import Abandoned, SessionError, WsCeleryError
from ws_celery.masking import logger_of
from ws_celery.outbox.journal import connection_of, join
from ws_celery.recording import ROW_HEADER, Publication, holding

if TYPE_CHECKING:
    from sqlalchemy import Connection, Row

    from ws_celery.outbox.store import Outbox

__all__ = (
    "Claim",
    "Run",
    "Unclaimed",
)

log = logger_of(__name__)


class Run:
    """One run of a task.

    :param outbox: the outbox.
    :param task: the task that runs.
    :param row_id: id of the row that the message names.
    """

    def __init__(self, outbox: Outbox, task: Any, row_id: UUID) -> None:
        self._outbox = outbox
        self._task = task
        self._row_id = row_id

    @property
    def name(self) -> str:
        """The task and its id, as messages tell them."""
        return f"{self._task.name}[{self._task.request.id}]"

    def follow_up(self, result: Any) -> None:
        """Dispatch the callbacks and the rest of the chain, which take the place of the run's row.

        Celery would do it when the row has gone: a crash in between would cut the chain.

        :param result: what the function has returned.
        """
        task, context = self._task, self._task.request
        callbacks, chain = context.callbacks or [], context.chain or []
        options: dict[str, Any] = {
            "parent_id": context.id,
            "root_id": context.root_id or context.id,
        }
        if task.app.conf.task_inherit_parent_priority:
            options["priority"] = (context.delivery_info or {}).get("priority")
        for callback in callbacks:
            signature(callback, app=task.app).apply_async((result,), **options)
        if chain:
            *rest, following = chain
            signature(following, app=task.app).apply_async((result,), chain=rest, **options)

    def close(self) -> None:
        """Take note of the commit: the row is gone, and what follows has been dispatched.

        Not before: a run whose commit fails is tried again, with its callbacks and its chain.
        """
        context = self._task.request
        context.ws_celery_settled = True
        context.callbacks = context.chain = None

    def is_cut_off(self, error: BaseException) -> bool:
        """Tell whether the database has gone: whether it has committed may be open then.

        The next try finds out, by its claim.
        """
        if isinstance(error, OperationalError) and error.statement is None:
            return True  # the error of no statement: the database is not there
        return isinstance(error, DBAPIError) and error.connection_invalidated

    def leave(self) -> Abandoned:
        """Return the error that ends the run, and leaves the row to be sent after its lease."""
        self._task.request.ws_celery_settled = True
        log.warning("%s has lost its database; it is sent again after its lease", self.name)
        return Abandoned(f"{self.name} has lost its database", "cut off")

    def without_row(self, reason: str) -> Abandoned:
        """Return the error that ends a run whose row is not there: its effect is another one's."""
        context = self._task.request
        context.ws_celery_settled = True  # whoever has the row settles it
        if (owner := self._outbox.owner_of(context)) is None:
            return Abandoned(f"{self.name} {reason}")
        queue = (context.delivery_info or {}).get("routing_key")
        error = Abandoned.foreign(self.name, str(queue), owner, str(self._outbox.place))
        log.error("%s", error)
        return error


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
        :raises Abandoned: if it is not, or another run has it.
        :raises Abandoned: ("foreign") if it is not, and the message is another outbox's.
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

        :raises Abandoned: if another run has committed meanwhile.
        """
        if self._txn is not txn:
            self._take(txn, _ELSEWHERE)

    # What the function does by itself

    def before_completion(self, txn: Any) -> None:
        """Let the session belong to a transaction of the function: it could not join its commit."""
        if not self.has_committed:
            with suppress(SessionError):
                join(self._session, txn, self._task.name)

    def commit(self, txn: Any) -> None:
        """Claim the row with a commit of the function, and write the row of what comes after it.

        :raises Abandoned: if another run has committed meanwhile.
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


class Unclaimed(Run):
    """A run of a RequestAwareTask.

    Its row is only looked at before it. What follows it is written in the transaction that deletes
    the row, so that a crash cannot cut its chain, nor a second run double it.
    """

    def begin(self) -> None:
        """Look whether the row is there; if nobody can tell, the task is run.

        :raises Abandoned: if it is not.
        :raises Abandoned: ("foreign") if it is not, and the message is another outbox's.
        """
        rows = self._outbox.rows
        try:
            with self._outbox.begin() as connection:
                if self._task.request.expires is not None:
                    rows.forget_expiry(connection, self._row_id)
                there = rows.is_there(connection, self._row_id)
                if not there:
                    self._outbox.look(connection)
        except self._outbox.errors as error:
            log.warning("%s is run without a look at its row: %s", self.name, error)
            return
        if not there:
            raise self.without_row("has run, or is a dead letter")

    def end(self, result: Any) -> None:
        """Dispatch the callbacks and the rest of the chain, if there are any.

        Otherwise the row stays until the result is stored, which may count for a chord.

        :param result: what the function has returned.
        :raises Abandoned: if the row is gone: another run has ended, or somebody has given it up.
        :raises Abandoned: ("foreign") if it was in another outbox all the time.
        :raises Abandoned: ("cut off") if the database is not there; the task is run again.
        """
        context = self._task.request
        if context.callbacks or context.chain:
            with holding() as held:
                self.follow_up(result)
            self.hand_over(held)

    def hand_over(self, publications: Sequence[Publication]) -> None:
        """Let the rows of these messages take the place of the run's, and send them.

        :raises Abandoned: as :meth:`end` does.
        :raises Abandoned: ("cut off") likewise.
        """
        if not self._replace_row(publications):
            raise self.without_row("has run elsewhere, or was given up")
        self.close()
        self._outbox.app.publish(publications)

    def _replace_row(self, publications: Sequence[Publication]) -> bool:
        settled = getattr(self._task.request, "ws_celery_settled", False)  # it is a retry's
        rows = self._outbox.rows
        try:
            with self._outbox.begin() as connection:
                if not settled and not rows.delete(connection, [self._row_id]):
                    self._outbox.look(connection)
                    return False
                self._outbox.keep(connection, publications)
        except self._outbox.errors as error:
            if isinstance(error, (WsCeleryError, OperationalError)) or self.is_cut_off(error):
                raise self.leave() from error
            raise
        return True
