"""Reads a configuration, loads its application, and collects what is found."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from configparser import Error as ParserError
from configparser import InterpolationError

from pyramid.exceptions import ConfigurationConflictError, ConfigurationExecutionError

from ws_celery.app import PyramidCelery, get_celery_app
from ws_celery.applications import load_registry
from ws_celery.checks.application import entries_of_code, look_at_application
from ws_celery.checks.report import ERROR, NOTE, WARNING, Finding, Report
from ws_celery.exceptions import ConfigurationError, Fault, NotIncluded, WsCeleryError
from ws_celery.logs import set_up_logging
from ws_celery.masking import masked_text
from ws_celery.settings import WITHOUT_EFFECT, Configuration, survey
from ws_celery.settings.reader import interpolation_problem

__all__ = ("examine", "explain")


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
            report.findings += look_at_application(app, configuration, config_uri)
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
    for text in configuration.told:
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
            text = str(explain(error, config_uri) or _told(cause))
            report.findings.append(Finding(ERROR, "application", text))
    return None


def _told(cause: BaseException) -> str:
    return f"the application cannot be loaded ({type(cause).__name__}: {masked_text(str(cause))})"


def explain(error: BaseException, config_uri: str) -> WsCeleryError | None:
    """Return what to say of an error, or ``None`` if it is the application's own."""
    if isinstance(error, ConfigurationExecutionError) and isinstance(error.evalue, WsCeleryError):
        error = error.evalue
    if isinstance(error, NotIncluded):
        return NotIncluded(f"The application in {config_uri}")
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
