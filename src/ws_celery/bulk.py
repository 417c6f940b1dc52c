"""Many calls of one task as one dispatch: Celery makes the first message, the others are like it.

What Celery computes for a message is the same for all calls of :meth:`apply_async_many`, but for
the arguments and the ids. So the first call goes Celery's whole way, into a producer that keeps
what it is given, and the others are written by its example. Where a call could make more of a
difference, each goes the whole way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, TypeAlias

from celery import signals
from celery.app.routes import MapRoute
from celery.result import AsyncResult, GroupResult
from celery.utils.saferepr import saferepr
from kombu import Producer
from kombu.exceptions import EncodeError
from kombu.serialization import dumps
from kombu.utils.uuid import uuid
from pyramid.request import Request

from ws_celery.compat import GROUP_PROMISE, library_errors, make_group_promise
from ws_celery.events import BeforeDispatch, has_subscriber
from ws_celery.locks import rule_of
from ws_celery.publishing import batch, publish
from ws_celery.recording import (
    Publication,
    RecordingProducer,
    blame_argument,
    immediately,
    refuse_misread,
)
from ws_celery.request import calling, split_request
from ws_celery.shown_arguments import masked_reprs

if TYPE_CHECKING:
    from ws_celery.app import PyramidCelery
    from ws_celery.tasks import RequestAwareTask

__all__ = (
    "SLICE",
    "BulkPublication",
    "BulkResult",
    "Call",
    "Example",
    "apply_async_many",
    "dispatch_call",
    "split_call",
)

#: Positional and keyword arguments.
Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


def dispatch_call(
    task: RequestAwareTask, number: int, call: Call, options: dict[str, Any]
) -> AsyncResult:
    """Let one call go Celery's whole way.

    :param number: of the call among all, counted from 0.
    :raises ArgumentNotSerializable: if a value does not serialise; it names the call.
    """
    try:
        return task.apply_async(*call, add_to_parent=False, **options)
    except EncodeError as error:
        _blame(task, number, call, error, options.get("serializer"))
        raise


def _blame(
    task: RequestAwareTask, number: int, call: Call, error: EncodeError, serializer: str | None
) -> None:
    serializer = serializer or task.serializer
    blame_argument(error, f"{task.name}, call {number}", *call, serializer)


class Example(RecordingProducer):
    """Takes the first message of many, and makes the others from it.

    :param task: the task that is called.
    :param call: arguments of the first call.
    :param options: options of all calls.
    """

    def __init__(self, task: RequestAwareTask, call: Call, options: dict[str, Any]) -> None:
        kept: list[Publication] = []
        super().__init__(task.app.producer_pool.connections.connection, kept)
        self._task = task
        #: The result of the first call.
        self.result = dispatch_call(task, 0, call, {**options, "producer": self, "group_index": 0})
        (self.first,) = kept
        self.options = self.first.options
        self.headers = self.options["headers"]
        #: Without a task that calls, each is its own root.
        self.root_is_own = self.headers["root_id"] == self.headers["id"]
        #: Unless the caller has given one.
        self.correlation_is_own = self.options["correlation_id"] == self.headers["id"]

    def publish(self, body: Any, *, serializer: str | None = None, **options: Any) -> None:
        _, _, self._embedded = body
        self._serializer = serializer
        super().publish(body, serializer=serializer, **options)

    def publications(self, calls: Iterator[Call]) -> Iterator[Publication]:
        """Yield the first message and those of the other calls."""
        yield self.first
        app = self._task.app
        levels = {"maxlevels": app.conf.get("task_repr_maxlevels", 3)}
        rule = rule_of(self._task)
        for number, call in enumerate(calls, 1):
            refuse_misread(f"{self._task.name}, call {number}", *call, self._serializer, {})
            if rule is not None:
                rule.key_of(self._task, *call)
            try:
                _, _, payload = dumps((*call, self._embedded), serializer=self._serializer)
            except EncodeError as error:
                _blame(self._task, number, call, error, self._serializer)
                raise
            args, kwargs = call
            argsrepr, kwargsrepr = masked_reprs(app, self._task.name, args, kwargs)
            argsrepr = argsrepr or saferepr(args, app.amqp.argsrepr_maxsize, **levels)
            if kwargsrepr is None:
                limit = app.amqp.kwargsrepr_maxsize
                kwargsrepr = saferepr(kwargs, limit, **levels) if kwargs else "{}"
            yield BulkPublication(self, payload, (uuid(), number, argsrepr, kwargsrepr))


class BulkPublication(Publication):
    """A message that is like another one, but for what differs: it keeps no more than that.

    :param example: what knows the first message.
    :param payload: the serialised body.
    :param own: id, number of the call, and how the positional and keyword arguments are shown.
    """

    __slots__ = ("_example", "_own")

    def __init__(
        self, example: Example, payload: str | bytes, own: tuple[str, int, str, str]
    ) -> None:
        super().__init__(payload, example.options)
        self.task_id = own[0]
        self._example = example
        self._own = own
        del self.options  # from now on they are made when they are asked for, see __getattr__()

    def __getattr__(self, name: str) -> dict[str, Any]:
        if name != "options":
            raise AttributeError(name)
        task_id, number, argsrepr, kwargsrepr = self._own
        headers = {
            **self._example.headers,
            "id": task_id,
            "group_index": number,
            "argsrepr": argsrepr,
            "kwargsrepr": kwargsrepr,
        }
        if self._example.root_is_own:
            headers["root_id"] = task_id
        options = {**self._example.options, "headers": headers}
        if self._example.correlation_is_own:
            options["correlation_id"] = task_id
        return options


class BulkResult(GroupResult):
    """A ``GroupResult`` that makes the results of its tasks when somebody asks for them.

    :param id: the id of the group.
    :param ids: ids of the tasks, in the order of the calls.
    :param make: makes the result of an id.
    """

    def __init__(
        self,
        id: str,  # noqa: A002 - the name is Celery's
        ids: list[str],
        app: PyramidCelery,
        make: Callable[[str], AsyncResult],
    ) -> None:
        self.id = id
        self.parent = None
        self.ids = ids
        self._app = app
        self._make = make

    @cached_property
    def results(self) -> list[AsyncResult]:
        """The results of the tasks."""
        return [self._make(task_id) for task_id in self.ids]

    def __getattr__(self, name: str) -> Any:
        # What Celery computes from all the results, when a group is made.
        if name not in ("on_ready", GROUP_PROMISE):
            raise AttributeError(name)
        super().__init__(self.id, self.results, parent=self.parent, app=self._app)
        return self.__dict__[name]

    def iter_native(self, *args: Any, **options: Any) -> Any:
        """Yield the results as they arrive, as in Celery."""
        make_group_promise(self)
        return super().iter_native(*args, **options)

    def __len__(self) -> int:
        return len(self.ids)

    def __reduce__(self) -> tuple[Any, ...]:
        return GroupResult, (self.id, self.results)


#: Messages that are made before they are sent, where no transaction keeps them.
SLICE = 1000


def apply_async_many(
    task: RequestAwareTask, calls: Iterable[tuple[Any, Any]], options: dict[str, Any]
) -> GroupResult:
    """Dispatch a task once for each of ``calls``; see :meth:`RequestAwareTask.apply_async_many`."""
    if "task_id" in options:
        raise TypeError(f"{task.name}: task_id cannot be the id of many tasks. Leave it out.")
    options = {**options, "group_id": options.get("group_id") or uuid()}
    add_to_parent = options.pop("add_to_parent", True)
    pending = iter(calls)
    request, prepared = _prepared(task, pending)
    with calling(request):
        send = _each if _differ(task, options) else _alike
        result = send(task, prepared, options)
    parent = task.app.current_worker_task
    if add_to_parent and parent:
        parent.add_trail(result)
    return result


def _prepared(
    task: RequestAwareTask, calls: Iterator[tuple[Any, Any]]
) -> tuple[Request | None, Iterator[Call]]:
    """Return the request of the first call, and the arguments of all without it, as checked."""
    first = list(islice(calls, 1))
    request = split_request(*split_call(task.name, 0, first[0]))[0] if first else None
    check = task.__header__ if task.typing else None

    def prepare(number: int, call: tuple[Any, Any]) -> Call:
        own, args, kwargs = split_request(*split_call(task.name, number, call))
        if own is not None and own is not request:
            raise TypeError(f"{task.name}: call {number} has another request than the first.")
        if check:
            try:
                check(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{task.name}: call {number}: {error}") from error
        return args, kwargs

    return request, (prepare(number, call) for number, call in enumerate(chain(first, calls)))


def split_call(name: str, number: int, call: Iterable[Any]) -> tuple[Any, Any]:
    """Return positional and keyword arguments of one of the calls.

    :raises TypeError: if it is no such pair.
    """
    try:
        args, kwargs = call
    except (TypeError, ValueError):
        args, kwargs = call, ()  # no dictionary
    if isinstance(args, (tuple, list)) and isinstance(kwargs, (Mapping, type(None))):
        return args, kwargs
    raise TypeError(
        f"{name}: call {number} has {args!r} as arguments: expected a tuple, such as (1,), and "
        "for apply_async_many() a dictionary with it, such as ((1,), {})."
    )


def _differ(task: RequestAwareTask, options: Mapping[str, Any]) -> bool:
    """Return whether a call may make a difference to its message that is not known here.

    Whoever listens to a publish sees each, a router may look at the arguments, and a method
    that was replaced at what it likes.
    """
    app, kind = task.app, type(task)
    return bool(
        any(signal.receivers for signal in _SIGNALS)
        or has_subscriber(app.registry, BeforeDispatch)
        or app.conf.task_send_sent_event
        or app.conf.task_protocol != 2
        or not all(isinstance(route, MapRoute) for route in app.amqp.routes)
        or getattr(task, "_dump_pydantic_arguments", None)
        or kind.shadow_name.__module__ != "celery.app.task"
        or not kind.apply_async.__module__.startswith("ws_celery.")
        or {"send_task", "apply_async"} & {*vars(app), *vars(task)}
        or {"router", "argsrepr", "kwargsrepr"} & options.keys()
    )


_SIGNALS = (signals.before_task_publish, signals.after_task_publish, signals.task_sent)


def _each(task: RequestAwareTask, calls: Iterator[Call], options: dict[str, Any]) -> GroupResult:
    """Let each call go Celery's whole way."""
    results = [
        dispatch_call(task, number, call, {**options, "group_index": number})
        for number, call in enumerate(calls)
    ]
    by_id = {result.id: result for result in results}
    ids = [result.id for result in results]
    return BulkResult(options["group_id"], ids, task.app, by_id.__getitem__)


def _alike(task: RequestAwareTask, calls: Iterator[Call], options: dict[str, Any]) -> GroupResult:
    """Let the first call go Celery's whole way, and write the others by its example."""
    app, ids = task.app, []
    producer = options.pop("producer", None)
    if connection := options.pop("connection", None):
        producer = app.amqp.Producer(connection, auto_declare=False)
    first = next(calls, None)
    if first is None:
        return BulkResult(options["group_id"], [], app, task.AsyncResult)
    example = Example(task, first, options)
    waiting: list[Publication] = []
    for publication in example.publications(calls):
        ids.append(str(publication.task_id))
        # Asked for each: whoever makes the calls may begin, end or roll back between two of them.
        if producer is None and (recorder := app.recorder()) is not None:
            _send(app, producer, waiting)
            recorder.record((publication,))
        else:
            waiting.append(publication)
            if len(waiting) == SLICE:
                _send(app, producer, waiting)
    _send(app, producer, waiting)
    ignored = example.result.ignored

    def result(task_id: str) -> AsyncResult:
        made = task.AsyncResult(task_id)
        made.ignored = ignored
        return made

    return BulkResult(options["group_id"], ids, app, result)


def _send(app: PyramidCelery, producer: Producer | None, publications: list[Publication]) -> None:
    """Send what belongs to no transaction, and empty the list."""
    if not publications:
        return
    # A transaction may be open by now.
    with immediately(), app.producer_or_acquire(producer) as sender:
        if isinstance(sender, RecordingProducer):
            sender.record(publications)
        else:
            _publish(sender, publications)
    publications.clear()


def _publish(producer: Producer, publications: list[Publication]) -> None:
    first, *others = publications
    with library_errors(producer.connection), batch(producer, publications):
        publish(producer, first)
        for publication in others:
            publish(producer, publication, declare=None)
