"""Logging: the INI's in all processes, and the task on every record."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from logging.handlers import WatchedFileHandler
from typing import Any

import click
from celery import signals
from click.core import ParameterSource

from ws_celery.compat import get_current_task
from ws_celery.exceptions import ConfigurationError
from ws_celery.masking import MASK, SafeRecords
from ws_celery.settings import ini_variables
from ws_celery.settings.reader import loader_of
from ws_celery.shown_arguments import logged_arguments, shown_text

__all__ = (
    "TaskFilter",
    "TaskFormatter",
    "filter_handlers",
    "has_logging",
    "log_arguments_of_failures",
    "set_up_logging",
)

#: What stands for the task where none runs.
_NONE = "-"

_SAFE = SafeRecords()

#: The logger by which Celery says how a run has ended.
_TRACE = "celery.app.trace"


class TaskFilter(logging.Filter):
    """Gives each record ``task_name`` and ``task_id``; it lets all of them pass.

    What ws_celery, Celery and kombu log is without secrets and terminal escapes then. The fields
    are those of the task that runs in this thread, or that Celery's record is about; ``-`` where
    there is none. ``ws-celery`` adds it to the handlers of the INI file; elsewhere, add it to a
    handler, so that the records of all loggers pass through it.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the fields; always returns ``True``."""
        if not hasattr(record, "task_id"):
            record.task_name, record.task_id = _task_of(record)
        if record.name == _TRACE and (record.exc_info or record.exc_text):
            _hide_arguments(record)
        return _SAFE.filter(record)


class TaskFormatter(logging.Formatter):
    """A formatter whose format may have ``%(task_name)s`` and ``%(task_id)s``, in any process.

    For the INI file, whose handlers cannot be given a filter: its section ``[formatter_...]`` has
    ``class = ws_celery.logs.TaskFormatter``.
    """

    _fields = TaskFilter()

    def format(self, record: logging.LogRecord) -> str:
        """Add the fields, and format."""
        self._fields.filter(record)
        return super().format(record)


def _task_of(record: logging.LogRecord) -> tuple[str, str]:
    fields = getattr(record, "data", None)  # Celery's own records name their task so
    if isinstance(fields, Mapping) and fields.get("id"):
        return str(fields.get("name") or _NONE), str(fields["id"])
    task = get_current_task()
    if task is None or not task.request.id:
        return _NONE, _NONE
    return str(task.name), str(task.request.id)


def has_logging(config_uri: str) -> bool:
    """Return whether an INI file has logging of its own, which Celery does not change."""
    return "loggers" in loader_of(config_uri).get_sections()


def set_up_logging(config_uri: str) -> None:
    """Put the logging of an INI file in force, if it has one, and keep Celery from changing it.

    ``--loglevel`` and ``--logfile`` change it where they are given on the command line.

    :raises ConfigurationError: if its sections are not complete.
    """
    if not has_logging(config_uri):
        return  # Celery's own logging, with its options
    try:
        loader_of(config_uri).setup_logging(ini_variables())
    except (KeyError, ValueError) as error:
        raise ConfigurationError(
            f"{config_uri}: the logging sections are not complete or not right: {error}. "
            "[loggers], [handlers] and [formatters] list the others under `keys`."
        ) from error
    for handler in _handlers():
        handler.addFilter(TaskFilter())
    # Celery configures logging only where nobody is connected.
    signals.setup_logging.connect(_keep, weak=False)


def filter_handlers(logger: logging.Logger, **_: Any) -> None:
    """Give the handlers of a logger that Celery has set up what those of the INI file have."""
    for handler in logger.handlers:
        if not any(isinstance(each, TaskFilter) for each in handler.filters):
            handler.addFilter(TaskFilter())


def log_arguments_of_failures() -> None:
    """Let Celery's record of a failure show the arguments of the call, their secrets masked."""
    logger = logging.getLogger(_TRACE)
    if not any(isinstance(each, _ArgumentsOfFailure) for each in logger.filters):
        logger.addFilter(_ArgumentsOfFailure())


class _ArgumentsOfFailure(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        fields = getattr(record, "data", None)
        if record.levelno >= logging.ERROR and isinstance(fields, Mapping) and "args" in fields:
            arguments = " ".join(_arguments_of(fields)).replace("%", "%%")
            record.msg = f"{record.msg} Arguments: {arguments}"
        return True


def _arguments_of(fields: Mapping[str, Any]) -> tuple[str, ...]:
    task = get_current_task()
    if task is None or task.request.id != fields.get("id"):
        return (MASK,)  # nobody knows the names by which a text without them is masked
    context = task.request
    reprs = getattr(context, "argsrepr", None), getattr(context, "kwargsrepr", None)
    return logged_arguments(task.app, task.name, (context.args, context.kwargs), reprs)


def _hide_arguments(record: logging.LogRecord) -> None:
    """Hide in the error of a run what is hidden of its arguments."""
    task = get_current_task()
    if task is None or not hasattr(task.app, "registry"):
        return
    call = task.request.args or (), task.request.kwargs or {}
    if record.exc_info and record.exc_text is None:
        record.exc_text = logging.Formatter().formatException(record.exc_info)
    record.exc_text = shown_text(task.app, task.name, call, record.exc_text or "")
    text = record.getMessage()
    if (shown := shown_text(task.app, task.name, call, text)) != text:
        record.msg, record.args = shown, None


def _handlers() -> list[logging.Handler]:
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    return [each for logger in loggers for each in getattr(logger, "handlers", ())]


def _keep(loglevel: int, logfile: str | None, **_: Any) -> None:
    context = click.get_current_context(silent=True)
    if context is not None:
        given = context.get_parameter_source
        if given("loglevel") is ParameterSource.COMMANDLINE:
            _set_level(loglevel)
        if given("logfile") is ParameterSource.COMMANDLINE and logfile:
            _set_file(logfile)


def _set_level(loglevel: int) -> None:
    for name in (None, "celery", "ws_celery"):
        logging.getLogger(name).setLevel(loglevel)


def _set_file(logfile: str) -> None:
    root = logging.getLogger()
    handler = WatchedFileHandler(logfile, encoding="utf-8")
    handler.addFilter(TaskFilter())
    if root.handlers:
        handler.setFormatter(root.handlers[0].formatter)
    root.handlers[:] = [handler]
