"""The sequence of what would be sent: questions, assertions, and running it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from contextvars import Context as Variables
from typing import TYPE_CHECKING, Any

from celery.backends.base import DisabledBackend
from celery.exceptions import Ignore, Retry
from kombu.serialization import dumps, loads
from pyramid.events import NewRequest
from pyramid.interfaces import INewRequest
from pyramid.path import DottedNameResolver

from ws_celery.eager import MemoryBackend
from ws_celery.recording import Publication, RecordingProducer, immediately
from ws_celery.request import calling_request
from ws_celery.testing.captured import (
    CapturedTask,
    attribute,
    check_options,
    described,
    read,
    run_as_worker,
    task_name,
)

if TYPE_CHECKING:
    from ws_celery.app import PyramidCelery

__all__ = (
    "Capture",
    "Interception",
)


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
        self._transactions: list[Any] = []
        self._countdowns: dict[str, Any] = {}
        self._outer: Interception | None = app.__dict__.get("captured_by")
        self._stack = ExitStack()
        self._intercept()

    def _held(self) -> list[Any]:
        """Return the lists of what is kept: sent already, and with each open transaction."""
        recorded = (_recorded(self.app, txn) for txn in self._transactions)
        return [self._sent, *filter(None, recorded)]

    def publications(self) -> list[Publication]:
        """Return the messages of tasks, those sent already first."""
        return [found for held in self._held() for found in held if _is_task(found)]

    def countdown(self, publication: Publication) -> float | None:
        """Return the countdown of the call, in seconds."""
        return self._countdowns.get(str(publication.task_id))

    def take(self) -> Publication | None:
        """Remove the first message, and return it."""
        for held in self._held():
            while held:
                publication = held.pop(0)
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

    def until_closed(self, callback: Callable[..., Any], *args: Any) -> None:
        """Call ``callback`` when the interception ends."""
        self._stack.callback(callback, *args)

    def _watch(self, txn: Any) -> None:
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

    def _replace(self, name: str, value: Any) -> None:
        self._stack.enter_context(attribute(self.app, name, value))

    def _producer_or_acquire(self, producer: Any = None) -> AbstractContextManager[Any]:
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

        def answered(request: Any, response: Any) -> None:
            responses.append(response)
            if _would_abort(request, response):
                self._drop(request, count)

        def finished(request: Any) -> None:
            if not responses:
                self._drop(request, count)

        request.add_response_callback(answered)
        request.add_finished_callback(finished)

    def _drop(self, request: Any, count: int) -> None:
        # Under pyramid_tm itself the mark is gone by now, and the transaction with it.
        if "tm.active" in request.environ:
            del _recorded(self.app, self.app.transactions.current(request))[count:]


def _is_task(publication: Publication) -> bool:
    """Tell a task's message from an event that travels along."""
    return publication.task_id is not None


def _recorded(app: PyramidCelery, txn: Any) -> list[Publication]:
    """Return the list, not a copy, of what is recorded in a transaction; new if there is none."""
    try:
        data_manager = None if txn is None else txn.data(app)
    except KeyError:  # it is over, or nothing was dispatched
        return []
    return [] if data_manager is None else data_manager.publications


def _would_abort(request: Any, response: Any) -> bool:
    """Tell as pyramid_tm does whether a response that is no error aborts its transaction."""
    veto = request.registry.settings.get("tm.commit_veto")
    if veto:
        return bool(DottedNameResolver(None).maybe_resolve(veto)(request, response))
    return getattr(request, "exc_info", None) is not None


_TIMES = {0: "not sent", 1: "sent once", 2: "sent twice"}


class Capture(Sequence[CapturedTask]):
    """What one application would send, as a sequence of :class:`CapturedTask`.

    It is alive: a task disappears when its transaction aborts or its savepoint is rolled back.
    Made by :func:`capture`. Ends with :meth:`close`, or at the end of ``with``.

    A test that begins the transaction itself (``tm.active`` in the environ, as Pylons' cookiecutter
    has it) has switched pyramid_tm off. What pyramid_tm would have dropped is dropped here:
    the tasks of a request that raises, or whose response is vetoed.

    :param app: the Celery app of the application.
    :param environ: WSGI environ of the requests of the tasks that are run.
    """

    def __init__(self, app: PyramidCelery, environ: Mapping[str, Any] | None = None) -> None:
        self.app = app
        self._interception = Interception(app, environ)

    # What there is

    def __getitem__(self, index: Any) -> Any:
        held = self._interception
        return [read(found, held.countdown(found)) for found in held.publications()][index]

    def __len__(self) -> int:
        return len(self._interception.publications())

    def __repr__(self) -> str:
        return "\n".join(["Captured:", *(f"  {task}" for task in self or ["nothing"])])

    @property
    def names(self) -> list[str]:
        """Names of the tasks, in the order of dispatch within each transaction."""
        return [task.name for task in self]

    def find(
        self, task: Any, args: Any = None, kwargs: Any = None, **options: Any
    ) -> list[CapturedTask]:
        """Return the captured tasks that a call would have sent.

        :param task: a task, its name, or the last part of its name.
        :param args: positional arguments; if not given, any.
        :param kwargs: keyword arguments; if not given, any.
        :param options: options of ``apply_async`` that :attr:`CapturedTask.options` has. Of
            ``headers`` the given ones are compared.
        :raises TypeError: if an option is another one.
        """
        check_options(options)
        name = task_name(task)
        wanted = {"args": None if args is None else list(args), "kwargs": kwargs}
        # As they will arrive: a tuple inside is a list then.
        content_type, encoding, text = dumps(wanted, serializer=self.app.conf.task_serializer)
        wanted = loads(text, content_type, encoding, accept={content_type})
        return [
            found
            for found in self
            if name in (found.name, found.name.rpartition(".")[2])
            and wanted["args"] in (None, found.args)
            and wanted["kwargs"] in (None, found.kwargs)
            and all(found.agrees(option, value) for option, value in options.items())
        ]

    # Assertions

    def assert_sent(
        self, task: Any, args: Any = None, kwargs: Any = None, *, times: int = 1, **options: Any
    ) -> CapturedTask | None:
        """Assert that such a task is sent, once or ``times`` times; what is sent besides is free.

        :param times: how often.
        :return: the first such task.
        :raises AssertionError: otherwise; the message shows what was captured.

        The other parameters are those of :meth:`find`.
        """
        __tracebackhide__ = True
        found = self.find(task, args, kwargs, **options)
        if len(found) != times:
            call = described(task_name(task), args, kwargs, options)
            raise AssertionError(
                f"{call} should have been {_times(times)}, and was {_times(len(found))}."
                f"{self._hint(task_name(task))}\n{self!r}"
            )
        return found[0] if found else None

    def assert_not_sent(
        self, task: Any = None, args: Any = None, kwargs: Any = None, **options: Any
    ) -> None:
        """Assert that no such task is sent, or without arguments that no task is.

        The parameters are those of :meth:`find`.

        :raises AssertionError: otherwise; the message shows what was captured.
        """
        __tracebackhide__ = True
        if task is not None:
            self.assert_sent(task, args, kwargs, times=0, **options)
        elif self:
            raise AssertionError(f"No task should have been sent.\n{self!r}")

    def _hint(self, name: str) -> str:
        known = any(name in (full, full.rpartition(".")[2]) for full in self.app.tasks)
        return "" if known else " No task of that name is registered."

    # Running

    def drain(self, *, limit: int = 1000) -> list[Any]:
        """Run what would be sent, as workers would, and what the runs send in turn.

        Each message is decoded as it is, and has a request and a transaction of its own.
        Callbacks, the next tasks of chains, bodies of chords and retries follow; nothing waits for
        its ``eta``. Nothing is left of what was captured.

        :param limit: how many runs there may be: a task that sends itself has no end.
        :return: what the runs have returned, in their order. A run that ended with ``Retry`` or
            ``Ignore`` has returned nothing.
        :raises Exception: what a task raises; what was not run yet stays captured.
        :raises TaskNotRegistered: if a task is another program's.
        :raises AssertionError: if there are more runs than ``limit``.
        """
        results = []
        for _ in range(limit):
            publication = self._interception.take()
            if publication is None:
                break
            # Both have sent what follows, or wanted nothing to follow.
            with suppress(Retry, Ignore):
                results.append(self._run(publication))
        if self:
            raise AssertionError(f"drain() has run {limit} tasks, and more are to run.\n{self!r}")
        return results

    def perform(self, task: Any, *args: Any, **kwargs: Any) -> Any:
        """Run one task as a worker would; what it sends is captured.

        :param task: a task, or a signature of one.
        :return: what the task returns.
        :raises Exception: what the task raises, ``Retry``, ``Ignore`` and ``Reject`` too.
        """
        with immediately():
            result = task.apply_async(args, kwargs)
        return self._run(self._interception.take_sent(result.id))

    def _run(self, publication: Publication) -> Any:
        # An empty context, as in a worker: no calling request, no immediately().
        return Variables().run(run_as_worker, self.app, publication, self._interception.environ)

    # Its life

    def look_at(self, source: Any) -> None:
        """Include what the current transaction of a request or manager has recorded already."""
        self._interception.look_at(source)

    def until_closed(self, callback: Callable[..., Any], *args: Any) -> None:
        """Call ``callback`` when the capture ends."""
        self._interception.until_closed(callback, *args)

    def close(self) -> None:
        """End the capture: what is dispatched from now on is sent.

        What this one has kept is passed on to the capture around it, or dropped. What is recorded
        in a transaction that is still open is the transaction's.
        """
        self._interception.close()

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _times(count: int) -> str:
    return _TIMES.get(count, f"sent {count} times")
