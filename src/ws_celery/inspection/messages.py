"""Messages as they lie in a queue, told for people; whatever lies there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any

from kombu.serialization import prepare_accept_content
from kombu.utils.json import loads

from ws_celery.shown_arguments import shown_arguments

__all__ = ("WaitingMessage", "message_of", "time_of", "told")


@dataclass(frozen=True)
class WaitingMessage:
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

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        times = {"eta": self.eta, "expires": self.expires}
        return {**asdict(self), **{key: time and time.isoformat() for key, time in times.items()}}


def message_of(app: Any, channel: Any, raw: Any) -> WaitingMessage:
    """Return what a message of a virtual transport says, from the JSON that lies in the queue."""
    try:
        stored = loads(raw)
        message = channel.Message(stored, channel=channel)
        message.accept = prepare_accept_content(app.conf.accept_content)
    except Exception as error:  # noqa: BLE001  anybody may have written there anything
        return WaitingMessage(problem=f"no message of Celery: {_said(error)}")
    try:
        body, problem = message.decode(), None
    except Exception as error:  # noqa: BLE001
        body, problem = None, f"its arguments cannot be read: {_said(error)}"
    return told(app, message.headers, body, problem, message.properties)


def told(
    app: Any,
    headers: Any,
    body: Any,
    problem: str | None = None,
    properties: Mapping[str, Any] | None = None,
) -> WaitingMessage:
    """Return what a message says, from its headers and its body, decoded.

    :param problem: why there is no body.
    """
    known = headers if isinstance(headers, Mapping) else {}
    if "task" not in known and isinstance(body, Mapping) and "task" in body:
        # task_protocol = 1 has all in the body.
        known, body = body, (body.get("args"), body.get("kwargs"))
    properties = properties or {}
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


def time_of(value: Any) -> datetime | None:
    """Return a time of a message in UTC; ``None`` if there is none, or it is none."""
    try:
        found = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return found.astimezone(timezone.utc) if found.tzinfo else found.replace(tzinfo=timezone.utc)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
