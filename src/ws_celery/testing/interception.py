"""Keeps what an application would send: the methods of its Celery app that a capture replaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from celery.backends.base import DisabledBackend
from pyramid.events import NewRequest
from pyramid.interfaces import INewRequest
from pyramid.path import DottedNameResolver

from ws_celery.eager import MemoryBackend
from ws_celery.recording import Publication, RecordingProducer
from ws_celery.request import calling_request

if TYPE_CHECKING:
    from kombu import Producer
    from pyramid.request import Request
    from pyramid.response import Response
    from transaction.interfaces import ITransaction

    from ws_celery.app import PyramidCelery

__all__ = ("Interception",)


class Interception:
    """Keeps what is sent at once or by a commit, and knows who keeps the rest.

    It takes the place of some methods of the app, and gives them back with :meth:`close`. It may be
    inside another one of the same app, to which it passes on what it has kept.

    :param app: the Celery app.
    :param environ: WSGI environ of the requests of the tasks that are run.
    """

    def __init__(self, app: PyramidCelery, environ: Mapping[str, Any] | None = None) -> None:
        self.app = app
        self.environ = dict(environ or {})
        self._sent: list[Publication] = []
        self._transactions: list[ITransaction] = []
        self._countdowns: dict[str, float | None] = {}
        self._outer: Interception | None = app.__dict__.get("captured_by")
        self._stack = ExitStack()
        self._intercept()

    def _lists(self) -> list[list[Publication]]:
        """Return the lists of what is kept: sent already, and with each open transaction."""
        recorded = (_recorded(self.app, txn) for txn in self._transactions)
        return [self._sent, *filter(None, recorded)]

    def publications(self) -> list[Publication]:
        """Return the messages of tasks, those sent already first."""
        return [found for each in self._lists() for found in each if _is_task(found)]

    def countdown(self, publication: Publication) -> float | None:
        """Return the countdown of the call, in seconds."""
        return self._countdowns.get(str(publication.task_id))

    def take(self) -> Publication | None:
        """Remove the first message, and return it."""
        for each in self._lists():
            while each:
                publication = each.pop(0)
                if _is_task(publication):
                    return publication
        return None

    def take_sent(self, task_id: str) -> Publication:
        """Remove the message of a task that was sent at once, and return it."""
        (publication,) = (
            found for found in self._sent if _is_task(found) and found.task_id == task_id
        )
        self._sent.remove(publication)
        return publication

    def look_at(self, source: Any) -> None:
        """Include what the current transaction of a request or manager has recorded already."""
        transactions = self.app.transactions
        if hasattr(source, "registerSynch"):
            self._watch(transactions.begun(source))
        else:
            self._watch(transactions.current(source if hasattr(source, "tm") else None))
        self._watch(transactions.current(calling_request()))

    def close(self) -> None:
        """Give the methods back, and pass on what was kept."""
        self._stack.close()
        if self._outer is not None:
            self._outer._sent += self._sent
            self._outer._countdowns.update(self._countdowns)
            for txn in self._transactions:
                self._outer._watch(txn)
        self._sent.clear()

    def until_closed(self, callback: Callable[..., object], *args: object) -> None:
        """Call ``callback`` when the interception ends."""
        self._stack.callback(callback, *args)

    def _watch(self, txn: ITransaction | None) -> None:
        if txn is not None and not any(txn is known for known in self._transactions):
            self._transactions.append(txn)

    def _intercept(self) -> None:
        app = self.app
        if self._outer is not None:
            self._transactions += self._outer._transactions
            self.environ = self.environ or self._outer.environ
        self._replace("captured_by", self)
        self._send_task = app.send_task
        self._replace("producer_or_acquire", self._producer_or_acquire)
        self._replace("publish", self._sent.extend)
        # A row would be of a message that is not sent.
        self._replace("outbox", None)
        self._replace("send_task", self._note_countdown)
        if not isinstance(app.backend, DisabledBackend):
            # Results in memory: AsyncResult.get() and chords work without a service.
            self._replace("_backend_cache", MemoryBackend(app))
        self.look_at(self.environ.get("tm.manager"))
        app.registry.registerHandler(self._watch_request, (INewRequest,))
        self._stack.callback(app.registry.unregisterHandler, self._watch_request, (INewRequest,))

    def _replace(self, name: str, value: object) -> None:
        self._stack.enter_context(_attribute(self.app, name, value))

    def _producer_or_acquire(
        self, producer: Producer | None = None
    ) -> AbstractContextManager[Producer]:
        if isinstance(producer, RecordingProducer):
            return nullcontext(producer)
        recorder = self.app.recorder() if producer is None else None
        if recorder is None:
            connection = self.app.producer_pool.connections.connection
            return nullcontext(RecordingProducer(connection, self._sent))
        self._watch(self.app.transactions.current(calling_request()))
        return nullcontext(recorder)

    def _note_countdown(self, name: str, *args: Any, **options: Any) -> Any:
        # The message has an eta only.
        result = self._send_task(name, *args, **options)
        self._countdowns[result.id] = options.get("countdown")
        return result

    def _watch_request(self, event: NewRequest) -> None:
        request = event.request
        recorded = _recorded(self.app, self.app.transactions.current(request))
        count, responses = len(recorded), []

        def answered(request: Request, response: Response) -> None:
            responses.append(response)
            if _would_abort(request, response):
                self._drop(request, count)

        def finished(request: Request) -> None:
            if not responses:
                self._drop(request, count)

        request.add_response_callback(answered)
        request.add_finished_callback(finished)

    def _drop(self, request: Request, count: int) -> None:
        # Under pyramid_tm itself the mark is gone by now, and the transaction with it.
        if "tm.active" in request.environ:
            del _recorded(self.app, self.app.transactions.current(request))[count:]


def _is_task(publication: Publication) -> bool:
    """Tell a task's message from an event that travels along."""
    return publication.task_id is not None


def _recorded(app: PyramidCelery, txn: ITransaction | None) -> list[Publication]:
    """Return the list, not a copy, of what is recorded in a transaction; new if there is none."""
    try:
        data_manager = None if txn is None else txn.data(app)
    except KeyError:  # it is over, or nothing was dispatched
        return []
    return [] if data_manager is None else data_manager.publications


def _would_abort(request: Request, response: Response) -> bool:
    """Tell as pyramid_tm does whether a response that is no error aborts its transaction."""
    veto = request.registry.settings.get("tm.commit_veto")
    if veto:
        return bool(DottedNameResolver(None).maybe_resolve(veto)(request, response))
    return getattr(request, "exc_info", None) is not None


@contextmanager
def _attribute(target: object, name: str, value: object) -> Iterator[None]:
    """Set an attribute of the instance for a while, over what its class has."""
    before = dict(vars(target))
    setattr(target, name, value)
    try:
        yield
    finally:
        if name in before:
            setattr(target, name, before[name])
        else:
            delattr(target, name)
