"""What can go wrong, in one vocabulary; imports nothing of ours.

Every message is one sentence that says what was wrong and one that names the remedy, because the
command line prints it as it stands.
"""

from __future__ import annotations

import copyreg
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from celery.exceptions import Ignore
from celery.exceptions import TimeoutError as CeleryTimeoutError
from kombu.exceptions import EncodeError
from pyramid.exceptions import ConfigurationError as PyramidConfigurationError

if TYPE_CHECKING:
    from uuid import UUID

    from ws_celery.locks import Holder

__all__ = (
    "Abandoned",
    "ArgumentNotSerializable",
    "BrokenRow",
    "BrokerUnavailable",
    "ConfigurationError",
    "EntryRefused",
    "Fault",
    "LockGone",
    "LocksUnavailable",
    "NoCurrentApplication",
    "NotFound",
    "NotIncluded",
    "NotRunYet",
    "NotSupported",
    "OptionNotSendable",
    "SessionError",
    "Skipped",
    "TableError",
    "TaskNotRegistered",
    "Unavailable",
    "WsCeleryError",
)

#: Which of our tables, and its database.
Part: TypeAlias = Literal["outbox", "schedule"]


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
    """The application has no Celery app, no outbox or no schedule, because it does not include it.

    :param part: what is wanted of it.
    :param where: the application, as the subject of a sentence.
    """

    _TEXTS: ClassVar = {
        "ws_celery": "{} does not include ws_celery. Add `pyramid.includes = ws_celery` to its "
        '[app:main] section, or call config.include("ws_celery").',
        "outbox": "This application has no outbox. Switch it on by `ws_celery.outbox = true` in "
        'its section, or by config.include("ws_celery.outbox").',
        "schedule": "This application keeps no schedule in its database. Switch it on by "
        '`ws_celery.beat = true` in its section, or by config.include("ws_celery.beat").',
    }

    def __init__(
        self,
        part: Literal["ws_celery", "outbox", "schedule"] = "ws_celery",
        where: str = "This Pyramid application",
    ) -> None:
        self.part = part
        super().__init__(self._TEXTS[part].format(where))


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
    """A header or an option of a call cannot be written into a message of this broker.

    What a propagator captures of a request is a header, too.

    :param what: the option.
    :param problem: what the serializer or the broker's library has against it.
    """

    def __init__(
        self, what: str, problem: str, *, said: str = "cannot be sent", remedy: str = "Pass"
    ) -> None:
        super().__init__(
            f"{what} {said} ({problem.rstrip('.')}). {remedy} text, numbers, lists and "
            "dictionaries."
        )

    @classmethod
    def captured(cls, name: str, error: Exception) -> OptionNotSendable:
        """Return the error of a value that the propagator ``name`` has captured."""
        return cls(
            f"ws_celery.propagate: what {name!r} has captured",
            str(error),
            said="is no JSON value",
            remedy="Let its capture() return",
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


class Unavailable(WsCeleryError):
    """Something that is needed does not answer; it may do so later.

    :param part: ``"outbox"`` or ``"schedule"``, whose database it is; ``"broker"``, ``"locks"``,
        ``"results"`` or ``"workers"``.
    :param problem: what was seen; of workers, how long they were waited for.
    """

    _DATABASE = (
        "The database of the {part} does not answer: {problem}. Start it, or correct the URL that "
        "the application connects to."
    )
    _TEXTS: ClassVar = {
        "outbox": _DATABASE,
        "schedule": _DATABASE,
        "broker": "{problem}",
        "locks": "The one-instance locks are out of reach: {problem}. Start what keeps them, or "
        "name another place by the setting ws_celery.locks.",
        "results": "The result backend does not answer: {problem}. Start it, or correct "
        "`result_backend` in [celery].",
        "workers": "No worker has answered within {problem}. Start one with `ws-celery worker "
        "--ini FILE`; or wait longer, by --timeout: a worker with the pool solo does not answer "
        "while it runs a task.",
    }

    def __init__(self, part: str, problem: str) -> None:
        self.part = part
        super().__init__(self._TEXTS[part].format(part=part, problem=problem))


class BrokerUnavailable(Unavailable):
    """The broker does not answer; the embedded one may not be running.

    :param message: what was seen, and the remedy.
    """

    def __init__(self, message: str) -> None:
        super().__init__("broker", message)


class LocksUnavailable(Unavailable):
    """What keeps the one-instance locks does not answer, or cannot keep them."""

    def __init__(self, problem: str) -> None:
        super().__init__("locks", problem)


class SessionError(WsCeleryError):
    """A request's database session is missing, or belongs to another transaction."""

    @classmethod
    def missing(cls, part: Part, task: str, attribute: str) -> SessionError:
        """Return the error of a request that has no session as its ``attribute``."""
        if part == "schedule":
            return cls(
                "The schedule cannot be found in the database: requests have no SQLAlchemy session "
                f"as their attribute {attribute!r}. Name the attribute by the setting "
                "ws_celery.dbsession, or switch ws_celery.beat off."
            )
        return cls(
            f"{task} cannot be written to the outbox: the request that dispatches it has no "
            f"SQLAlchemy session as its attribute {attribute!r}. Pass the request as the first "
            "argument, name the attribute by the setting ws_celery.dbsession, or opt out with "
            "@task(outbox=False)."
        )

    @classmethod
    def detached(cls, what: str, problem: str) -> SessionError:
        """Return the error of a row that its transaction would not commit."""
        return cls(
            f"{what} cannot be written to the outbox: {problem}. Pass the request whose "
            "transaction is open, whose session is registered with that transaction's manager "
            "(zope.sqlalchemy.register(session, transaction_manager=request.tm)), and dispatch "
            "before it commits; or opt out with @task(outbox=False)."
        )


class TableError(WsCeleryError):
    """A table of ours is missing, is not the one that this version needs, or cannot be written.

    :param part: what it is the table of.
    :param table: its name.
    :param problem: what is wrong with it.
    :param state: ``"missing"``, ``"different"``, or ``"read-only"``: its database takes no changes.
    """

    _REMEDIES: ClassVar = {
        "missing": "Create it with `ws-celery {part} create --ini FILE`, or with a migration of "
        "Alembic.",
        "different": "Change it by a migration of Alembic; or, when nothing in it is needed any "
        "more, drop it and run `ws-celery {part} create --ini FILE`; or name another table by the "
        "setting {setting}.",
        "read-only": "Connect to its primary server, in a transaction that may write{otherwise}.",
    }

    def __init__(
        self,
        part: Part,
        table: str,
        problem: str,
        state: Literal["missing", "different", "read-only"] = "different",
    ) -> None:
        self.part = part
        self.state = state
        said = f"cannot use the table {table}: {problem}"
        if state == "read-only":
            said = f"cannot write to the table {table}: the database is read-only ({problem})"
        of_outbox = part == "outbox"
        remedy = self._REMEDIES[state].format(
            part=part,
            setting="ws_celery.outbox.table" if of_outbox else "ws_celery.beat.table",
            otherwise="; or send without the outbox, by @task(outbox=False)" if of_outbox else "",
        )
        super().__init__(f"The {part} {said}. {remedy}")


class NotFound(WsCeleryError):
    """What is named is not there; or, of rows of the outbox, more than one answers to the name.

    :param kind: what is wanted.
    :param name: its name, key or id.
    :param found: the ids of several rows that have this task id.
    """

    _TEXTS: ClassVar = {
        "entry": "There is no schedule entry {!r}. `ws-celery schedule list` shows what there is.",
        "lock": "No run holds the lock {!r}. `ws-celery locks list` shows those that are held.",
        "queue": "There is no queue {!r}: the application does not use one of this name, and the "
        "broker has none. `ws-celery queues` shows those that there are.",
        "result": "There is no result of the task {}: it has not run yet, ignores its result, was "
        "forgotten, has expired, or there never was one of this id.",
        "row": "There is no row {} in the outbox: the task has had its effect, or was discarded. "
        "`ws-celery outbox list --all` shows what there is.",
    }

    def __init__(
        self,
        kind: Literal["entry", "lock", "queue", "result", "row"],
        name: str,
        found: Iterable[object] = (),
    ) -> None:
        self.kind = kind
        several = ", ".join(map(str, found))
        super().__init__(
            f"{name} is the task id of several rows: {several}. Name one of them."
            if several
            else self._TEXTS[kind].format(name)
        )


class NotSupported(WsCeleryError):
    """The broker, or the result backend, cannot do what is asked for; another one can.

    :param action: to show messages without taking them, or to list results.
    :param kind: of the broker or backend, in words.
    """

    _TEXTS: ClassVar = {
        "peek": "The broker ({}) cannot show messages without taking them: to take one and give it "
        "back changes the order, and marks it as delivered before. Redis, an SQL database, files "
        "and the outbox can be looked into.",
        "list results": "The result backend ({}) finds a result by the id of its task only: "
        "`ws-celery results show ID`. To list results, keep them in a database, by "
        "`result_backend = db+postgresql://...` and `result_extended = true` in [celery].",
    }

    def __init__(self, action: Literal["peek", "list results"], kind: str) -> None:
        self.action = action
        super().__init__(self._TEXTS[action].format(kind))


class EntryRefused(WsCeleryError):
    """Beat could not run an entry of the schedule as somebody wants to have it.

    :param name: of the entry.
    :param problem: what is wrong.
    """

    def __init__(self, name: str, problem: str) -> None:
        self.name = name
        self.problem = problem
        super().__init__(f"Schedule entry {name!r}: {problem}.")


class BrokenRow(WsCeleryError):
    """A row of the outbox does not hold a message that can be published."""

    def __init__(self, row_id: UUID, problem: str) -> None:
        self.row_id = row_id
        self.problem = problem
        super().__init__(
            f"The row {row_id} of the outbox cannot be published: {problem}. Look at it with "
            f"`ws-celery outbox show {row_id}`, and discard it."
        )


class Abandoned(WsCeleryError, Ignore):
    """A run ends without an effect, and quietly: Celery stores nothing, and calls nothing back.

    No ``Reject``: Celery would store that its task has failed.

    :param reason: ``"duplicate"``, if the effect is there already, or another run is at it;
        ``"foreign"``, if the message belongs to another outbox, which keeps its row, and sends it
        again; ``"cut off"``, if the run has lost its database, and whether it has committed is
        open: its row is sent again.
    """

    def __init__(
        self, message: str, reason: Literal["duplicate", "foreign", "cut off"] = "duplicate"
    ) -> None:
        self.reason = reason
        super().__init__(message)

    @classmethod
    def foreign(cls, task: str, queue: str, owner: str, ours: str) -> Abandoned:
        """Return the error of a message whose row is in the outbox ``owner``, not in ``ours``."""
        return cls(
            f"{task} is not run: its row is in another outbox ({owner}) than that of this worker "
            f"({ours}). Give each application queues of its own: both take their messages from "
            f"the queue {queue!r}.",
            "foreign",
        )


class Skipped(WsCeleryError, Ignore):
    """A run did not begin: another task holds its one-instance lock; the state is ``SKIPPED``.

    :param holder: who has it.
    """

    def __init__(self, task: str, task_id: str, key: str, holder: Holder) -> None:
        super().__init__(task, task_id, key, holder)
        self.key = key
        self.holder = holder
        self.reason = f"the lock {key!r} is held by {holder}"

    def __str__(self) -> str:
        return "{}[{}] is skipped: {}".format(*self.args[:2], self.reason)

    def as_dict(self) -> dict[str, object]:
        """Return what is kept as the result of the task: its reason, key and holder."""
        return {"reason": self.reason, "key": self.key, "holder": self.holder.as_dict()}


class LockGone(WsCeleryError):
    """A run has not, or not any more, the one-instance lock that it needs.

    It has lost it, and another run with its key may have begun; or it is a part of a chord, or an
    item of ``map()``, whose lock another task holds.

    :param holder: that other task, in words.
    """

    def __init__(self, task: str, task_id: str | None, key: str, holder: str | None = None) -> None:
        super().__init__(task, task_id, key, *(() if holder is None else (holder,)))

    def __repr__(self) -> str:
        # Celery quotes it so in the error of a chord.
        return f"{type(self).__name__}({str(self)!r})"

    def __str__(self) -> str:
        task, task_id, key, *holder = self.args
        if holder:
            return (
                f"{task}: the lock {key!r} of one_instance is held by {holder[0]}. Let the run "
                "wait for it, by one_instance(wait=SECONDS)."
            )
        return (
            f"{task}[{task_id}] has lost the lock {key!r}. Its process may have stood still for "
            "longer than the timeout of one_instance, or the lock was freed by hand."
        )
