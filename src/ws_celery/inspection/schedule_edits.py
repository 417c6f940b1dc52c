"""Editing the schedule in the database.

What beats would set aside is refused here, with the reason. Running beats see a change within
seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ws_celery.app import PyramidCelery, get_celery_app
from ws_celery.beat.entries import (
    FIELDS,
    TIMING,
    Entry,
    Known,
    check_fields,
    problem_of_name,
    unknown_field,
)
from ws_celery.beat.sources import entries_of, entry_of
from ws_celery.beat.ticks import next_tick
from ws_celery.converters import Refused
from ws_celery.exceptions import EntryRefused, NotFound, NotIncluded
from ws_celery.inspection.messages import Source

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from ws_celery.beat.store import Store

__all__ = (
    "Imported",
    "add_schedule_entry",
    "disable_schedule_entry",
    "edit_schedule_entry",
    "enable_schedule_entry",
    "export_schedule",
    "import_schedule",
    "remove_schedule_entry",
    "run_schedule_entry",
    "unexported_entries",
)

#: Where an entry of a source is written.
_WHERE = {"code": "the application's code", "ini": "the INI file", "database": "the database"}


def add_schedule_entry(source: Source, name: str, fields: Mapping[str, Any]) -> None:
    """Add an entry to the schedule.

    :param source: a registry, or what has one: a request, a Celery app. So it is for all of these
        functions; each of them raises ``NotIncluded``, ``TableError`` and
        ``Unavailable`` (see :mod:`ws_celery.exceptions`).
    :param name: a new one.
    :param fields: those of ``[celerybeat:NAME]``, as texts or as JSON has them.
    :raises EntryRefused: if there is one of this name, or beat would set it aside.
    """
    with _editing(source) as edit:
        found = edit.entry(name)
        if found is not None:
            raise EntryRefused(
                name,
                f"there is one of this name, from {_WHERE[found.origin]}. Change it with "
                f"`ws-celery schedule edit {name}`, or choose another name",
            )
        edit.save(name, fields)


def edit_schedule_entry(
    source: Source, name: str, fields: Mapping[str, Any], reset: Iterable[str] = ()
) -> None:
    """Change fields of an entry, wherever it comes from.

    :param fields: the new values; see :func:`add_schedule_entry`.
    :param reset: names of fields that are to be again what code or INI say, or nothing.
    :raises NotFound: if there is none of this name.
    :raises EntryRefused: if beat would set it aside.
    """
    with _editing(source) as edit:
        entry = edit.find(name)
        given = _with_whole_timing(entry, fields)
        edit.save(name, {**dict.fromkeys(_whole_reset(name, reset)), **given})


def enable_schedule_entry(source: Source, name: str) -> None:
    """Switch an entry on; what it has missed meanwhile is not caught up with."""
    with _editing(source) as edit:
        _refuse_unfit(edit.find(name))
        known = edit.known.get(name) or Known(name, "database")
        rest = {key: value for key, value in known.fields.items() if key != "enabled"}
        is_on_without = _merged(edit.app, replace(known, fields=rest)).enabled
        edit.save(name, {"enabled": None if is_on_without else True})


def disable_schedule_entry(source: Source, name: str) -> None:
    """Switch an entry off: it has no ticks until it is switched on.

    :raises EntryRefused: if what the database says of it cannot be read: it would be lost.
    """
    with _editing(source) as edit:
        entry, known = edit.find(name), edit.known.get(name)
        if known is not None and known.problem is not None:
            raise EntryRefused(
                name,
                f"{known.problem}, and would be lost. Mend them in the table by SQL, give all of "
                f"them anew with `ws-celery schedule edit {name}`, or delete them with "
                f"`ws-celery schedule remove {name}`",
            )
        # Not by save(): what beat sets aside can be switched off, too.
        origin = edit.origin(name, entry)
        edit.store.save(name, origin=origin, connection=edit.connection, enabled=False)


def remove_schedule_entry(source: Source, name: str) -> None:
    """Delete an entry of the database, or what was edited of another one.

    :raises EntryRefused: if there is nothing of it in the database.
    """
    with _editing(source) as edit:
        entry, known = edit.find(name), edit.known.get(name)
        if known is None or not (known.fields or known.problem or known.origin == "database"):
            raise EntryRefused(
                name,
                f"it is from {_WHERE[entry.origin]}, and nothing of it was edited. Delete it "
                f"there, or switch it off with `ws-celery schedule disable {name}`",
            )
        edit.store.remove(name, edit.connection)
        after = entry_of(edit.app, name, replace(known, fields={}, problem=None))
        if known.origin != "database" and after is not None and _begins_anew(entry, after):
            edit.store.restart(name, known.origin, edit.connection)


def run_schedule_entry(source: Source, name: str) -> None:
    """Let a beat send an entry now, once, whatever its schedule says.

    :raises EntryRefused: if beat cannot send it.
    """
    with _editing(source) as edit:
        entry = edit.find(name)
        _refuse_unfit(entry)
        edit.store.request_run(name, origin=edit.origin(name, entry), connection=edit.connection)


class _Editing:
    """One transaction in which entries are edited.

    :param app: the Celery app.
    :param connection: to the database, its transaction begun.
    """

    def __init__(self, app: PyramidCelery, connection: Connection) -> None:
        self.app = app
        self.store: Store = app.schedule
        self.connection = connection
        self.known = self.store.load(connection)
        self.now = self.store.now(connection)

    def entry(self, name: str) -> Entry | None:
        """Return an entry, ``None`` if there is none of this name."""
        return entry_of(self.app, name, self.known.get(name))

    def find(self, name: str) -> Entry:
        """Return an entry.

        :raises NotFound: if there is none of this name.
        """
        entry = self.entry(name)
        if entry is None:
            raise NotFound("entry", name)
        return entry

    def origin(self, name: str, entry: Entry | None) -> str:
        """Return the source that has made an entry, which may be a new one."""
        known = self.known.get(name)
        if entry is None:
            return "database"  # whatever had its name before
        return known.origin if known else entry.origin

    def save(self, name: str, fields: Mapping[str, Any]) -> None:
        """Save fields of an entry, if beat will run what comes of them.

        :param fields: the edited ones; ``None`` takes one back.
        :raises EntryRefused: if beat would set the entry aside.
        """
        if problem := problem_of_name(name):
            raise EntryRefused(name, problem)
        before, known = self.entry(name), self.known.get(name)
        if before is not None:
            _refuse_orphan(before)
        origin = self.origin(name, before)
        left = _given({**(known.fields if known else {}), **fields})
        after = _merged(self.app, Known(name, origin, left))
        _refuse_unfit(after)
        anew = before is None or _begins_anew(before, after)
        if anew and after.enabled and next_tick(after, self.now) is None:
            raise _EntryIsOver(name, f"it would never run: {after.words} is past")
        edited = {field: after.values[field] if field in left else None for field in fields}
        if "type" not in left and not isinstance(left.get("schedule", ""), (str, Mapping)):
            edited["type"] = after.type  # of a number; its text alone has none
        _refuse_unfit(_merged(self.app, Known(name, origin, _given({**left, **edited}))))
        self.store.save(name, origin=origin, connection=self.connection, **edited)
        if anew:
            self.store.restart(name, origin, self.connection)


class _EntryIsOver(EntryRefused):
    """An entry has no tick to come."""


@contextmanager
def _editing(source: Source) -> Iterator[_Editing]:
    """Open a transaction in which entries are edited, and commit it at the end.

    :raises NotIncluded: if the application keeps no schedule in its database.
    """
    app = get_celery_app(source)
    if app.schedule is None:
        raise NotIncluded("schedule")
    with app.schedule.begin() as connection:
        yield _Editing(app, connection)


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _merged(app: PyramidCelery, known: Known) -> Entry:
    """Return what an entry would be that is no orphan."""
    entry = entry_of(app, known.name, known)
    assert entry is not None  # noqa: S101 - each source that makes one says something
    return entry


def _refuse_orphan(entry: Entry) -> None:
    if entry.orphaned:
        raise EntryRefused(
            entry.name,
            "code and INI have it no more, and only what was edited of it is left. Delete that "
            f"with `ws-celery schedule remove {entry.name}`; then it can be added",
        )


def _refuse_unfit(entry: Entry) -> None:
    _refuse_orphan(entry)
    if entry.problem is not None:
        raise EntryRefused(entry.name, entry.problem)


def _begins_anew(before: Entry, after: Entry) -> bool:
    """Tell whether the ticks of an entry that is edited count from now on."""
    times = (*TIMING, "starts_at", "expires")
    return not before.enabled or any(before.values[name] != after.values[name] for name in times)


def _with_whole_timing(entry: Entry, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Complete what an edit says of the schedule: its fields mean nothing alone."""
    timing = {}
    if "type" not in fields and fields.keys() & {*TIMING}:
        timing = {name: value for name, value in entry.as_fields().items() if name in TIMING}
    return {**timing, **fields}


def _whole_reset(name: str, reset: Iterable[str]) -> set[str]:
    fields = set(reset)
    for unknown in fields.difference(FIELDS):
        raise EntryRefused(name, unknown_field(unknown))
    return fields | {*TIMING} if fields & {*TIMING} else fields


@dataclass(frozen=True)
class Imported:
    """The outcome of :func:`import_schedule`, by names of entries.

    :param added: those of which the database had no fields.
    :param replaced: those of which it had other fields.
    :param left: those that were left as they are.
    :param over: those that were left out, because they would never run: their time is past.
    """

    added: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    over: list[str] = field(default_factory=list)


def export_schedule(source: Source, *, everything: bool = False) -> dict[str, dict[str, Any]]:
    """Return entries by name, as :func:`import_schedule` takes them; secrets are not masked.

    What is orphaned or set aside could not be imported, and is left out.

    :param source: a registry, or what has one: a request, a Celery app.
    :param everything: the whole schedule, with what stands in code and INI, but for entries whose
        schedule no text can say. By default only what the database says.
    :raises NotIncluded: if only that is wanted, and the application keeps no schedule there.
    """
    fields, entries = _fields(source, everything=everything)
    return {name: each for name, each in fields.items() if _is_exported(entries[name], each)}


def unexported_entries(source: Source, *, everything: bool = False) -> list[str]:
    """Return the names of what :func:`export_schedule` leaves out."""
    fields, entries = _fields(source, everything=everything)
    return [name for name, each in fields.items() if not _is_exported(entries[name], each)]


def _fields(
    source: Source, *, everything: bool
) -> tuple[dict[str, dict[str, Any]], Mapping[str, Entry]]:
    """Return the fields of the entries that are asked for, and all entries."""
    app = get_celery_app(source)
    if app.schedule is None and not everything:
        raise NotIncluded("schedule")
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
    source: Source, entries: Mapping[str, Mapping[str, Any]], *, replace: bool
) -> Imported:
    """Let the database say of entries what :func:`export_schedule` has returned: all, or nothing.

    Entries of other names are left as they are, and those whose time is past are left out.

    :param replace: whether entries are restored that the database says something else of; otherwise
        they are left as they are, because somebody may have edited them.
    :raises EntryRefused: if beat would set one of them aside.
    """
    outcome = Imported()
    with _editing(source) as edit:
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
            except _EntryIsOver:
                outcome.over.append(name)  # a one-off that has run, or a season that has ended
                continue
            (outcome.replaced if edited or unreadable else outcome.added).append(name)
    return outcome
