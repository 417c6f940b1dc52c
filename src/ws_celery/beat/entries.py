"""Whether an application can run an entry: its task, its arguments, its next tick."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

from celery.beat import BeatLazyFunc
from celery.exceptions import QueueNotFound
from kombu.exceptions import EncodeError
from kombu.serialization import dumps

from ws_celery.beat.ticks import due_tick, nothing_tells
from ws_celery.converters import nearest
from ws_celery.exceptions import ArgumentNotSerializable
from ws_celery.recording import blame_argument
from ws_celery.schedules import Clocked, describe

__all__ = (
    "FIELDS",
    "LONGEST_NAME",
    "SOURCES",
    "TIMING",
    "Entry",
    "Known",
    "fitted",
    "problem_of_name",
    "problem_of_queue",
)

#: How many characters the name of an entry has at most that the database is to know.
LONGEST_NAME = 255

#: Fields that make the schedule. A source that has ``type`` has all of them: the time zone of a
#: crontab means nothing to the period that takes its place.
TIMING = ("type", "schedule", "timezone", "relative")

#: All fields, in the order in which people read them.
FIELDS = (
    "task",
    *TIMING,
    "args",
    "kwargs",
    "options",
    "enabled",
    "catch_up",
    "overlap",
    "starts_at",
    "expires",
    "description",
)

#: Where fields come from; the later ones count more.
SOURCES = ("code", "ini", "database")


def problem_of_name(name: str) -> str | None:
    """Return why the database cannot know an entry of this name, ``None`` if it can."""
    # MariaDB takes no notice of blanks at the end of a name.
    if name and name == name.strip() and name.isprintable() and len(name) <= LONGEST_NAME:
        return None
    return (
        f"a name is from 1 to {LONGEST_NAME} characters that can be printed, with no blank at its "
        "ends"
    )


@dataclass(frozen=True)
class Known:
    """What the database knows of one entry.

    :param name: of the entry.
    :param origin: the source that has made it: one that is not ``database`` has to go on having it.
    :param fields: what was edited.
    :param last_run_at: the nominal tick that the next one is counted from, in UTC: the last that
        was sent, or is over. ``None`` until a beat has looked at the entry, or it was edited.
    :param task_id: the id of the task that was sent last.
    :param sent_at: when that was; ``None`` before the first.
    :param seen_at: when a beat first looked at the entry.
    :param run_requested_at: since when somebody wants it to be run now.
    :param version: counts the edits.
    :param problem: why what was edited cannot be read.
    """

    name: str
    origin: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    last_run_at: datetime | None = None
    task_id: str | None = None
    sent_at: datetime | None = None
    seen_at: datetime | None = None
    run_requested_at: datetime | None = None
    version: int = 0
    problem: str | None = None

    @property
    def last_tick(self) -> datetime | None:
        """The tick that was sent last; ``None`` before the first.

        Later ones are over for another reason: they were missed, or edited away.
        """
        if self.sent_at is None:
            return None
        return min(self.sent_at, self.last_run_at or self.sent_at)


@dataclass(frozen=True)
class Entry:
    """One entry, merged from its sources.

    :param name: its name.
    :param task: the name of the task.
    :param schedule: Celery's schedule; ``None`` if it is broken.
    :param args: positional arguments of the task.
    :param kwargs: keyword arguments.
    :param options: of the call, as ``apply_async`` takes them.
    :param enabled: whether it is switched on.
    :param catch_up: what becomes of ticks that nobody was there for: ``skip`` or ``once``.
    :param overlap: ``skip`` does not send while the task of the last tick is unfinished.
    :param starts_at: there are no ticks before this time.
    :param expires: there are no ticks from this time on.
    :param description: for people.
    :param type: of the schedule, as the INI has it; ``python`` if no text can say it.
    :param text: the schedule as the INI has it.
    :param timezone: of a crontab or a time.
    :param relative: whether times are rounded to the period's unit.
    :param origins: field to ``code``, ``ini`` or ``database``.
    :param problem: why it is set aside, and does not tick.
    :param orphaned: whether it was edited in the database, and its source has it no more.
    """

    name: str
    task: str
    schedule: Any
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    enabled: bool = True
    catch_up: str = "skip"
    overlap: str = "allow"
    starts_at: datetime | None = None
    expires: datetime | None = None
    description: str | None = None
    type: str = ""
    text: str = ""
    timezone: str | None = None
    relative: bool = False
    origins: Mapping[str, str] = field(default_factory=dict)
    problem: str | None = None
    orphaned: bool = False

    @property
    def ticks(self) -> bool:
        """Whether it is sent at its times."""
        return self.enabled and not self.orphaned and self.problem is None

    @property
    def origin(self) -> str:
        """The source that has made it."""
        return min(self.origins.values(), key=SOURCES.index, default="database")

    @property
    def words(self) -> str:
        """The schedule in words that fit on one line."""
        return self.text if self.schedule is None else describe(self.schedule)

    def as_fields(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them, without those that say nothing."""
        return {name: value for name, value in self.values.items() if value != _NOTHING.get(name)}

    @property
    def values(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        return {
            "task": self.task,
            "type": self.type,
            "schedule": self.text,
            "timezone": self.timezone,
            "relative": self.relative,
            "args": list(self.args),
            "kwargs": dict(self.kwargs),
            "options": dict(self.options),
            "enabled": self.enabled,
            "catch_up": self.catch_up,
            "overlap": self.overlap,
            "starts_at": self.starts_at and self.starts_at.isoformat(),
            "expires": self.expires and self.expires.isoformat(),
            "description": self.description,
        }

    def for_celery(self) -> dict[str, Any]:
        """Return the entry as Celery's ``beat_schedule`` has it."""
        entry = {
            "task": self.task,
            "schedule": self.schedule,
            "args": list(self.args),
            "kwargs": dict(self.kwargs),
            "options": dict(self.options),
        }
        return {**entry, "relative": True} if self.relative else entry


#: What a field is that nobody has given.
_NOTHING: dict[str, Any] = {
    "timezone": None,
    "relative": False,
    "args": [],
    "kwargs": {},
    "options": {},
    "enabled": True,
    "catch_up": "skip",
    "overlap": "allow",
    "starts_at": None,
    "expires": None,
    "description": None,
}


#: Fields that Celery's own scheduler does not know.
_OURS = ("catch_up", "overlap", "starts_at", "expires")


def fitted(entries: Mapping[str, Entry], app: Any) -> dict[str, Entry]:
    """Return entries as the application will run them, those that it cannot run set aside.

    :param entries: by name, as :func:`ws_celery.beat.sources.merge` returns them.
    :param app: the Celery app; its time zone is that of a crontab without one.
    """
    return {name: _fitted(entry, app) for name, entry in entries.items()}


def _fitted(entry: Entry, app: Any) -> Entry:
    if entry.schedule is not None:
        entry.schedule.app = app
    if entry.problem is not None:
        return entry
    return replace(entry, problem=_problem(entry, app))


def _problem(entry: Entry, app: Any) -> str | None:
    task = app.tasks.get(entry.task)
    if task is None:
        close = nearest(entry.task, app.tasks)
        meant = f"did you mean {close}? Else call" if close else "call"
        return (
            f"the task {entry.task!r} is not registered; {meant} config.scan() on its module, or "
            "list the module under `imports` in the [celery] section"
        )
    try:
        if task.typing:
            task.__header__(*entry.args, **entry.kwargs)
    except TypeError as error:
        return f"the arguments do not fit {entry.task}: {error}"
    if app.schedule is None:
        of_scheduler = _problem_without_database(entry)
    else:
        of_scheduler = _problem_of_overlap(entry, app)
    return _problem_of_message(entry, task) or of_scheduler or _problem_of_timing(entry)


def _problem_of_message(entry: Entry, task: Any) -> str | None:
    serializer = entry.options.get("serializer") or task.serializer
    # What is made at each tick cannot be looked at now.
    args = [None if isinstance(each, BeatLazyFunc) else each for each in entry.args]
    kwargs = {k: v for k, v in entry.kwargs.items() if not isinstance(v, BeatLazyFunc)}
    try:
        dumps((args, kwargs), serializer=serializer)
    except EncodeError as error:
        try:
            blame_argument(error, entry.task, args, kwargs, serializer)
        except ArgumentNotSerializable as blamed:
            return str(blamed).rstrip(".")
    queue = entry.options.get("queue") or getattr(task, "queue", None)
    return problem_of_queue(task.app, entry.task, queue)


def problem_of_queue(app: Any, task: str, queue: Any = None) -> str | None:
    """Return why a call of a task could not be routed, if it could not.

    :param queue: the one that the call or the task names; that of the route if it is ``None``.
    """
    if app.conf.task_create_missing_queues:
        return None  # not asked for: a worker would consume from what is made
    try:
        app.amqp.router.route({"queue": queue} if queue else {}, task)
    except QueueNotFound as error:
        return f"calls of {task} cannot be routed: {error}; add [celeryqueue:NAME] for it"
    return None


def _problem_without_database(entry: Entry) -> str | None:
    fields = [name for name in _OURS if name in entry.origins]
    if isinstance(entry.schedule, Clocked):
        fields.insert(0, "type = clocked")
    return " and ".join(fields) and (
        f"has {' and '.join(fields)}, which needs the schedule in the database: Celery's own "
        "scheduler would not obey. Set ws_celery.beat = true in the section of the application, or "
        "take it out"
    )


def _problem_of_overlap(entry: Entry, app: Any) -> str | None:
    reason = nothing_tells(app, entry) if entry.overlap == "skip" else None
    return reason and (
        "overlap = skip needs to know when the last run has ended, and nothing tells it: the task "
        f"has no row in an outbox, and {reason}. Set overlap = allow, or keep its results"
    )


def _problem_of_timing(entry: Entry) -> str | None:
    try:
        due_tick(entry, None, datetime.now(timezone.utc))
    except Exception as error:  # noqa: BLE001 - schedules are the application's own classes, too
        return f"the schedule cannot tell its next tick: {error}"
    return None
