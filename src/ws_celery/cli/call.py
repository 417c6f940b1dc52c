"""``ws-celery call``: Celery's command, but that it knows the tasks."""

from __future__ import annotations

import copy
from typing import Any

import click
from celery.bin.call import call as celery_call

from ws_celery.exceptions import TaskNotRegistered

__all__ = ("call",)


@click.pass_context
def _call(context: click.Context, /, name: str, args: Any, kwargs: Any, **options: Any) -> None:
    """Call a task by name."""
    app = context.obj.app
    if name not in app.tasks:
        raise TaskNotRegistered(name)
    given = {key: value for key, value in options.items() if value is not None}
    try:
        result = app.tasks[name].apply_async(args, kwargs, **given)
    except TypeError as error:
        raise click.UsageError(str(error)) from error
    context.obj.echo(result.id)


call = copy.copy(celery_call)
call.callback = _call
