"""What a message says, in a queue or in the outbox; and what all records for people have."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TypeAlias

from kombu.serialization import loads as loads_body
from kombu.serialization import prepare_accept_content
from kombu.utils.json import loads

from ws_celery.converters import aware
from ws_celery.exceptions import BrokenRow
from ws_celery.shown_arguments import shown_arguments

if TYPE_CHECKING:
    from kombu.transport.virtual import Channel
    from pyramid.registry import Registry
    from pyramid.request import Request
    from sqlalchemy import Row

    from ws_celery.app import PyramidCelery
    from ws_celery.recording import Publication

__all__ = (
    "Record",
    "Source",
    "WaitingMessage",
    "body_of",
    "message_of_outbox",
    "message_of_queue",
    "time_of",
)

#: Whose tasks, queues and results: a registry, or what has one.
Source: TypeAlias = "Registry | Request | PyramidCelery"


@dataclass(frozen=True)
class Record:
    """What people may look at."""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, times as JSON has them."""
        return {
            name: value.isoformat() if isinstance(value, datetime) else value
            for name, value in asdict(self).items()
        }


def time_of(value: object) -> datetime | None:
    """Return a time in UTC, from a text too; ``None`` if there is none, or it is none."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = datetime.fromisoformat(value)
    if not isinstance(value, datetime):
        return None
    return aware(value).astimezone(timezone.utc)


@dataclass(frozen=True)
class WaitingMessage(Record):
    """A message that waits in a queue.

    :param id: the id of the task, as ``AsyncResult`` has it; ``None`` if it is not Celery's.
    :param task: the name of the task.
    :param eta: before when it is not to run, if the call said so.
    :param expires: after when it is not to run, if the call said so.
    :param retries: how often the task has asked to be tried again.
    :param origin: process and host that sent it.
    :param priority: as the broker was given it.
    :param redelivered: whether a worker has had it before.
    :param arguments: ``args`` and ``kwargs``, their secrets masked; ``None`` if unreadable.
    :param problem: what is wrong with it.
    """

    id: str | None = None
    task: str | None = None
    eta: datetime | None = None
    expires: datetime | None = None
    retries: int = 0
    origin: str | None = None
    priority: int | None = None
    redelivered: bool = False
    arguments: Mapping[str, Any] | None = field(default=None, repr=False)
    problem: str | None = None


def message_of_queue(app: PyramidCelery, channel: Channel, raw: str | bytes) -> WaitingMessage:
    """Return what a message of a virtual transport says, from the JSON that lies in the queue."""
    try:
        message = channel.Message(loads(raw), channel=channel)
        message.accept = prepare_accept_content(app.conf.accept_content)
    except Exception as error:  # noqa: BLE001  anybody may have written there anything
        return WaitingMessage(problem=f"no message of Celery: {_described(error)}")
    try:
        body, problem = message.decode(), None
    except Exception as error:  # noqa: BLE001
        body, problem = None, f"its arguments cannot be read: {_described(error)}"
    return _message(app, message.headers, body, problem, message.properties)


def message_of_outbox(app: PyramidCelery, row: Row[Any]) -> WaitingMessage:
    """Return what the message of a row of the outbox says."""
    try:
        publication = app.outbox.publication_of(row)
    except BrokenRow as error:
        return WaitingMessage(id=row.task_id, task=row.task, problem=error.problem)
    try:
        body, problem = body_of(app, publication), None
    except Exception as error:  # noqa: BLE001  whatever was written there; it is shown, not run
        body, problem = None, f"its arguments cannot be read: {_described(error)}"
    return _message(app, publication.options["headers"], body, problem, publication.options)


def body_of(app: PyramidCelery, publication: Publication) -> Any:
    """Decode the body of a message: arguments, and what Celery calls ``embed``.

    :raises Exception: whatever is wrong with it, or if the application does not accept its kind.
    """
    return loads_body(
        publication.payload,
        publication.options["content_type"],
        publication.options["content_encoding"],
        accept=prepare_accept_content(app.conf.accept_content),
    )


def _message(
    app: PyramidCelery,
    headers: object,
    body: object,
    problem: str | None,
    properties: Mapping[str, Any],
) -> WaitingMessage:
    """Return what a message says, from its headers and its decoded body.

    :param problem: why there is no body.
    """
    known = headers if isinstance(headers, Mapping) else {}
    if "task" not in known and isinstance(body, Mapping) and "task" in body:
        # task_protocol = 1 has all in the body.
        known, body = body, (body.get("args"), body.get("kwargs"))
    priority = properties.get("priority")
    if not isinstance(known.get("task"), str):
        return WaitingMessage(priority=priority, problem=problem or "no message of Celery")
    call = body if isinstance(body, (list, tuple)) and len(body) > 1 else None
    return WaitingMessage(
        id=str(known.get("id")),
        task=known["task"],
        eta=time_of(known.get("eta")),
        expires=time_of(known.get("expires")),
        retries=known.get("retries") or 0,
        origin=known.get("origin"),
        priority=priority,
        redelivered=bool(known.get("redelivered")),
        arguments=shown_arguments(app, known["task"], *call[:2]) if call else None,
        problem=problem or (None if call else "its body holds no arguments"),
    )


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
