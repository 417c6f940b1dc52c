"""``ws-celery outbox``: look at what has not taken effect yet, and decide on dead letters."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

import click

from ws_celery import inspection
from ws_celery.cli.tables import LIMIT, confirm, echo, fields_of, table, time_of

if TYPE_CHECKING:
    from ws_celery.app import PyramidCelery
    from ws_celery.inspection import OutboxRow, OutboxState

__all__ = ("outbox",)

_HIDDEN = "(hidden; --arguments shows them)"
_HEADINGS = ("ROW", "TASK", "STATE", "DISPATCHED", "SENT AGAIN", "ERROR")


@click.group
def outbox() -> None:
    """Look after the outbox: its table, what waits in it, its dead letters."""


@outbox.command
@click.pass_context
def create(context: click.Context) -> None:
    """Create the table if it is missing."""
    app = _app(context)
    created = inspection.create_outbox(app)
    name = app.outbox.rows.table.fullname
    echo(f"Created the table {name}." if created else f"The table {name} is there already.")


@outbox.command(name="list")
@click.option("--dead", "which", flag_value="dead", default="dead", help="Dead letters. [default]")
@click.option("--waiting", "which", flag_value="waiting", help="What has not ended yet.")
@click.option("--all", "which", flag_value="all", help="Both.")
@click.option("--limit", type=LIMIT, default=100, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.pass_context
def list_rows(context: click.Context, which: str, limit: int, as_json: bool) -> None:
    """List rows, the oldest first."""
    app = _app(context)
    dead = {"dead": True, "waiting": False, "all": None}[which]
    rows = inspection.outbox_rows(app, dead=dead, limit=limit)
    if as_json:
        echo(json.dumps([row.as_dict() for row in rows], indent=2))
        return
    if rows:
        for line in table(_HEADINGS, [_cells(row) for row in rows], 5, 1):
            echo(line)
    state = inspection.outbox_state(app)
    echo(f"{len(rows)} shown; {_counted(state)}.")


@outbox.command
@click.argument("name", metavar="ID")
@click.option("--arguments", is_flag=True, help="Show those of the call, their secrets masked.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.pass_context
def show(context: click.Context, name: str, arguments: bool, as_json: bool) -> None:
    """Show a row, by its id or by that of its task."""
    rows = inspection.find_outbox_rows(_app(context), name)
    if as_json:
        echo(json.dumps([_shown(row, arguments) for row in rows], indent=2))
        return
    for row in rows:
        for line in _lines(_shown(row, arguments)):
            echo(line)


@outbox.command
@click.argument("names", metavar="ID...", nargs=-1)
@click.option("--all-dead", is_flag=True, help="All dead letters.")
@click.pass_context
def retry(context: click.Context, names: Sequence[str], all_dead: bool) -> None:
    """Send rows again, as if they had just been dispatched.

    Exit code 1 if one of them cannot be sent.
    """
    app = _app(context)
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
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
def discard(context: click.Context, names: Sequence[str], all_dead: bool, yes: bool) -> None:
    """Delete rows: these dispatches are given up.

    Their messages in queues are not run, except those of plain tasks of Celery.
    """
    app = _app(context)
    ids = _wanted(app, names, all_dead)
    if ids and not yes:
        confirm(f"Delete {len(ids)} of {_counted(inspection.outbox_state(app))}, for ever?")
    echo(f"Discarded {inspection.discard_outbox_rows(app, ids)}.")


def _app(context: click.Context) -> PyramidCelery:
    app: PyramidCelery = context.obj.app
    return app


def _wanted(app: PyramidCelery, names: Sequence[str], all_dead: bool) -> list[UUID]:
    if bool(names) == all_dead:
        raise click.UsageError("Name rows by their id, or give --all-dead.")
    return inspection.dead_letters(app) if all_dead else inspection.outbox_row_ids(app, names)


def _cells(row: OutboxRow) -> tuple[str, ...]:
    lines = (row.problem or row.error or "").strip().splitlines() or [""]
    return (
        str(row.id),
        row.task,
        "dead" if row.is_dead else "waiting",
        time_of(row.created_at),
        str(row.deliveries),
        lines[-1],
    )


def _shown(row: OutboxRow, arguments: bool) -> dict[str, Any]:
    return {**row.as_dict(), **({"arguments": row.arguments} if arguments else {})}


def _lines(fields: dict[str, Any]) -> Iterator[str]:
    error = fields.pop("error")
    shown = json.dumps(fields["arguments"]) if "arguments" in fields else _HIDDEN
    yield from fields_of({**fields, "arguments": shown})
    if error:
        yield f"\n{error.rstrip()}"


def _counted(state: OutboxState) -> str:
    letters = "dead letter" if state.dead == 1 else "dead letters"
    return f"{state.dead} {letters} and {state.waiting} waiting"
