"""The result backend: what it raises when it does not answer, and which times a database keeps."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone, tzinfo
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from kombu.exceptions import OperationalError

from ws_celery.exceptions import ResultsUnavailable
from ws_celery.masking import masked_text

__all__ = ("answering", "backend_of", "in_zone", "zone_of")

#: The errors of backends, by the module that defines them.
_ERRORS = (("sqlalchemy.exc", "SQLAlchemyError"), ("redis.exceptions", "RedisError"))

#: What Celery's backend for Redis says in a RuntimeError when it connects no more.
_GIVEN_UP = "Retry limit exceeded"


@contextmanager
def answering(*, except_for: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """Tell in one sentence that the result backend does not answer.

    :param except_for: errors that are somebody else's.
    :raises ResultsUnavailable: in place of what the backend has raised.
    """
    try:
        yield
    except except_for:
        raise
    except _errors() as error:
        raise _unavailable(error) from error
    except RuntimeError as error:
        if _GIVEN_UP not in str(error):
            raise
        raise _unavailable(error.__cause__ or error) from error


def backend_of(app: Any) -> Any:
    """Return the result backend of an application; that of a database makes its tables.

    :raises ResultsUnavailable: at once, if that database does not answer.
    """
    with answering():
        _connect_once(app)
        return app.backend


def _connect_once(app: Any) -> None:
    # Celery would try for ten seconds, and log the traceback of each try.
    made, url = app.backend_class()
    if hasattr(made, "ResultSession"):
        probe = type("Probe", (made,), {"_create_tables": lambda _: None})(app=app, url=url)
        probe.session_manager.get_engine(probe.url, **probe.engine_options).connect().close()


def zone_of(app: Any, session: Any) -> tzinfo:
    """Return the zone that the times of results are in, which the database keeps without one.

    Celery writes the time in the zone of the application; a PostgreSQL puts it into that of the
    session, others forget its zone.
    """
    connection = session.connection()
    if connection.dialect.name != "postgresql":
        zone: tzinfo = app.timezone
        return zone
    name = connection.exec_driver_sql("SHOW TimeZone").scalar()
    try:
        return ZoneInfo(name)
    except (ValueError, ZoneInfoNotFoundError):  # it may be an offset, or a rule of POSIX
        asked = "SELECT extract(timezone FROM now())::integer"
        return timezone(timedelta(seconds=connection.exec_driver_sql(asked).scalar()))


def in_zone(time: datetime, zone: tzinfo) -> datetime:
    """Return a time as a database keeps it; one without zone is UTC."""
    aware = time if time.tzinfo else time.replace(tzinfo=timezone.utc)
    return aware.astimezone(zone).replace(tzinfo=None)


def _unavailable(error: BaseException) -> ResultsUnavailable:
    said = getattr(error, "orig", None) or error
    return ResultsUnavailable(masked_text(str(said).strip()))


def _errors() -> tuple[type[BaseException], ...]:
    """Return what backends raise; of libraries that are not loaded, nothing can have come."""
    found = ((sys.modules.get(module), name) for module, name in _ERRORS)
    return (OSError, OperationalError, *(getattr(each, name) for each, name in found if each))
