"""Which transaction a dispatch belongs to: one that somebody will finish, or none."""

from __future__ import annotations

import sys
from collections.abc import Iterator, MutableSequence, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from threading import local
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet, finalize, ref

import transaction
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
from ws_celery.recording import Publication, RecordingProducer, held_publications, is_immediate

__all__ = (
    "DispatchDataManager",
    "Listener",
    "OwnCommits",
    "ThreadsDispatches",
    "Transactions",
    "open_session",
    "open_transactions",
    "raising_interruptions",
    "remember_transaction",
    "tell_rollbacks",
)

log = logger_of(__name__)

#: Where a session keeps who is to be told: in its ``info``, so that both are forgotten together.
_LISTENERS = "ws_celery.listeners"


class Listener(Protocol):
    """Who wants to know of rollbacks."""

    def rolled_back(self, session_transaction: Any) -> None:
        """Take note that this transaction or savepoint of a session is undone."""


def open_session(request: Any, name: str) -> Any:
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


def open_transactions(session: Any) -> tuple[Any, ...]:
    """Return the open transactions of a session, the innermost savepoint first."""
    return tuple(_outwards(session.get_nested_transaction() or session.get_transaction()))


def _outwards(session_transaction: Any) -> Iterator[Any]:
    while session_transaction is not None:
        yield session_transaction
        session_transaction = session_transaction.parent


def tell_rollbacks(session: Any, listener: Listener) -> None:
    """Let ``listener`` know of each rollback of this session, as long as it lives."""
    if _LISTENERS not in session.info:
        session.info[_LISTENERS] = WeakSet()
        # One listener for good: SQLAlchemy forbids to remove one while it is being called.
        sys.modules["sqlalchemy.event"].listen(session, "after_soft_rollback", _rolled_back)
    session.info[_LISTENERS].add(listener)


def _rolled_back(session: Any, session_transaction: Any) -> None:
    for listener in tuple(session.info[_LISTENERS]):
        listener.rolled_back(session_transaction)


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


#: Where the environ of a request has the manager and the transaction that it was received in.
_RECEIVED_IN = "ws_celery.received_in"


class OwnCommits(Protocol):
    """Who wants to know of the commits that a function makes itself, in the middle of its run."""

    def before_completion(self, txn: Any) -> None:
        """Take note that the function is about to commit or to abort."""

    def commit(self, txn: Any) -> None:
        """Write what is to be committed with it; an error stops the commit."""

    def after_completion(self, txn: Any) -> None:
        """Take note that it has committed or aborted: the status of ``txn`` tells."""


@implementer(ISynchronizer)
class _Watcher:
    """Knows which transaction of one manager somebody will finish.

    An implicit ``get()`` does not call it, but ``begin()`` does. For a request that is
    ``tm.active`` somebody finishes any transaction, also the one that follows a commit of the
    function's own.
    """

    def __init__(self) -> None:
        self._begun: ref[Any] | None = None
        self._undone: ref[Any] | None = None
        self._request: ref[Any] | None = None
        self._own_commits: OwnCommits | None = None

    def forget_begun(self) -> None:
        self._begun = None

    def manage(self, request: Any, own_commits: OwnCommits | None = None) -> None:
        """Count all transactions as begun, until one ends and ``request`` is not ``tm.active``."""
        self._request, self._own_commits = ref(request), own_commits

    def is_active(self) -> bool:
        """Tell whether the function is at work: who commits or aborts now is not its caller."""
        request = None if self._request is None else self._request()
        return request is not None and bool(request.environ.get("tm.active"))

    def open(self, manager: Any) -> Any:
        """Return the transaction of ``manager``, to which this belongs, if it counts as begun."""
        begun = None if self._begun is None else self._begun()
        managed = self._request is not None and self._request() is not None
        if begun is None and not managed:
            return None
        try:
            txn = manager.get()
        except NoTransaction:
            return None
        if self._is_over(txn) or not (txn is begun or (managed and txn.status != "Commit failed")):
            return None
        return txn

    def _is_over(self, txn: Any) -> bool:
        # The manager has it still while its hooks run.
        return txn.status == "Committed" or (self._undone is not None and self._undone() is txn)

    def newTransaction(self, txn: Any) -> None:  # noqa: N802 - the name is the interface's
        self._begun = ref(txn)

    def beforeCompletion(self, txn: Any) -> None:  # noqa: N802 - the name is the interface's
        if txn.status not in ("Active", "Doomed"):
            return  # its commit has failed, so that nobody can join it
        own = self._own_commits if self.is_active() else None
        if own is not None:
            own.before_completion(txn)
        if own is not None or any(txn.getAfterAbortHooks()):
            txn.join(_Completion(self, own))

    def afterCompletion(self, txn: Any) -> None:  # noqa: N802 - the name is the interface's
        self._begun = None
        if not self.is_active():
            self._request = self._own_commits = None
        elif self._own_commits is not None:
            self._own_commits.after_completion(txn)

    def undone(self, txn: Any) -> None:
        """Take note that what comes now, in the hooks of an abort, is outside of ``txn``."""
        self._undone = ref(txn)


@implementer(IDataManager)
class _Completion:
    """Joins a transaction that is about to end, because only data managers are told how it does.

    :param watcher: is told if it aborts.
    :param own_commits: is told if it commits.
    """

    transaction_manager = None

    def __init__(self, watcher: _Watcher, own_commits: OwnCommits | None) -> None:
        self._watcher = watcher
        self._own_commits = own_commits

    def abort(self, txn: Any) -> None:
        self._watcher.undone(txn)

    def tpc_begin(self, txn: Any) -> None:
        if self._own_commits is not None:
            self._own_commits.commit(txn)

    def commit(self, txn: Any) -> None:
        """Nothing to write."""

    tpc_vote = tpc_finish = tpc_abort = commit

    def sortKey(self) -> str:  # noqa: N802 - the name is the interface's
        # Below "~sqlalchemy", whose one-phase manager commits in tpc_vote.
        return f"ws_celery:{id(self)}"


class Transactions:
    """Tells which transaction, if any, a dispatch belongs to: one that somebody will finish.

    That is one begun explicitly (``begin()``, ``with manager:``, pyramid_tm), never one that
    ``manager.get()`` made in passing; for a request that is ``tm.active``, and in a run of a
    TransactionalTask, any that is open. The first sight of a manager that is in a transaction
    already counts as begun, because an explicit manager has no other kind; the thread-local manager
    is watched from the start of each request and task run.
    """

    def __init__(self) -> None:
        # Strong references: a manager keeps its synchronizers weakly.
        self._watchers: WeakKeyDictionary[Any, _Watcher] = WeakKeyDictionary()
        self._of_this_thread = ThreadsDispatches()

    def watch(self, manager: Any, *, begun: bool) -> _Watcher:
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

    def manage(self, manager: Any, request: Any, own_commits: OwnCommits | None = None) -> None:
        """Count all transactions of ``manager`` as begun while ``request`` is ``tm.active``.

        :param own_commits: is told of those that end before ``request`` ceases to be so.
        """
        self.watch(manager, begun=True).manage(request, own_commits)

    def begin(self, app: Any, request: Any, own_commits: OwnCommits | None = None) -> Any:
        """Begin the transaction of a run, by the manager that pyramid_tm would use.

        :param request: of the run; it is marked as pyramid_tm marks one, for add-ons that ask.
        :param own_commits: is told of what ends before :meth:`release`.
        :return: the manager.
        """
        manager = getattr(request, "tm", None)
        if manager is None:
            manager = transaction.manager
        if self.begun(manager) is not None:
            # Eager execution inside the caller's transaction, which is not ours to abort.
            manager = request.tm = transaction.TransactionManager(explicit=True)
        request.environ.update({"tm.active": True, "tm.manager": manager})
        self.manage(manager, request, own_commits)
        manager.begin().set_data(ICeleryApp, app)  # see current_celery_app()
        return manager

    def release(self, request: Any) -> None:
        """Let the transaction of a run be ended by us; nobody is told of that."""
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

    def begun(self, manager: Any) -> Any:
        """Return the open transaction of ``manager`` that somebody will finish, or ``None``."""
        return self.watch(manager, begun=True).open(_of_this_thread(manager))

    def current(self, request: Any) -> Any:
        """Return the transaction that a dispatch on behalf of ``request`` belongs to, or ``None``.

        The request's own manager comes first, then the thread-local one, then the transaction that
        the request was received in: ``request.tm`` may be the thread-local manager, and so another
        one in a thread that was handed the request.
        """
        manager = getattr(request, "tm", None)
        if manager is not None:
            self._manage_again(manager, request)
            if (txn := self.begun(manager)) is not None:
                return txn
        return self.begun(transaction.manager) or self._received_in(request)

    def _manage_again(self, manager: Any, request: Any) -> None:
        # A subrequest may have ended a transaction of this manager in between.
        environ = getattr(request, "environ", {})
        received_by, _ = environ.get(_RECEIVED_IN, (None, None))
        if environ.get("tm.active") and received_by is _of_this_thread(manager):
            watcher = self.watch(manager, begun=True)
            if not watcher.is_active():
                watcher.manage(request)

    def _received_in(self, request: Any) -> Any:
        manager, received = getattr(request, "environ", {}).get(_RECEIVED_IN, (None, None))
        if manager is None or (txn := self.begun(manager)) is not received():
            return None
        return txn

    def recorded(self, app: Any, request: Any) -> Sequence[Publication]:
        """Return what the current transaction holds of an app."""
        txn = self.current(request)
        data_manager = None
        with suppress(KeyError):
            data_manager = txn and txn.data(app)
        return data_manager.publications if data_manager is not None else ()

    def recorder(self, app: Any, request: Any) -> RecordingProducer | None:
        """Return what records for the current transaction, or ``None``: send at once."""
        if (held := held_publications()) is not None:
            return RecordingProducer(app.producer_pool.connections.connection, held)
        if is_immediate() or (txn := self.current(request)) is None:
            return None
        return _recorder(app, request, self._data_manager(app, txn))

    def _data_manager(self, app: Any, txn: Any) -> DispatchDataManager:
        try:
            found: DispatchDataManager | None = txn.data(app)
        except KeyError:
            found = None
        if found is None:
            found = DispatchDataManager(app, txn)
            txn.set_data(app, found)
            if txn is self.begun(transaction.manager):
                self._of_this_thread.hold(found.publications)
        return found


def remember_transaction(request: Any, manager: Any) -> None:
    """Let threads that are handed the request find the transaction that it was received in."""
    request.environ[_RECEIVED_IN] = _of_this_thread(manager), ref(manager.get())


def _recorder(app: Any, request: Any, data_manager: DispatchDataManager) -> RecordingProducer:
    """Return the last one if it is for the same request and savepoint, else a new one."""
    session = open_session(request, app.session_attribute)
    opened = () if session is None else open_transactions(session)
    last = data_manager.recorder
    if last is not None and last.request is request and last.session_transactions == opened:
        return last
    if session is not None:
        tell_rollbacks(session, data_manager)
    data_manager.recorder = RecordingProducer(
        app.producer_pool.connections.connection,
        data_manager.publications,
        opened,
        request,
        data_manager.journal and data_manager.journal.admit,
    )
    return data_manager.recorder


def _of_this_thread(manager: Any) -> Any:
    # transaction.manager is a threading.local around one real manager for each thread.
    return getattr(manager, "manager", manager)
