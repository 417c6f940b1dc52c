"""One run of a task at a time: ``@one_instance``, its locks, and where they are kept.

::

    keeper              takes the lock of a run, keeps it, and gives it back
    rule  choice        what @one_instance says; which store an application has
    renewal             one thread of a process keeps the locks of its runs
    redis_store postgresql memory
    told                who holds an advisory lock
    holding             the lock of one run; what a store has to do

``pyproject.toml`` has the order in which they import each other.
"""

from __future__ import annotations

from ws_celery.locks.holding import Held, Holder
from ws_celery.locks.keeper import Locks
from ws_celery.locks.rule import (
    OneInstance,
    apply_option,
    check_rule,
    one_instance,
    rule_of,
)

__all__ = (
    "Held",
    "Holder",
    "Locks",
    "OneInstance",
    "apply_option",
    "check_rule",
    "one_instance",
    "rule_of",
)
