"""Deferred dispatch: what is published in a transaction is recorded, and leaves when it commits.

The ways in are :class:`Transactions`, which tells whether a transaction that somebody will finish
is open, and :class:`RecordingProducer`, which stands in for kombu's producer while one is. Between
them a :class:`DispatchDataManager` has joined the transaction, so that aborts and savepoints are
obeyed without anybody calling us.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, MutableSequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import transaction
from kombu import Connection, Producer
from kombu.serialization import dumps
from transaction.interfaces import (
    IDataManagerSavepoint,
    ISavepointDataManager,
    ISynchronizer,
)
from zope.interface import implementer

from ws_celery.eager import DeferredResult, EagerCall
from ws_celery.sessions import open_session, open_transactions, tell_rollbacks

__all__ = (
    "DispatchDataManager",
    "Publication",
    "RecordingProducer",
    "Transactions",
    "immediately",
    "raising_interruptions",
)

log = logging.getLogger(__name__)

_immediate: ContextVar[bool] = ContextVar("ws_celery_immediate", default=False)

_interruptions: ContextVar[list[BaseException] | None] = ContextVar(
    "ws_celery_interruptions", default=None
)


@contextmanager
def immediately() -> Iterator[None]:
    """Send what is called inside at once, whatever transaction is open.

    The message leaves before the transaction commits, and stays sent if it aborts: the task may
    run before the data it needs is visible. Retries leave this way, because the transaction they
    are raised in is about to abort.
    """
    token = _immediate.set(True)
    try:
        yield
    finally:
        _immediate.reset(token)


@contextmanager
def raising_interruptions() -> Iterator[None]:
    """Raise what has interrupted the hooks of a commit that was made inside.

    The ``transaction`` package swallows whatever an after-commit hook raises: a time limit, a
    signal to end the process, and the error of an eager task.
    """
    caught: list[BaseException] = []
    token = _interruptions.set(caught)
    try:
        yield
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


@dataclass(frozen=True)
class Publication:
    """One message: the serialised body, and the options of :meth:`kombu.Producer.publish`."""

    payload: str | bytes
    options: dict[str, Any]
    #: The transactions and savepoints of SQLAlchemy in which it was dispatched.
    session_transactions: tuple[Any, ...] = ()

    @property
    def task_id(self) -> str | None:
        """Id of the task, or ``None`` for an event that travels along."""
        return self._header("id")

    @property
    def task_name(self) -> str | None:
        """Name of the task, or ``None`` for an event that travels along."""
        return self._header("task")

    def _header(self, name: str) -> Any:
        return (self.options.get("headers") or {}).get(name)

    def publish(self, producer: Producer, **overrides: Any) -> None:
        """Hand the message to the broker."""
        producer.publish(self.payload, **{**self.options, **overrides})


class RecordingProducer:
    """Takes kombu's place while a transaction is open: ``publish()`` keeps instead of sending.

    The body is serialised at the call, so that changing an argument afterwards changes nothing and
    a value that does not serialise fails where the caller can see it. Routing, headers and signals
    have happened by then: Celery and its instrumentations do them before they publish.

    :param connection: the connection that the message will leave by; it is never opened here.
    :param publications: where to keep what is published.
    :param session_transactions: what is open in the request's SQLAlchemy session.
    """

    #: No serializer of its own: Celery passes the task's with every message.
    serializer: str | None = None

    def __init__(
        self,
        connection: Connection,
        publications: MutableSequence[Publication | EagerCall],
        session_transactions: tuple[Any, ...] = (),
    ) -> None:
        self.connection = connection
        self._publications = publications
        self._session_transactions = session_transactions

    def publish(self, body: Any, *, serializer: str | None = None, **options: Any) -> None:
        content_type, content_encoding, payload = dumps(body, serializer=serializer)
        options.update(content_type=content_type, content_encoding=content_encoding)
        self._publications.append(Publication(payload, options, self._session_transactions))

    def defer(self, run: Callable[[], Any], result: DeferredResult) -> DeferredResult:
        """Let ``run`` be called after the commit, and settle ``result``; returns it."""
        self._publications.append(EagerCall(run, result, self._session_transactions))
        return result


@implementer(IDataManagerSavepoint)
class _Savepoint:
    def __init__(self, publications: MutableSequence[Publication | EagerCall]) -> None:
        self._publications = publications
        self._length = len(publications)

    def rollback(self) -> None:
        del self._publications[self._length :]


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
        self.publications: list[Publication | EagerCall] = []
        self._app = app
        txn.addAfterCommitHook(self._after_commit, (txn,))
        try:
            txn.join(self)
        except ValueError:
            # The transaction is committing already (a listener of its own flush dispatches). No
            # savepoint can come any more, so that the hook alone is enough.
            log.debug("dispatch during the commit of %r", txn)

    def _after_commit(self, committed: bool, txn: Any) -> None:
        if not committed:
            return
        messages = [item for item in self.publications if isinstance(item, Publication)]
        calls = [item for item in self.publications if isinstance(item, EagerCall)]
        if messages:
            with _told_to_caller():
                self._app.publish(messages)
        for call in calls:
            with _told_to_caller():
                call.perform(txn)

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

    def tpc_begin(self, txn: Any) -> None:
        """Nothing to prepare."""

    def commit(self, txn: Any) -> None:
        """Nothing to write."""

    def tpc_vote(self, txn: Any) -> None:
        """Nothing that could still fail."""

    def tpc_finish(self, txn: Any) -> None:
        """Published by the after-commit hook."""

    def tpc_abort(self, txn: Any) -> None:
        self.abort(txn)


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

        The request's own manager comes first, then the thread-local one.
        """
        manager = getattr(request, "tm", None)
        if manager is not None and (txn := self.begun(manager)) is not None:
            return txn
        return self.begun(transaction.manager)

    def recorder(self, app: Any, request: Any) -> RecordingProducer | None:
        """Return what records for the current transaction, or ``None``: send at once."""
        if _immediate.get() or (txn := self.current(request)) is None:
            return None
        try:
            data_manager = txn.data(app)
        except KeyError:
            data_manager = None
        if data_manager is None:
            data_manager = DispatchDataManager(app, txn)
            txn.set_data(app, data_manager)
        return RecordingProducer(
            app.producer_pool.connections.connection,
            data_manager.publications,
            _watch_session(app, request, data_manager),
        )


def _watch_session(app: Any, request: Any, data_manager: DispatchDataManager) -> tuple[Any, ...]:
    """Listen to the request's session; return its open transactions."""
    session = open_session(request, app.registry.settings.get("ws_celery.dbsession", "dbsession"))
    if session is None:
        return ()
    tell_rollbacks(session, data_manager)
    return open_transactions(session)


def _of_this_thread(manager: Any) -> Any:
    # transaction.manager is a threading.local around one real manager for each thread.
    return getattr(manager, "manager", manager)
