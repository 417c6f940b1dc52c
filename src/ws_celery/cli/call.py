"""``ws-celery call``: Celery's command, but that it knows the tasks, and what does not answer."""

from __future__ import annotations

import copy
from typing import Any

import click
from celery.bin.call import call as celery_call
from kombu.exceptions import OperationalError

from ws_celery.exceptions import TaskNotRegistered
from ws_celery.inspection.result_backend import answering, backend_of

__all__ = ("call",)


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
