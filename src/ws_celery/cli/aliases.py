"""``ws-celery run``, ``view`` and ``clean``: the verbs that CKAN's ``celeryd`` had."""

from __future__ import annotations

import copy

import click

from ws_celery.cli.queues import peek, purge
from ws_celery.cli.values import LIMIT
from ws_celery.cli.worker import worker

__all__ = ("clean", "run", "view")


def _renamed(command: click.Command, name: str, short_help: str) -> click.Command:
    alias = copy.copy(command)
    alias.name, alias.short_help = name, short_help
    return alias


run = _renamed(worker, "run", "Start worker instance; the same as worker.")
clean = _renamed(purge, "clean", "Throw away what waits in all queues; the same as purge.")


@click.command
@click.option("--limit", type=LIMIT, default=100, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.pass_context
def view(context: click.Context, limit: int, as_json: bool) -> None:
    """Show what waits in the default queue; `queues peek` shows it of any."""
    name = context.obj.app.conf.task_default_queue
    context.invoke(peek, name=name, limit=limit, as_json=as_json)
