"""Which transaction a dispatch belongs to: one that somebody will finish, or none."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary, ref

import transaction
from transaction.interfaces import ISynchronizer
from zope.interface import implementer

from ws_celery.datamanager import DispatchDataManager
from ws_celery.dispatch import Publication, RecordingProducer, held_publications, is_immediate
from ws_celery.sessions import open_session, open_transactions, tell_rollbacks

__all__ = ("Transactions", "remember_transaction")

#: Where the environ of a request has the manager and the transaction that it was received in.
_RECEIVED_IN = "ws_celery.received_in"


@implementer(ISynchronizer)
class _BeginSynchronizer:
    """Remembers the transaction that ``begin()`` opened: an implicit ``get()`` does not call it."""

    def __init__(self) -> None:
        self.begun: ref[Any] | None = None

    def newTransaction(self, txn: Any) -> None:  # noqa: N802 - the name is the interface's
        self.begun = ref(txn)

    def beforeCompletion(self, txn: Any) -> None:  # noqa: N802 - the name is the interface's
        """Dispatch goes on until the transaction is complete."""

    def afterCompletion(self, txn: Any) -> None:  # noqa: ARG002, N802 - as the interface has it
        self.begun = None


class Transactions:
    """Tells which transaction, if any, a dispatch belongs to: one that somebody will finish.

    That is one begun explicitly (``begin()``, ``with manager:``, pyramid_tm), never one that
    ``manager.get()`` made in passing. The first sight of a manager that is in a transaction already
    counts as begun, because an explicit manager has no other kind; the thread-local manager is
    watched from the start of each request and task run.
    """

    def __init__(self) -> None:
        # Strong references: a manager keeps its synchronizers weakly.
        self._synchronizers: WeakKeyDictionary[Any, _BeginSynchronizer] = WeakKeyDictionary()

    def watch(self, manager: Any, *, begun: bool) -> _BeginSynchronizer:
        """Watch ``manager`` from now on.

        :param begun: at first sight, whether a transaction that it is in was begun explicitly.
        """
        manager = _of_this_thread(manager)
        synchronizer = self._synchronizers.get(manager)
        if synchronizer is None:
            synchronizer = self._synchronizers[manager] = _BeginSynchronizer()
            manager.registerSynch(synchronizer)
            if not begun:
                synchronizer.begun = None
        return synchronizer

    def begun(self, manager: Any) -> Any:
        """Return the open transaction of ``manager`` that somebody will finish, or ``None``."""
        reference = self.watch(manager, begun=True).begun
        return None if reference is None else reference()

    def current(self, request: Any) -> Any:
        """Return the transaction that a dispatch on behalf of ``request`` belongs to, or ``None``.

        The request's own manager comes first, then the thread-local one, then the transaction that
        the request was received in: ``request.tm`` may be the thread-local manager, and so another
        one in a thread that was handed the request.
        """
        manager = getattr(request, "tm", None)
        if manager is not None and (txn := self.begun(manager)) is not None:
            return txn
        return self.begun(transaction.manager) or self._received_in(request)

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
        return _recorder(app, request, _data_manager(app, txn))


def remember_transaction(request: Any, manager: Any) -> None:
    """Let threads that are handed the request find the transaction that it was received in."""
    request.environ[_RECEIVED_IN] = _of_this_thread(manager), ref(manager.get())


def _data_manager(app: Any, txn: Any) -> DispatchDataManager:
    try:
        found: DispatchDataManager | None = txn.data(app)
    except KeyError:
        found = None
    if found is None:
        found = DispatchDataManager(app, txn)
        txn.set_data(app, found)
    return found


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
