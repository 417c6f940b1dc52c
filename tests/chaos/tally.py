"""What has become of each dispatch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from tests.chaos.models import Dispatch, Effect

__all__ = ("Counts", "Tally")


#: What is told of rows that should not be there.
_TOLD = ("task_id", "task", "created_at", "due_at", "lease", "deliveries", "error")


@dataclass(frozen=True)
class Counts:
    """Dispatches that were committed, and how their effects differ from what they should be."""

    dispatches: int
    lost: int
    duplicates: int
    phantoms: int


class Tally:
    """Counts, on a connection of its own.

    :param engine: of the database.
    :param outbox: the outbox's table, if there is one.
    """

    def __init__(self, engine: sa.Engine, outbox: sa.Table | None = None) -> None:
        self._engine = engine
        self._outbox = outbox

    def outstanding(self, since: float = 0.0) -> int:
        """Return how many effects are missing of what was dispatched since a time."""
        wanted = sa.select(sa.func.coalesce(sa.func.sum(Dispatch.steps), 0)).where(
            Dispatch.at >= since
        )
        found = (
            sa.select(Effect.dispatch_id, Effect.step)
            .join(Dispatch, Dispatch.id == Effect.dispatch_id)
            .where(Dispatch.at >= since)
            .distinct()
            .subquery()
        )
        return self._scalar(wanted) - self._scalar(sa.select(sa.func.count()).select_from(found))

    def dispatches(self) -> int:
        """Return how many dispatches were committed."""
        return self._scalar(sa.select(sa.func.count(Dispatch.id)))

    def rows(self) -> list[dict[str, Any]]:
        """Return what the outbox has left, dead letters included."""
        if self._outbox is None:
            return []
        columns = (self._outbox.c[name] for name in _TOLD)
        with self._engine.connect() as connection:
            return [dict(row._mapping) for row in connection.execute(sa.select(*columns))]

    def counts(self, windows: Sequence[tuple[float, float]]) -> Counts:
        """Count what was dispatched in these spans of time."""
        with self._engine.connect() as connection:
            wanted = {row.id: row for row in connection.execute(sa.select(Dispatch.__table__))}
            effects = Counter(
                (row.dispatch_id, row.step)
                for row in connection.execute(sa.select(Effect.__table__))
            )

        def dispatched_then(key: str) -> bool:
            at = float(key.partition("-")[0])
            return any(begin <= at < end for begin, end in windows)

        then = [row for key, row in wanted.items() if dispatched_then(key)]
        found = {key: number for key, number in effects.items() if dispatched_then(key[0])}
        return Counts(
            dispatches=len(then),
            lost=sum((row.id, step) not in effects for row in then for step in range(row.steps)),
            duplicates=sum(number - 1 for number in found.values()),
            phantoms=sum(dispatch_id not in wanted for dispatch_id, _ in found),
        )

    def _scalar(self, statement: Any) -> int:
        with self._engine.connect() as connection:
            return int(connection.execute(statement).scalar_one())
