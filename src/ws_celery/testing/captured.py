"""One captured message, decoded, and the words in which it is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from celery.app.task import Context
from kombu.serialization import loads

from ws_celery.dispatch import Publication

__all__ = ("CapturedTask", "agrees", "described", "read", "task_name")


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
        return described(self.name, self.args, self.kwargs, shown)


def task_name(task: Any) -> str:
    """Return the name of a task, which may be given by name."""
    return task if isinstance(task, str) else task.name


def agrees(actual: Any, expected: Any) -> bool:
    """Tell whether an option is as expected; of a mapping, the expected keys are compared."""
    if isinstance(actual, dict) and isinstance(expected, Mapping):
        return all(actual.get(key) == value for key, value in expected.items())
    return bool(actual == expected)


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
    content_type = options["content_type"]
    args, kwargs, _ = loads(
        publication.payload, content_type, options["content_encoding"], accept={content_type}
    )
    declared = options.get("declare")
    found = {
        "queue": declared[0].name if declared else options.get("routing_key"),
        "routing_key": options.get("routing_key"),
        "priority": options.get("priority"),
        "countdown": countdown,
        "eta": headers["eta"] and datetime.fromisoformat(headers["eta"]),
        "expires": headers["expires"] and datetime.fromisoformat(headers["expires"]),
        "headers": Context(headers).headers or None,
    }
    given = {key: value for key, value in found.items() if value is not None}
    return CapturedTask(headers["id"], headers["task"], args, kwargs, given)
