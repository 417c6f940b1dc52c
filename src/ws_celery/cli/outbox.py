"""``ws-celery outbox``: look at what has not taken effect yet, and decide on dead letters."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any
from uuid import UUID

import click

from ws_celery import inspection
from ws_celery.app import PyramidCelery
from ws_celery.cli.tables import (
    Answer,
    Listing,
    confirm,
    counted,
    echo,
    fields_of,
    limit,
    showing,
    time_of,
    with_app,
    yes,
)

__all__ = ("outbox",)

_HIDDEN = "(hidden; --arguments shows them)"

_ROWS: Listing[inspection.OutboxRow] = Listing(
    {
        "ROW": lambda row: str(row.id),
        "TASK": lambda row: row.task,
        "STATE": lambda row: "dead" if row.is_dead else "waiting",
        "DISPATCHED": lambda row: time_of(row.created_at),
        "SENT AGAIN": lambda row: str(row.deliveries),
        "ERROR": lambda row: _last_line(row.problem or row.error or ""),
    },
    giving_way=("ERROR", "TASK"),
)


@click.group
def outbox() -> None:
    """Look after the outbox: its table, what waits in it, its dead letters."""


@outbox.command
@with_app
def create(app: PyramidCelery) -> None:
    """Create the table if it is missing."""
    created = inspection.create_outbox(app)
    name = app.outbox.rows.table.fullname
    echo(f"Created the table {name}." if created else f"The table {name} is there already.")


@outbox.command(name="list")
@click.option("--dead", "which", flag_value="dead", default="dead", help="Dead letters. [default]")
@click.option("--waiting", "which", flag_value="waiting", help="What has not ended yet.")
@click.option("--all", "which", flag_value="all", help="Both.")
@limit(100)
@showing
def list_rows(app: PyramidCelery, which: str, limit: int) -> Answer:
    """List rows, the oldest first."""
    dead = {"dead": True, "waiting": False, "all": None}[which]
    rows = inspection.outbox_rows(app, dead=dead, limit=limit)
    return _ROWS.answer(rows, after=_totals(app, len(rows)))


@outbox.command
@click.argument("name", metavar="ID")
@click.option("--arguments", is_flag=True, help="Show those of the call, their secrets masked.")
@showing
def show(app: PyramidCelery, name: str, arguments: bool) -> Answer:
    """Show a row, by its id or by that of its task."""
    rows = [_shown(row, arguments) for row in inspection.find_outbox_rows(app, name)]
    return Answer((line for row in rows for line in _lines(row)), rows)


@outbox.command
@click.argument("names", metavar="ID...", nargs=-1)
@click.option("--all-dead", is_flag=True, help="All dead letters.")
@with_app
def retry(app: PyramidCelery, names: Sequence[str], all_dead: bool) -> None:
    """Send rows again, as if they had just been dispatched.

    Exit code 1 if one of them cannot be sent.
    """
    outcome = inspection.retry_outbox_rows(app, _wanted(app, names, all_dead))
    for row_id in outcome.busy:
        echo(f"The row {row_id} is gone, or its task is running.", err=True)
    for error in outcome.broken:
        echo(f"Error: {error}", err=True)
    echo(f"Sent {len(outcome.sent)}.")
    sys.exit(1 if outcome.broken else 0)


@outbox.command
@click.argument("names", metavar="ID...", nargs=-1)
@click.option("--all-dead", is_flag=True, help="All dead letters.")
@yes
@with_app
def discard(app: PyramidCelery, names: Sequence[str], all_dead: bool, yes: bool) -> None:
    """Delete rows: these dispatches are given up.

    Their messages in queues are not run, except those of plain tasks of Celery.
    """
    ids = _wanted(app, names, all_dead)
    if ids and not yes:
        confirm(f"Delete {len(ids)} of {_counted(inspection.outbox_state(app))}, for ever?")
    echo(f"Discarded {inspection.discard_outbox_rows(app, ids)}.")


def _wanted(app: PyramidCelery, names: Sequence[str], all_dead: bool) -> list[UUID]:
    if bool(names) == all_dead:
        raise click.UsageError("Name rows by their id, or give --all-dead.")
    return inspection.dead_letters(app) if all_dead else inspection.outbox_row_ids(app, names)


def _totals(app: PyramidCelery, shown: int) -> Iterator[str]:
    # The rows are counted when this is read, which is not with --json.
    yield f"{shown} shown; {_counted(inspection.outbox_state(app))}."


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def _shown(row: inspection.OutboxRow, arguments: bool) -> dict[str, Any]:
    return {**row.as_dict(), **({"arguments": row.arguments} if arguments else {})}


def _lines(row: dict[str, Any]) -> Iterator[str]:
    fields = dict(row)
    error = fields.pop("error")
    shown = json.dumps(fields["arguments"]) if "arguments" in fields else _HIDDEN
    yield from fields_of({**fields, "arguments": shown})
    if error:
        yield f"\n{error.rstrip()}"


def _counted(state: inspection.OutboxState) -> str:
    return f"{counted(state.dead, 'dead letter')} and {state.waiting} waiting"
