"""What ``ws-celery check`` finds out: what was read from where, and what is wrong or doubtful.

:func:`examine` reads a configuration and loads its application; ``application`` looks at what was
loaded. :func:`explain` has the sentence for an error of a file, for all commands.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Mapping
from configparser import Error as ParserError
from configparser import InterpolationError
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from pyramid.exceptions import ConfigurationConflictError, ConfigurationExecutionError

from ws_celery.app import PyramidCelery, get_celery_app
from ws_celery.applications import load_registry
from ws_celery.checks.application import (
    ERROR,
    NOTE,
    WARNING,
    Finding,
    check_pool,
    entries_of_code,
    findings_in,
)
from ws_celery.exceptions import ConfigurationError, Fault, NotIncluded, WsCeleryError
from ws_celery.logs import set_up_logging
from ws_celery.masking import masked, masked_text
from ws_celery.settings import WITHOUT_EFFECT, Configuration, survey
from ws_celery.settings.reader import interpolation_problem

if TYPE_CHECKING:
    from ws_celery.settings import Setting

__all__ = ("Finding", "Report", "check_pool", "examine", "explain", "shown")


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

    def as_dict(self) -> dict[str, object]:
        """Return what JSON can hold; secrets are masked."""
        return {
            "config_uri": self.config_uri,
            "settings": [
                {
                    "category": row.category,
                    "name": row.name,
                    "value": shown(row),
                    "type": row.type,
                    "file": row.place.file,
                    "line": row.place.line,
                    "section": row.place.section,
                    "key": row.place.key or None,
                }
                for row in self.rows
            ],
            "findings": [asdict(finding) for finding in self.findings],
        }


def examine(config_uri: str) -> Report:
    """Read a configuration, load its application, and look for what is wrong or doubtful.

    The application is loaded only where its configuration is right. The broker is asked for a
    connection; nothing is sent.

    :param config_uri: what plaster takes.
    """
    # What is needed and missing, the application may set in code.
    configuration, faults = survey(config_uri, need_broker=False)
    report = Report(config_uri, configuration.rows)
    report.findings += map(_fault, faults)
    report.findings += _spellings(configuration)
    report.findings += _root()
    if not faults:
        app = _load(config_uri, report)
        if app is not None:
            # What was set in code is in there, too.
            configuration = app.configuration or configuration
            report.rows = [*configuration.rows, *entries_of_code(app, configuration)]
            report.findings += findings_in(app, configuration, config_uri)
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
        yield Finding(NOTE, "environment", override)
    for text in configuration.notices:
        yield Finding(WARNING, "celeryconfig", text)
    for name, instead in WITHOUT_EFFECT.items():
        if name in configuration.settings:
            text = f"Celery does not read {name}, but {instead}"
            yield Finding.at(configuration.place(name), WARNING, "without-effect", text)


def _root() -> Iterator[Finding]:
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        text = "this runs as root; give workers and beat a user without privileges"
        yield Finding(WARNING, "root", text)


def _load(config_uri: str, report: Report) -> PyramidCelery | None:
    try:
        set_up_logging(config_uri)
        return get_celery_app(load_registry(config_uri))
    except Exception as error:  # noqa: BLE001  whatever the application does
        cause = error.evalue if isinstance(error, ConfigurationExecutionError) else error
        if isinstance(cause, ConfigurationError):
            report.findings += map(_fault, cause.faults)
        else:
            text = str(explain(error, config_uri) or _cannot_load(cause))
            report.findings.append(Finding(ERROR, "application", text))
    return None


def _cannot_load(cause: BaseException) -> str:
    return f"the application cannot be loaded ({type(cause).__name__}: {masked_text(str(cause))})"


def explain(error: BaseException, config_uri: str) -> WsCeleryError | None:
    """Return what to say of an error, or ``None`` if it is the application's own."""
    if isinstance(error, ConfigurationExecutionError) and isinstance(error.evalue, WsCeleryError):
        error = error.evalue
    if isinstance(error, NotIncluded) and error.part == "ws_celery":
        return NotIncluded(where=f"The application in {config_uri}")
    if isinstance(error, WsCeleryError):
        return error
    if isinstance(error, ConfigurationConflictError):
        return ConfigurationError(f"{config_uri}: {error}")
    if isinstance(error, InterpolationError):
        # Its own text shows a part of the value, which may be a password.
        return ConfigurationError(
            f"{config_uri}: [{error.section}] {error.option}: {interpolation_problem(error)}"
        )
    if isinstance(error, (ParserError, UnicodeDecodeError)):
        _, faults = survey(config_uri, need_broker=False)
        return ConfigurationError(*faults) if faults else None
    if isinstance(error, (ImportError, AttributeError)) and _raised_by_paste(error):
        return ConfigurationError(
            f"{config_uri}: the application cannot be found ({error}). Install it, with "
            "`pip install -e .` in its directory, and name it in its section by `use`, such as "
            "`use = egg:myapp` or `use = call:myapp:main`."
        )
    if isinstance(error, LookupError) and _raised_by_paste(error):
        return ConfigurationError(
            f"{config_uri}: {error}. An [app:main] section is needed, which names the application."
        )
    return None


def _raised_by_paste(error: BaseException) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [str(frame.f_globals.get("__name__", "")) for frame in frames]
    callers = [name for name in modules if not name.startswith(("importlib", "pkg_resources"))]
    return bool(callers) and callers[-1].startswith("paste.deploy")


def shown(row: Setting) -> str:
    """Return the value of a setting for people, on one line, its secrets masked."""
    value = row.value
    if row.category == "entry":
        return _shown_entry(value)
    if row.name == "beat_schedule":
        return ", ".join(value)  # each entry has a row of its own
    if row.category == "queue":
        kind = value.exchange.type
        return f"exchange {value.exchange.name} ({kind}), routing key {value.routing_key}"
    if row.category in ("route", "annotation"):
        pairs = masked("", value).items()
        return ", ".join(f"{key} = {inner}" for key, inner in pairs)
    value = masked(row.name, value)
    if isinstance(value, (list, tuple)):
        return ", ".join(str(getattr(each, "name", each)) for each in value)
    return "none" if value is None else str(value)


def _shown_entry(fields: Mapping[str, object]) -> str:
    """Return an entry as people write it, with what it lacks left out."""
    when = ""
    if "schedule" in fields:
        kind = f"{fields['type']}: " if fields.get("type") else ""
        zone = f", {fields['timezone']}" if fields.get("timezone") else ""
        when = f"{kind}{fields['schedule']}{zone}"
    what = f"-> {fields['task']}" if "task" in fields else ""
    off = "(off)" if fields.get("enabled") is False else ""
    return " ".join(filter(None, (when, what, off)))
