"""What holds the messages of one transaction, and obeys its aborts, savepoints and commit.

It has joined the transaction, so that nobody has to call us.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableSequence
from contextlib import contextmanager
from contextvars import ContextVar
from threading import local
from typing import Any
from weakref import finalize

from transaction.interfaces import IDataManagerSavepoint, ISavepointDataManager
from zope.interface import implementer

from ws_celery.dispatch import Publication, RecordingProducer
from ws_celery.masking import logger_of

__all__ = ("DispatchDataManager", "ThreadsDispatches", "raising_interruptions")

log = logger_of(__name__)

_interruptions: ContextVar[list[BaseException] | None] = ContextVar(
    "ws_celery_interruptions", default=None
)


@contextmanager
def raising_interruptions() -> Iterator[list[BaseException]]:
    """Raise what has interrupted the hooks of a commit that was made inside; yields it as it comes.

    The ``transaction`` package swallows whatever an after-commit hook raises: a time limit, a
    signal to end the process, and the error of an eager task.
    """
    caught: list[BaseException] = []
    token = _interruptions.set(caught)
    try:
        yield caught
    finally:
        _interruptions.reset(token)
    if caught:
        raise caught[0]


@contextmanager
def _told_to_caller() -> Iterator[None]:
    try:
        yield
    except BaseException as interruption:
        caught = _interruptions.get()
        if caught is not None:
            caught.append(interruption)
        elif isinstance(interruption, Exception):
            log.exception("The transaction has committed, but what follows it has failed")
        else:
            raise


class ThreadsDispatches(local):
    """What this thread has dispatched in its transactions; tells what its end leaves unfinished."""

    def __init__(self) -> None:
        self._held: list[list[Publication]] = []
        self._end = _End()
        finalize(self._end, _tell_unfinished, self._held)

    def hold(self, publications: list[Publication]) -> None:
        """Keep a list that is emptied when its transaction commits or aborts."""
        self._held[:] = [each for each in self._held if each]
        self._held.append(publications)


class _End:
    """Goes with the thread, at once: a transaction waits for the garbage collector."""


def _tell_unfinished(held: list[list[Publication]]) -> None:
    names = [str(each.task_name) for found in held for each in found if each.task_id]
    if names:
        log.warning(
            "A thread has ended, and nobody has committed its transaction; not sent: %s. "
            "Dispatch in `with transaction.manager:`, or pass a request whose transaction is open",
            ", ".join(names),
        )


@implementer(IDataManagerSavepoint)
class _Savepoint:
    def __init__(self, publications: MutableSequence[Publication]) -> None:
        self._publications = publications
        # Not how many: a rollback of SQLAlchemy's may take out earlier ones meanwhile.
        self._kept = list(publications)

    def rollback(self) -> None:
        kept = set(self._kept)
        self._publications[:] = [each for each in self._publications if each in kept]


@implementer(ISavepointDataManager)
class DispatchDataManager:
    """Holds what one transaction has dispatched to one Celery app.

    It only keeps the list: publishing is the after-commit hook's, because ``tpc_finish`` may
    precede another manager's commit, and an error there would reach the caller of a transaction
    that has committed.

    :param app: the Celery app whose broker the publications are for.
    :param txn: the transaction to join.
    """

    def __init__(self, app: Any, txn: Any) -> None:
        #: The interface wants the name; the transaction itself is told by the calls.
        self.transaction_manager: Any = None
        self.publications: list[Publication] = []
        #: What has recorded last; as a rule the next dispatch is made in the same savepoint.
        self.recorder: RecordingProducer | None = None
        outbox = app.outbox if app.eager is None else None
        #: Writes them into the outbox, if the application has one and sends them.
        self.journal = outbox and outbox.journal(txn, self.publications)
        self._app = app
        txn.addAfterCommitHook(self._after_commit)
        try:
            txn.join(self)
        except ValueError:
            # The transaction is committing already (a listener of its own flush dispatches). No
            # savepoint can come any more, so that the hook alone is enough.
            log.debug("dispatch during the commit of %r", txn)

    def _after_commit(self, committed: bool) -> None:
        publications = list(self.publications)
        self.publications.clear()
        if committed and publications:
            with _told_to_caller():
                if self.journal is not None:
                    self.journal.write_late()
                self._app.publish(publications)

    def abort(self, txn: Any) -> None:
        self.publications.clear()
        # A rolled-back savepoint aborts and unjoins a manager that joined after it: a later
        # dispatch has to join anew, or its messages would be lost.
        txn.set_data(self._app, None)

    def rolled_back(self, session_transaction: Any) -> None:
        """Drop what was dispatched in a transaction or savepoint of SQLAlchemy that is undone."""
        self.publications[:] = [
            publication
            for publication in self.publications
            if session_transaction not in publication.session_transactions
        ]

    def savepoint(self) -> _Savepoint:
        return _Savepoint(self.publications)

    def sortKey(self) -> str:  # noqa: N802 - the name is the interface's
        # Below "~sqlalchemy", whose one-phase manager commits in tpc_vote.
        return f"ws_celery:{id(self)}"

    def tpc_begin(self, txn: Any) -> None:  # noqa: ARG002 - as the interface has it
        """Write what was dispatched after the hooks: by a synchronizer, before the completion."""
        if self.journal is not None:
            self.journal.write()

    def commit(self, txn: Any) -> None:
        """Nothing to write."""

    def tpc_vote(self, txn: Any) -> None:
        """Nothing that could still fail."""

    def tpc_finish(self, txn: Any) -> None:
        """Published by the after-commit hook."""

    def tpc_abort(self, txn: Any) -> None:
        self.abort(txn)
