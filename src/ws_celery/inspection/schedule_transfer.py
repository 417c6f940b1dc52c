"""Schedules as data: what one database says of its entries, for a file or another database."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ws_celery.applications import get_celery_app
from ws_celery.beat.entry import Entry
from ws_celery.beat.merging import check_fields
from ws_celery.beat.sources import entries_of
from ws_celery.converters import Refused
from ws_celery.exceptions import EntryRefused, ScheduleNotOn
from ws_celery.inspection.schedule_edits import EntryIsOver, editing

__all__ = ("Imported", "export_schedule", "import_schedule", "unexported_entries")


@dataclass(frozen=True)
class Imported:
    """The outcome of :func:`import_schedule`, by names of entries.

    :param added: those that the database had said nothing of.
    :param replaced: those that it had said something else of.
    :param left: those that were left as they are.
    :param over: those that were left out, because they would never run: their time is past.
    """

    added: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    over: list[str] = field(default_factory=list)


def export_schedule(source: Any, *, everything: bool = False) -> dict[str, dict[str, Any]]:
    """Return entries by name, as :func:`import_schedule` takes them; secrets are not masked.

    What is orphaned or set aside could not be imported, and is left out.

    :param source: a registry, or what has one: a request, a Celery app.
    :param everything: the whole schedule, with what stands in code and INI, but for entries whose
        schedule no text can say. By default only what the database says.
    :raises ScheduleNotOn: if only that is wanted, and the application keeps no schedule there.
    """
    said, entries = _said(source, everything=everything)
    return {name: fields for name, fields in said.items() if _is_exported(entries[name], fields)}


def unexported_entries(source: Any, *, everything: bool = False) -> list[str]:
    """Return the names of what :func:`export_schedule` leaves out."""
    said, entries = _said(source, everything=everything)
    return [name for name, fields in said.items() if not _is_exported(entries[name], fields)]


def _said(
    source: Any, *, everything: bool
) -> tuple[dict[str, dict[str, Any]], Mapping[str, Entry]]:
    """Return what is said of entries, and all entries."""
    app = get_celery_app(source)
    if app.schedule is None and not everything:
        raise ScheduleNotOn
    known = app.schedule.load() if app.schedule else {}
    entries = entries_of(app, known)
    if everything:
        return {name: entries[name].as_fields() for name in sorted(entries)}, entries
    return {
        name: dict(each.fields)
        for name, each in known.items()
        if name in entries and (each.fields or each.problem)
    }, entries


def _is_exported(entry: Entry, fields: Mapping[str, Any]) -> bool:
    if entry.type == "python" or entry.orphaned or entry.problem is not None:
        return False
    try:
        check_fields(fields)
        json.dumps(fields)
    except (Refused, TypeError):
        return False  # it has objects of the application's code
    return True


def import_schedule(
    source: Any, entries: Mapping[str, Mapping[str, Any]], *, replace: bool
) -> Imported:
    """Let the database say of entries what :func:`export_schedule` has returned: all, or nothing.

    Entries of other names are left as they are, and those whose time is past are left out.

    :param replace: whether entries are restored that the database says something else of; otherwise
        they are left as they are, because somebody may have edited them.
    :raises EntryRefused: if beat would set one of them aside.
    """
    outcome = Imported()
    with editing(source) as edit:
        for name, fields in entries.items():
            if not isinstance(fields, Mapping):
                raise EntryRefused(name, f"{fields!r} is no JSON object of fields")
            known = edit.known.get(name)
            edited = known.fields if known and edit.entry(name) else {}
            unreadable = known is not None and known.problem is not None
            if (unreadable and not replace) or (
                edited and (not replace or dict(edited) == dict(fields))
            ):
                outcome.left.append(name)
                continue
            try:
                edit.save(name, {**dict.fromkeys(edited), **fields})
            except EntryIsOver:
                outcome.over.append(name)  # a one-off that has run, or a season that has ended
                continue
            (outcome.replaced if edited or unreadable else outcome.added).append(name)
    return outcome
