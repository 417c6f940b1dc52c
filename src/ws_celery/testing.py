"""The test kit: see what would be sent, run it as a worker would, without broker and worker.

``pytest_plugins = ["ws_celery.testing"]`` in ``conftest.py`` gives the fixtures :func:`capture` and
:func:`perform`. Nothing else imports this module, so that pytest is needed for tests only.

While a :class:`Capture` is open nothing leaves the process: what is deferred stays with its
transaction, what is sent at once or by a commit is kept here, and results are kept in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from contextvars import Context as Variables
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeGuard

import celery.contrib.testing.tasks  # noqa: F401 - the fixture celery_worker asks for its task
import pytest
import transaction
from billiard.einfo import ExceptionInfo
from celery.app.task import Context
from celery.app.trace import build_tracer
from celery.backends.base import DisabledBackend
from celery.backends.cache import CacheBackend
from celery.exceptions import Ignore, Retry
from celery.worker.request import Request as WorkerRequest
from kombu import Message
from kombu.serialization import dumps, loads, prepare_accept_content
from pyramid.events import NewRequest
from pyramid.interfaces import INewRequest, IRequestFactory
from pyramid.path import DottedNameResolver
from pyramid.registry import Registry
from pyramid.request import Request
from pyramid.threadlocal import get_current_registry
from pyramid.threadlocal import manager as threadlocals

from ws_celery.app import PyramidCelery, loaded_celery_app
from ws_celery.declaration import TaskProxy
from ws_celery.dispatch import Publication, RecordingProducer, immediately
from ws_celery.eager import EagerCall
from ws_celery.exceptions import TaskNotRegistered
from ws_celery.interfaces import ICeleryApp
from ws_celery.request import calling_request

__all__ = ("Capture", "CapturedTask", "capture", "celery_environ", "perform")

_TIMES = {0: "not sent", 1: "sent once", 2: "sent twice"}


@dataclass(frozen=True)
class CapturedTask:
    """One message that would be sent, decoded as a worker would decode it."""

    #: Id of the task, that of the ``AsyncResult`` which the call has returned.
    id: str
    #: Name of the task.
    name: str
    #: Positional arguments, without the request.
    args: list[Any]
    #: Keyword arguments, without the request.
    kwargs: dict[str, Any]
    #: Options of the call: ``queue``, ``routing_key``, ``priority``, ``countdown``, ``eta`` and
    #: ``expires`` (datetimes), ``headers`` (yours only); those not given are missing.
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = {name: value for name, value in self.options.items() if name != "routing_key"}
        return _pairs(_call(self.name, self.args, self.kwargs), shown)


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
        self.environ = dict(environ or {})
        self._sent: list[Publication | EagerCall] = []
        self._transactions: list[Any] = []
        self._countdowns: dict[str, Any] = {}
        self._outer: Capture | None = app.__dict__.get("captured_by")
        self._stack = ExitStack()
        self._intercept()

    # What there is

    def __getitem__(self, index: Any) -> Any:
        return [self._read(publication) for publication in self._publications()][index]

    def __len__(self) -> int:
        return len(self._publications())

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
        :param options: options of ``apply_async``. Of ``headers`` the given ones are compared.
        """
        name = _name(task)
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
            and all(_agrees(found.options.get(key), value) for key, value in options.items())
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
            call = _pairs(_call(_name(task), args, kwargs), options)
            raise AssertionError(
                f"{call} should have been {_times(times)}, and was {_times(len(found))}."
                f"{self._hint(_name(task))}\n{self!r}"
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
            publication = self._take()
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
        (publication,) = (
            found for found in self._sent if _is_task(found) and found.task_id == result.id
        )
        self._sent.remove(publication)
        return self._run(publication)

    def _take(self) -> Publication | None:
        for held in self._held():
            while held:
                publication = held.pop(0)
                if _is_task(publication):
                    return publication
        return None

    def _run(self, publication: Publication) -> Any:
        # An empty context, as in a worker: no calling request, no immediately().
        return Variables().run(_run_as_worker, self.app, publication, self.environ)

    # Interception

    def _held(self) -> list[Any]:
        """Return the lists of what is kept: sent already, and with each open transaction."""
        recorded = (_recorded(self.app, txn) for txn in self._transactions)
        return [self._sent, *filter(None, recorded)]

    def _publications(self) -> list[Publication]:
        return [found for held in self._held() for found in held if _is_task(found)]

    def look_at(self, source: Any) -> None:
        """Include what the current transaction of a request or manager has recorded already."""
        transactions = self.app.transactions
        if hasattr(source, "registerSynch"):
            self._watch(transactions.begun(source))
        else:
            self._watch(transactions.current(source if hasattr(source, "tm") else None))
        self._watch(transactions.current(calling_request()))

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
        self._replace("send_task", self._note_countdown)
        if app.conf.task_always_eager:
            # Eager calls are never sent.
            app.conf.task_always_eager = False
            self._stack.callback(setattr, app.conf, "task_always_eager", True)
        if not isinstance(app.backend, DisabledBackend):
            # Results in memory: AsyncResult.get() and chords work without a service.
            self._replace("_backend_cache", CacheBackend(app=app, url="memory://"))
        self.look_at(self.environ.get("tm.manager"))
        app.registry.registerHandler(self._watch_request, (INewRequest,))
        self._stack.callback(app.registry.unregisterHandler, self._watch_request, (INewRequest,))

    def _replace(self, name: str, value: Any) -> None:
        self._stack.enter_context(_attribute(self.app, name, value))

    def _producer_or_acquire(self, producer: Any = None) -> AbstractContextManager[Any]:
        if isinstance(producer, RecordingProducer):
            return nullcontext(producer)
        transactions, request = self.app.transactions, calling_request()
        recorder = transactions.recorder(self.app, request) if producer is None else None
        if recorder is None:
            connection = self.app.producer_pool.connections.connection
            return nullcontext(RecordingProducer(connection, self._sent))
        self._watch(transactions.current(request))
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

    def _read(self, publication: Publication) -> CapturedTask:
        options, headers = publication.options, publication.options["headers"]
        content_type = options["content_type"]
        args, kwargs, _ = loads(
            publication.payload, content_type, options["content_encoding"], accept={content_type}
        )
        declared = options.get("declare")
        found = {
            "queue": declared[0].name if declared else options.get("routing_key"),
            "routing_key": options.get("routing_key"),
            "priority": options.get("priority"),
            "countdown": self._countdowns.get(headers["id"]),
            "eta": headers["eta"] and datetime.fromisoformat(headers["eta"]),
            "expires": headers["expires"] and datetime.fromisoformat(headers["expires"]),
            "headers": Context(headers).headers or None,
        }
        given = {key: value for key, value in found.items() if value is not None}
        return CapturedTask(headers["id"], headers["task"], args, kwargs, given)

    def close(self) -> None:
        """End the capture: what is dispatched from now on is sent.

        What this one has kept is passed on to the capture around it, or dropped. What is recorded
        in a transaction that is still open is the transaction's.
        """
        self._stack.close()
        if self._outer is not None:
            self._outer._sent += self._sent
            self._outer._countdowns.update(self._countdowns)
            for txn in self._transactions:
                self._outer._watch(txn)
        self._sent.clear()

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def capture(source: Any = None, environ: Mapping[str, Any] | None = None) -> Capture:
    """Begin to keep what an application would send; nothing leaves until it is closed.

    What the current transaction has recorded already is there, too.

    :param source: a transaction manager, a request, a registry or what has one (a Pyramid
        application). It tells the application, if more than one is loaded, and the transaction.
    :param environ: what the requests of the tasks find in their environ, such as the
        ``extra_environ`` of a ``TestApp``: so they share the database session of the test. Its
        ``tm.manager`` is replaced, because each run has a transaction of its own.
    :raises NoCurrentApplication: if none or more than one application is loaded.
    """
    app = _celery_app(source)
    captured = Capture(app, environ)
    captured.look_at(source)
    for registry in _registries(source):
        if registry.queryUtility(ICeleryApp) is None:
            # The registry of a dummy configuration: its tasks are those of the application.
            registry.registerUtility(app, ICeleryApp)
            captured._stack.callback(registry.unregisterUtility, app, ICeleryApp)
    return captured


def perform(task: Any, *args: Any, **kwargs: Any) -> Any:
    """Run one task as a worker would: decoded from a message, own request, own transaction.

    What it sends in turn is captured if a capture is open, and dropped otherwise.

    :param task: a task, or a signature of one.
    :param args: its arguments, without a request.
    :return: what the task returns.
    :raises Exception: what the task raises, ``Retry``, ``Ignore`` and ``Reject`` too.
    """
    with capture(_owner(task)) as captured:
        return captured.perform(task, *args, **kwargs)


def _owner(task: Any) -> Registry | None:
    # What @task has left belongs to whichever application is current.
    return None if isinstance(task, TaskProxy) else task.app.registry


def _registries(source: Any) -> list[Registry]:
    candidates = (source, calling_request())
    registries = [getattr(candidate, "registry", candidate) for candidate in candidates]
    return [
        registry
        for registry in (*registries, get_current_registry())
        if hasattr(registry, "queryUtility")
    ]


def _celery_app(source: Any) -> PyramidCelery:
    apps = [registry.queryUtility(ICeleryApp) for registry in _registries(source)]
    return next(filter(None, apps), None) or loaded_celery_app("capture()")


def _is_task(recorded: Publication | EagerCall) -> TypeGuard[Publication]:
    """Tell a task's message from an event that travels along and from an eager call."""
    return isinstance(recorded, Publication) and recorded.task_id is not None


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


def _run_as_worker(app: PyramidCelery, publication: Publication, environ: dict[str, Any]) -> Any:
    request = _received(app, publication)
    task = app.tasks[request.type]
    with _as_in_a_process_of_its_own(app.registry), _request_environ(app.registry, environ):
        trace = build_tracer(task.name, task, app=app)
        result, ended, _, _ = trace(
            request.id, request.args, request.kwargs, request=request.request_dict
        )
    if ended is not None:
        raise ended.retval
    if isinstance(result, ExceptionInfo):  # not the function, but what follows it has failed
        raise result.exception
    for shared in environ.values():
        # A session that the test has lent is not committed by the run; a commit would flush it.
        if hasattr(shared, "flush"):
            shared.flush()
    return result


def _received(app: PyramidCelery, publication: Publication) -> WorkerRequest:
    """Take a message through all that it goes through between two processes."""
    if publication.task_name not in app.tasks:
        raise TaskNotRegistered(str(publication.task_name), "drain()")
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


@contextmanager
def _as_in_a_process_of_its_own(registry: Registry) -> Iterator[None]:
    # No request of the test is current, and a run that cleans up the manager of its thread does not
    # abort the test's transaction.
    threadlocals.push({"request": None, "registry": registry})
    try:
        with _attribute(transaction.manager, "manager", transaction.TransactionManager()):
            yield
    finally:
        threadlocals.pop()


@contextmanager
def _request_environ(registry: Registry, environ: dict[str, Any]) -> Iterator[None]:
    """Let the requests of tasks begin with ``environ``, and with a manager of their own."""
    if not environ:
        yield
        return
    registered = registry.queryUtility(IRequestFactory)
    registry.registerUtility(_Factory(registered or Request, environ), IRequestFactory)
    try:
        yield
    finally:
        registry.unregisterUtility(provided=IRequestFactory)
        if registered is not None:
            registry.registerUtility(registered, IRequestFactory)


class _Factory:
    """The application's request factory, with more in the environ."""

    def __init__(self, factory: Any, environ: dict[str, Any]) -> None:
        self._factory = factory
        self._environ = {key: value for key, value in environ.items() if key != "tm.active"}

    def blank(self, path: str, **options: Any) -> Any:
        manager = transaction.TransactionManager(explicit=True)
        environ = {**self._environ, "tm.manager": manager}
        return self._factory.blank(path, environ=environ, **options)


@contextmanager
def _attribute(target: Any, name: str, value: Any) -> Iterator[None]:
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


def _name(task: Any) -> str:
    return task if isinstance(task, str) else task.name


def _agrees(actual: Any, expected: Any) -> bool:
    if isinstance(actual, dict) and isinstance(expected, Mapping):
        return all(actual.get(key) == value for key, value in expected.items())
    return bool(actual == expected)


def _pairs(call: str, values: Mapping[str, Any]) -> str:
    return " ".join([call, *(f"{name}={value!r}" for name, value in values.items())])


def _call(name: str, args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None) -> str:
    if args is None and kwargs is None:
        return name
    words = [*map(repr, args or ()), *(f"{key}={value!r}" for key, value in (kwargs or {}).items())]
    return f"{name}({', '.join(words)})"


def _times(count: int) -> str:
    return _TIMES.get(count, f"sent {count} times")


# Fixtures of pytest


@pytest.fixture
def celery_environ() -> dict[str, Any]:
    """What the requests of tasks find in their environ: nothing.

    Override it to share the database session of a test whose transaction is never committed.
    """
    return {}


@pytest.fixture(name="capture")
def _capture(celery_environ: dict[str, Any]) -> Iterator[Callable[..., Capture]]:
    """Begin a :func:`capture` that ends with the test; a second one is the same."""
    captures: dict[PyramidCelery, Capture] = {}
    with ExitStack() as stack:

        def begin(source: Any = None) -> Capture:
            app = _celery_app(source)
            if app not in captures:
                captures[app] = stack.enter_context(capture(source, celery_environ))
            captures[app].look_at(source)
            return captures[app]

        yield begin


@pytest.fixture(name="perform")
def _perform(celery_environ: dict[str, Any]) -> Callable[..., Any]:
    """Run a task as :func:`perform` does, its request with the environ of ``celery_environ``."""

    def run(task: Any, *args: Any, **kwargs: Any) -> Any:
        with capture(_owner(task), celery_environ) as captured:
            return captured.perform(task, *args, **kwargs)

    return run
