"""What ``ws-celery check`` finds out: what was read from where, and what is wrong or doubtful."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pyramid.exceptions import ConfigurationExecutionError
from pyramid.settings import asbool

from ws_celery.app import PyramidCelery, get_celery_app, load_registry
from ws_celery.codecheck import engines_of_modules, modules_of, places_that_read_results
from ws_celery.embedded import SCHEME, EmbeddedBroker
from ws_celery.exceptions import ConfigurationError, Fault, NotIncluded
from ws_celery.faults import Place
from ws_celery.masking import masked, masked_text
from ws_celery.options import WITHOUT_EFFECT, kind_of
from ws_celery.schedules import describe
from ws_celery.sections import Setting
from ws_celery.settings import Configuration, survey

__all__ = ("Finding", "Report", "examine")

ERROR, WARNING, NOTE = "error", "warning", "note"

#: Seconds after which a transport gives a message that is not acknowledged to another worker.
_VISIBILITY = {"redis": 3600, "rediss": 3600, "sentinel": 3600, "sqs": 1800}
_PATIENCE = 5


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


@dataclass
class Report:
    """The result of :func:`examine`.

    :param config_uri: what was examined.
    :param rows: what was read.
    :param findings: what was found, errors first.
    """

    config_uri: str
    rows: list[Setting] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def exit_code(self, strict: bool = False) -> int:
        """Return 2 if there are errors, 1 if ``strict`` and there are warnings, else 0."""
        severities = {finding.severity for finding in self.findings}
        if ERROR in severities:
            return 2
        return 1 if strict and WARNING in severities else 0

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can hold; secrets are masked."""
        return {
            "config_uri": self.config_uri,
            "settings": [
                {
                    "category": row.category,
                    "name": row.name,
                    "value": shown(row),
                    "type": type_of(row),
                    "file": row.place.file,
                    "line": row.place.line,
                    "section": row.place.section,
                    "key": row.place.key or None,
                }
                for row in self.rows
            ],
            "findings": [asdict(finding) for finding in self.findings],
        }


def shown(row: Setting) -> str:
    """Return the value of a setting for people, on one line, its secrets masked."""
    value = row.value
    if row.category == "entry":
        return f"{describe(value['schedule'])} -> {value['task']}"
    if row.category == "queue":
        kind = value.exchange.type
        return f"exchange {value.exchange.name} ({kind}), routing key {value.routing_key}"
    if row.category in ("route", "annotation"):
        pairs = masked(row.name, value).items()
        return ", ".join(f"{key} = {inner}" for key, inner in pairs)
    value = masked(row.name, value)
    if isinstance(value, (list, tuple)):
        return ", ".join(str(getattr(each, "name", each)) for each in value)
    return "none" if value is None else str(value)


def type_of(row: Setting) -> str:
    """Return the type of a setting, in one word."""
    value = row.value["schedule"] if row.category == "entry" else row.value
    return kind_of(value)


def examine(config_uri: str) -> Report:
    """Read a configuration, load its application, and look for what is wrong or doubtful.

    The application is loaded only where its configuration is right. The broker is asked for a
    connection; nothing is sent.

    :param config_uri: what plaster takes.
    """
    configuration, faults = survey(config_uri)
    report = Report(config_uri, configuration.rows)
    report.findings += map(_fault, faults)
    report.findings += _spellings(configuration)
    report.findings += _root()
    if not faults:
        app = _load(config_uri, report)
        if app is not None:
            # What was set in code is in there, too.
            configuration = app.configuration or configuration
            report.rows = configuration.rows
            report.findings += _application(app, configuration, config_uri)
    order = (ERROR, WARNING, NOTE)
    report.findings = sorted(
        dict.fromkeys(report.findings), key=lambda finding: order.index(finding.severity)
    )
    return report


def _fault(fault: Fault) -> Finding:
    text = str(fault)
    for part in (fault.file, fault.line):
        text = text.removeprefix(f"{part}:") if part is not None else text
    return Finding(ERROR, "configuration", text.strip(), fault.file, fault.line)


def _spellings(configuration: Configuration) -> Iterator[Finding]:
    for each in configuration.renamed:
        yield Finding.at(each.place, WARNING, "old-name", f"{each.old} is {each.new} today")
    for override in configuration.overrides:
        yield Finding(NOTE, "environment", str(override))
    for name, instead in WITHOUT_EFFECT.items():
        if name in configuration.settings:
            text = f"Celery does not read {name}, but {instead}"
            yield Finding.at(_place(configuration, name), WARNING, "without-effect", text)


def _root() -> Iterator[Finding]:
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        text = "this runs as root; give workers and beat a user without privileges"
        yield Finding(WARNING, "root", text)


def _load(config_uri: str, report: Report) -> PyramidCelery | None:
    try:
        return get_celery_app(load_registry(config_uri))
    except NotIncluded:
        text = str(NotIncluded(f"The application in {config_uri}"))
    except ConfigurationExecutionError as error:
        if isinstance(error.evalue, ConfigurationError):
            report.findings += map(_fault, error.evalue.faults)
            return None
        text = f"the application cannot be loaded: {masked_text(str(error.evalue))}"
    except ConfigurationError as error:
        report.findings += map(_fault, error.faults)
        return None
    except Exception as error:  # noqa: BLE001  whatever the application does
        reason = f"{type(error).__name__}: {masked_text(str(error))}"
        text = f"the application cannot be loaded ({reason})"
    report.findings.append(Finding(ERROR, "application", text))
    return None


def _application(
    app: PyramidCelery, configuration: Configuration, config_uri: str
) -> Iterator[Finding]:
    yield from _broker(app, configuration)
    yield from _tasks(app, configuration)
    yield from _queues(app, configuration)
    yield from _visibility(app, configuration)
    if not _is_development(app, config_uri):
        yield from _for_development(configuration)
    yield from _pickle(app, configuration)
    yield from _results(app)
    yield from _engines(app)


def _place(configuration: Configuration, name: str) -> Place | None:
    names = (name, f"{name}.")
    return next((row.place for row in configuration.rows if row.name.startswith(names)), None)


# --- The broker -------------------------------------------------------------------------------


def _broker(app: PyramidCelery, configuration: Configuration) -> Iterator[Finding]:
    if app.conf.task_always_eager:
        return
    place = _place(configuration, "broker_url")
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


# --- Names ------------------------------------------------------------------------------------


def _tasks(app: PyramidCelery, configuration: Configuration) -> Iterator[Finding]:
    for row in configuration.rows:
        if row.category == "entry" and row.value["task"] not in app.tasks:
            text = (
                f"[{row.place.section}] task = {row.value['task']}: no such task is registered; "
                "scan its module, or list it in imports"
            )
            yield Finding.at(row.place, ERROR, "unknown-task", text)
        if row.category in ("route", "annotation") and not _registered(app, row.name):
            text = f"[{row.place.section}]: no registered task has this name"
            yield Finding.at(row.place, WARNING, "unknown-task", text)


def _registered(app: PyramidCelery, name: str) -> bool:
    return name in app.tasks or ("*" in name and any(fnmatchcase(t, name) for t in app.tasks))


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
        place = _place(configuration, "broker_transport_options")
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


def _numbers(value: Any, name: str) -> Iterator[tuple[float, str]]:
    if isinstance(value, (int, float)):
        yield value, name


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
        yield Finding.at(_place(configuration, "task_always_eager"), WARNING, "eager", text)
    for name in ("broker_url", "result_backend"):
        if str(configuration.settings.get(name)).startswith(SCHEME):
            text = f"{name} is the embedded broker, which is for development"
            yield Finding.at(_place(configuration, name), WARNING, "embedded", text)


def _pickle(app: PyramidCelery, configuration: Configuration) -> Iterator[Finding]:
    for name in ("accept_content", "result_accept_content"):
        accepted: Iterable[str] = app.conf[name] or ()
        if {"pickle", "application/x-python-serialize"} & set(accepted):
            text = f"{name} has pickle: whoever can write to the broker can run any code here"
            yield Finding.at(_place(configuration, name), WARNING, "pickle", text)


# --- Code -------------------------------------------------------------------------------------


def _results(app: PyramidCelery) -> Iterator[Finding]:
    if app.conf.result_backend not in (None, "", "disabled", "disabled://"):
        return
    for file, line in places_that_read_results(modules_of(app)):
        text = "a result is read here, but there is no result_backend"
        yield Finding(WARNING, "no-result-backend", text, file, line)


def _engines(app: PyramidCelery) -> Iterator[Finding]:
    if app.conf.worker_pool not in ("prefork", "processes"):
        return
    for name, file in engines_of_modules():
        text = f"{name} is an engine made at import, before the pool forks; make it in includeme()"
        yield Finding(WARNING, "engine-at-import", text, file)
