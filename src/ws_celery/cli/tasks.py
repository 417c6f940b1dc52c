"""``ws-celery tasks``, ``call``, ``workers`` and ``status``: what can run, and what runs."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
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
from ws_celery.app import PyramidCelery
from ws_celery.cli.tables import (
    Answer,
    Listing,
    arguments_of,
    confirm,
    counted,
    echo,
    fields_of,
    show,
    showing,
    time_of,
    with_app,
    yes,
)
from ws_celery.exceptions import TaskNotRegistered
from ws_celery.inspection.results import answering, backend_of

__all__ = (
    "call",
    "status",
    "tasks",
    "workers",
)

_TASKS: Listing[inspection.RegisteredTask] = Listing(
    {
        "TASK": lambda task: task.name,
        "ORIGIN": lambda task: task.plugin or task.origin,
        "QUEUE": lambda task: task.queue or "-",
        "SCHEDULE": lambda task: ", ".join(task.schedule),
        "BASE": lambda task: task.base,
    },
    giving_way=("BASE", "SCHEDULE", "QUEUE", "ORIGIN", "TASK"),
)

_RUNNING: Listing[inspection.HeldTask] = Listing(
    {
        "ID": lambda task: task.id,
        "TASK": lambda task: task.task,
        "STATE": lambda task: task.state,
        "SINCE OR ETA": lambda task: time_of(task.since or task.eta),
        "WORKER": lambda task: task.worker,
        "ARGUMENTS": lambda task: arguments_of(task.arguments),
    },
    giving_way=("ARGUMENTS", "WORKER", "TASK"),
)

_WORKERS: Listing[inspection.WorkerState] = Listing(
    {
        "WORKER": lambda worker: worker.name,
        "PID": lambda worker: str(worker.pid),
        "POOL": lambda worker: worker.pool.rpartition(".")[2],
        "AT ONCE": lambda worker: str(worker.concurrency or "-"),
        "FINISHED": lambda worker: str(sum(worker.finished.values())),
        "QUEUES": lambda worker: ", ".join(worker.queues),
    },
    giving_way=("QUEUES", "WORKER"),
)

_timeout = click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Seconds to wait for workers.",
)


@click.group(invoke_without_command=True)
@click.option("--all", "with_celerys", is_flag=True, help="Those of Celery's own, too.")
@showing
def tasks(app: PyramidCelery, with_celerys: bool) -> Answer:
    """List the registered tasks; show what runs, and stop it."""
    found = inspection.registered_tasks(app)
    found = [task for task in found if with_celerys or task.origin != "celery"]
    return _TASKS.answer(found, after=[] if found else ["No task is registered."])


@tasks.command(name="show")
@click.argument("name", metavar="TASK")
@showing
def show_task(app: PyramidCelery, name: str) -> Answer:
    """Show all that was decided about one task."""
    fields = inspection.registered_task(app, name).as_dict()
    texts = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in fields.items()
    }
    return Answer(fields_of(texts), fields)


@tasks.command
@click.option(
    "--state",
    "states",
    type=click.Choice(inspection.STATES),
    multiple=True,
    help="Only these. [default: all]",
)
@_timeout
@showing
def running(app: PyramidCelery, states: Sequence[str], timeout: float) -> Answer:
    """List what workers have in hand: running, next, or waiting for its eta."""
    found = inspection.held_tasks(app, states or inspection.STATES, timeout)
    return _RUNNING.answer(found, after=[f"{len(found)} in the hands of workers."])


@tasks.command
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@_timeout
@yes
@with_app
def revoke(app: PyramidCelery, ids: Sequence[str], timeout: float, yes: bool) -> None:
    """Let tasks not run, if they have not begun."""
    named = counted(len(ids), "task")
    if not yes:
        confirm(f"Revoke {named}, so that they never run?")
    inspection.revoke_tasks(app, ids, timeout=timeout)
    echo(f"Revoked {named}.")


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
@yes
@with_app
def terminate(
    app: PyramidCelery, ids: Sequence[str], signal: str, timeout: float, yes: bool
) -> None:
    """Kill the processes that run tasks, and let the tasks not run again."""
    named = counted(len(ids), "task")
    if not yes:
        active = inspection.held_tasks(app, ("active",), timeout)
        count = sum(task.id in ids for task in active)
        confirm(f"Terminate {named}, of which {count} running: kill with {signal}?")
    inspection.revoke_tasks(app, ids, terminate=True, signal=signal, timeout=timeout)
    echo(f"Asked workers to terminate {named}.")


@click.command
@_timeout
@showing
def workers(app: PyramidCelery, timeout: float) -> Answer:
    """List the workers that answer."""
    return _WORKERS.answer(inspection.worker_states(app, timeout))


@click.pass_context
def _call(
    context: click.Context,
    /,
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    **options: object,
) -> None:
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
    found = inspection.health(context.obj.app, workers=options["destination"] or (), **ours)
    healthy = all(part.healthy for part in found)
    lines = (
        f"{each.name:8}  {'ok' if each.healthy else 'FAILED':6}  {each.detail}" for each in found
    )
    data = {"healthy": healthy, "parts": [part.as_dict() for part in found]}
    show(context, Answer(lines, data, 0 if healthy else EX_UNAVAILABLE), as_json=options["json"])


def _refuse_ours(context: click.Context) -> None:
    # A probe that has forgotten --healthy would be content with any worker.
    for option in _OPTIONS:
        if context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{option.opts[0]} is for --healthy only.")


status = copy.copy(celery_status)
status.callback = _status
status.help = _status.__doc__
status.params = [*celery_status.params, *_OPTIONS]
