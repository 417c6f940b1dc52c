"""``ws-celery locks``: who holds a one-instance lock, and freeing one by hand."""

from __future__ import annotations

import click

from ws_celery import inspection
from ws_celery.app import PyramidCelery
from ws_celery.cli.tables import Answer, Listing, confirm, showing, yes

__all__ = ("locks",)

_LOCKS: Listing[inspection.Holder] = Listing(
    {
        "KEY": lambda holder: holder.key,
        "TASK": lambda holder: _known(holder.task),
        "ID": lambda holder: _known(holder.id),
        "HOST": lambda holder: _known(holder.host),
        "PROCESS": lambda holder: _known(holder.pid),
        "AGE": lambda holder: _duration(holder.age),
        "TIME LEFT": lambda holder: (
            "while it runs" if holder.time_left is None else _duration(holder.time_left)
        ),
    },
    giving_way=("KEY", "TASK", "ID"),
)


@click.group
def locks() -> None:
    """Look at the locks of @one_instance, and free one."""


@locks.command(name="list")
@showing
def list_locks(app: PyramidCelery) -> Answer:
    """List the locks that are held, by their keys.

    TIME LEFT is when a lock is free if nothing is heard of its run any more.
    """
    holders = inspection.lock_holders(app)
    return _LOCKS.answer(holders, after=[] if holders else ["No lock is held."])


@locks.command
@click.argument("key")
@yes
@showing
def free(app: PyramidCelery, key: str, yes: bool) -> Answer:
    """Take the lock of KEY away from the run that holds it.

    The run is told, and goes on: another one may then run beside it.
    """
    holder = inspection.lock_holder(app, key)
    if not yes:
        age = "" if holder.age is None else f", for {_duration(holder.age)}"
        confirm(f"The lock {key!r} is held by {holder}{age}. Take it away?")
    inspection.free_lock(app, holder)
    freed = f"Freed the lock {key!r}, which was held by {holder}."
    return Answer([freed], holder.as_dict())


def _known(value: object) -> str:
    return "?" if value is None else str(value)


def _duration(seconds: float | None) -> str:
    """Return a time in the largest units that matter: ``1 h 5 min``, ``7.2 s``."""
    if seconds is None:
        return "?"
    if seconds < 60:
        return f"{max(seconds, 0):.1f} s"
    minutes, _ = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
