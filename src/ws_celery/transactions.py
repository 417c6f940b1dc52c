"""Which transaction a dispatch belongs to: one that somebody will finish, or none."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import transaction
from transaction.interfaces import IDataManager, ISynchronizer, NoTransaction
from zope.interface import implementer

from ws_celery.datamanager import DispatchDataManager, ThreadsDispatches
from ws_celery.dispatch import Publication, RecordingProducer, held_publications, is_immediate
from ws_celery.sessions import open_session, open_transactions, tell_rollbacks

__all__ = ("OwnCommits", "Transactions", "remember_transaction")

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
