"""Eager mode (``task_always_eager``): what would be sent runs in the calling process.

Celery's own eager mode calls functions: nothing is serialised, canvases run in the middle of the
caller's transaction, and ``send_task`` sends all the same. So Celery does not know of it. It builds
its messages as ever, and they run when they would have left, as a worker runs them. The test kit
runs what it has captured by the same means.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context as Variables
from threading import local
from typing import TYPE_CHECKING, Any

import transaction
from billiard.einfo import ExceptionInfo
from celery import states
from celery.app.trace import build_tracer
from celery.backends.cache import CacheBackend
from celery.exceptions import Ignore, Reject, Retry
from celery.worker.request import Request as WorkerRequest
from kombu import Message
from kombu.serialization import dumps, loads, prepare_accept_content
from pyramid.registry import Registry
from pyramid.threadlocal import manager as threadlocals

from ws_celery.exceptions import NotRunYet, TaskNotRegistered
from ws_celery.recording import Publication, RecordingProducer

if TYPE_CHECKING:
    from ws_celery.app import PyramidCelery

__all__ = ("EagerWorker", "MemoryBackend", "manager_of_its_own", "perform", "received")


class EagerWorker:
    """Runs messages in the thread that sends them.

    It does one after the other, as a worker with one process does: what a run sends, and its retry,
    runs when that run is over.

    :param app: the Celery app that sends them.
    """

    def __init__(self, app: PyramidCelery) -> None:
        self._app = app
        self._thread = local()

    @contextmanager
    def producer(self) -> Iterator[RecordingProducer]:
        """Hand out a producer whose messages run when whoever has asked for it has done."""
        publications: list[Publication] = []
        yield RecordingProducer(self._app.producer_pool.connections.connection, publications)
        self.run(publications)

    def run(self, publications: Iterable[Publication]) -> None:
        """Run messages, and what they send in turn; in a run, leave them to the worker.

        :raises TaskNotRegistered: if a task is another program's; the others have run.
        :raises Exception: the first error of a task, with ``task_eager_propagates``; likewise.
        """
        waiting = getattr(self._thread, "waiting", None)
        if waiting is not None:
            waiting.extend(publications)
            return
        self._thread.waiting = waiting = deque(publications)
        try:
            errors = self._run_all(waiting)
        finally:
            del self._thread.waiting
        if errors:
            raise errors[0]

    def _run_all(self, waiting: deque[Publication]) -> list[Exception]:
        errors = []
        while waiting:
            publication = waiting.popleft()
            try:
                if publication.task_id is not None:  # no event that travels along
                    self._run(received(self._app, publication))
            except Exception as error:  # noqa: BLE001 - the next message is not to blame
                errors.append(error)
        return errors

    def _run(self, request: WorkerRequest) -> None:
        propagates = self._app.conf.task_eager_propagates
        # The result has the error, and Celery has logged it.
        with suppress(*(Ignore, Reject, Retry) if propagates else (Exception,)):
            # An empty context, as in a worker: no calling request, no immediately().
            Variables().run(perform, self._app, request)


class MemoryBackend(CacheBackend):
    """Keeps results in the memory of the process: the last 5000, for all applications.

    Nobody waits for one: whoever could make it is the thread that asks.

    :param app: the Celery app.
    """

    supports_native_join = False  # it would wait

    def __init__(self, app: PyramidCelery) -> None:
        super().__init__(app=app, url="memory://")

    def wait_for(
        self, task_id: str, on_interval: Callable[[], None] | None = None, **_: Any
    ) -> dict[str, Any]:
        """Return what is kept of a task that has run.

        :raises NotRunYet: if it has not.
        """
        found = self.get_task_meta(task_id)
        if found["status"] not in states.READY_STATES:
            if on_interval:
                on_interval()  # knows of a run that was skipped
            raise NotRunYet(task_id)
        return found


def received(app: PyramidCelery, publication: Publication) -> WorkerRequest:
    """Take a message through all that it goes through between two processes.

    :raises TaskNotRegistered: if the task is another program's.
    """
    if publication.task_name not in app.tasks:
        raise TaskNotRegistered(str(publication.task_name))
    options = publication.options
    content_type, encoding, headers = dumps(options["headers"], serializer="json")
    message = Message(
        body=publication.payload,
        content_type=options["content_type"],
        content_encoding=options["content_encoding"],
        headers=loads(headers, content_type, encoding, accept={content_type}),
        properties={key: options.get(key) for key in ("correlation_id", "reply_to", "priority")},
        delivery_info={key: options.get(key) for key in ("exchange", "routing_key")},
        accept=prepare_accept_content(app.conf.accept_content),
    )
    request = WorkerRequest(message, app=app)
    _, _, embed = message.payload
    request.request_dict.update({**(embed or {}), "is_eager": False})
    return request


def perform(app: PyramidCelery, request: WorkerRequest) -> Any:
    """Give a received message a run of its own, and do what Celery does after it.

    :return: what the task returns.
    :raises Exception: what the task raises, and the ways in which Celery ends a run.
    """
    task = app.tasks[request.type]
    with _as_in_a_process_of_its_own(app.registry):
        trace = build_tracer(task.name, task, app=app)
        result, ended, _, _ = trace(
            request.id, request.args, request.kwargs, request=request.request_dict
        )
    if ended is not None:
        raise ended.retval
    if isinstance(result, ExceptionInfo):  # not the function, but what follows it has failed
        raise result.exception
    return result


@contextmanager
def _as_in_a_process_of_its_own(registry: Registry) -> Iterator[None]:
    # No request of the caller is current, and its transaction is out of reach: a run cleans up the
    # manager of its thread, and could not begin one in the after-commit hook of another.
    threadlocals.push({"request": None, "registry": registry})
    try:
        with manager_of_its_own():
            yield
    finally:
        threadlocals.pop()


@contextmanager
def manager_of_its_own() -> Iterator[None]:
    """Let this thread have another transaction manager, so that no transaction is open in it."""
    manager = transaction.manager.manager
    transaction.manager.manager = transaction.TransactionManager()
    try:
        yield
    finally:
        transaction.manager.manager = manager
