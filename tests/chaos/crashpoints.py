"""Places at which a process kills itself, wired into the library from outside.

Where the environment variable ``CHAOS_POINTS`` names a directory, a file ``ROLE.POINT`` in it arms
a point: the first process of that role that gets there takes the file away and dies by SIGKILL.
``CHAOS_ROLE`` says what a process is: ``web``, ``worker`` or ``relay``. Without the variables
nothing is wrapped.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

__all__ = ("reach", "take", "wire", "wrap")


def reach(point: str) -> None:
    """Die if this point is armed for processes like this one."""
    if take(point):
        _die()


def take(point: str) -> bool:
    """Disarm a point; tell whether it was armed."""
    folder = os.environ.get("CHAOS_POINTS")
    if folder is None:
        return False
    try:
        Path(folder, f"{os.environ['CHAOS_ROLE']}.{point}").unlink()
    except FileNotFoundError:
        return False
    return True


def wire() -> None:
    """Wrap the steps of dispatch, publish, claim, run, commit, acknowledge, retry and relay."""
    if "CHAOS_POINTS" not in os.environ:
        return
    from kombu.message import Message
    from transaction import TransactionManager

    from ws_celery.app import PyramidCelery
    from ws_celery.outbox.rows import Rows
    from ws_celery.outbox.runs import Claim, Runs, Unclaimed
    from ws_celery.outbox.store import Journal
    from ws_celery.publishing import Publisher

    wrap(Journal, "_insert", "dispatch.begun", "dispatch.written")
    wrap(PyramidCelery, "publish", "dispatch.committed")
    wrap(Publisher, "attempt", "publish.begun", "publish.done")
    _trap(Publisher, "attempt", "publish.middle", _send_half)
    wrap(Claim, "begin", "claim.begun", "claim.done")
    wrap(Unclaimed, "_replace_row", "handover.begun", "handover.committed")
    wrap(Unclaimed, "hand_over", "handover.called", "handover.done")
    wrap(TransactionManager, "commit", "commit.begun", "commit.done")
    wrap(Message, "ack", "acknowledge.begun")
    wrap(Runs, "retry", "retry.aborted", "retry.published")
    _trap(Runs, "retry", "retry.rewritten", _publish_never)
    wrap(Rows, "lease_due", "take.begun", "take.locked")


def wrap(owner: type, name: str, before: str, after: str | None = None) -> None:
    """Let a process die before a method is called, or after it."""
    original = getattr(owner, name)

    @wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        reach(before)
        result = original(*args, **kwargs)
        if after is not None:
            reach(after)
        return result

    setattr(owner, name, wrapper)


def _trap(owner: type, name: str, point: str, trap: Callable[[], None]) -> None:
    """Set a trap when a method is called, for a point that is in its middle."""
    original = getattr(owner, name)

    @wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if take(point):
            trap()
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)


def _send_half() -> None:
    """Let the process die when half of its messages' bytes have left."""
    from redis.connection import AbstractConnection

    send = AbstractConnection.send_packed_command

    def half(self: Any, command: Any, **options: Any) -> Any:
        data = command if isinstance(command, bytes) else b"".join(command)
        if b"LPUSH" not in data:
            return send(self, command, **options)
        self._sock.sendall(data[: len(data) // 2])
        _die()
        return None

    AbstractConnection.send_packed_command = half


def _publish_never() -> None:
    from ws_celery.app import PyramidCelery

    PyramidCelery.publish = lambda *_: _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
