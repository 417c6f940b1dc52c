"""``ws-celery results``: how runs have ended."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from time import sleep
from typing import TYPE_CHECKING, Any

import click
from celery import states
from celery.backends.base import DisabledBackend
from celery.bin.result import result as celery_result

from ws_celery import inspection
from ws_celery.cli.tables import LIMIT, arguments_of, confirm, echo, fields_of, table, time_of
from ws_celery.events import SKIPPED
from ws_celery.exceptions import NotFound, TaskNotRegistered
from ws_celery.inspection.results import answering, backend_of
from ws_celery.masking import masked, printable
from ws_celery.shown_arguments import shown_text

if TYPE_CHECKING:
    from ws_celery.inspection import Result

__all__ = (
    "result",
    "results",
)

#: Seconds between two looks.
_INTERVAL = 0.5


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


_HEADINGS = ("ID", "TASK", "STATE", "DONE", "RESULT")

_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def _time(_context: Any, _option: Any, value: str | None) -> datetime | None:
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


@click.group(invoke_without_command=True)
@click.option("--state", help="Only those in this state, such as FAILURE.")
@click.option("--task", help="Only those of this task.")
@click.option("--since", callback=_time, help="Only what ended then or later: UTC, or 2h.")
@click.option("--until", callback=_time, help="Only what ended before then.")
@click.option("--limit", type=LIMIT, default=100, show_default=True)
@_as_json
@click.pass_context
def results(
    context: click.Context, /, since: Any, until: Any, as_json: bool, **wanted: Any
) -> None:
    """List results, the youngest first; show or forget one."""
    if context.invoked_subcommand is not None:
        return
    found = inspection.stored_results(context.obj.app, between=(since, until), **wanted)
    if as_json:
        echo(json.dumps([each.as_dict() for each in found], indent=2, default=str))
        return
    if found:
        for line in table(_HEADINGS, [_cells(each) for each in found], 4, 1):
            echo(line)
    echo(f"{len(found)} shown.")


@results.command
@click.argument("task_id", metavar="ID")
@_as_json
@click.pass_context
def show(context: click.Context, task_id: str, as_json: bool) -> None:
    """Show the result of a task, from any result backend."""
    result = inspection.result_of(context.obj.app, task_id)
    if as_json:
        echo(json.dumps(result.as_dict(), indent=2, default=str))
        return
    for line in _lines(result):
        echo(line)


@results.command
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
def forget(context: click.Context, ids: Sequence[str], yes: bool) -> None:
    """Delete results, for ever."""
    counted = "1 result" if len(ids) == 1 else f"{len(ids)} results"
    if not yes:
        confirm(f"Delete {counted}, for ever?")
    inspection.forget_results(context.obj.app, *ids)
    echo(f"Deleted {counted}.")


def _cells(result: Result) -> tuple[str, ...]:
    shown = "" if result.result is None else json.dumps(result.result, default=str)
    return result.id, result.task or "-", result.state, time_of(result.done), shown


def _lines(result: Result) -> Iterator[str]:
    fields = {
        **result.as_dict(),
        "done": time_of(result.done),
        "result": json.dumps(result.result, default=str),
        "arguments": result.arguments and arguments_of(result.arguments),
    }
    traceback = fields.pop("traceback")
    yield from fields_of(fields)
    if traceback:
        yield f"\n{traceback.rstrip()}"
