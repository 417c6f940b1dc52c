"""The schedule in words: rows of tables, and lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from typing import Any

from ws_celery.inspection import ComingTick, ScheduleEntry, ScheduleHealth

__all__ = ("cells", "health_lines", "others", "standing", "tick_cells", "time_text", "value_text")


def cells(entry: ScheduleEntry) -> tuple[str, ...]:
    """Return the cells of a row of the table of entries."""
    origin = entry.origin
    if entry.edited:
        origin = f"{origin}; database: {', '.join(entry.edited)}"
    return (
        entry.name,
        entry.task,
        entry.schedule,
        entry.state,
        origin,
        time_text(entry.last_tick),
        time_text(entry.next_tick),
    )


def others(entry: ScheduleEntry, field: str) -> str:
    """Return what other sources say of a field, which does not count."""
    others = entry.overridden.get(field, {})
    return ", ".join(f"{value_text(value)} ({source})" for source, value in others.items())


def standing(entry: ScheduleEntry) -> Iterator[str]:
    """Yield lines that say where an entry stands."""
    yield f"state      {entry.state}"
    yield f"runs       {entry.schedule}"
    if entry.problem:
        yield f"problem    {entry.problem}"
    yield f"last tick  {time_text(entry.last_tick) or 'none that is known'}"
    yield f"next tick  {time_text(entry.next_tick) or 'none'}"
    if entry.task_id:
        yield f"last task  {entry.task_id}"
    if entry.run_requested_at:
        yield f"wanted     now, since {time_text(entry.run_requested_at)}"


def tick_cells(tick: ComingTick) -> tuple[str, ...]:
    """Return the cells of a row of the table of ticks."""
    return time_text(tick.time), tick.name, tick.task


def health_lines(found: ScheduleHealth) -> Iterator[str]:
    """Yield lines that say how beats do."""
    if found.age is None:
        yield "No beat has sent anything yet."
    else:
        yield f"The last tick was {found.age:.0f} s ago."
    if found.overdue:
        yield f"Overdue: {', '.join(found.overdue)}."
    if found.unseen:
        yield f"No beat has looked at: {', '.join(found.unseen)}."
    yield "healthy" if found.is_healthy else "not healthy"


def value_text(value: Any) -> str:
    """Return the value of a field as people would write it."""
    return json.dumps(value) if isinstance(value, (Mapping, list, bool)) else str(value)


def time_text(time: datetime | None) -> str:
    """Return a time in UTC, to the second; nothing for none."""
    return time.astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M:%S") if time else ""
