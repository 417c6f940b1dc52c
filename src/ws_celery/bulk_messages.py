"""Messages that are written by the example of another one, and the result of them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, TypeAlias

from celery.result import GroupResult
from celery.utils.saferepr import saferepr
from kombu.exceptions import EncodeError
from kombu.serialization import dumps
from kombu.utils.uuid import uuid

from ws_celery.arguments import blame_argument, refuse_misread
from ws_celery.dispatch import Publication, RecordingProducer
from ws_celery.locks import rule_of
from ws_celery.shown_arguments import told_arguments

__all__ = ("BulkPublication", "BulkResult", "Call", "Example", "dispatch_call")

#: Positional and keyword arguments.
Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


def dispatch_call(task: Any, number: int, call: Call, options: dict[str, Any]) -> Any:
    """Let one call go Celery's whole way.

    :param number: of the call among all, counted from 0.
    :raises ArgumentNotSerializable: if a value does not serialise; it names the call.
    """
    try:
        return task.apply_async(*call, add_to_parent=False, **options)
    except EncodeError as error:
        _blame(task, number, call, error, options.get("serializer"))
        raise


def _blame(task: Any, number: int, call: Call, error: EncodeError, serializer: str | None) -> None:
    serializer = serializer or task.serializer
    blame_argument(error, f"{task.name}, call {number}", *call, serializer)


class Example(RecordingProducer):
    """Takes the first message of many, and makes the others from it.

    :param task: the task that is called.
    :param call: arguments of the first call.
    :param options: options of all calls.
    """

    def __init__(self, task: Any, call: Call, options: dict[str, Any]) -> None:
        kept: list[Any] = []
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
            argsrepr, kwargsrepr = told_arguments(app, self._task.name, args, kwargs)
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
        self._example = example
        self._own = own

    @property
    def options(self) -> dict[str, Any]:
        """Options of the publish."""
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
        options = {**self._options, "headers": headers}
        if self._example.correlation_is_own:
            options["correlation_id"] = task_id
        return options

    @property
    def task_id(self) -> str:
        """Id of the task."""
        return self._own[0]

    @property
    def task_name(self) -> str:
        """Name of the task."""
        return str(self._example.headers["task"])


class BulkResult(GroupResult):
    """A ``GroupResult`` that makes the results of its tasks when somebody asks for them.

    :param id: the id of the group.
    :param ids: ids of the tasks, in the order of the calls.
    :param make: makes the result of an id.
    """

    def __init__(self, id: str, ids: list[str], app: Any, make: Callable[[str], Any]) -> None:  # noqa: A002 - the name is Celery's
        self.id = id
        self.parent = None
        self.ids = ids
        self._app = app
        self._make = make

    @cached_property
    def results(self) -> list[Any]:
        """The results of the tasks."""
        return [self._make(task_id) for task_id in self.ids]

    def __getattr__(self, name: str) -> Any:
        # What Celery computes from all the results, when a group is made.
        if name not in ("on_ready", "_on_full"):
            raise AttributeError(name)
        super().__init__(self.id, self.results, parent=self.parent, app=self._app)
        return self.__dict__[name]

    def iter_native(self, *args: Any, **options: Any) -> Any:
        """Yield the results as they arrive, as in Celery."""
        self._on_full.ready  # noqa: B018 - made now: Celery 5.5 listens for no others
        return super().iter_native(*args, **options)

    def __len__(self) -> int:
        return len(self.ids)

    def __reduce__(self) -> tuple[Any, ...]:
        return GroupResult, (self.id, self.results)
