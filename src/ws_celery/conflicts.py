"""Which errors are conflicts with another transaction, so that the same work may succeed at once.

Data managers know most of them: ZODB's ``ConflictError``, PostgreSQL's serialization failures and
deadlocks (zope.sqlalchemy). The others are told here:

=====================  =============================================================
SQLite                 ``database is locked``, ``database table is locked``
MariaDB, MySQL         1213 deadlock, 1205 lock wait timeout, 1020 record has changed
pyramid_retry          what ``mark_error_retryable()`` has marked, instance or class
=====================  =============================================================

No driver is imported here: one that has raised an error has been imported.
"""

from __future__ import annotations

import sys
from typing import Any

from transaction.interfaces import NoTransaction

__all__ = ("is_conflict",)

#: Errors by number, by the package of the driver that raises them. Each means "try again".
_NUMBERS = dict.fromkeys(("pymysql", "MySQLdb", "mysql", "mariadb", "asyncmy"), (1020, 1205, 1213))


def is_conflict(manager: Any, error: BaseException) -> bool:
    """Tell whether the transaction that raised ``error`` may succeed when it is run again.

    :param manager: the transaction's manager. Ask before the abort, which makes the transaction
        forget its data managers.
    """
    if not isinstance(error, Exception):
        return False
    return _is_known_to(manager, error) or _is_marked(error) or _is_of_driver(error)


def _is_known_to(manager: Any, error: Exception) -> bool:
    try:
        return bool(manager.get().isRetryableError(error))
    except NoTransaction:
        return False


def _is_marked(error: Exception) -> bool:
    pyramid_retry = sys.modules.get("pyramid_retry")
    return pyramid_retry is not None and pyramid_retry.IRetryableError.providedBy(error)


def _is_of_driver(error: Exception) -> bool:
    original = getattr(error, "orig", None) or error  # SQLAlchemy wraps it
    sqlite3 = sys.modules.get("sqlite3")
    if sqlite3 is not None and isinstance(original, sqlite3.OperationalError):
        return str(original).endswith(" is locked")
    package = type(original).__module__.partition(".")[0]
    known = _NUMBERS.get(package, ())
    # MariaDB's own driver has the number in an attribute only.
    return any(number in known for number in (getattr(original, "errno", None), *original.args[:1]))
