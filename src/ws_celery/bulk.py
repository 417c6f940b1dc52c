"""Many calls of one task as one dispatch: Celery makes the first message, the others are like it.

What Celery computes for a message is the same for all calls of :meth:`apply_async_many`, but for
the arguments and the ids. So the first call goes Celery's whole way, into a producer that keeps
what it is given, and the others are written by its example. Where a call could make more of a
difference, each goes the whole way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

from celery import signals
from celery.app.routes import MapRoute
from celery.result import GroupResult
from kombu.utils.uuid import uuid

from ws_celery.bulk_messages import BulkResult, Call, Example, dispatch_call
from ws_celery.dispatch import Publication, RecordingProducer, immediately
from ws_celery.events import BeforeDispatch, has_subscriber
from ws_celery.publishing import batch
from ws_celery.request import calling, split_request

__all__ = ("SLICE", "apply_async_many", "split_call")

#: Messages that are made before they are sent, where no transaction keeps them.
SLICE = 1000


def apply_async_many(
    task: Any, calls: Iterable[tuple[Any, Any]], options: dict[str, Any]
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


def _prepared(task: Any, calls: Iterator[tuple[Any, Any]]) -> tuple[Any, Iterator[Call]]:
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


def split_call(name: str, number: int, call: Any) -> tuple[Any, Any]:
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


def _differ(task: Any, options: Mapping[str, Any]) -> bool:
    """Tell whether a call may make a difference to its message that is not known here.

    Whoever listens to a publish is told of each, a router may look at the arguments, and a method
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


def _each(task: Any, calls: Iterator[Call], options: dict[str, Any]) -> GroupResult:
    """Let each call go Celery's whole way."""
    results = [
        dispatch_call(task, number, call, {**options, "group_index": number})
        for number, call in enumerate(calls)
    ]
    by_id = {result.id: result for result in results}
    ids = [result.id for result in results]
    return BulkResult(options["group_id"], ids, task.app, by_id.__getitem__)


def _alike(task: Any, calls: Iterator[Call], options: dict[str, Any]) -> GroupResult:
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

    def result(task_id: str) -> Any:
        made = task.AsyncResult(task_id)
        made.ignored = ignored
        return made

    return BulkResult(options["group_id"], ids, app, result)


def _send(app: Any, producer: Any, publications: list[Publication]) -> None:
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


def _publish(producer: Any, publications: list[Publication]) -> None:
    first, *others = publications
    with producer.connection._reraise_as_library_errors(), batch(producer, publications):
        first.publish(producer)
        for publication in others:
            publication.publish(producer, declare=None)
