"""Writing the rows of one transaction, through the session that the application works with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from zope.sqlalchemy import mark_changed

from ws_celery.dispatch import Publication
from ws_celery.exceptions import OutboxDetached
from ws_celery.outbox.message import check_names, times_of

if TYPE_CHECKING:
    from ws_celery.outbox.store import Outbox

__all__ = ("Journal", "connection_of", "join")

#: How often the flush of a session may lead to another one.
_FLUSHES = 100


class Journal:
    """Writes what one transaction has dispatched into the outbox, before it commits.

    :param outbox: the outbox.
    :param txn: the transaction.
    :param publications: its messages, kept by the data manager: those of a savepoint that is rolled
        back are taken out of it.
    """

    def __init__(self, outbox: Outbox, txn: Any, publications: Iterable[Any]) -> None:
        self._outbox = outbox
        self._txn = txn
        self._publications = publications
        self._written: set[Any] = set()
        self._session: Any = None
        self._hooked = False
        self._late: list[Publication] = []

    def admit(self, publications: Iterable[Publication], request: Any) -> None:
        """Give messages that are to be kept their row.

        :param request: the request whose session they are written with.
        :raises ValueError: if ``eta`` or ``expires`` is no time, or a name does not fit the table.
        :raises OutboxUnreachable: if it has no session.
        :raises OutboxDetached: if its session does not commit with the transaction.
        """
        kept = [publication for publication in publications if self._outbox.keeps(publication)]
        if not kept:
            return
        if self._session is None:
            self._session = self._joined(request, str(kept[0].task_name))
        for publication in kept:
            check_names(publication)  # what is wrong is told at the call
            times_of(publication)
            self._outbox.number(publication)
        if self._txn.status == "Committing":
            self._admit_late(kept)
        elif not self._hooked:
            self._hooked = True
            self._txn.addBeforeCommitHook(self._flush_and_write)

    def _admit_late(self, publications: list[Publication]) -> None:
        resources = self._txn._resources  # no public name tells what has joined
        mine = (each for each in resources if getattr(each, "session", None) is self._session)
        if any(each.tx.is_active for each in mine):
            self._insert(publications)  # a listener of the flush that the commit itself makes
        else:  # a listener of the session's commit, which takes no statement any more
            self._late += publications

    def write_late(self) -> None:
        """Write what the session was too late for in a transaction of our own, after the commit."""
        if self._late:
            self._outbox.keep_late(self._late)

    def _joined(self, request: Any, task: str) -> Any:
        """Return the session of a request, which now belongs to the transaction.

        Else its row would be committed by somebody else, or nobody, and the message would find
        none.
        """
        session = self._outbox.session_of(request, task)
        manager = getattr(request, "tm", None)
        if manager is not None and self._outbox.app.transactions.begun(manager) is not self._txn:
            raise OutboxDetached(task, "the transaction of its request is not the one that is open")
        join(session, self._txn, task)
        return session

    def _flush_and_write(self) -> None:
        # First the flush: its listeners may dispatch. What later hooks dispatch needs a hook again.
        for _ in range(_FLUSHES):
            self._session.flush()
            if not (self._session.new or self._session.dirty or self._session.deleted):
                break
        self._hooked = False
        self.write()

    def write(self) -> None:
        """Write what has no row yet."""
        self._insert(
            publication
            for publication in self._publications
            if isinstance(publication, Publication)
            and publication.row_id
            and publication.row_id not in self._written
            and publication not in self._late
        )

    def _insert(self, publications: Iterable[Publication]) -> None:
        if not (kept := list(publications)):
            return
        self._written.update(publication.row_id for publication in kept)
        with self._outbox.explaining():
            connection = connection_of(self._session, self._outbox.rows.table, self._txn)
            self._outbox.write(connection, kept)


def connection_of(session: Any, table: Any, txn: Any) -> Any:
    """Return the connection of a session, in its transaction, to write ``table`` with.

    :param txn: the transaction that commits the session; it would not commit what the ORM has not
        written, if nobody told.
    """
    join(session, txn, table.fullname)
    return session.connection(bind_arguments={"clause": table})


def join(session: Any, txn: Any, what: str) -> None:
    """Let a session belong to a transaction, and be committed by it; it begins nothing yet.

    :param what: what it is for, in messages.
    :raises OutboxDetached: if it belongs to another one, or this one commits already.
    """
    try:
        mark_changed(session, _ManagerOf(txn))
    except ValueError as error:
        raise OutboxDetached(what, "the transaction commits already") from error
    if not any(getattr(resource, "session", None) is session for resource in txn._resources):
        raise OutboxDetached(what, "the session of its request belongs to another transaction")


class _ManagerOf:
    """A transaction manager that knows one transaction."""

    def __init__(self, txn: Any) -> None:
        self._txn = txn

    def get(self) -> Any:
        """Return the transaction."""
        return self._txn
