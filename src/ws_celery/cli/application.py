"""From an INI file to its Celery app, its logging in force."""

from __future__ import annotations

import configparser
import logging
import os
import traceback
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any

import click
import plaster
from celery import signals
from click.core import ParameterSource
from pyramid.exceptions import ConfigurationExecutionError

from ws_celery.app import INI_VARIABLE, PyramidCelery, get_celery_app, load_registry
from ws_celery.exceptions import (
    ConfigurationError,
    NotIncluded,
    TaskNotRegistered,
    WsCeleryError,
)
from ws_celery.settings import ini_variables, survey

__all__ = ("READY_VARIABLE", "check_schedule", "find_ini", "load_celery_app")

#: Environment variable that names a file which the worker makes when it takes tasks.
READY_VARIABLE = "WS_CELERY_READY_FILE"


def find_ini(ini: str | None) -> str:
    """Return the INI file to work with: the one given, else the environment's ``WS_CELERY_INI``.

    :raises ConfigurationError: if there is none, or it does not exist.
    """
    config_uri = ini or os.environ.get(INI_VARIABLE)
    if not config_uri:
        raise ConfigurationError(
            f"No INI file. Give it with --ini FILE, or by the environment variable {INI_VARIABLE}."
        )
    if not _is_file(config_uri):
        raise ConfigurationError(f"{config_uri}: there is no such file. Give its path with --ini.")
    # Absolute, because children may be started in another directory.
    return config_uri if "://" in config_uri else str(Path(config_uri).absolute())


def _is_file(config_uri: str) -> bool:
    try:
        return Path(plaster.parse_uri(config_uri).path).is_file()
    except plaster.InvalidURI:
        return False  # a name without a suffix


def load_celery_app(config_uri: str) -> PyramidCelery:
    """Load the application of an INI file, with the INI's logging, and return its Celery app.

    :raises WsCeleryError: whatever is wrong with the configuration, in one sentence.
    """
    try:
        _set_up_logging(plaster.get_loader(config_uri, protocols=["wsgi"]), config_uri)
        app = get_celery_app(load_registry(config_uri))
    except Exception as error:
        explained = _explain(error, config_uri)
        if explained is None:
            raise
        raise explained from None
    app.set_default()
    if ready_file := os.environ.get(READY_VARIABLE):
        signals.worker_ready.connect(lambda **_: Path(ready_file).touch(), weak=False)
    return app


def check_schedule(app: PyramidCelery) -> None:
    """Make sure that every entry of the schedule names a task that is registered.

    :raises TaskNotRegistered: for the first one that does not.
    """
    for name, entry in app.conf.beat_schedule.items():
        if entry["task"] not in app.tasks:
            raise TaskNotRegistered(entry["task"], f"[celerybeat:{name}]")


def _explain(error: Exception, config_uri: str) -> WsCeleryError | None:
    """Return what to say of an error, or ``None`` if it is the application's own."""
    if isinstance(error, ConfigurationExecutionError) and isinstance(error.evalue, WsCeleryError):
        error = error.evalue
    if isinstance(error, NotIncluded):
        return NotIncluded(f"The application in {config_uri}")
    if isinstance(error, WsCeleryError):
        return error
    if isinstance(error, configparser.InterpolationError):
        # Its own text shows a part of the value, which may be a password.
        return ConfigurationError(
            f"{config_uri}: [{error.section}] {error.option} cannot be interpolated. "
            "Write a percent sign as %%."
        )
    if isinstance(error, (configparser.Error, UnicodeDecodeError)):
        _, faults = survey(config_uri, need_broker=False)
        return ConfigurationError(*faults) if faults else None
    if isinstance(error, (ImportError, AttributeError)) and _raised_by_paste(error):
        return ConfigurationError(
            f"{config_uri}: the application cannot be found ({error}). Its section names it by "
            "`use`, such as `use = egg:myapp` or `use = call:myapp:main`."
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


def _set_up_logging(loader: Any, config_uri: str) -> None:
    if "loggers" not in loader.get_sections():
        return  # Celery's own logging, with its options

    def keep(loglevel: int, logfile: str | None, **_: Any) -> None:
        context = click.get_current_context(silent=True)
        if context is not None:
            given = context.get_parameter_source
            if given("loglevel") is ParameterSource.COMMANDLINE:
                _set_level(loglevel)
            if given("logfile") is ParameterSource.COMMANDLINE and logfile:
                _set_file(logfile)

    try:
        loader.setup_logging(ini_variables())
    except (KeyError, ValueError) as error:
        raise ConfigurationError(
            f"{config_uri}: the logging sections are not complete or not right: {error}. "
            "[loggers], [handlers] and [formatters] list the others under `keys`."
        ) from error
    # Celery configures logging only where nobody is connected.
    signals.setup_logging.connect(keep, weak=False)


def _set_level(loglevel: int) -> None:
    for name in (None, "celery", "ws_celery"):
        logging.getLogger(name).setLevel(loglevel)


def _set_file(logfile: str) -> None:
    root = logging.getLogger()
    handler = WatchedFileHandler(logfile, encoding="utf-8")
    if root.handlers:
        handler.setFormatter(root.handlers[0].formatter)
    root.handlers[:] = [handler]
