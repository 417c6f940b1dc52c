"""What a run does with the row that its message names: claims it, or gives it to what follows.

A run of a TransactionalTask deletes its row in its own transaction: a :class:`Claim`. One without a
transaction may be made twice, and its chain goes on once: :class:`Unclaimed`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar
from uuid import UUID, uuid4

from celery.canvas import signature
from sqlalchemy.exc import DBAPIError, OperationalError

from ws_celery.exceptions import Abandoned, SessionError, WsCeleryError
from ws_celery.masking import logger_of
from ws_celery.outbox.tables import join
from ws_celery.recording import (
    OUTBOX_HEADER,
    ROW_HEADER,
    Publication,
    holding,
    withheld,
)
from ws_celery.worker import Run, run_of

if TYPE_CHECKING:
    from celery import Task
    from celery.app.task import Context
    from pyramid.request import Request
    from sqlalchemy import Connection
    from sqlalchemy.orm import Session
    from transaction import Transaction

    from ws_celery.outbox.store import Outbox

__all__ = (
    "Claim",
    "Runs",
    "Unclaimed",
    "row_id_in",
)

log = logger_of(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_ELSEWHERE = "has run elsewhere, or was given up"

#: Error of the row of what comes after a function's own commit, until it ends.
_CUT_SHORT = (
    "the function has committed by itself, which was its effect, and what it does after that has "
    "not ended: its process was killed, or it takes longer than the lease"
)


def row_id_in(headers: Mapping[str, Any] | None) -> UUID | None:
    """Return the id of the row that a message with these headers belongs to, or ``None``."""
    value = (headers or {}).get(ROW_HEADER)
    try:
        return None if value is None else UUID(value)
    except (AttributeError, TypeError, ValueError):
        return None  # somebody else's header


class Runs:
    """The runs of the tasks of one outbox, whose messages have rows there, and their retries.

    :param outbox: the outbox.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    def claim(self, task: Task) -> Claim | None:
        """Return the claim of the current run of a TransactionalTask, if its message has a row."""
        row_id = row_id_in(task.request.headers)
        return None if row_id is None else Claim(self._outbox, task, row_id)

    def unclaimed(self, task: Task) -> Unclaimed | None:
        """Return the current run of a task without a transaction, if its message has a row."""
        row_id = row_id_in(task.request.headers)
        return None if row_id is None else Unclaimed(self._outbox, task, row_id)

    def has_row(self, context: Context) -> bool:
        """Return whether the message of a run has a row."""
        return row_id_in(context.headers) is not None

    def owner_of(self, context: Context) -> str | None:
        """Return which other outbox the message of a run belongs to, or ``None``.

        Only for one that has no row here: after a move of the database, messages that were sent
        before it name the old place.
        """
        place: str | None = context.headers.get(OUTBOX_HEADER)
        return None if self._outbox.place is None or place == self._outbox.place else place

    def retry(self, context: Context, publications: Sequence[Publication]) -> None:
        """Let a run's row hold its retry, and send it; the run's transaction has ended.

        Who catches what ``retry()`` raises can ask for more than one; those have rows of their own.
        If the database fails the row keeps the message of the run that wanted the retry, and it is
        sent again after its lease. If the row has gone, another run has had the effect.

        :param context: Celery's context of the run.
        :param publications: the messages of the retries.
        """
        run = run_of(context)
        row_id = None if run.is_settled else row_id_in(context.headers)
        run.is_settled = True  # the row is the retry's
        if self._outbox.attempt(self._keep_retries, row_id, publications):
            self._outbox.app.publish(publications)

    def _keep_retries(
        self, connection: Connection, row_id: UUID | None, publications: Sequence[Publication]
    ) -> bool:
        outbox, others = self._outbox, list(publications)
        if row_id is not None:
            first = others.pop(0)
            first.row_id = uuid4()
            outbox.find_place(connection)
            row = outbox.row_of(first)
            due = row.pop("due")
            if not outbox.rows.rewrite(connection, row_id, row, due):
                return False
        outbox.keep(connection, others)
        return True

    def retry_of(self, context: Context, publications: Sequence[Publication]) -> Publication | None:
        """Return what is the retry of a run; send the rest, of subscribers and events, at once.

        :param context: Celery's context of the run.
        :param publications: what was sent while the retry was.
        :raises ValueError: if the retry cannot be kept: its ``eta`` or ``expires`` is no time.
        """
        retries = [each for each in publications if each.task_id == context.id]
        for retry in retries:
            self._outbox.check(retry)
        if others := [each for each in publications if each not in retries]:
            self._outbox.app.publish(others)
        return retries[-1] if retries else None

    @contextmanager
    def keeping_retries(self, headers: dict[str, Any], task_id: str | None) -> Iterator[None]:
        """Let the row of a run hold the retry that a class of Celery's own sends inside.

        Such a message has the headers of the run that it repeats, and the row's among them; it is
        taken out, because a message has the row that it is given.

        :param headers: of the call.
        :param task_id: the id that the call was given.
        """
        named = row_id_in({ROW_HEADER: headers.pop(ROW_HEADER, None)})
        task = self._outbox.app.current_worker_task
        if not named or withheld.get() is not None or not task or task.request.id != task_id:
            yield
            return
        with holding() as held:
            yield
        if retry := self.retry_of(task.request, held):
            self.retry(task.request, [retry])


class RunWithRow:
    """One run of a task whose message has a row.

    :param outbox: the outbox.
    :param task: the task that runs.
    :param row_id: id of the row that the message names.
    """

    def __init__(self, outbox: Outbox, task: Task, row_id: UUID) -> None:
        self._outbox = outbox
        self._task = task
        self._row_id = row_id

    @property
    def name(self) -> str:
        """The task and its id, for messages."""
        return f"{self._task.name}[{self._task.request.id}]"

    def follow_up(self, result: object) -> None:
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

    @staticmethod
    def is_cut_off(error: BaseException) -> bool:
        """Return whether the database has gone: whether it has committed may be open then.

        The next try finds out, by its claim.
        """
        if isinstance(error, OperationalError) and error.statement is None:
            return True  # the error of no statement: the database is not there
        return isinstance(error, DBAPIError) and error.connection_invalidated

    def leave(self) -> Abandoned:
        """Return the error that ends the run, and leaves the row to be sent after its lease."""
        run_of(self._task.request).is_settled = True
        log.warning("%s has lost its database; it is sent again after its lease", self.name)
        return Abandoned(f"{self.name} has lost its database", "cut off")

    def without_row(self, reason: str) -> Abandoned:
        """Return the error that ends a run whose row is not there: its effect is another one's."""
        context = self._task.request
        run_of(context).is_settled = True  # whoever has the row settles it
        if (owner := self._outbox.runs.owner_of(context)) is None:
            return Abandoned(f"{self.name} {reason}")
        queue = (context.delivery_info or {}).get("routing_key")
        error = Abandoned.foreign(self.name, str(queue), owner, str(self._outbox.place))
        log.error("%s", error)
        return error


class Claim(RunWithRow):
    """A run of a TransactionalTask.

    Its row is deleted at the beginning, so that no other run can begin, or just before the commit,
    so that only one run can commit: with the task's option ``acknowledge="late"``, and in SQLite,
    which has no row locks. A function that aborts by itself gives the row back; it is claimed in
    the transaction that commits. If the function commits by itself, that is the effect, and another
    row takes the place of the first in the same commit: it stands for the rest of the run, which
    ends, is tried again or becomes a dead letter, and is never sent as it is.
    """

    def __init__(self, outbox: Outbox, task: Task, row_id: UUID) -> None:
        super().__init__(outbox, task, row_id)
        late = getattr(task, "acknowledge", "early") == "late"
        self._late = late or outbox.engine.dialect.name == "sqlite"
        self._request: Request = None
        #: The transaction that the row is deleted in.
        self._txn: Transaction | None = None
        #: The row of the rest of the run, once the function commits by itself.
        self._rest: UUID | None = None
        #: Whether the function has committed by itself: the run must not be made again in place.
        self.has_committed = False

    def begin(self, request: Request, txn: Transaction) -> None:
        """Claim the row, or look whether it is there if that comes later.

        :param request: the request of the run.
        :param txn: the transaction of the run.
        :raises Abandoned: if it is not, or another run has it.
        :raises Abandoned: ("foreign") if it is not, and the message is another outbox's.
        """
        self._request, self._txn, self._rest = request, None, None
        rows = self._outbox.rows
        if not self._late:
            self._claim(txn, "runs elsewhere, has run, or is a dead letter")
            return
        if self._task.request.expires is not None:
            self._outbox.attempt(rows.forget_expiry, self._row_id)
        if not self._execute(txn, rows.is_there, self._row_id):
            raise self._without_row(txn, "has run, or is a dead letter")

    def end(self, txn: Transaction) -> None:
        """Claim the row if the transaction that commits next does not have it yet.

        :raises Abandoned: if another run has committed meanwhile.
        """
        if self._txn is not txn:
            self._claim(txn, _ELSEWHERE)

    def _claim(self, txn: Transaction, otherwise: str) -> None:
        rows = self._outbox.rows
        if self.has_committed:
            # Nobody but this run has the row of its rest, which may have become a dead letter.
            found = self._execute(txn, rows.delete, [self._row_id]) == 1
        else:
            found = self._execute(txn, rows.claim, self._row_id)
        if not found:
            raise self._without_row(txn, otherwise)
        self._txn = txn

    def _without_row(self, txn: Transaction, reason: str) -> Exception:
        self._execute(txn, self._outbox.find_place)
        return self.without_row(reason)

    def _execute(
        self,
        txn: Transaction,
        statement: Callable[Concatenate[Connection, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        outbox = self._outbox
        return outbox.execute_in_session(self._session, txn, statement, *args, **kwargs)

    @property
    def _session(self) -> Session:
        return self._outbox.session_of(self._request, self._task.name)

    # What the function does by itself

    def before_completion(self, txn: Transaction) -> None:
        """Let the session belong to a transaction of the function: it could not join its commit."""
        if not self.has_committed:
            with suppress(SessionError):
                join(self._session, txn, self._task.name)

    def commit(self, txn: Transaction) -> None:
        """Claim the row with a commit of the function, and write the row of what comes after it.

        :raises Abandoned: if another run has committed meanwhile.
        """
        if not self.has_committed:
            self._execute(txn, self._claim_and_write_rest, txn)

    def _claim_and_write_rest(self, connection: Connection, txn: Transaction) -> None:
        rows = self._outbox.rows
        if self._txn is txn:
            # Its own transaction does not see any more what it has deleted.
            with self._outbox.begin() as other:
                row = rows.get(other, self._row_id)
        else:
            row = rows.get(connection, self._row_id)
        if row is None:
            raise self.without_row(_ELSEWHERE)
        self.end(txn)
        self._rest = uuid4()
        rows.insert_rest(connection, row, self._rest, self._outbox.lease, _CUT_SHORT)

    def after_completion(self, txn: Transaction) -> None:
        """Take the row of the rest for the run's own, if this was the commit that wrote it."""
        if self.has_committed or self._rest is None or txn.status != "Committed":
            return
        self.has_committed = True
        self._row_id, self._txn = self._rest, None
        context = self._task.request
        context.headers = {**context.headers, ROW_HEADER: str(self._rest)}
        run_of(context).attempts_left = 0


class Unclaimed(RunWithRow):
    """A run of a RequestAwareTask.

    Its row is only looked at before it. What follows it is written in the transaction that deletes
    the row, so that a crash cannot cut its chain, nor a second run double it.
    """

    def begin(self) -> None:
        """Look whether the row is there; if that is not known, the task is run.

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
                    self._outbox.find_place(connection)
        except self._outbox.errors as error:
            log.warning("%s is run without a look at its row: %s", self.name, error)
            return
        if not there:
            raise self.without_row("has run, or is a dead letter")

    def end(self, result: object) -> None:
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
        run = run_of(self._task.request)
        if not self._replace_row(publications, run):
            raise self.without_row(_ELSEWHERE)
        run.is_settled = True
        self._task.request.callbacks = self._task.request.chain = None
        self._outbox.app.publish(publications)

    def _replace_row(self, publications: Sequence[Publication], run: Run) -> bool:
        outbox = self._outbox
        try:
            with outbox.begin() as connection:
                # Once it is settled, the row is a retry's.
                if not run.is_settled and not outbox.rows.delete(connection, [self._row_id]):
                    outbox.find_place(connection)
                    return False
                outbox.keep(connection, publications)
        except outbox.errors as error:
            if isinstance(error, (WsCeleryError, OperationalError)) or self.is_cut_off(error):
                raise self.leave() from error
            raise
        return True
