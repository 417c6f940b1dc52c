"""One-instance locks: who holds them, and taking one away."""

from __future__ import annotations

from ws_celery.app import get_celery_app
from ws_celery.exceptions import NotFound
from ws_celery.inspection.messages import Source
from ws_celery.locks import Holder

__all__ = ("Holder", "free_lock", "lock_holder", "lock_holders")


def lock_holders(source: Source) -> list[Holder]:
    """Return who holds locks of ``@one_instance``, in the order of their keys.

    :param source: a registry, or what has one: a request, a Celery app. So it is for all of these
        functions.
    :raises LocksUnavailable: if what keeps them does not answer.
    """
    return get_celery_app(source).locks.store.holders()


def lock_holder(source: Source, key: str) -> Holder:
    """Return who holds the lock of a key.

    :raises NotFound: if nobody does.
    :raises LocksUnavailable: if what keeps it does not answer.
    """
    holder = get_celery_app(source).locks.store.holder_of(key)
    if holder is None:
        raise NotFound("lock", key)
    return holder


def free_lock(source: Source, holder: Holder) -> None:
    """Take a lock away from this holder: another run with its key may begin, though he goes on.

    :param holder: what :func:`lock_holder` has returned; another one keeps the lock.
    :raises NotFound: if he does not hold it any more.
    :raises LocksUnavailable: if what keeps it does not answer.
    """
    if not get_celery_app(source).locks.store.free(holder):
        raise NotFound("lock", holder.key)
