"""``ws-celery schedule``: look at the schedule, edit it while beats run, and see what comes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ws_celery import inspection
from ws_celery.cli.tables import LIMIT, echo, table
from ws_celery.converters import Refused, json_value
from ws_celery.exceptions import ConfigurationError

if TYPE_CHECKING:
    from ws_celery.inspection import ComingTick, ScheduleEntry, ScheduleHealth

__all__ = (
    "cells",
    "health_lines",
    "others",
    "read_entries",
    "schedule",
    "standing",
    "tick_cells",
    "time_text",
    "value_text",
    "written",
)


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


def read_entries(file: Path) -> dict[str, Any]:
    """Return the entries of a JSON file.

    :raises ConfigurationError: if it holds none.
    """
    try:
        entries = json_value(file.read_text(encoding="utf-8"))
    except (Refused, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"{file}: {error}. `ws-celery schedule export` prints what can be read here."
        ) from None
    if not isinstance(entries, dict):
        raise ConfigurationError(
            f'{file}: is no JSON object of entries, such as {{"nightly": {{"enabled": false}}}}.'
        )
    return entries


def written(entries: Mapping[str, Mapping[str, Any]], form: str) -> Iterator[str]:
    """Yield the lines of a file.

    :param form: ``json`` or ``ini``.
    """
    if form == "json":
        yield json.dumps(entries, indent=2, ensure_ascii=False)
        return
    for name, fields in entries.items():
        yield f"[celerybeat:{name}]"
        for field, value in fields.items():
            yield f"{field} = {_ini_text(value)}"
        yield ""


def _ini_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return " ".join(text.splitlines()).replace("%", "%%")


_HEADINGS = ("ENTRY", "TASK", "SCHEDULE", "STATE", "FROM", "LAST TICK", "NEXT TICK")
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
_fields = click.argument("fields", metavar="FIELD=VALUE...", nargs=-1)


@click.group
def schedule() -> None:
    """Look after the schedule: what runs when, from code, INI and database.

    Fields are those of [celerybeat:NAME]: task, type, schedule, timezone, relative, args, kwargs,
    options, enabled, catch_up, overlap, starts_at, expires, description. Beats that run see a
    change within seconds.
    """


@schedule.command
@click.pass_context
def create(context: click.Context) -> None:
    """Create the table if it is missing."""
    app = _app(context)
    created = inspection.create_schedule(app)
    name = app.schedule.table.fullname
    echo(f"Created the table {name}." if created else f"The table {name} is there already.")


# --- What there is ----------------------------------------------------------------------------


@schedule.command(name="list")
@_as_json
@click.pass_context
def list_entries(context: click.Context, as_json: bool) -> None:
    """List all entries, where they are from, and what is wrong with those that are set aside."""
    entries = inspection.schedule_entries(_app(context))
    if as_json:
        echo(json.dumps([entry.as_dict() for entry in entries], indent=2))
        return
    if entries:
        for line in table(_HEADINGS, [cells(entry) for entry in entries], 4, 2, 1, 0, left_out=5):
            echo(line)
    for entry in entries:
        if entry.problem:
            echo(f"{entry.name}: {entry.problem}.")
    echo(f"{len(entries)} {'entry' if len(entries) == 1 else 'entries'}.")


@schedule.command
@click.argument("name")
@_as_json
@click.pass_context
def show(context: click.Context, name: str, as_json: bool) -> None:
    """Show an entry: each field, where it is from, and what that overrides."""
    entry = inspection.schedule_entry(_app(context), name)
    if as_json:
        echo(json.dumps(entry.as_dict(), indent=2))
        return
    rows = [
        (field, value_text(value), entry.origins.get(field, ""), others(entry, field))
        for field, value in entry.fields.items()
    ]
    for line in table(("FIELD", "VALUE", "FROM", "INSTEAD OF"), rows, 3, 1):
        echo(line)
    echo()
    for line in standing(entry):
        echo(line)


@schedule.command(name="next")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--hours", type=click.FloatRange(0, 24 * 366), default=24.0, show_default=True)
@click.option("--limit", type=LIMIT, default=100, show_default=True)
@_as_json
@click.pass_context
def next_ticks(
    context: click.Context, names: Sequence[str], hours: float, limit: int, as_json: bool
) -> None:
    """List the ticks to come, of these entries or of all, in UTC."""
    ticks = inspection.coming_ticks(_app(context), timedelta(hours=hours), names, limit)
    if as_json:
        echo(json.dumps([tick.as_dict() for tick in ticks], indent=2))
        return
    if ticks:
        for line in table(
            ("TIME (UTC)", "ENTRY", "TASK"), [tick_cells(each) for each in ticks], 2, 1
        ):
            echo(line)
    if len(ticks) == limit:
        echo(f"The first {limit}; --limit shows more.")
    elif not ticks:
        echo(f"No tick in the next {hours:g} hours.")


@schedule.command
@click.option(
    "--late",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    help="By how many seconds a tick may be late.",
)
@_as_json
@click.pass_context
def health(context: click.Context, late: float, as_json: bool) -> None:
    """Tell whether beats send the ticks of the schedule, for probes.

    Exit code 0 if they do, 1 if entries are overdue, 69 if the database does not answer.
    """
    found = inspection.schedule_health(_app(context), timedelta(seconds=late))
    if as_json:
        echo(json.dumps(found.as_dict(), indent=2))
    else:
        for line in health_lines(found):
            echo(line)
    sys.exit(0 if found.is_healthy else 1)


# --- Edits ------------------------------------------------------------------------------------


@schedule.command
@click.argument("name")
@_fields
@click.pass_context
def add(context: click.Context, name: str, fields: Sequence[str]) -> None:
    """Add an entry to the database.

    It needs task, type and schedule: add nightly task=myapp.tasks.clean_up type=crontab
    "schedule=30 3 * * *" timezone=Europe/Berlin
    """
    inspection.add_schedule_entry(_app(context), name, _given(fields))
    _show_next(context, name)


@schedule.command
@click.argument("name")
@_fields
@click.option(
    "--reset",
    metavar="FIELD",
    multiple=True,
    help="Take back what was edited of FIELD; may be repeated.",
)
@click.pass_context
def edit(context: click.Context, name: str, fields: Sequence[str], reset: Sequence[str]) -> None:
    """Change fields of an entry; the database counts more than INI and code."""
    if not fields and not reset:
        raise click.UsageError("Give fields as FIELD=VALUE, or --reset FIELD.")
    inspection.edit_schedule_entry(_app(context), name, _given(fields), reset)
    _show_next(context, name)


@schedule.command
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.pass_context
def enable(context: click.Context, names: Sequence[str]) -> None:
    """Switch entries on; what they have missed is not caught up with."""
    for name in names:
        inspection.enable_schedule_entry(_app(context), name)
        _show_next(context, name)


@schedule.command
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.pass_context
def disable(context: click.Context, names: Sequence[str]) -> None:
    """Switch entries off."""
    for name in names:
        inspection.disable_schedule_entry(_app(context), name)
        echo(f"{name} is off.")


@schedule.command
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.pass_context
def remove(context: click.Context, names: Sequence[str]) -> None:
    """Delete entries of the database, and what was edited of those of INI and code."""
    for name in names:
        inspection.remove_schedule_entry(_app(context), name)
        echo(f"The database says nothing of {name} any more.")


@schedule.command
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.pass_context
def run(context: click.Context, names: Sequence[str]) -> None:
    """Let a beat send entries now, once, whatever their schedule says."""
    for name in names:
        inspection.run_schedule_entry(_app(context), name)
        echo(f"A beat will send {name} within seconds.")


# --- Schedules as data ------------------------------------------------------------------------


@schedule.command
@click.option("--all", "everything", is_flag=True, help="With what stands in code and INI.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["json", "ini"]),
    default="json",
    show_default=True,
    help="JSON is what import reads; INI are sections for the INI file.",
)
@click.pass_context
def export(context: click.Context, everything: bool, form: str) -> None:
    """Print what the database says of the schedule; secrets are not masked."""
    app = _app(context)
    entries = inspection.export_schedule(app, everything=everything)
    for line in written(entries, form):
        echo(line)
    if left_out := inspection.unexported_entries(app, everything=everything):
        names = ", ".join(left_out)
        echo(f"Left out, because they cannot be imported: {names}.", err=True)


@schedule.command(name="import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--once", is_flag=True, help="Leave edited ones alone.")
@click.option("--replace", is_flag=True, help="Restore edited ones.")
@click.pass_context
def import_entries(context: click.Context, file: Path, once: bool, replace: bool) -> None:
    """Read the entries of a JSON file that export has printed; all of them, or none."""
    if once == replace:
        raise click.UsageError("Give --once or --replace: what is to become of edited entries?")
    outcome = inspection.import_schedule(_app(context), read_entries(file), replace=replace)
    counts = (len(outcome.added), len(outcome.replaced), len(outcome.left))
    echo("Added {}, replaced {}, left {} as they are.".format(*counts))
    if outcome.over:
        echo(f"Left out, because their time is past: {', '.join(outcome.over)}.", err=True)


def _app(context: click.Context) -> Any:
    return context.obj.app


def _given(fields: Sequence[str]) -> dict[str, str]:
    given = {}
    for text in fields:
        name, equals, value = text.partition("=")
        if not equals:
            raise click.UsageError(f"{text!r} is not of the form FIELD=VALUE.")
        if name.strip() in given:
            raise click.UsageError(f"{name.strip()} is given twice.")
        given[name.strip()] = value
    return given


def _show_next(context: click.Context, name: str) -> None:
    entry = inspection.schedule_entry(_app(context), name)
    if entry.state == "on":
        echo(f"{name}: {entry.schedule}; the next tick is {time_text(entry.next_tick)} UTC.")
    else:
        echo(f"{name}: {entry.schedule}; {entry.state}.")
