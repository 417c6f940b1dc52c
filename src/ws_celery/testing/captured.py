"""One captured message: run, decoded, and in the words in which it is shown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from numbers import Real
from typing import TYPE_CHECKING, Any

import transaction
from celery.app.task import Context
from pyramid.interfaces import IRequestFactory
from pyramid.request import Request

from ws_celery.converters import nearest
from ws_celery.eager import perform, received

if TYPE_CHECKING:
    from celery import Task
    from pyramid.registry import Registry

    from ws_celery.app import PyramidCelery
    from ws_celery.recording import Publication

__all__ = (
    "CapturedTask",
    "check_options",
    "described",
    "read",
    "run_as_worker",
    "task_name",
)


def run_as_worker(app: PyramidCelery, publication: Publication, environ: dict[str, Any]) -> Any:
    """Take a message through decoding, a run of its own, and what Celery does after it.

    :param environ: what the requests of tasks find in their environ.
    :return: what the task returns.
    :raises Exception: what the task raises, and the ways in which Celery ends a run.
    """
    request = received(app, publication)
    with _request_environ(app.registry, environ):
        result = perform(app, request)
    for shared in environ.values():
        # A session that the test has lent is not committed by the run; a commit would flush it.
        if hasattr(shared, "flush"):
            shared.flush()
    return result


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

    def __init__(self, factory: type[Request], environ: dict[str, Any]) -> None:
        self._factory = factory
        self._environ = {key: value for key, value in environ.items() if key != "tm.active"}

    def blank(self, path: str, **options: Any) -> Request:
        manager = transaction.TransactionManager(explicit=True)
        environ = {**self._environ, "tm.manager": manager}
        return self._factory.blank(path, environ=environ, **options)


#: The options that are read of a message, in the order in which they are shown.
_OPTIONS = (
    "queue",
    "routing_key",
    "priority",
    "countdown",
    "eta",
    "expires",
    "headers",
    "task_id",
    "shadow",
    "time_limit",
    "soft_time_limit",
    "ignore_result",
)


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
    #: ``expires`` (datetimes), ``headers`` (yours only), ``task_id``, ``shadow``, ``time_limit``,
    #: ``soft_time_limit``, ``ignore_result``; those not given are missing.
    options: dict[str, Any] = field(default_factory=dict)
    #: Seconds until it expires, counted from the call.
    expiration: float | None = None

    def __str__(self) -> str:
        hidden = ("routing_key", "task_id")
        shown = {name: value for name, value in self.options.items() if name not in hidden}
        return described(self.name, self.args, self.kwargs, shown)

    def agrees(self, option: str, expected: object) -> bool:
        """Tell whether an option is as expected; of a mapping, the expected keys are compared."""
        actual = self.options.get(option)
        if option == "expires" and isinstance(expected, Real):
            actual = self.expiration
        if option == "ignore_result":
            actual, expected = bool(actual), bool(expected)
        if option == "headers" and isinstance(expected, Mapping):
            return all((actual or {}).get(key) == value for key, value in expected.items())
        return bool(actual == expected)


def task_name(task: Task | str) -> str:
    """Return the name of a task, which may be given by name."""
    return task if isinstance(task, str) else str(task.name)


def check_options(options: Iterable[str]) -> None:
    """Refuse options that no message is asked for: each answer would be wrong.

    :raises TypeError: if there is one.
    """
    for option in options:
        if option not in _OPTIONS:
            close = nearest(option, _OPTIONS)
            meant = f"Did you mean {close}? " if close else ""
            raise TypeError(
                f"The option {option!r} is not read of a message. {meant}Write one of "
                f"{', '.join(_OPTIONS)}."
            )


def described(
    name: str,
    args: Sequence[Any] | None,
    kwargs: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> str:
    """Show a call as one would write it, and its options behind."""
    return " ".join(
        [_call(name, args, kwargs), *(f"{key}={value!r}" for key, value in options.items())]
    )


def _call(name: str, args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None) -> str:
    if args is None and kwargs is None:
        return name
    words = [*map(repr, args or ()), *(f"{key}={value!r}" for key, value in (kwargs or {}).items())]
    return f"{name}({', '.join(words)})"


def read(publication: Publication, countdown: float | None) -> CapturedTask:
    """Decode a message as a worker would.

    :param countdown: of the call, in seconds: the message has an ``eta`` only.
    """
    options, headers = publication.options, publication.options["headers"]
    args, kwargs = publication.call()
    declared = options.get("declare")
    time_limit, soft_time_limit = headers["timelimit"]
    found = {
        "queue": declared[0].name if declared else options.get("routing_key"),
        "routing_key": options.get("routing_key"),
        "priority": options.get("priority"),
        "countdown": countdown,
        "eta": headers["eta"] and datetime.fromisoformat(headers["eta"]),
        "expires": headers["expires"] and datetime.fromisoformat(headers["expires"]),
        "headers": Context(headers).headers or None,
        "task_id": headers["id"],
        "shadow": headers["shadow"],
        "time_limit": time_limit,
        "soft_time_limit": soft_time_limit,
        "ignore_result": headers["ignore_result"] or None,
    }
    given = {key: value for key, value in found.items() if value is not None}
    expiration = options.get("expiration")
    return CapturedTask(headers["id"], headers["task"], args, kwargs, given, expiration)
