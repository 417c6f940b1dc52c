"""What can go wrong, in one vocabulary; imports nothing of ours.

Every message is one sentence that says what was wrong and one that names the remedy, because the
command line prints it as it stands.
"""

from __future__ import annotations

import copyreg
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from celery.exceptions import Ignore
from celery.exceptions import TimeoutError as CeleryTimeoutError
from kombu.exceptions import EncodeError
from pyramid.exceptions import ConfigurationError as PyramidConfigurationError

__all__ = (
    "ArgumentNotSerializable",
    "BrokenRow",
    "BrokerUnavailable",
    "CannotPeek",
    "ConfigurationError",
    "CutOff",
    "Duplicate",
    "EntryRefused",
    "Fault",
    "ForeignMessage",
    "LockGone",
    "LockHeld",
    "LocksUnavailable",
    "NoCurrentApplication",
    "NoSuchEntry",
    "NoSuchLock",
    "NoSuchQueue",
    "NoSuchResult",
    "NoSuchRow",
    "NoWorker",
    "NotIncluded",
    "NotRunYet",
    "NothingToProbe",
    "OptionNotSendable",
    "OutboxNotOn",
    "OutboxReadOnly",
    "OutboxTableError",
    "OutboxUnavailable",
    "OutboxUnreachable",
    "ReadOnly",
    "ResultsNotListed",
    "ResultsUnavailable",
    "ScheduleNotOn",
    "ScheduleReadOnly",
    "ScheduleTableError",
    "ScheduleUnavailable",
    "ScheduleUnreachable",
    "Skipped",
    "TableError",
    "TaskNotRegistered",
    "Unavailable",
    "Unreachable",
    "ValueNotPropagated",
    "WsCeleryError",
)


class WsCeleryError(Exception):
    """Base of every error that ws_celery raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        # A pool's child pickles it for the worker's main process, which ends if it cannot be read.
        # Python would call __init__ with the finished message, and that takes other arguments.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with the configuration; its text is one readable line.

    :param problem: what is wrong, as the end of a sentence that begins with section and key; may be
        empty where ``expected`` says it all.
    :param file: name of the file, or what else the value came from.
    :param line: line in that file, counted from 1.
    :param section: name of the section, without brackets.
    :param key: the option, as it is written there.
    :param value: the value, with its secrets masked already.
    :param expected: what would have been right.
    :param nearest: the legal name that is most like the unknown one.
    """

    problem: str
    file: str | None = None
    line: int | None = None
    section: str | None = None
    key: str | None = None
    value: str | None = None
    expected: str | None = None
    nearest: str | None = None

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line) if part is not None)
        subject = " ".join(
            part for part in (f"[{self.section}]" if self.section else "", self.key or "") if part
        )
        if self.value is not None:
            subject += f" = {self.value!r}"
        expected = f"expected {self.expected}" if self.expected else ""
        said = "; ".join(part for part in (self.problem, expected) if part)
        if subject and self.value is None and said.startswith(("is ", "sets ", "has ", "cannot ")):
            subject, said = f"{subject} {said}", ""
        text = ": ".join(part for part in (place, subject, said) if part)
        text = text.rstrip(".") + "."
        return f"{text} Did you mean {self.nearest}?" if self.nearest else text

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)


class ConfigurationError(WsCeleryError, PyramidConfigurationError):
    """Settings, sections or files are wrong: all that is wrong, one line for each fault.

    :param faults: what is wrong; a plain sentence counts as one.
    """

    def __init__(self, *faults: Fault | str) -> None:
        self.faults: tuple[Fault, ...] = tuple(
            fault if isinstance(fault, Fault) else Fault(fault) for fault in faults
        )
        super().__init__(*faults)

    def __str__(self) -> str:
        return "\n".join(str(fault) for fault in self.faults)

    @classmethod
    def of(cls, faults: Iterable[Fault]) -> ConfigurationError:
        """Return the error that shows each of ``faults`` once, in the order of files and lines."""
        ordered = sorted(dict.fromkeys(faults), key=lambda each: (each.file or "", each.line or 0))
        return cls(*ordered)


class NotIncluded(WsCeleryError):
    """The Pyramid application has no Celery app because it does not include ws_celery."""

    def __init__(self, where: str = "This Pyramid application") -> None:
        super().__init__(
            f"{where} does not include ws_celery. Add `pyramid.includes = ws_celery` to its "
            f'[app:main] section, or call config.include("ws_celery").'
        )


class NoCurrentApplication(WsCeleryError):
    """A task or ``celery_app`` was used where no single Pyramid application can be told."""

    def __init__(self, what: str, candidates: int) -> None:
        found = (
            "no Pyramid application that includes ws_celery is loaded"
            if not candidates
            else f"{candidates} applications that include ws_celery are loaded in this process"
        )
        remedy = "run the code inside `with pyramid.paster.bootstrap(...)`"
        if not candidates:
            # For Celery's own command line, whose -A is all that it knows.
            remedy += ", or name the INI file by the environment variable WS_CELERY_INI"
        super().__init__(
            f"Cannot tell which application {what} belongs to: {found}. Pass the request as the "
            f"first argument, {'or ' if candidates else ''}{remedy}."
        )


class TaskNotRegistered(WsCeleryError):
    """A task is used, or named in a schedule, that the application has not registered."""

    def __init__(self, name: str, where: str = "") -> None:
        super().__init__(
            f"{where}{': ' if where else ''}the task {name!r} is not registered. Call "
            "config.scan() on its module, or list the module under `imports` in the [celery] "
            "section."
        )


class ArgumentNotSerializable(WsCeleryError, EncodeError):
    """An argument of a call cannot be written into a message."""

    def __init__(self, task: str, argument: str, serializer: str, advice: str) -> None:
        super().__init__(f"{task}: {argument} cannot be serialized with {serializer}: {advice}.")


class OptionNotSendable(WsCeleryError, EncodeError):
    """A header or an option of a call cannot be written into a message of this broker."""

    def __init__(self, what: str, problem: str) -> None:
        super().__init__(
            f"{what} cannot be sent ({problem.rstrip('.')}). Pass text, numbers, lists and "
            "dictionaries."
        )


class ValueNotPropagated(WsCeleryError, EncodeError):
    """What a propagator has captured of a request cannot be written into a message header."""

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(
            f"ws_celery.propagate: what {name!r} has captured is no JSON value ({error}). Let its "
            "capture() return text, numbers, lists and dictionaries."
        )


class NotRunYet(WsCeleryError, CeleryTimeoutError):
    """A result is wanted that does not come while it is waited for; Celery's ``TimeoutError``, too.

    :param task_id: the id of the task.
    :param remedy: why it has not run, and what to do.
    """

    EAGER = (
        "With task_always_eager it runs when the transaction commits, in a task when that task is "
        "over, and in a test it is run by drain(). Ask for its result after that."
    )
    DEFERRED = (
        "Its message leaves when the transaction that is open commits. Ask for its result after "
        "that, or dispatch it inside `with immediately():`."
    )
    SKIPPED = "Call it again, or let it wait for the lock, by one_instance(wait=SECONDS)."

    def __init__(self, task_id: str, remedy: str = EAGER) -> None:
        super().__init__(task_id, remedy)  # as they are: it travels between processes

    def __str__(self) -> str:
        return "The task {} has not run. {}".format(*self.args)


class BrokerUnavailable(WsCeleryError):
    """The broker does not answer; the embedded one may not be running."""


class Unreachable(WsCeleryError):
    """A request has no database session to write a table of ours with."""


class OutboxUnreachable(Unreachable):
    """A dispatch that is to be kept in the outbox has no database session to be written with."""

    def __init__(self, task: str, attribute: str) -> None:
        super().__init__(
            f"{task} cannot be written to the outbox: the request that dispatches it has no "
            f"SQLAlchemy session as its attribute {attribute!r}. Pass the request as the first "
            "argument, name the attribute by the setting ws_celery.dbsession, or opt out with "
            "@task(outbox=False)."
        )


class OutboxDetached(WsCeleryError):
    """A row of the outbox would not be committed by the transaction that it belongs to."""

    def __init__(self, what: str, problem: str) -> None:
        super().__init__(
            f"{what} cannot be written to the outbox: {problem}. Pass the request whose "
            "transaction is open, whose session is registered with that transaction's manager "
            "(zope.sqlalchemy.register(session, transaction_manager=request.tm)), and dispatch "
            "before it commits; or opt out with @task(outbox=False)."
        )


class ScheduleUnreachable(Unreachable):
    """The application's requests have no database session that tells where the schedule is."""

    def __init__(self, _what: str, attribute: str) -> None:
        super().__init__(
            "The schedule cannot be found in the database: requests have no SQLAlchemy session as "
            f"their attribute {attribute!r}. Name the attribute by the setting "
            "ws_celery.dbsession, or switch ws_celery.beat off."
        )


class TableError(WsCeleryError):
    """A table of ours is missing, or is not the one that this version needs.

    :param table: its name.
    :param problem: what is wrong with it.
    :param missing: whether it does not exist.
    """

    #: What cannot use the table, the command that creates it, the setting that names it.
    words: tuple[str, str, str]

    def __init__(self, table: str, problem: str, *, missing: bool = False) -> None:
        what, command, setting = self.words
        remedy = (
            f"Create it with `{command} --ini FILE`, or with a migration of Alembic."
            if missing
            else "Change it by a migration of Alembic; or, when nothing in it is needed any more, "
            f"drop it and run `{command} --ini FILE`; or name another table by the setting "
            f"{setting}."
        )
        super().__init__(f"{what} cannot use the table {table}: {problem}. {remedy}")


class OutboxTableError(TableError):
    """The table of the outbox is missing, or is not the one that this version needs."""

    words = ("The outbox", "ws-celery outbox create", "ws_celery.outbox.table")


class ScheduleTableError(TableError):
    """The table of the schedule is missing, or is not the one that this version needs."""

    words = ("The schedule", "ws-celery schedule create", "ws_celery.beat.table")


class ReadOnly(WsCeleryError):
    """The database takes no changes."""


class OutboxReadOnly(ReadOnly):
    """The database takes no changes, so that a dispatch cannot be kept, nor a task be run."""

    def __init__(self, table: str, problem: str) -> None:
        super().__init__(
            f"The outbox cannot write to the table {table}: the database is read-only ({problem}). "
            "Connect to its primary server, in a transaction that may write; or send without the "
            "outbox, by @task(outbox=False)."
        )


class ScheduleReadOnly(ReadOnly):
    """The database takes no changes, so that no tick can be claimed, and no entry edited."""

    def __init__(self, table: str, problem: str) -> None:
        super().__init__(
            f"The schedule cannot write to the table {table}: the database is read-only "
            f"({problem}). Connect to its primary server, in a transaction that may write."
        )


class Unavailable(WsCeleryError):
    """A database does not answer."""

    #: What it is the database of.
    what: str

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"The database of the {self.what} does not answer: {problem}. Start it, or correct the "
            "URL that the application connects to."
        )


class OutboxUnavailable(Unavailable):
    """The database of the outbox does not answer."""

    what = "outbox"


class ScheduleUnavailable(Unavailable):
    """The database of the schedule does not answer."""

    what = "schedule"


class ScheduleNotOn(WsCeleryError):
    """Something is wanted of a schedule in the database, and the application has none."""

    def __init__(self) -> None:
        super().__init__(
            "This application keeps no schedule in its database. Switch it on by "
            '`ws_celery.beat = true` in its section, or by config.include("ws_celery.beat").'
        )


class EntryRefused(WsCeleryError):
    """Beat could not run an entry of the schedule as somebody wants to have it.

    :param name: of the entry.
    :param problem: what is wrong.
    """

    def __init__(self, name: str, problem: str) -> None:
        self.name = name
        self.problem = problem
        super().__init__(f"Schedule entry {name!r}: {problem}.")


class NoSuchEntry(WsCeleryError):
    """An entry of the schedule is wanted that is not there."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"There is no schedule entry {name!r}. `ws-celery schedule list` shows what there is."
        )


class OutboxNotOn(WsCeleryError):
    """Something is wanted of the outbox of an application that has none."""

    def __init__(self) -> None:
        super().__init__(
            "This application has no outbox. Switch it on by `ws_celery.outbox = true` in its "
            'section, or by config.include("ws_celery.outbox").'
        )


class NoSuchRow(WsCeleryError):
    """A row of the outbox is wanted that is not there, or more than one answers to a name."""

    def __init__(self, wanted: str, found: Iterable[Any] = (), kind: str = "row") -> None:
        several = ", ".join(map(str, found))
        problem = (
            f"{wanted} is the task id of several rows: {several}. Name one of them"
            if several
            else f"There is no {kind} {wanted} in the outbox: the task has had its effect, or was "
            "discarded. `ws-celery outbox list --all` shows what there is"
        )
        super().__init__(f"{problem}.")


class BrokenRow(WsCeleryError):
    """A row of the outbox does not hold a message that can be published."""

    def __init__(self, row_id: Any, problem: str) -> None:
        self.row_id = row_id
        self.problem = problem
        super().__init__(
            f"The row {row_id} of the outbox cannot be published: {problem}. Look at it with "
            f"`ws-celery outbox show {row_id}`, and discard it."
        )


class NoSuchQueue(WsCeleryError):
    """A queue is meant that the application does not use, and that the broker does not have."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"There is no queue {name!r}: the application does not use one of this name, and the "
            "broker has none. `ws-celery queues` shows those that there are."
        )


class CannotPeek(WsCeleryError):
    """The broker cannot show messages without taking them."""

    def __init__(self, kind: str) -> None:
        super().__init__(
            f"The broker ({kind}) cannot show messages without taking them: to take one and give "
            "it back changes the order, and marks it as delivered before. Redis, an SQL database, "
            "files and the outbox can be looked into."
        )


class NoWorker(WsCeleryError):
    """No worker has answered in time."""

    def __init__(self, timeout: float) -> None:
        super().__init__(
            f"No worker has answered within {timeout:g} seconds. Start one with `ws-celery "
            "worker --ini FILE`; or wait longer, by --timeout: a worker with the pool solo does "
            "not answer while it runs a task."
        )


class NothingToProbe(WsCeleryError):
    """It is asked whether a part is healthy that the application does not have."""

    def __init__(self, part: str, parts: Iterable[str]) -> None:
        remedies = {
            "relay": " Without an outbox it needs the health file of a relay (--relay-file).",
            "beat": " It needs the health file of beat (--beat-file).",
        }
        super().__init__(
            f"The part {part} cannot be asked whether it is healthy; those of this application: "
            f"{', '.join(parts)}.{remedies.get(part, '')} Name one of these, or leave it out."
        )


class ResultsNotListed(WsCeleryError):
    """Results are to be listed that are not in a database."""

    def __init__(self, backend: str) -> None:
        super().__init__(
            f"The result backend ({backend}) finds a result by the id of its task only: "
            "`ws-celery results show ID`. To list results, keep them in a database, by "
            "`result_backend = db+postgresql://...` and `result_extended = true` in [celery]."
        )


class ResultsUnavailable(WsCeleryError):
    """The result backend does not answer."""

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"The result backend does not answer: {problem}. Start it, or correct `result_backend` "
            "in [celery]."
        )


class NoSuchResult(WsCeleryError):
    """Nothing is known of a task by its id."""

    def __init__(self, task_id: str) -> None:
        super().__init__(
            f"There is no result of the task {task_id}: it has not run yet, ignores its result, "
            "was forgotten, has expired, or there never was one of this id."
        )


class Duplicate(WsCeleryError, Ignore):
    """A message's effect is there already, or another run is at it; this run ends quietly."""


class ForeignMessage(WsCeleryError, Ignore):
    """A message belongs to another outbox, which keeps its row, and sends it again.

    No ``Reject``: Celery would store that its task has failed.
    """

    def __init__(self, task: str, queue: str, owner: str, ours: str) -> None:
        super().__init__(
            f"{task} is not run: its row is in another outbox ({owner}) than that of this worker "
            f"({ours}). Give each application queues of its own: both take their messages from "
            f"the queue {queue!r}."
        )


class CutOff(WsCeleryError, Ignore):
    """A run has lost its database, and whether it has committed is open; its row is sent again."""


class Skipped(WsCeleryError, Ignore):
    """A run did not begin: another task holds its one-instance lock; the state is ``SKIPPED``.

    :param holder: who has it.
    """

    def __init__(self, task: str, task_id: str, key: str, holder: Any) -> None:
        super().__init__(task, task_id, key, holder)
        self.key = key
        self.holder = holder
        self.reason = f"the lock {key!r} is held by {holder}"

    def __str__(self) -> str:
        return "{}[{}] is skipped: {}".format(*self.args[:2], self.reason)

    def as_dict(self) -> dict[str, Any]:
        """Return what is kept as the result of the task: its reason, key and holder."""
        return {"reason": self.reason, "key": self.key, "holder": self.holder.as_dict()}


class LockHeld(WsCeleryError):
    """A part of a chord, or an item of ``map()``, needs a lock that another task holds."""

    def __init__(self, task: str, key: str, holder: Any) -> None:
        super().__init__(
            f"{task}: the lock {key!r} of one_instance is held by {holder}. Let the run wait for "
            "it, by one_instance(wait=SECONDS)."
        )


class LockGone(WsCeleryError):
    """A run has lost its one-instance lock: another run with its key may have begun."""

    def __init__(self, task: str, task_id: str | None, key: str) -> None:
        super().__init__(task, task_id, key)

    def __str__(self) -> str:
        return (
            "{}[{}] has lost the lock {!r}. Its process may have stood still for longer than the "
            "timeout of one_instance, or the lock was freed by hand.".format(*self.args)
        )


class LocksUnavailable(WsCeleryError):
    """What keeps the one-instance locks does not answer, or cannot keep them."""

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"The one-instance locks are out of reach: {problem}. Start what keeps them, or name "
            "another place by the setting ws_celery.locks."
        )


class NoSuchLock(WsCeleryError):
    """A lock is wanted that no run holds."""

    def __init__(self, key: str) -> None:
        super().__init__(
            f"No run holds the lock {key!r}. `ws-celery locks list` shows those that are held."
        )
