"""The message of one tick."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from celery.beat import BeatLazyFunc

from ws_celery.beat.entry import Entry
from ws_celery.dispatch import Publication, RecordingProducer

__all__ = ("ENTRY_HEADER", "TICK_HEADER", "record")

#: Headers that tell a task which entry it is run for, and which tick, in UTC.
ENTRY_HEADER, TICK_HEADER = "ws_celery_entry", "ws_celery_tick"


def record(app: Any, entry: Entry, tick: datetime) -> tuple[str, list[Publication]]:
    """Return the id of the task of a tick, and its messages, which the caller sends.

    :param tick: the nominal time.
    """
    publications: list[Publication] = []
    options = dict(entry.options)
    headers = {
        **(options.pop("headers", None) or {}),
        "celery_beat_task": True,  # as Celery's own beat says it
        ENTRY_HEADER: entry.name,
        TICK_HEADER: tick.isoformat(),
    }
    result = app.tasks[entry.task].apply_async(
        _evaluated(entry.args),
        _evaluated(entry.kwargs),
        producer=RecordingProducer(app.producer_pool.connections.connection, publications),
        headers=headers,
        **options,
    )
    return result.id, publications


def _evaluated(values: Any) -> Any:
    """Return arguments, with those that Celery's users let beat make at each tick."""
    if isinstance(values, Mapping):
        return {key: _value(value) for key, value in values.items()}
    return tuple(map(_value, values))


def _value(value: Any) -> Any:
    return value() if isinstance(value, BeatLazyFunc) else value
