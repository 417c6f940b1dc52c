"""``ws-celery result``: Celery's command, but that it knows of what nothing will come."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from time import sleep
from typing import Any

import click
from celery import states
from celery.backends.base import DisabledBackend
from celery.bin.result import result as celery_result

from ws_celery.exceptions import NoSuchResult, TaskNotRegistered
from ws_celery.inspection.result_backend import answering, backend_of
from ws_celery.locks import SKIPPED
from ws_celery.masking import masked, printable
from ws_celery.shown_arguments import shown_text

__all__ = ("result",)

#: Seconds between two looks.
_INTERVAL = 0.5


@click.pass_context
def _result(context: click.Context, /, task_id: str, task: str | None, traceback: bool) -> None:
    """Print the return value for a given task id."""
    app = context.obj.app
    if task and task not in app.tasks:
        raise TaskNotRegistered(task)
    if isinstance(backend_of(app), DisabledBackend):
        raise NoSuchResult(task_id)
    with answering():
        result = (app.tasks[task] if task else app).AsyncResult(task_id)
        value = result.traceback if traceback else _awaited(result)
        call = (result.args or (), result.kwargs or {}) if result.name else None
    if isinstance(value, BaseException):
        said = f"{type(value).__name__}: {value}"
        if (text := shown_text(app, result.name, call, said)) != said:
            raise click.ClickException(printable(text))  # Python would print the traceback
        result.maybe_throw()  # out there, since what a task has raised may look the same
    context.obj.echo(shown_text(app, result.name, call, value) if traceback and value else value)


def _awaited(result: Any) -> Any:
    """Return what a run returns or raises."""
    while (state := result.state) not in states.READY_STATES:
        if state == SKIPPED:
            said = result.info
            reason = said.get("reason", said) if isinstance(said, Mapping) else said
            text = printable(f"The task {result.id} did not run: {masked('', reason)}.")
            raise click.ClickException(text)
        sleep(_INTERVAL)
    return result.get(propagate=False)


result = copy.copy(celery_result)
result.callback = _result
