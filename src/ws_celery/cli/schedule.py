"""``ws-celery schedule``: look at the schedule, edit it while beats run, and see what comes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from ws_celery import inspection
from ws_celery.app import PyramidCelery
from ws_celery.cli.tables import (
    Answer,
    Listing,
    echo,
    fields_of,
    limit,
    showing,
    table,
    time_of,
    with_app,
)
from ws_celery.converters import Refused, json_value
from ws_celery.exceptions import ConfigurationError

__all__ = ("schedule",)

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
@with_app
def create(app: PyramidCelery) -> None:
    """Create the table if it is missing."""
    created = inspection.create_schedule(app)
    name = app.schedule.table.fullname
    echo(f"Created the table {name}." if created else f"The table {name} is there already.")


# --- What there is ----------------------------------------------------------------------------


def _origin(entry: inspection.ScheduleEntry) -> str:
    edited = f"; database: {', '.join(entry.edited)}" if entry.edited else ""
    return f"{entry.origin}{edited}"


_ENTRIES: Listing[inspection.ScheduleEntry] = Listing(
    {
        "ENTRY": lambda entry: entry.name,
        "TASK": lambda entry: entry.task,
        "SCHEDULE": lambda entry: entry.schedule,
        "STATE": lambda entry: entry.state,
        "FROM": _origin,
        "LAST TICK": lambda entry: time_of(entry.last_tick),
        "NEXT TICK": lambda entry: time_of(entry.next_tick),
    },
    giving_way=("FROM", "SCHEDULE", "TASK", "ENTRY"),
    left_out="LAST TICK",
)

_TICKS: Listing[inspection.ComingTick] = Listing(
    {
        "TIME (UTC)": lambda tick: time_of(tick.time),
        "ENTRY": lambda tick: tick.name,
        "TASK": lambda tick: tick.task,
    },
    giving_way=("TASK", "ENTRY"),
)


@schedule.command(name="list")
@showing
def list_entries(app: PyramidCelery) -> Answer:
    """List all entries, where they are from, and what is wrong with those that are set aside."""
    entries = inspection.schedule_entries(app)
    problems = [f"{entry.name}: {entry.problem}." for entry in entries if entry.problem]
    number = f"{len(entries)} {'entry' if len(entries) == 1 else 'entries'}."
    return _ENTRIES.answer(entries, after=[*problems, number])


@schedule.command
@click.argument("name")
@showing
def show(app: PyramidCelery, name: str) -> Answer:
    """Show an entry: each field, where it is from, and what that overrides."""
    entry = inspection.schedule_entry(app, name)
    rows = [
        (field, _text(value), entry.origins.get(field, ""), _overridden(entry, field))
        for field, value in entry.fields.items()
    ]
    fields = table(("FIELD", "VALUE", "FROM", "INSTEAD OF"), rows, 3, 1)
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
    return Answer([*fields, "", *fields_of(standing)], entry.as_dict())


def _text(value: object) -> str:
    return json.dumps(value) if isinstance(value, (Mapping, list, bool)) else str(value)


def _overridden(entry: inspection.ScheduleEntry, field: str) -> str:
    """Return what other sources say of a field, which does not count."""
    others = entry.overridden.get(field, {})
    return ", ".join(f"{_text(value)} ({source})" for source, value in others.items())


@schedule.command(name="next")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--hours", type=click.FloatRange(0, 24 * 366), default=24.0, show_default=True)
@limit(100)
@showing
def next_ticks(app: PyramidCelery, names: Sequence[str], hours: float, limit: int) -> Answer:
    """List the ticks to come, of these entries or of all, in UTC."""
    ticks = inspection.coming_ticks(app, timedelta(hours=hours), names, limit)
    more = [f"The first {limit}; --limit shows more."] if len(ticks) == limit else []
    none = [] if ticks else [f"No tick in the next {hours:g} hours."]
    return _TICKS.answer(ticks, after=more or none)


@schedule.command
@click.option(
    "--late",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    help="By how many seconds a tick may be late.",
)
@showing
def health(app: PyramidCelery, late: float) -> Answer:
    """Tell whether beats send the ticks of the schedule, for probes.

    Exit code 0 if they do, 1 if entries are overdue, 69 if the database does not answer.
    """
    found = inspection.schedule_health(app, timedelta(seconds=late))
    return Answer(_health(found), found.as_dict(), 0 if found.is_healthy else 1)


def _health(found: inspection.ScheduleHealth) -> Iterator[str]:
    if found.age is None:
        yield "No beat has sent anything yet."
    else:
        yield f"The last tick was {found.age:.0f} s ago."
    if found.overdue:
        yield f"Overdue: {', '.join(found.overdue)}."
    if found.unseen:
        yield f"No beat has looked at: {', '.join(found.unseen)}."
    yield "healthy" if found.is_healthy else "not healthy"


# --- Edits ------------------------------------------------------------------------------------


@schedule.command
@click.argument("name")
@_fields
@with_app
def add(app: PyramidCelery, name: str, fields: Sequence[str]) -> None:
    """Add an entry to the database.

    It needs task, type and schedule: add nightly task=myapp.tasks.clean_up type=crontab
    "schedule=30 3 * * *" timezone=Europe/Berlin
    """
    inspection.add_schedule_entry(app, name, _given(fields))
    _show_next(app, name)


@schedule.command
@click.argument("name")
@_fields
@click.option(
    "--reset",
    metavar="FIELD",
    multiple=True,
    help="Take back what was edited of FIELD; may be repeated.",
)
@with_app
def edit(app: PyramidCelery, name: str, fields: Sequence[str], reset: Sequence[str]) -> None:
    """Change fields of an entry; the database counts more than INI and code."""
    if not fields and not reset:
        raise click.UsageError("Give fields as FIELD=VALUE, or --reset FIELD.")
    inspection.edit_schedule_entry(app, name, _given(fields), reset)
    _show_next(app, name)


@schedule.command
@_names
@with_app
def enable(app: PyramidCelery, names: Sequence[str]) -> None:
    """Switch entries on; what they have missed is not caught up with."""
    for name in names:
        inspection.enable_schedule_entry(app, name)
        _show_next(app, name)


@schedule.command
@_names
@with_app
def disable(app: PyramidCelery, names: Sequence[str]) -> None:
    """Switch entries off."""
    for name in names:
        inspection.disable_schedule_entry(app, name)
        echo(f"{name} is off.")


@schedule.command
@_names
@with_app
def remove(app: PyramidCelery, names: Sequence[str]) -> None:
    """Delete entries of the database, and what was edited of those of INI and code."""
    for name in names:
        inspection.remove_schedule_entry(app, name)
        echo(f"The database says nothing of {name} any more.")


@schedule.command
@_names
@with_app
def run(app: PyramidCelery, names: Sequence[str]) -> None:
    """Let a beat send entries now, once, whatever their schedule says."""
    for name in names:
        inspection.run_schedule_entry(app, name)
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
@with_app
def export(app: PyramidCelery, everything: bool, form: str) -> None:
    """Print what the database says of the schedule; secrets are not masked."""
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
@with_app
def import_entries(app: PyramidCelery, file: Path, once: bool, replace: bool) -> None:
    """Read the entries of a JSON file that export has printed; all of them, or none."""
    if once == replace:
        raise click.UsageError("Give --once or --replace: what is to become of edited entries?")
    outcome = inspection.import_schedule(app, _read_entries(file), replace=replace)
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


def _show_next(app: PyramidCelery, name: str) -> None:
    entry = inspection.schedule_entry(app, name)
    if entry.state == "on":
        echo(f"{name}: {entry.schedule}; the next tick is {time_of(entry.next_tick)} UTC.")
    else:
        echo(f"{name}: {entry.schedule}; {entry.state}.")
