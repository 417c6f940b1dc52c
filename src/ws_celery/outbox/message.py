"""A message as the values of a row, and back."""

from __future__ import annotations

import json as plain_json
from collections.abc import Mapping
from datetime import MAXYEAR, MINYEAR, datetime, timezone
from typing import Any
from uuid import UUID

from celery.utils.time import maybe_iso8601
from kombu.entity import Queue
from kombu.utils import json

from ws_celery.delays import bare_key
from ws_celery.dispatch import ROW_HEADER, Publication
from ws_celery.exceptions import BrokenRow
from ws_celery.outbox.table import LONGEST_NAME, aware

__all__ = ("check_names", "publication_of", "row_id_in", "row_of", "times_of")

#: What is not kept: how the first publisher tried, and what is computed anew.
_PASSING = ("declare", "exchange", "expiration", "retry", "retry_policy")


def row_of(publication: Publication, queues: Mapping[str, Queue]) -> dict[str, Any]:
    """Return what the columns of the message's row hold, by their names.

    :param publication: the message.
    :param queues: the app's queues by name.
    """
    options = publication.options
    declared = [entity.name for entity in publication.declare]
    exchange = options.get("exchange")
    payload = publication.payload
    kept = {key: value for key, value in options.items() if key not in _PASSING}
    kept |= {
        "declare": declared,
        "exchange": getattr(exchange, "name", exchange),
        "text": isinstance(payload, str),
        "anonymous": publication.anonymous,
    }
    return {
        "id": publication.row_id,
        **_names_of(publication, queues),
        "body": payload.encode() if isinstance(payload, str) else payload,
        "options": json.dumps(kept),
        **times_of(publication),
    }


def _names_of(publication: Publication, queues: Mapping[str, Queue]) -> dict[str, Any]:
    reply_to = publication.options.get("reply_to")
    declared = [each for each in publication.declare if each.name != reply_to]
    told = publication.options.get("routing_key")
    return {
        "task_id": publication.task_id,
        "task": publication.task_name,
        "queue": declared[0].name if declared else _queue_of(told, queues),
    }


def _queue_of(told: Any, queues: Mapping[str, Queue]) -> Any:
    """Return the queue of a routing key, which names none if RabbitMQ delays the message."""
    key = bare_key(told) if isinstance(told, str) else told
    if key == told:
        return told
    return next((queue.name for queue in queues.values() if queue.routing_key == key), key)


def check_names(publication: Publication) -> None:
    """Refuse a message whose names do not fit their columns: its row would not be written.

    :raises ValueError: if the id or the name of the task, or the queue, is no such text.
    """
    for column, name in _names_of(publication, {}).items():
        if name is not None and not _fits(name):
            raise ValueError(
                f"{name!a:.60} is no {column.replace('_', ' ')} that the outbox can keep. "
                f"Pass text of at most {LONGEST_NAME} characters, without NUL."
            )


def _fits(name: Any) -> bool:
    if not isinstance(name, str) or len(name) > LONGEST_NAME or "\0" in name:
        return False
    # No database keeps half of a pair.
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)


def times_of(publication: Publication) -> dict[str, datetime | None]:
    """Return the ``eta`` and ``expires`` of a message, in UTC.

    :raises ValueError: if one of them is no time, or one that no database's driver may read.
    """
    return {name: _time(publication.options["headers"].get(name)) for name in ("eta", "expires")}


def row_id_in(headers: Mapping[str, Any] | None) -> UUID | None:
    """Return the id of the row that a message with these headers belongs to, or ``None``."""
    value = (headers or {}).get(ROW_HEADER)
    try:
        return None if value is None else UUID(value)
    except (AttributeError, TypeError, ValueError):
        return None  # somebody else's header


def publication_of(row: Any, queues: Mapping[str, Queue], now: datetime) -> Publication:
    """Make the message of a row again.

    :param row: a row of the table.
    :param queues: the app's queues by name; what is not there is not declared.
    :param now: the time, to tell what is left until the message expires.
    :raises BrokenRow: if the row does not hold a message.
    """
    try:
        options = _loads(row.options)
        payload = row.body.decode() if options.pop("text") else row.body
        anonymous = options.pop("anonymous", False)
        options["declare"] = [queues[name] for name in options["declare"] if name in queues]
        same = options["headers"]["id"] == row.task_id
    except Exception as error:
        raise BrokenRow(row.id, f"{type(error).__name__}: {error}") from error
    if not same:
        raise BrokenRow(row.id, "its headers are of another task")
    if row.expires is None:
        options["headers"]["expires"] = None  # or it began in time, and is run to its end
    else:
        options["expiration"] = max((aware(row.expires) - now).total_seconds(), 0)
    publication = Publication(payload, options)
    publication.row_id = row.id
    publication.anonymous = anonymous
    return publication


def _loads(text: str) -> Any:
    # Only kombu makes times and the like of objects with this key, which takes three times as long.
    return json.loads(text) if "__type__" in text else plain_json.loads(text)


def _time(text: str | None) -> datetime | None:
    # As the worker reads it: a time without a zone is UTC for Celery, whatever its own zone is.
    if text is None:
        return None
    try:
        time = aware(maybe_iso8601(text))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{text!r} is no time for eta or expires. Pass a datetime, or a text such as "
            "2030-01-31T12:00:00+01:00."
        ) from error
    # A database may show a time in its own zone, where the first and the last ones are none.
    if not MINYEAR < time.year < MAXYEAR:
        raise ValueError(
            f"{text} is no time for eta or expires: it is outside of the years 2 to 9998. Leave "
            "the option out if no time is meant."
        )
    return time.astimezone(timezone.utc)
