"""The table of the schedule: what was edited, and which tick of each entry was sent last."""

from __future__ import annotations

from sqlalchemy import Column, Integer, MetaData, String, Table
from sqlalchemy.dialects import mysql

from ws_celery.beat.entry import LONGEST_NAME
from ws_celery.outbox.table import LongText, Time

__all__ = ("schedule_table",)

#: Two names that differ in case are two entries, whatever the collation of the database says.
_Name = String(LONGEST_NAME).with_variant(
    mysql.VARCHAR(LONGEST_NAME, collation="utf8mb4_bin"), "mysql", "mariadb"
)


def schedule_table(name: str = "ws_celery_schedule", metadata: MetaData | None = None) -> Table:
    """Return the definition of the schedule's table.

    A row is what the database knows of one entry, wherever that comes from.

    :param name: name of the table; ``schema.name`` for another schema than the default one.
    :param metadata: where to define it: the application's, for Alembic and its tests; one of its
        own if not given.
    """
    schema, _, bare = name.rpartition(".")
    return Table(
        bare,
        MetaData() if metadata is None else metadata,
        Column("name", _Name, primary_key=True),
        Column("origin", String(8), nullable=False, comment="code, ini or database"),
        Column("fields", LongText, nullable=True, comment="what was edited; a JSON object"),
        Column("last_run_at", Time, nullable=True, comment="the tick that was sent last"),
        Column("task_id", String(255), nullable=True, comment="of the task that was sent last"),
        Column("sent_at", Time, nullable=True, comment="when that task was sent"),
        Column("seen_at", Time, nullable=True, comment="when a beat first looked at it"),
        Column("run_requested_at", Time, nullable=True, comment="to be sent now, once"),
        Column("version", Integer, nullable=False, comment="counts the edits"),
        Column("changed_at", Time, nullable=False, comment="by an edit"),
        schema=schema or None,
        comment="Entries of the schedule, and their last ticks: ws_celery",
    )
