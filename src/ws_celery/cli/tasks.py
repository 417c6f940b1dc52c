"""``ws-celery tasks``: what there is to run, what runs, and stopping it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from signal import Signals
from typing import Any

import click
from celery.bin.call import call as celery_call
from celery.bin.control import status as celery_status
from celery.platforms import EX_UNAVAILABLE
from click.core import ParameterSource
from kombu.exceptions import OperationalError

from ws_celery import inspection
from ws_celery.cli.tables import arguments_of, confirm, echo, fields_of, table, time_of
from ws_celery.exceptions import TaskNotRegistered
from ws_celery.inspection import HeldTask, RegisteredTask, WorkerState, health
from ws_celery.inspection.results import answering, backend_of

__all__ = (
    "call",
    "status",
    "tasks",
    "workers",
)


@click.pass_context
def _call(context: click.Context, /, name: str, args: Any, kwargs: Any, **options: Any) -> None:
    """Call a task by name."""
    app = context.obj.app
    if name not in app.tasks:
        raise TaskNotRegistered(name)
    given = {key: value for key, value in options.items() if value is not None}
    backend_of(app)
    try:
        # Celery subscribes to the result first; an error of the broker is not the backend's.
        with answering(except_for=(OperationalError,)):
            result = app.tasks[name].apply_async(args, kwargs, **given)
    except TypeError as error:
        raise click.UsageError(str(error)) from error
    context.obj.echo(result.id)


call = copy.copy(celery_call)
call.callback = _call


_PARTS = ("broker", "worker", "database", "relay", "beat")
_FILE = click.Path(dir_okay=False, path_type=Path)

_OPTIONS = (
    click.Option(
        ["--healthy"],
        is_flag=True,
        help="For probes: one line for each part, and exit code 69 if one is not alive. With "
        "--destination these workers have to answer, else any one.",
    ),
    click.Option(
        ["--part", "parts"],
        multiple=True,
        type=click.Choice(_PARTS),
        help="With --healthy: ask this part only; may be repeated.",
    ),
    click.Option(["--relay-file"], type=_FILE, help="With --healthy: health file of the relay."),
    click.Option(["--beat-file"], type=_FILE, help="With --healthy: health file of beat."),
    click.Option(
        ["--max-age"],
        type=click.FloatRange(0, min_open=True),
        default=60,
        show_default=True,
        help="With --healthy: seconds that a health file may be old, or the outbox be behind.",
    ),
)
_OURS = tuple(option.name for option in _OPTIONS)


@click.pass_context
def _status(context: click.Context, /, **options: Any) -> None:
    """Show the workers that are online, or whether all parts are healthy."""
    ours = {name: options.pop(name) for name in _OURS if name}
    if not ours.pop("healthy"):
        _refuse_ours(context)
        context.invoke(celery_status.callback, **options)
        return
    if "beat" in ours["parts"] and ours["beat_file"] is None:
        raise click.UsageError("--part beat needs --beat-file: only that tells of a beat.")
    found = health(context.obj.app, workers=options["destination"] or (), **ours)
    healthy = all(part.healthy for part in found)
    if options["json"]:
        parts = [part.as_dict() for part in found]
        echo(json.dumps({"healthy": healthy, "parts": parts}, indent=2))
    else:
        for part in found:
            echo(f"{part.name:8}  {'ok' if part.healthy else 'FAILED':6}  {part.detail}")
    context.exit(0 if healthy else EX_UNAVAILABLE)


def _refuse_ours(context: click.Context) -> None:
    # A probe that has forgotten --healthy would be content with any worker.
    for option in _OPTIONS:
        if context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{option.opts[0]} is for --healthy only.")


status = copy.copy(celery_status)
status.callback = _status
status.help = _status.__doc__
status.params = [*celery_status.params, *_OPTIONS]


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
