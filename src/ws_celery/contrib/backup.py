"""The task ``backup``: a dump of the application's database, and only so many of them.

Switched on by ``imports = ws_celery.contrib.backup`` or ``config.include`` of this module.
"""

from __future__ import annotations

import re
import sqlite3
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ws_celery.contrib.backup_databases import libpq_variables, title_of
from ws_celery.contrib.backup_stores import Store, store_of
from ws_celery.contrib.programs import ProgramError, run_program
from ws_celery.declaration import task
from ws_celery.exceptions import ConfigurationError, WsCeleryError
from ws_celery.masking import masked_text
from ws_celery.settings import our_setting
from ws_celery.tasks import RequestAwareTask

__all__ = ("BackupFailed", "backup", "includeme")

_NOWHERE = "-"
_KEEP = 14
_TIMEOUT = 3600.0
_TIME = "%Y%m%dT%H%M%S%fZ"


def includeme(config: Any) -> None:
    """Register the task ``backup``."""
    config.scan(__name__)


class BackupFailed(WsCeleryError):
    """The database was not dumped; nothing was deleted."""


@task(name="backup", base=RequestAwareTask)
def backup(request: Any) -> dict[str, Any]:
    """Dump the database of ``request.dbsession`` to ``ws_celery.backup.target``.

    PostgreSQL is dumped by ``pg_dump`` in its custom format, for ``pg_restore``; SQLite by its own
    backup, while it is in use. The file is complete when it has its name. Then the oldest dumps of
    this very database are deleted, until ``ws_celery.backup.keep`` are left.

    :return: ``file``, ``bytes`` and the names that were ``removed``.
    :raises BackupFailed: if the dump was not made; no older one is deleted then.
    """
    settings = request.registry.settings
    keep = our_setting(settings, "ws_celery.backup.keep", default=_KEEP)
    timeout = our_setting(settings, "ws_celery.backup.timeout", default=_TIMEOUT)
    store, url = _store(settings), _database_url(request)
    dump, suffix = _dumper(url)
    title = title_of(url)
    name = f"{title}-{datetime.now(timezone.utc).strftime(_TIME)}{suffix}"
    with tempfile.TemporaryDirectory(prefix="ws-celery-backup-") as folder:
        file = Path(folder, name)  # nobody else may read what is in there
        dump(url, file, timeout)
        size = file.stat().st_size
        place = store.put(file, name)
    ours = re.compile(rf"{re.escape(title)}-\d{{8}}T\d{{12}}Z{re.escape(suffix)}")
    dumps = sorted(filter(ours.fullmatch, store.names()))
    removed = dumps[: max(len(dumps) - keep, 0)]
    for old in removed:
        store.remove(old)
    return {"file": place, "bytes": size, "removed": removed}


def _database_url(request: Any) -> Any:
    session = getattr(request, request.celery_app.session_attribute, None)
    if session is None:
        raise BackupFailed(
            "There is no database to dump: the request has no session. Name its attribute by the "
            "setting ws_celery.dbsession."
        )
    bind = session.get_bind()
    return getattr(bind, "engine", bind).url


def _dumper(url: Any) -> tuple[Callable[[Any, Path, float], None], str]:
    kinds = {"postgresql": (_dump_postgresql, ".dump"), "sqlite": (_dump_sqlite, ".sqlite")}
    kind = url.get_backend_name()
    if kind not in kinds or not url.database or url.database == ":memory:":
        raise BackupFailed(
            f"A database of {kind} cannot be dumped, or it is in memory: PostgreSQL and files of "
            "SQLite can. Run the dump program of yours by run_command."
        )
    return kinds[kind]


def _dump_postgresql(url: Any, file: Path, timeout: float) -> None:
    words = ("pg_dump", "--format=custom", "--no-password", "--file", str(file))
    environment = {**libpq_variables(url), "PGDATABASE": url.database}
    try:
        ended = run_program(words, timeout, environment)
    except ProgramError as error:
        raise BackupFailed(str(error)) from error
    if ended.exit_code != 0:
        raise BackupFailed(f"pg_dump has failed: {masked_text(ended.output.strip())}")


def _dump_sqlite(url: Any, file: Path, timeout: float) -> None:
    source = Path(url.database).absolute().as_uri()
    try:
        with (
            closing(sqlite3.connect(f"{source}?mode=ro", timeout=timeout, uri=True)) as database,
            closing(sqlite3.connect(file)) as copy,
        ):
            database.backup(copy)
    except sqlite3.Error as error:
        raise BackupFailed(f"{url.database} cannot be dumped: {error}") from error


def _store(settings: Mapping[str, Any]) -> Store:
    target: str = our_setting(settings, "ws_celery.backup.target", default=_NOWHERE)
    if target == _NOWHERE:
        raise ConfigurationError(
            "ws_celery.backup.target is not set. Name a folder, or a URL such as s3://bucket/shop."
        )
    return store_of(target)
