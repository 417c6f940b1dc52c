"""``ws-celery results`` and ``result``: how runs have ended."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from time import sleep
from typing import Any

import click
from celery import states
from celery.backends.base import DisabledBackend
from celery.bin.result import result as celery_result
from celery.result import AsyncResult

from ws_celery import inspection
from ws_celery.app import PyramidCelery
from ws_celery.cli.tables import (
    Answer,
    Listing,
    arguments_of,
    confirm,
    counted,
    echo,
    fields_of,
    limit,
    showing,
    time_of,
    with_app,
    yes,
)
from ws_celery.events import SKIPPED
from ws_celery.exceptions import NotFound, TaskNotRegistered
from ws_celery.inspection.results import answering, backend_of
from ws_celery.masking import masked, printable
from ws_celery.shown_arguments import shown_text

__all__ = (
    "result",
    "results",
)

#: Seconds between two looks.
_INTERVAL = 0.5


def _time(_context: click.Context, _option: click.Parameter, value: str | None) -> datetime | None:
    """Return the time that ``2035-01-31T12:00``, ``30m``, ``2h`` or ``7d`` mean."""
    units = {"m": "minutes", "h": "hours", "d": "days"}
    if value is None:
        return None
    try:
        if value[-1:] in units:
            ago = timedelta(**{units[value[-1]]: float(value[:-1])})
            return datetime.now(timezone.utc) - ago
        return datetime.fromisoformat(value)
    except (OverflowError, ValueError):
        text = f"{value!r} is no time; write 2035-01-31T12:00 (UTC), 30m, 2h or 7d."
        raise click.BadParameter(text) from None


def _value(result: inspection.Result) -> str:
    return json.dumps(result.result, default=str)


_RESULTS: Listing[inspection.Result] = Listing(
    {
        "ID": lambda result: result.id,
        "TASK": lambda result: result.task or "-",
        "STATE": lambda result: result.state,
        "DONE": lambda result: time_of(result.done),
        "RESULT": lambda result: "" if result.result is None else _value(result),
    },
    giving_way=("RESULT", "TASK"),
)


@click.group(invoke_without_command=True)
@click.option("--state", help="Only those in this state, such as FAILURE.")
@click.option("--task", help="Only those of this task.")
@click.option("--since", callback=_time, help="Only what ended then or later: UTC, or 2h.")
@click.option("--until", callback=_time, help="Only what ended before then.")
@limit(100)
@showing
def results(
    app: PyramidCelery, /, since: datetime | None, until: datetime | None, **wanted: Any
) -> Answer:
    """List results, the youngest first; show or forget one."""
    found = inspection.stored_results(app, between=(since, until), **wanted)
    return _RESULTS.answer(found, after=[f"{len(found)} shown."])


@results.command
@click.argument("task_id", metavar="ID")
@showing
def show(app: PyramidCelery, task_id: str) -> Answer:
    """Show the result of a task, from any result backend."""
    result = inspection.result_of(app, task_id)
    return Answer(_lines(result), result.as_dict())


def _lines(result: inspection.Result) -> Iterator[str]:
    fields = {
        **result.as_dict(),
        "done": time_of(result.done),
        "result": _value(result),
        "arguments": result.arguments and arguments_of(result.arguments),
    }
    traceback = fields.pop("traceback")
    yield from fields_of(fields)
    if traceback:
        yield f"\n{traceback.rstrip()}"


@results.command
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@yes
@with_app
def forget(app: PyramidCelery, ids: Sequence[str], yes: bool) -> None:
    """Delete results, for ever."""
    if not yes:
        confirm(f"Delete {counted(len(ids), 'result')}, for ever?")
    inspection.forget_results(app, *ids)
    echo(f"Deleted {counted(len(ids), 'result')}.")


@click.pass_context
def _result(context: click.Context, /, task_id: str, task: str | None, traceback: bool) -> None:
    """Print the return value for a given task id."""
    app = context.obj.app
    if task and task not in app.tasks:
        raise TaskNotRegistered(task)
    if isinstance(backend_of(app), DisabledBackend):
        raise NotFound("result", task_id)
    with answering():
        result = (app.tasks[task] if task else app).AsyncResult(task_id)
        value = result.traceback if traceback else _awaited(result)
        call = (result.args or (), result.kwargs or {}) if result.name else None
    if isinstance(value, BaseException):
        text = f"{type(value).__name__}: {value}"
        if (shown := shown_text(app, result.name, call, text)) != text:
            raise click.ClickException(printable(shown))  # Python would print the traceback
        result.maybe_throw()  # out there, since what a task has raised may look the same
    if traceback and value:
        value = shown_text(app, result.name, call, str(value))
    context.obj.echo(value)


def _awaited(result: AsyncResult) -> object:
    """Return what a run returns or raises."""
    while (state := result.state) not in states.READY_STATES:
        if state == SKIPPED:
            info = result.info
            reason = info.get("reason", info) if isinstance(info, Mapping) else info
            text = printable(f"The task {result.id} did not run: {masked('', reason)}.")
            raise click.ClickException(text)
        sleep(_INTERVAL)
    found: object = result.get(propagate=False)
    return found


result = copy.copy(celery_result)
result.callback = _result
