"""Which transaction a dispatch belongs to, one that somebody will finish, and what it holds.

:class:`Transactions` answers for one application; a :class:`DispatchDataManager` holds what one
transaction has dispatched, and publishes it after the commit.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from threading import local
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakSet, finalize, ref

import transaction
from pyramid.events import NewRequest
from pyramid.request import Request
from transaction import Transaction, TransactionManager
from transaction.interfaces import (
    IDataManager,
    IDataManagerSavepoint,
    ISavepointDataManager,
    ISynchronizer,
    NoTransaction,
)
from zope.interface import implementer

from ws_celery.interfaces import ICeleryApp
from ws_celery.masking import logger_of
from ws_celery.recording import Publication, RecordingProducer, immediate, withheld

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, SessionTransaction

    from ws_celery.app import PyramidCelery
    from ws_celery.outbox.runs import Claim
    from ws_celery.outbox.store import Journal

__all__ = (
    "DispatchDataManager",
    "Transactions",
    "raising_interruptions",
)

log = logger_of(__name__)

#: Where the environ of a request has the manager and the transaction that it was received in.
_RECEIVED_IN = "ws_celery.received_in"

#: Where a session keeps the data managers that follow its rollbacks: in its ``info``, so that both
#: are forgotten together.
_FOLLOWERS = "ws_celery.followers"


class Transactions:
    """Finds the transaction, if any, that a dispatch belongs to: one that somebody will finish.

    That is one begun explicitly (``begin()``, ``with manager:``, pyramid_tm), never one that
    ``manager.get()`` made in passing; for a request that is ``tm.active``, and in a run of a
    TransactionalTask, any that is open. The first sight of a manager that is in a transaction
    already counts as begun, because an explicit manager has no other kind; the thread-local manager
    is watched from the start of each request and task run.

    :param app: the Celery app.
    """

    def __init__(self, app: PyramidCelery) -> None:
        self._app = app
        # Strong references: a manager keeps its synchronizers weakly.
        self._watchers: WeakKeyDictionary[TransactionManager, _Watcher] = WeakKeyDictionary()
        self._of_this_thread = _DispatchesOfThread()

    def watch_request(self, event: NewRequest) -> None:
        """Watch the transactions of a request that begins."""
        request = event.request
        environ = request.environ
        manager = environ.get("tm.manager")
        # The thread's manager outlives requests: what it is in may be left over from another one.
        begun = manager is transaction.manager or "repoze.tm.active" in environ
        self.watch(transaction.manager, begun=begun)
        if manager:
            if environ.get("tm.active"):
                self.manage(manager, request)
            with suppress(NoTransaction):
                txn = manager.get()
                txn.set_data(ICeleryApp, self._app)  # see current_celery_app()
                # Threads that are handed the request find it so.
                environ[_RECEIVED_IN] = _of_this_thread(manager), ref(txn)

    def watch(self, manager: TransactionManager, *, begun: bool) -> _Watcher:
        """Watch ``manager`` from now on.

        :param begun: at first sight, whether a transaction that it is in was begun explicitly.
        """
        manager = _of_this_thread(manager)
        watcher = self._watchers.get(manager)
        if watcher is None:
            watcher = self._watchers[manager] = _Watcher()
            manager.registerSynch(watcher)
            if not begun:
                watcher.forget_begun()
        return watcher

    def manage(
        self, manager: TransactionManager, request: Request, claim: Claim | None = None
    ) -> None:
        """Count all transactions of ``manager`` as begun while ``request`` is ``tm.active``.

        :param claim: of a run, which is notified of those that end before ``request`` ceases to
            be so.
        """
        self.watch(manager, begun=True).manage(request, claim)

    def begin(self, request: Request, claim: Claim | None = None) -> TransactionManager:
        """Begin the transaction of a run, by the manager that pyramid_tm would use.

        :param request: of the run; it is marked as pyramid_tm marks one, for add-ons that ask.
        :param claim: is notified of what ends before :meth:`release`.
        :return: the manager.
        """
        manager = getattr(request, "tm", None)
        if manager is None:
            manager = transaction.manager
        if self.begun(manager) is not None:
            # Eager execution inside the caller's transaction, which is not ours to abort.
            manager = request.tm = transaction.TransactionManager(explicit=True)
        request.environ.update({"tm.active": True, "tm.manager": manager})
        self.manage(manager, request, claim)
        manager.begin().set_data(ICeleryApp, self._app)  # see current_celery_app()
        return manager

    def release(self, request: Request) -> None:
        """Let the transaction of a run be ended by us; its claim is not notified of that."""
        for key in ("tm.active", "tm.manager"):
            request.environ.pop(key, None)

    def abort_leftovers(self, *, begun: bool) -> None:
        """Abort what something else in this thread has opened and not finished.

        :param begun: also what was begun explicitly; else only a session of the thread that has
            joined, and would not commit.
        """
        self.watch(transaction.manager, begun=False)
        if begun or self.begun(transaction.manager) is None:
            transaction.abort()

    def begun(self, manager: TransactionManager) -> Transaction | None:
        """Return the open transaction of ``manager`` that somebody will finish, or ``None``."""
        return self.watch(manager, begun=True).open(manager)

    def current(self, request: Request | None) -> Transaction | None:
        """Return the transaction that a dispatch on behalf of ``request`` belongs to, or ``None``.

        The request's own manager comes first, then the thread-local one, then the transaction that
        the request was received in: ``request.tm`` may be the thread-local manager, and so another
        one in a thread that was handed the request.
        """
        environ = getattr(request, "environ", {})
        received_by, received_in = environ.get(_RECEIVED_IN, (None, None))
        manager = getattr(request, "tm", None)
        if manager is not None:
            watcher = self.watch(manager, begun=True)
            # A subrequest may have ended a transaction of this manager in between.
            again = environ.get("tm.active") and received_by is _of_this_thread(manager)
            if again and not watcher.is_active():
                watcher.manage(request)
            if (txn := watcher.open(manager)) is not None:
                return txn
        if (txn := self.begun(transaction.manager)) is not None:
            return txn
        txn = None if received_by is None else self.begun(received_by)
        return txn if txn is None or txn is received_in() else None

    def recorder(self, request: Request | None) -> RecordingProducer | None:
        """Return what records for the current transaction, or ``None``: send at once."""
        if (kept := withheld.get()) is not None:
            return RecordingProducer(self._app.producer_pool.connections.connection, kept)
        if immediate.get() or (txn := self.current(request)) is None:
            return None
        return self._data_manager(txn).recorder(txn, request)

    def recorded(self, request: Request | None) -> Sequence[Publication]:
        """Return what the current transaction has recorded."""
        txn = self.current(request)
        data_manager = None
        with suppress(KeyError):
            data_manager = txn and txn.data(self._app)
        return data_manager.publications if data_manager is not None else ()

    def _data_manager(self, txn: Transaction) -> DispatchDataManager:
        try:
            found = txn.data(self._app)
        except KeyError:
            found = None
        if found is None:
            found = DispatchDataManager(self._app, txn)
            txn.set_data(self._app, found)
            if txn is self.begun(transaction.manager):
                self._of_this_thread.add(found.publications)
        return found


def _of_this_thread(manager: TransactionManager) -> TransactionManager:
    # transaction.manager is a threading.local around one real manager for each thread.
    return getattr(manager, "manager", manager)


@implementer(IDataManager)
class _Joined:
    """Joins a transaction and has nothing to write, but for what a subclass adds."""

    #: The interface wants the name; the transaction itself comes with the calls.
    transaction_manager: TransactionManager | None = None

    def commit(self, txn: Transaction) -> None:
        """Do nothing."""

    tpc_begin = tpc_vote = tpc_finish = tpc_abort = commit

    def sortKey(self) -> str:  # noqa: N802 - the name is the interface's
        # Below "~sqlalchemy", whose one-phase manager commits in tpc_vote.
        return f"ws_celery:{id(self)}"


@implementer(ISavepointDataManager)
class DispatchDataManager(_Joined):
    """Holds what one transaction has dispatched to one Celery app.

    It only keeps the list: publishing is the after-commit hook's, because ``tpc_finish`` may
    precede another manager's commit, and an error there would reach the caller of a transaction
    that has committed.

    :param app: the Celery app whose broker the publications are for.
    :param txn: the transaction to join.
    """

    def __init__(self, app: PyramidCelery, txn: Transaction) -> None:
        self.publications: list[Publication] = []
        self._app = app
        #: What has recorded last; as a rule the next dispatch is made in the same savepoint.
        self._recorder: RecordingProducer | None = None
        #: Writes them into the outbox, if the application has one and sends them.
        self._journal: Journal | None = None
        txn.addAfterCommitHook(self._after_commit)
        try:
            txn.join(self)
        except ValueError:
            # The transaction is committing already (a listener of its own flush dispatches). No
            # savepoint can come any more, so that the hook alone is enough.
            log.debug("dispatch during the commit of %r", txn)

    def recorder(self, txn: Transaction, request: Request | None) -> RecordingProducer:
        """Return what records for a request: the last one, if it is in the same savepoint still."""
        session = _open_session(request, self._app.session_attribute)
        opened = () if session is None else _open_transactions(session)
        last = self._recorder
        if last is not None and last.request is request and last.session_transactions == opened:
            return last
        if session is not None:
            _follow_rollbacks(session, self)
        if self._journal is None and self._app.eager is None and self._app.outbox is not None:
            self._journal = self._app.outbox.journal(txn, self.publications)
        self._recorder = RecordingProducer(
            self._app.producer_pool.connections.connection,
            self.publications,
            opened,
            request,
            self._journal,
        )
        return self._recorder

    def session_rolled_back(self, session_transaction: SessionTransaction) -> None:
        """Drop what was dispatched in a transaction or savepoint of SQLAlchemy that is undone."""
        self.publications[:] = [
            publication
            for publication in self.publications
            if session_transaction not in publication.session_transactions
        ]

    def savepoint(self) -> _Savepoint:
        return _Savepoint(self.publications)

    def tpc_begin(self, txn: Transaction) -> None:  # noqa: ARG002 - as the interface has it
        """Write what was dispatched after the hooks: by a synchronizer, before the completion."""
        if self._journal is not None:
            self._journal.write()

    def _after_commit(self, committed: bool) -> None:
        publications = list(self.publications)
        self.publications.clear()
        if not (committed and publications):
            return
        try:
            if self._journal is not None:
                self._journal.write_late()
            self._app.publish(publications)
        except BaseException as interruption:
            # The transaction package would swallow it.
            caught = _interruptions.get()
            if caught is not None:
                caught.append(interruption)
            elif isinstance(interruption, Exception):
                log.exception("The transaction has committed, but what follows it has failed")
            else:
                raise

    def abort(self, txn: Transaction) -> None:
        self.publications.clear()
        # A rolled-back savepoint aborts and unjoins a manager that joined after it: a later
        # dispatch has to join anew, or its messages would be lost.
        txn.set_data(self._app, None)

    def tpc_abort(self, txn: Transaction) -> None:
        self.abort(txn)


@implementer(IDataManagerSavepoint)
class _Savepoint:
    def __init__(self, publications: list[Publication]) -> None:
        self._publications = publications
        # Not how many: a rollback of SQLAlchemy's may take out earlier ones meanwhile.
        self._kept = set(publications)

    def rollback(self) -> None:
        self._publications[:] = [each for each in self._publications if each in self._kept]


def _open_session(request: Request | None, name: str) -> Session | None:
    """Return the SQLAlchemy session of ``request`` if it has made it already, else ``None``.

    It is never made here: a request that uses no database must not begin to because it dispatches.

    :param name: the attribute of the request; a ``scoped_session`` is fine, too.
    """
    orm = sys.modules.get("sqlalchemy.orm")
    if orm is None or request is None:
        return None
    session = getattr(request, "__dict__", {}).get(name)
    if session is None:
        # Where WebOb keeps attributes that the class of the request does not have.
        session = getattr(request, "environ", {}).get("webob.adhoc_attrs", {}).get(name)
    if isinstance(session, orm.scoped_session):
        session = session.registry() if session.registry.has() else None
    return session if isinstance(session, orm.Session) else None


def _open_transactions(session: Session) -> tuple[SessionTransaction, ...]:
    """Return the open transactions of a session, the innermost savepoint first."""
    found = []
    session_transaction = session.get_nested_transaction() or session.get_transaction()
    while session_transaction is not None:
        found.append(session_transaction)
        session_transaction = session_transaction.parent
    return tuple(found)


def _follow_rollbacks(session: Session, data_manager: DispatchDataManager) -> None:
    """Notify a data manager of each rollback of this session, as long as it lives."""
    if _FOLLOWERS not in session.info:
        session.info[_FOLLOWERS] = WeakSet()
        # One listener for good: SQLAlchemy forbids to remove one while it is being called.
        sys.modules["sqlalchemy.event"].listen(session, "after_soft_rollback", _rolled_back)
    session.info[_FOLLOWERS].add(data_manager)


def _rolled_back(session: Session, session_transaction: SessionTransaction) -> None:
    for data_manager in tuple(session.info[_FOLLOWERS]):
        data_manager.session_rolled_back(session_transaction)


@implementer(ISynchronizer)
class _Watcher:
    """Knows which transaction of one manager somebody will finish.

    An implicit ``get()`` does not call it, but ``begin()`` does. For a request that is
    ``tm.active`` somebody finishes any transaction, also the one that follows a commit of the
    function's own.
    """

    def __init__(self) -> None:
        self._begun: ref[Transaction] | None = None
        self._undone: ref[Transaction] | None = None
        self._request: ref[Request] | None = None
        self._claim: Claim | None = None

    def forget_begun(self) -> None:
        self._begun = None

    def manage(self, request: Request, claim: Claim | None = None) -> None:
        """Count all transactions as begun, until one ends and ``request`` is not ``tm.active``."""
        self._request, self._claim = ref(request), claim

    def is_active(self) -> bool:
        """Return whether the function is at work: who commits or aborts now is not its caller."""
        request = None if self._request is None else self._request()
        return request is not None and bool(request.environ.get("tm.active"))

    def open(self, manager: TransactionManager) -> Transaction | None:
        """Return the transaction of ``manager``, to which this belongs, if it counts as begun."""
        begun = None if self._begun is None else self._begun()
        managed = self._request is not None and self._request() is not None
        if begun is None and not managed:
            return None
        try:
            txn = manager.get()
        except NoTransaction:
            return None
        # The manager has it still while its hooks run.
        over = txn.status == "Committed" or (self._undone is not None and self._undone() is txn)
        counts = txn is begun or (managed and txn.status != "Commit failed")
        return txn if counts and not over else None

    def newTransaction(self, txn: Transaction) -> None:  # noqa: N802 - the name is the interface's
        self._begun = ref(txn)

    def beforeCompletion(self, txn: Transaction) -> None:  # noqa: N802 - the name is the interface's
        if txn.status not in ("Active", "Doomed"):
            return  # its commit has failed, so that nobody can join it
        own = self._claim if self.is_active() else None
        if own is not None:
            own.before_completion(txn)
        if own is not None or any(txn.getAfterAbortHooks()):
            txn.join(_Completion(self, own))

    def afterCompletion(self, txn: Transaction) -> None:  # noqa: N802 - the name is the interface's
        self._begun = None
        if not self.is_active():
            self._request = self._claim = None
        elif self._claim is not None:
            self._claim.after_completion(txn)

    def undone(self, txn: Transaction) -> None:
        """What comes now, in the hooks of an abort, is outside of ``txn``."""
        self._undone = ref(txn)


class _Completion(_Joined):
    """Joins a transaction that is about to end, because only data managers learn how it does.

    :param watcher: is notified if it aborts.
    :param claim: is notified if it commits.
    """

    def __init__(self, watcher: _Watcher, claim: Claim | None) -> None:
        self._watcher = watcher
        self._claim = claim

    def abort(self, txn: Transaction) -> None:
        self._watcher.undone(txn)

    def tpc_begin(self, txn: Transaction) -> None:
        if self._claim is not None:
            self._claim.commit(txn)


class _DispatchesOfThread(local):
    """What this thread has dispatched in its transactions; its end logs what is left unfinished."""

    def __init__(self) -> None:
        self._kept: list[list[Publication]] = []
        self._end = _End()
        finalize(self._end, _log_unfinished, self._kept)

    def add(self, publications: list[Publication]) -> None:
        """Keep a list that is emptied when its transaction commits or aborts."""
        self._kept[:] = [each for each in self._kept if each]
        self._kept.append(publications)


class _End:
    """Goes with the thread, at once: a transaction waits for the garbage collector."""


def _log_unfinished(kept: list[list[Publication]]) -> None:
    names = [str(each.task_name) for found in kept for each in found if each.task_id]
    if names:
        log.warning(
            "A thread has ended, and nobody has committed its transaction; not sent: %s. "
            "Dispatch in `with transaction.manager:`, or pass a request whose transaction is open",
            ", ".join(names),
        )


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
