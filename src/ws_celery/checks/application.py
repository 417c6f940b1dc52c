"""What is wrong or doubtful with a loaded application: its broker, names, times and safety."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from celery import Task
from kombu.serialization import prepare_accept_content
from kombu.serialization import registry as serializers
from pyramid.settings import asbool

from ws_celery.beat.sources import entries_of, problem_of_queue, problems_of_sources
from ws_celery.embedded import SCHEME, EmbeddedBroker
from ws_celery.exceptions import ConfigurationError, Fault, WsCeleryError
from ws_celery.inspection import outbox_state
from ws_celery.locks import rule_of
from ws_celery.logs import has_logging
from ws_celery.masking import masked, masked_text
from ws_celery.settings import Configuration, Place, Setting
from ws_celery.tasks import problem_of_request

if TYPE_CHECKING:
    from ws_celery.app import PyramidCelery

__all__ = (
    "ERROR",
    "NOTE",
    "WARNING",
    "Finding",
    "check_pool",
    "entries_of_code",
    "findings_in",
)

#: How bad a finding is.
ERROR, WARNING, NOTE = "error", "warning", "note"

#: Seconds after which a transport gives a message that is not acknowledged to another worker.
_VISIBILITY = {"redis": 3600, "rediss": 3600, "sentinel": 3600, "sqs": 1800}
_PATIENCE = 5
#: What tells whether the standard library is patched for a pool: a module, and its function.
_PATCHES = {
    "gevent": ("gevent.monkey", "is_module_patched"),
    "eventlet": ("eventlet.patcher", "is_monkey_patched"),
}
#: Seconds by which the clocks of two machines may differ.
_CLOCKS = 10
#: Options of the logging that Celery sets up.
_LOGGING = (
    "worker_hijack_root_logger",
    "worker_log_color",
    "worker_log_datefmt",
    "worker_log_format",
    "worker_redirect_stdouts",
    "worker_redirect_stdouts_level",
    "worker_task_log_datefmt",
    "worker_task_log_format",
)


@dataclass(frozen=True)
class Finding:
    """One thing that somebody should know.

    :param severity: ``error``, ``warning`` or ``note``.
    :param code: a short name that stays the same, for programs.
    :param text: what it is, and the remedy.
    :param file: where it is written, as far as that is known.
    :param line: line in that file.
    """

    severity: str
    code: str
    text: str
    file: str | None = None
    line: int | None = None

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line) if part is not None)
        return f"{place}: {self.text}" if place else self.text

    @classmethod
    def at(cls, place: Place | None, severity: str, code: str, text: str) -> Finding:
        """Return the finding about what is written at ``place``."""
        if place is None:
            return cls(severity, code, text)
        return cls(severity, code, text, place.file, place.line)


def findings_in(
    app: PyramidCelery, configuration: Configuration, config_uri: str
) -> Iterator[Finding]:
    """Find what is wrong or doubtful; the broker is asked for a connection, nothing is sent."""
    yield from _broker(app, configuration)
    yield from _outbox(app)
    yield from _schedule(app, configuration)
    yield from _without_effect(app, configuration, config_uri)
    yield from _tasks(app, configuration)
    yield from _runs(app)
    yield from _locks(app)
    yield from _pool(app, configuration)
    yield from _plugins(app)
    yield from _queues(app, configuration)
    yield from _visibility(app, configuration)
    if not _is_development(app, config_uri):
        yield from _for_development(configuration)
    yield from _pickle(app, configuration)


# --- The broker -------------------------------------------------------------------------------


def _broker(app: PyramidCelery, configuration: Configuration) -> Iterator[Finding]:
    if app.eager is not None:
        return
    place = configuration.place("broker_url")
    url = configuration.settings.get("broker_url")
    if isinstance(url, str) and url.startswith(SCHEME):
        if not EmbeddedBroker.from_url(url).is_running():
            text = "the embedded broker is not running; `ws-celery dev` starts it"
            yield Finding.at(place, NOTE, "broker-not-running", text)
        return
    where = masked("broker_url", url)
    try:
        with app.connection_for_write(connect_timeout=_PATIENCE) as connection:
            where = masked_text(connection.as_uri())
            if connection.transport.driver_type == "redis":
                limits = {"socket_connect_timeout": _PATIENCE, "socket_timeout": _PATIENCE}
                connection.transport_options = {**connection.transport_options, **limits}
            connection.ensure_connection(max_retries=0, timeout=_PATIENCE)
    except Exception as error:  # noqa: BLE001  each transport has errors of its own
        text = f"the broker {where} does not answer: {masked_text(str(error))}"
        yield Finding.at(place, ERROR, "broker-unreachable", text)


# --- The outbox -------------------------------------------------------------------------------


def _outbox(app: PyramidCelery) -> Iterator[Finding]:
    if app.outbox is None:
        return
    try:
        state = outbox_state(app)
    except WsCeleryError as error:
        yield Finding(ERROR, "outbox", str(error))
        return
    if state.dead:
        text = f"{state.dead} dead letters in {state.table}; `ws-celery outbox list` shows them"
        yield Finding(WARNING, "dead-letters", text)
    if abs(state.clock_difference) > _CLOCKS:
        how = "ahead of" if state.clock_difference > 0 else "behind"
        text = (
            f"the database's clock is {abs(state.clock_difference):.0f} seconds {how} this "
            "machine's: etas are missed by as much, and unfinished tasks are sent again too early "
            "or too late; let both machines follow a time server (NTP)"
        )
        yield Finding(WARNING, "clock", text)


# --- What has no effect -----------------------------------------------------------------------


def _without_effect(
    app: PyramidCelery, configuration: Configuration, config_uri: str
) -> Iterator[Finding]:
    reasons = dict.fromkeys(_LOGGING, "the logging sections of the file are in force instead")
    if not has_logging(config_uri):
        reasons.clear()
    if app.schedule is not None:
        reasons["beat_schedule_filename"] = "the schedule is in the database"
    for name, reason in reasons.items():
        if configuration.settings.get(name):
            text = f"{name} has no effect: {reason}; take it out"
            yield Finding.at(configuration.place(name), WARNING, "without-effect", text)


# --- Names ------------------------------------------------------------------------------------


def _tasks(app: PyramidCelery, configuration: Configuration) -> Iterator[Finding]:
    for row in configuration.rows:
        if row.category in ("route", "annotation") and not _registered(app, row.name):
            text = f"[{row.place.section}]: no registered task has this name"
            yield Finding.at(row.place, WARNING, "unknown-task", text)


def _registered(app: PyramidCelery, name: str) -> bool:
    return name in app.tasks or ("*" in name and any(fnmatchcase(t, name) for t in app.tasks))


def _runs(app: PyramidCelery) -> Iterator[Finding]:
    """Find tasks whose calls or runs would fail, or do what nobody meant."""
    for name, task in sorted(app.tasks.items()):
        if problem := problem_of_queue(app, name, getattr(task, "queue", None)):
            yield Finding(ERROR, "unknown-queue", str(Fault(problem)))
        if problem := problem_of_request(task):
            severity = WARNING if _takes_an_argument(task.run) else ERROR
            yield Finding(severity, "request", str(Fault(problem)))
        if problem := _problem_of_content(app, task):
            yield Finding(ERROR, "serializer", str(Fault(problem)))


def _takes_an_argument(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind_partial(None)
    except TypeError:
        return False
    return True


def _problem_of_content(app: PyramidCelery, task: Task) -> str | None:
    kind = serializers.name_to_type.get(task.serializer)
    accepted = prepare_accept_content(app.conf.accept_content)
    if kind is None or accepted is None or kind in accepted:
        return None
    return (
        f"the messages of the task {task.name!r} are written with {task.serializer}, which is not "
        f"in accept_content, so that workers refuse them; write them with json, or add it there"
    )


def _locks(app: PyramidCelery) -> Iterator[Finding]:
    guarded = [name for name, task in app.tasks.items() if rule_of(task)]
    if not guarded or app.eager is not None:
        return
    try:
        app.locks.store.holder_of(guarded[0])  # whatever it answers
    except WsCeleryError as error:
        yield Finding(ERROR, "locks", f"{error} @one_instance of {min(guarded)} needs them.")


# --- The schedule -----------------------------------------------------------------------------


def entries_of_code(app: PyramidCelery, configuration: Configuration) -> Iterator[Setting]:
    """Yield the entries that the configuration does not list, because code declares them."""
    listed = {row.name for row in configuration.rows if row.category == "entry"}
    for name, entry in entries_of(app, {}).items():
        if name not in listed:
            place = Place("code", f"celerybeat:{name}")
            yield Setting("entry", name, entry.as_fields(), place)


def _schedule(app: PyramidCelery, configuration: Configuration) -> Iterator[Finding]:
    """Find what beat refuses as it starts, and what it would set aside."""
    places = {row.name: row.place for row in configuration.rows if row.category == "entry"}
    refused = list(problems_of_sources(app))
    for name, fault in refused:
        entry = entries_of(app, {}).get(name)
        unknown = entry is not None and entry.task and entry.task not in app.tasks
        code = "unknown-task" if unknown else "entry"
        yield Finding.at(places.get(name) or configuration.place(name), ERROR, code, str(fault))
    if app.schedule is None:
        return
    try:
        app.schedule.check_table()
        known = app.schedule.load()
    except WsCeleryError as error:
        yield Finding(ERROR, "schedule", str(error))
        return
    names = {name for name, _ in refused}
    for entry in entries_of(app, known).values():
        if entry.problem and entry.enabled and not entry.orphaned and entry.name not in names:
            text = f"The entry {entry.name} is set aside: {entry.problem}"
            yield Finding(WARNING, "entry", str(Fault(text)))


# --- What is registered -----------------------------------------------------------------------


def _plugins(app: PyramidCelery) -> Iterator[Finding]:
    tasks = app.registry.introspector.get_category("celery tasks", default=())
    brought = Counter(each["introspectable"]["plugin"] for each in tasks)
    for plugin, number in sorted((name, brought[name]) for name in brought if name):
        count = "1 task comes" if number == 1 else f"{number} tasks come"
        text = f"{count} from the installed distribution {plugin} (ws_celery.plugins)"
        yield Finding(NOTE, "plugin", text)


def _queues(app: PyramidCelery, configuration: Configuration) -> Iterator[Finding]:
    queues = configuration.settings.get("task_queues")
    default = app.conf.task_default_queue
    if queues and default not in {queue.name for queue in queues}:
        text = (
            f"task_default_queue = {default} is not among the queues, so that workers without -Q "
            f"do not read it; add [celeryqueue:{default}]"
        )
        place = next((r.place for r in configuration.rows if r.category == "queue"), None)
        yield Finding.at(place, WARNING, "default-queue", text)


# --- Times ------------------------------------------------------------------------------------


def _visibility(app: PyramidCelery, configuration: Configuration) -> Iterator[Finding]:
    transport = str(app.conf.broker_url or "").partition("://")[0].partition("+")[0].lower()
    if transport not in _VISIBILITY:
        return
    options = app.conf.broker_transport_options
    timeout = options.get("visibility_timeout", _VISIBILITY[transport])
    longest = max(_times(app, configuration), default=(0, ""))
    if isinstance(timeout, (int, float)) and longest[0] > timeout:
        text = (
            f"visibility_timeout is {timeout} seconds, and {longest[1]} is {longest[0]}: a message "
            "is given to a second worker while the first still has it"
        )
        place = configuration.place("broker_transport_options")
        yield Finding.at(place, WARNING, "visibility-timeout", text)


def _times(app: PyramidCelery, configuration: Configuration) -> Iterator[tuple[float, str]]:
    names = ("time_limit", "soft_time_limit")
    for name in names:
        yield from _numbers(getattr(app.conf, f"task_{name}"), f"task_{name}")
    for task in app.tasks.values():
        for name in names:
            yield from _numbers(getattr(task, name, None), f"{name} of {task.name}")
    for task_name, options in configuration.call_options.items():
        for name in (*names, "countdown"):
            yield from _numbers(options.get(name), f"{name} of {task_name}")
    for entry_name, entry in app.conf.beat_schedule.items():
        for name in (*names, "countdown"):
            value = (entry.get("options") or {}).get(name)
            yield from _numbers(value, f"{name} of [celerybeat:{entry_name}]")


def _numbers(value: object, name: str) -> Iterator[tuple[float, str]]:
    if isinstance(value, (int, float)):
        yield value, name


# --- Workers ----------------------------------------------------------------------------------


def check_pool(app: PyramidCelery) -> None:
    """Make sure that the standard library is patched if the configured pool needs that.

    :raises ConfigurationError: if it is not: tasks would share their thread-locals.
    """
    pool = app.conf.worker_pool
    if pool in _PATCHES and not _is_patched(*_PATCHES[pool]):
        raise ConfigurationError(
            f"[celery] worker_pool = {pool} comes too late: {pool} has to patch the standard "
            f"library before the application is loaded. Start the worker with --pool {pool}."
        )


def _is_patched(module: str, question: str) -> bool:
    # That it is imported tells nothing: others import it to ask this.
    found = sys.modules.get(module)
    return found is not None and bool(getattr(found, question)("socket"))


def _pool(app: PyramidCelery, configuration: Configuration) -> Iterator[Finding]:
    try:
        check_pool(app)
    except ConfigurationError as error:
        yield Finding.at(configuration.place("worker_pool"), ERROR, "pool", str(error))


# --- Production -------------------------------------------------------------------------------


def _is_development(app: PyramidCelery, config_uri: str) -> bool:
    settings = app.registry.settings
    debug = ("pyramid.reload_templates", "pyramid.reload_all", "pyramid.debug_all")
    name = Path(config_uri.partition("#")[0]).name
    return name.startswith(("dev", "test", "demo", "local")) or any(
        asbool(settings.get(each, False)) for each in debug
    )


def _for_development(configuration: Configuration) -> Iterator[Finding]:
    if configuration.settings.get("task_always_eager"):
        text = "tasks run in place, in the request (task_always_eager)"
        yield Finding.at(configuration.place("task_always_eager"), WARNING, "eager", text)
    for name in ("broker_url", "result_backend"):
        if str(configuration.settings.get(name)).startswith(SCHEME):
            text = f"{name} is the embedded broker, which is for development"
            yield Finding.at(configuration.place(name), WARNING, "embedded", text)


def _pickle(app: PyramidCelery, configuration: Configuration) -> Iterator[Finding]:
    for name in ("accept_content", "result_accept_content"):
        accepted: Iterable[str] = app.conf[name] or ()
        if {"pickle", "application/x-python-serialize"} & set(accepted):
            text = f"{name} has pickle: whoever can write to the broker can run any code here"
            yield Finding.at(configuration.place(name), WARNING, "pickle", text)
