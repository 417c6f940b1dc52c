"""SQLAlchemy's own transactions: which of them a dispatch is made in, and which are rolled back.

``session.begin_nested()`` makes savepoints that the ``transaction`` package knows nothing of. A
dispatch notes which transactions of the request's session are open, and a listener of that session
tells which are rolled back. A savepoint that is released needs no care: the one around it was
noted as well.

SQLAlchemy is never imported here: an application that has a session has done so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, Protocol
from weakref import WeakSet

__all__ = ("Listener", "open_session", "open_transactions", "tell_rollbacks")

#: Where a session keeps who is to be told: in its ``info``, so that both are forgotten together.
_LISTENERS = "ws_celery.listeners"


class Listener(Protocol):
    """Who wants to know of rollbacks."""

    def rolled_back(self, session_transaction: Any) -> None:
        """Take note that this transaction or savepoint of a session is undone."""


def open_session(request: Any, name: str) -> Any:
    """Return the SQLAlchemy session of ``request`` if it has made it already, else ``None``.

    It is never made here: a request that uses no database must not begin to because it dispatches.

    :param name: the attribute of the request; a ``scoped_session`` is fine, too.
    """
    orm = sys.modules.get("sqlalchemy.orm")
    if orm is None or request is None:
        return None
    session = getattr(request, "__dict__", {}).get(name)
    if session is None:
        # Where WebOb keeps attributes that the class of the request does not have.
        session = getattr(request, "environ", {}).get("webob.adhoc_attrs", {}).get(name)
    if isinstance(session, orm.scoped_session):
        session = session.registry() if session.registry.has() else None
    return session if isinstance(session, orm.Session) else None


def open_transactions(session: Any) -> tuple[Any, ...]:
    """Return the open transactions of a session, the innermost savepoint first."""
    return tuple(_outwards(session.get_nested_transaction() or session.get_transaction()))


def _outwards(session_transaction: Any) -> Iterator[Any]:
    while session_transaction is not None:
        yield session_transaction
        session_transaction = session_transaction.parent


def tell_rollbacks(session: Any, listener: Listener) -> None:
    """Let ``listener`` know of each rollback of this session, as long as it lives."""
    if _LISTENERS not in session.info:
        session.info[_LISTENERS] = WeakSet()
        # One listener for good: SQLAlchemy forbids to remove one while it is being called.
        sys.modules["sqlalchemy.event"].listen(session, "after_soft_rollback", _rolled_back)
    session.info[_LISTENERS].add(listener)


def _rolled_back(session: Any, session_transaction: Any) -> None:
    for listener in tuple(session.info[_LISTENERS]):
        listener.rolled_back(session_transaction)
