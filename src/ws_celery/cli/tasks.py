"""``ws-celery tasks``: what there is to run, what runs, and stopping it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from signal import Signals
from typing import Any

import click

from ws_celery import inspection
from ws_celery.cli.tables import arguments_of, confirm, echo, fields_of, table, time_of
from ws_celery.inspection import HeldTask, RegisteredTask, WorkerState

__all__ = ("tasks", "workers")

_HEADINGS = ("TASK", "ORIGIN", "QUEUE", "SCHEDULE", "BASE")
_HELD = ("ID", "TASK", "STATE", "SINCE OR ETA", "WORKER", "ARGUMENTS")
_WORKERS = ("WORKER", "PID", "POOL", "AT ONCE", "FINISHED", "QUEUES")

_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
_yes = click.option("--yes", is_flag=True, help="Do not ask.")
_timeout = click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Seconds to wait for workers.",
)


@click.group(invoke_without_command=True)
@click.option("--all", "with_celerys", is_flag=True, help="Those of Celery's own, too.")
@_as_json
@click.pass_context
def tasks(context: click.Context, with_celerys: bool, as_json: bool) -> None:
    """List the registered tasks; show what runs, and stop it."""
    if context.invoked_subcommand is not None:
        return
    found = inspection.registered_tasks(_app(context))
    found = [task for task in found if with_celerys or task.origin != "celery"]
    if as_json:
        echo(json.dumps([task.as_dict() for task in found], indent=2))
        return
    for line in table(_HEADINGS, [_cells(task) for task in found], 4, 3, 2, 1, 0):
        echo(line)


@tasks.command
@click.argument("name", metavar="TASK")
@_as_json
@click.pass_context
def show(context: click.Context, name: str, as_json: bool) -> None:
    """Show all that was decided about one task."""
    fields = inspection.registered_task(_app(context), name).as_dict()
    if as_json:
        echo(json.dumps(fields, indent=2))
        return
    texts = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in fields.items()
    }
    for line in fields_of(texts):
        echo(line)


@tasks.command
@click.option(
    "--state",
    "states",
    type=click.Choice(inspection.STATES),
    multiple=True,
    help="Only these. [default: all]",
)
@_timeout
@_as_json
@click.pass_context
def running(context: click.Context, states: Sequence[str], timeout: float, as_json: bool) -> None:
    """List what workers have in hand: running, next, or waiting for its eta."""
    held = inspection.held_tasks(_app(context), states or inspection.STATES, timeout)
    if as_json:
        echo(json.dumps([task.as_dict() for task in held], indent=2, default=str))
        return
    if held:
        for line in table(_HELD, [_held(task) for task in held], 5, 4, 1):
            echo(line)
    echo(f"{len(held)} in the hands of workers.")


@tasks.command
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@_timeout
@_yes
@click.pass_context
def revoke(context: click.Context, ids: Sequence[str], timeout: float, yes: bool) -> None:
    """Let tasks not run, if they have not begun."""
    if not yes:
        confirm(f"Revoke {_counted(ids)}, so that they never run?")
    inspection.revoke_tasks(_app(context), ids, timeout=timeout)
    echo(f"Revoked {_counted(ids)}.")


@tasks.command
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@click.option(
    "--signal",
    type=click.Choice([each.name for each in Signals], case_sensitive=False),
    metavar="NAME",
    default="SIGTERM",
    show_default=True,
    help="Name of the signal, such as SIGKILL.",
)
@_timeout
@_yes
@click.pass_context
def terminate(
    context: click.Context, ids: Sequence[str], signal: str, timeout: float, yes: bool
) -> None:
    """Kill the processes that run tasks, and let the tasks not run again."""
    app = _app(context)
    if not yes:
        held = inspection.held_tasks(app, ("active",), timeout)
        count = sum(task.id in ids for task in held)
        question = f"{_counted(ids)}, of which {count} running: kill with {signal}?"
        confirm(f"Terminate {question}")
    inspection.revoke_tasks(app, ids, terminate=True, signal=signal, timeout=timeout)
    echo(f"Asked workers to terminate {_counted(ids)}.")


@click.command
@_timeout
@_as_json
@click.pass_context
def workers(context: click.Context, timeout: float, as_json: bool) -> None:
    """List the workers that answer."""
    found = inspection.worker_states(_app(context), timeout)
    if as_json:
        echo(json.dumps([worker.as_dict() for worker in found], indent=2))
        return
    for line in table(_WORKERS, [_worker(each) for each in found], 5, 0):
        echo(line)


def _app(context: click.Context) -> Any:
    return context.obj.app


def _counted(ids: Sequence[str]) -> str:
    return "1 task" if len(ids) == 1 else f"{len(ids)} tasks"


def _cells(task: RegisteredTask) -> tuple[str, ...]:
    origin = task.plugin or task.origin
    return task.name, origin, task.queue or "-", ", ".join(task.schedule), task.base


def _held(task: HeldTask) -> tuple[str, ...]:
    time = time_of(task.since or task.eta)
    return task.id, task.task, task.state, time, task.worker, arguments_of(task.arguments)


def _worker(worker: WorkerState) -> tuple[str, ...]:
    return tuple(_texts(worker))


def _texts(worker: WorkerState) -> Iterator[str]:
    yield from (worker.name, str(worker.pid), worker.pool.rpartition(".")[2])
    yield from (str(worker.concurrency or "-"), str(sum(worker.finished.values())))
    yield ", ".join(worker.queues)
