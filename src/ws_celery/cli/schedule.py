"""``ws-celery schedule``: look at the schedule, edit it while beats run, and see what comes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ws_celery import inspection
from ws_celery.cli.tables import LIMIT, echo, fields_of, table, time_of
from ws_celery.converters import Refused, json_value
from ws_celery.exceptions import ConfigurationError

if TYPE_CHECKING:
    from ws_celery.app import PyramidCelery
    from ws_celery.inspection import ScheduleEntry

__all__ = ("schedule",)

_HEADINGS = ("ENTRY", "TASK", "SCHEDULE", "STATE", "FROM", "LAST TICK", "NEXT TICK")
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
_names = click.argument("names", metavar="NAME...", nargs=-1, required=True)
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
        for line in table(_HEADINGS, [_cells(entry) for entry in entries], 4, 2, 1, 0, left_out=5):
            echo(line)
    for entry in entries:
        if entry.problem:
            echo(f"{entry.name}: {entry.problem}.")
    echo(f"{len(entries)} {'entry' if len(entries) == 1 else 'entries'}.")


def _cells(entry: ScheduleEntry) -> tuple[str, ...]:
    edited = f"; database: {', '.join(entry.edited)}" if entry.edited else ""
    return (
        entry.name,
        entry.task,
        entry.schedule,
        entry.state,
        f"{entry.origin}{edited}",
        time_of(entry.last_tick),
        time_of(entry.next_tick),
    )


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
        (field, _text(value), entry.origins.get(field, ""), _overridden(entry, field))
        for field, value in entry.fields.items()
    ]
    for line in table(("FIELD", "VALUE", "FROM", "INSTEAD OF"), rows, 3, 1):
        echo(line)
    echo()
    wanted = entry.run_requested_at and f"now, since {time_of(entry.run_requested_at)}"
    standing = {
        "state": entry.state,
        "runs": entry.schedule,
        "problem": entry.problem,
        "last tick": time_of(entry.last_tick) or "none that is known",
        "next tick": time_of(entry.next_tick) or "none",
        "last task": entry.task_id,
        "wanted": wanted,
    }
    for line in fields_of(standing):
        echo(line)


def _text(value: object) -> str:
    return json.dumps(value) if isinstance(value, (Mapping, list, bool)) else str(value)


def _overridden(entry: ScheduleEntry, field: str) -> str:
    """Return what other sources say of a field, which does not count."""
    others = entry.overridden.get(field, {})
    return ", ".join(f"{_text(value)} ({source})" for source, value in others.items())


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
        rows = [(time_of(tick.time), tick.name, tick.task) for tick in ticks]
        for line in table(("TIME (UTC)", "ENTRY", "TASK"), rows, 2, 1):
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
        if found.age is None:
            echo("No beat has sent anything yet.")
        else:
            echo(f"The last tick was {found.age:.0f} s ago.")
        if found.overdue:
            echo(f"Overdue: {', '.join(found.overdue)}.")
        if found.unseen:
            echo(f"No beat has looked at: {', '.join(found.unseen)}.")
        echo("healthy" if found.is_healthy else "not healthy")
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
@_names
@click.pass_context
def enable(context: click.Context, names: Sequence[str]) -> None:
    """Switch entries on; what they have missed is not caught up with."""
    for name in names:
        inspection.enable_schedule_entry(_app(context), name)
        _show_next(context, name)


@schedule.command
@_names
@click.pass_context
def disable(context: click.Context, names: Sequence[str]) -> None:
    """Switch entries off."""
    for name in names:
        inspection.disable_schedule_entry(_app(context), name)
        echo(f"{name} is off.")


@schedule.command
@_names
@click.pass_context
def remove(context: click.Context, names: Sequence[str]) -> None:
    """Delete entries of the database, and what was edited of those of INI and code."""
    for name in names:
        inspection.remove_schedule_entry(_app(context), name)
        echo(f"The database says nothing of {name} any more.")


@schedule.command
@_names
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
    if form == "json":
        echo(json.dumps(entries, indent=2, ensure_ascii=False))
    else:
        for line in _sections(entries):
            echo(line)
    if left_out := inspection.unexported_entries(app, everything=everything):
        names = ", ".join(left_out)
        echo(f"Left out, because they cannot be imported: {names}.", err=True)


def _sections(entries: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of an INI file."""
    for name, fields in entries.items():
        yield f"[celerybeat:{name}]"
        for field, value in fields.items():
            text = value if isinstance(value, str) else json.dumps(value)
            yield f"{field} = {' '.join(text.splitlines()).replace('%', '%%')}"
        yield ""


@schedule.command(name="import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--once", is_flag=True, help="Leave edited ones alone.")
@click.option("--replace", is_flag=True, help="Restore edited ones.")
@click.pass_context
def import_entries(context: click.Context, file: Path, once: bool, replace: bool) -> None:
    """Read the entries of a JSON file that export has printed; all of them, or none."""
    if once == replace:
        raise click.UsageError("Give --once or --replace: what is to become of edited entries?")
    outcome = inspection.import_schedule(_app(context), _read_entries(file), replace=replace)
    counts = (len(outcome.added), len(outcome.replaced), len(outcome.left))
    echo("Added {}, replaced {}, left {} as they are.".format(*counts))
    if outcome.over:
        echo(f"Left out, because their time is past: {', '.join(outcome.over)}.", err=True)


def _read_entries(file: Path) -> dict[str, Any]:
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


def _app(context: click.Context) -> PyramidCelery:
    app: PyramidCelery = context.obj.app
    return app


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
        echo(f"{name}: {entry.schedule}; the next tick is {time_of(entry.next_tick)} UTC.")
    else:
        echo(f"{name}: {entry.schedule}; {entry.state}.")
