"""Results of tasks: those of Celery's database backend as a list, those of others by id."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone, tzinfo
from functools import partial
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from celery import states
from celery.backends.base import DisabledBackend
from kombu.exceptions import OperationalError

from ws_celery.app import PyramidCelery, get_celery_app
from ws_celery.converters import aware
from ws_celery.events import SKIPPED
from ws_celery.exceptions import NotFound, NotSupported, Unavailable
from ws_celery.inspection.messages import Record, Source, time_of
from ws_celery.masking import masked, masked_text
from ws_celery.shown_arguments import shown_arguments, shown_text

if TYPE_CHECKING:
    from celery.backends.base import Backend
    from sqlalchemy.orm import Session


__all__ = (
    "Result",
    "answering",
    "backend_of",
    "forget_results",
    "result_of",
    "stored_results",
)

#: The errors of backends, by the module that defines them.
_ERRORS = (("sqlalchemy.exc", "SQLAlchemyError"), ("redis.exceptions", "RedisError"))

#: What Celery's backend for Redis says in a RuntimeError when it connects no more.
_GIVEN_UP = "Retry limit exceeded"


@contextmanager
def answering(*, except_for: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """Tell in one sentence that the result backend does not answer.

    :param except_for: errors that are somebody else's.
    :raises Unavailable: in place of what the backend has raised.
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


def backend_of(app: PyramidCelery) -> Backend:
    """Return the result backend of an application; that of a database makes its tables.

    :raises Unavailable: at once, if that database does not answer.
    """
    with answering():
        _connect_once(app)
        return app.backend


def _connect_once(app: PyramidCelery) -> None:
    # Celery would try for ten seconds, and log the traceback of each try.
    made, url = app.backend_class()
    if hasattr(made, "ResultSession"):
        probe = type("Probe", (made,), {"_create_tables": lambda _: None})(app=app, url=url)
        probe.session_manager.get_engine(probe.url, **probe.engine_options).connect().close()


def _zone_of(app: PyramidCelery, session: Session) -> tzinfo:
    """Return the zone that the times of results are in, which the database keeps without one.

    Celery writes the time in the zone of the application; a PostgreSQL puts it into that of the
    session, others forget its zone.
    """
    connection = session.connection()
    if connection.dialect.name != "postgresql":
        zone: tzinfo = app.timezone
        return zone
    name = str(connection.exec_driver_sql("SHOW TimeZone").scalar())
    try:
        return ZoneInfo(name)
    except (ValueError, ZoneInfoNotFoundError):  # it may be an offset, or a rule of POSIX
        query = "SELECT extract(timezone FROM now())::integer"
        return timezone(timedelta(seconds=connection.exec_driver_sql(query).scalar_one()))


def _in_zone(time: datetime, zone: tzinfo) -> datetime:
    """Return a time as a database keeps it; one without zone is UTC."""
    return aware(time).astimezone(zone).replace(tzinfo=None)


def _unavailable(error: BaseException) -> Unavailable:
    reason = getattr(error, "orig", None) or error
    return Unavailable("results", masked_text(str(reason).strip()))


def _errors() -> tuple[type[BaseException], ...]:
    """Return what backends raise; of libraries that are not loaded, nothing can have come."""
    found = ((sys.modules.get(module), name) for module, name in _ERRORS)
    return (OSError, OperationalError, *(getattr(each, name) for each, name in found if each))


@dataclass(frozen=True)
class Result(Record):
    """How a run has ended, or how far it is.

    :param id: of the task.
    :param state: ``SUCCESS``, ``FAILURE``, ``RETRY``, ``STARTED``, ``REVOKED``, ``SKIPPED`` or one
        of a task's own.
    :param task: its name; as all that follows ``traceback`` only with ``result_extended = true``.
    :param done: when it has ended, in UTC.
    :param result: what was returned, or the error, its secrets masked.
    :param traceback: of an error, its secrets masked.
    :param arguments: ``args`` and ``kwargs``, their secrets masked.
    """

    id: str
    state: str
    task: str | None
    done: datetime | None
    result: Any = field(repr=False)
    traceback: str | None = field(repr=False)
    arguments: Mapping[str, Any] | None = field(repr=False)
    worker: str | None = None
    queue: str | None = None
    retries: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, times as JSON has them; the result is whatever it is."""
        return {**super().as_dict(), "result": self.result}


def stored_results(
    source: Source,
    *,
    state: str | None = None,
    task: str | None = None,
    between: tuple[datetime | None, datetime | None] = (None, None),
    limit: int = 100,
) -> list[Result]:
    """Return results, the youngest first; what has not ended comes last.

    :param source: a registry, or what has one: a request, a Celery app.
    :param state: only those in this state.
    :param task: only those of the task of this name; needs ``result_extended = true``.
    :param between: only what was stored at the first time or later, and before the second one; a
        time without zone is UTC.
    :param limit: how many at most.
    :raises NotSupported: if they are not in a database, or have no names of tasks to look for.
    :raises Unavailable: if the database does not answer.
    """
    app = get_celery_app(source)
    backend = backend_of(app)
    columns = getattr(backend, "task_cls", None)
    if columns is None or not hasattr(backend, "ResultSession"):
        raise NotSupported("list results", _kind(backend))
    if task is not None and not hasattr(columns, "name"):
        raise NotSupported("list results", "without result_extended")
    since, until = between
    with _database(backend) as session:
        zone = _zone_of(app, session)
        conditions = [
            *([columns.status == state.upper()] if state else []),
            *([columns.name == task] if task else []),
            *([columns.date_done >= _in_zone(since, zone)] if since else []),
            *([columns.date_done < _in_zone(until, zone)] if until else []),
        ]
        # What has not ended comes last, as MariaDB can say it, too.
        order = columns.date_done.is_(None), columns.date_done.desc()
        query = session.query(columns).filter(*conditions).order_by(*order)
        found = [each.to_dict() for each in query.limit(limit)]
    return [_result(app, _decoded(backend, each), zone) for each in found]


def result_of(source: Source, task_id: str) -> Result:
    """Return what is known of a run by the id of its task, from any result backend.

    :raises NotFound: if nothing is.
    :raises Unavailable: if the backend does not answer.
    """
    app = get_celery_app(source)
    backend = backend_of(app)
    found = _found(backend, task_id)
    if not hasattr(backend, "ResultSession"):
        return _result(app, found)
    with _database(backend) as session:
        zone = _zone_of(app, session)
    return _result(app, found, zone)


def forget_results(source: Source, *ids: str) -> None:
    """Delete results.

    :raises NotFound: for the first one that is not there; those before it are deleted.
    """
    backend = backend_of(get_celery_app(source))
    for task_id in ids:
        _found(backend, task_id)
        with answering():
            backend.forget(task_id)


@contextmanager
def _database(backend: Backend) -> Iterator[Any]:
    with answering():
        session = backend.ResultSession()
        try:
            yield session
        finally:
            session.close()


def _found(backend: Backend, task_id: str) -> dict[str, Any]:
    if isinstance(backend, DisabledBackend):
        raise NotFound("result", task_id)
    with answering():
        found: dict[str, Any] = backend.get_task_meta(task_id, cache=False)
    if found["status"] == states.PENDING:
        raise NotFound("result", task_id)
    return {"task_id": task_id, **found}


def _result(app: PyramidCelery, found: Mapping[str, Any], zone: tzinfo = timezone.utc) -> Result:
    name, traceback = found.get("name"), found.get("traceback")
    done = found.get("date_done")
    if isinstance(done, datetime) and done.tzinfo is None:
        done = done.replace(tzinfo=zone)
    call = found.get("args"), found.get("kwargs")
    known = None if call == (None, None) else call
    return Result(
        id=found["task_id"],
        state=found["status"],
        task=name,
        done=time_of(done),
        result=_shown(app, found, known),
        traceback=traceback and shown_text(app, name, known, traceback),
        arguments=known and shown_arguments(app, name, *call),
        worker=found.get("worker"),
        queue=found.get("queue"),
        retries=found.get("retries"),
    )


def _shown(app: PyramidCelery, found: Mapping[str, Any], call: tuple[Any, Any] | None) -> Any:
    value = found.get("result")
    if isinstance(value, BaseException):
        value = f"{type(value).__name__}: {value}"
    if found["status"] in states.EXCEPTION_STATES:
        return _shown_error(value, partial(shown_text, app, found.get("name"), call))
    if (
        found["status"] == SKIPPED
        and isinstance(value, Mapping)
        and isinstance(value.get("holder"), Mapping)
    ):
        # The key is that of a lock, and the token tells holders apart.
        holder = {name: masked("", each) for name, each in value["holder"].items()}
        return {**{name: masked("", each) for name, each in value.items()}, "holder": holder}
    return masked("", value)


def _shown_error(value: Any, shown: Callable[[str], str]) -> Any:
    """Return an error as it is stored: a text, or its class and its arguments."""
    if isinstance(value, Mapping):
        return {key: _shown_error(inner, shown) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shown_error(inner, shown) for inner in value]
    return shown(value) if isinstance(value, str) else value


def _decoded(backend: Backend, row: Mapping[str, Any]) -> dict[str, Any]:
    coded = [key for key in ("args", "kwargs") if row.get(key)]
    if isinstance(row.get("result"), bytes):  # with Celery 5.5, it is the value itself
        coded.append("result")
    return {**row, **{key: _read(backend, row[key]) for key in coded}}


def _read(backend: Backend, stored: Any) -> Any:
    try:
        return backend.decode(stored)
    except Exception as error:  # noqa: BLE001  whatever was written there; it is shown
        return f"(cannot be read: {type(error).__name__})"


def _kind(backend: Backend) -> str:
    if isinstance(backend, DisabledBackend):
        return "none"
    return str(type(backend).__name__.removesuffix("Backend"))
