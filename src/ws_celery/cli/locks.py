"""``ws-celery locks``: who holds a one-instance lock, and freeing one by hand."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from ws_celery import inspection
from ws_celery.cli.tables import confirm, echo, table

if TYPE_CHECKING:
    from ws_celery.app import PyramidCelery
    from ws_celery.inspection import Holder

__all__ = ("locks",)

_HEADINGS = ("KEY", "TASK", "ID", "HOST", "PROCESS", "AGE", "TIME LEFT")


@click.group
def locks() -> None:
    """Look at the locks of @one_instance, and free one."""


@locks.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.pass_context
def list_locks(context: click.Context, as_json: bool) -> None:
    """List the locks that are held, by their keys.

    TIME LEFT is when a lock is free if nothing is heard of its run any more.
    """
    holders = inspection.lock_holders(_app(context))
    if as_json:
        echo(json.dumps([holder.as_dict() for holder in holders], indent=2))
        return
    if not holders:
        echo("No lock is held.")
        return
    for line in table(_HEADINGS, [_cells(holder) for holder in holders], 0, 1, 2):
        echo(line)


@locks.command
@click.argument("key")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON of what was freed, for programs.")
@click.pass_context
def free(context: click.Context, key: str, yes: bool, as_json: bool) -> None:
    """Take the lock of KEY away from the run that holds it.

    The run is told, and goes on: another one may then run beside it.
    """
    app = _app(context)
    holder = inspection.lock_holder(app, key)
    if not yes:
        age = "" if holder.age is None else f", for {_duration(holder.age)}"
        text = f"The lock {key!r} is held by {holder}{age}. Take it away?"
        confirm(text, err=as_json)
    inspection.free_lock(app, holder)
    if as_json:
        echo(json.dumps(holder.as_dict(), indent=2))
    else:
        echo(f"Freed the lock {key!r}, which was held by {holder}.")


def _app(context: click.Context) -> PyramidCelery:
    app: PyramidCelery = context.obj.app
    return app


def _cells(holder: Holder) -> tuple[str, ...]:
    known = (holder.task, holder.id, holder.host, holder.pid)
    return (
        holder.key,
        *("?" if each is None else str(each) for each in known),
        _duration(holder.age),
        "while it runs" if holder.time_left is None else _duration(holder.time_left),
    )


def _duration(seconds: float | None) -> str:
    """Return a time in the largest units that matter: ``1 h 5 min``, ``7.2 s``."""
    if seconds is None:
        return "?"
    if seconds < 60:
        return f"{max(seconds, 0):.1f} s"
    minutes, _ = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
