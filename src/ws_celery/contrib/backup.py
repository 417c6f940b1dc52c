"""The task ``backup``: a dump of the application's database, and only so many of them.

Switched on by ``imports = ws_celery.contrib.backup`` or ``config.include`` of this module.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ws_celery.contrib.commands import ProgramError, run_program
from ws_celery.declaration import task
from ws_celery.exceptions import ConfigurationError, WsCeleryError
from ws_celery.masking import masked_text
from ws_celery.settings import our_setting
from ws_celery.tasks import RequestAwareTask

if TYPE_CHECKING:
    from pyramid.config import Configurator
    from pyramid.request import Request
    from sqlalchemy import URL

__all__ = (
    "BackupFailed",
    "backup",
    "includeme",
    "libpq_variables",
    "title_of",
)

_NOWHERE = "-"
_KEEP = 14
_TIMEOUT = 3600.0
_TIME = "%Y%m%dT%H%M%S%fZ"


def includeme(config: Configurator) -> None:
    """Register the task ``backup``."""
    config.scan(__name__)


class BackupFailed(WsCeleryError):
    """The database was not dumped; nothing was deleted."""


@task(name="backup", base=RequestAwareTask)
def backup(request: Request) -> dict[str, Any]:
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
    target, url = _target(settings), _database_url(request)
    dump, suffix = _dumper(url)
    title = title_of(url)
    name = f"{title}-{datetime.now(timezone.utc).strftime(_TIME)}{suffix}"
    with tempfile.TemporaryDirectory(prefix="ws-celery-backup-") as folder:
        file = Path(folder, name)  # nobody else may read what is in there
        dump(url, file, timeout)
        size = file.stat().st_size
        place = target.put(file, name)
    ours = re.compile(rf"{re.escape(title)}-\d{{8}}T\d{{12}}Z{re.escape(suffix)}")
    dumps = sorted(filter(ours.fullmatch, target.names()))
    removed = dumps[: max(len(dumps) - keep, 0)]
    for old in removed:
        target.remove(old)
    return {"file": place, "bytes": size, "removed": removed}


def _database_url(request: Request) -> URL:
    session = getattr(request, request.celery_app.session_attribute, None)
    if session is None:
        raise BackupFailed(
            "There is no database to dump: the request has no session. Name its attribute by the "
            "setting ws_celery.dbsession."
        )
    url: URL = session.get_bind().engine.url
    return url


def title_of(url: URL) -> str:
    """Return a name for the dumps of one database, which those of no other have."""
    name = url.database or ""
    if url.get_backend_name() == "sqlite":
        path = Path(name).absolute()
        name, identity = path.stem, str(path)
    else:
        given = {**os.environ, **libpq_variables(url)}
        identity = "\0".join([*(given.get(each, "") for each in _SERVER), name])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:10]
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', name)[:_LONGEST]}-{digest}"


#: What tells one server from another.
_SERVER = ("PGSERVICE", "PGHOSTADDR", "PGHOST", "PGPORT")

#: Characters of a name that a file has, at most: file systems allow 255 bytes for all of it.
_LONGEST = 50


# Dumping


def _dumper(url: URL) -> tuple[Callable[[URL, Path, float], None], str]:
    """Return what dumps a database, and the suffix of its files."""
    kinds = {"postgresql": (_dump_postgresql, ".dump"), "sqlite": (_dump_sqlite, ".sqlite")}
    kind = url.get_backend_name()
    if kind not in kinds or not url.database or url.database == ":memory:":
        raise BackupFailed(
            f"A database of {kind} cannot be dumped, or it is in memory: PostgreSQL and files of "
            "SQLite can. Run the dump program of yours by run_command."
        )
    return kinds[kind]


def _dump_sqlite(url: URL, file: Path, timeout: float) -> None:
    source = Path(url.database or "").absolute().as_uri()
    try:
        with (
            closing(sqlite3.connect(f"{source}?mode=ro", timeout=timeout, uri=True)) as database,
            closing(sqlite3.connect(file)) as copy,
        ):
            database.backup(copy)
    except sqlite3.Error as error:
        raise BackupFailed(f"{url.database} cannot be dumped: {error}") from error


def _dump_postgresql(url: URL, file: Path, timeout: float) -> None:
    words = ("pg_dump", "--format=custom", "--no-password", "--file", str(file))
    environment = {**libpq_variables(url), "PGDATABASE": url.database or ""}
    try:
        ended = run_program(words, timeout, environment)
    except ProgramError as error:
        raise BackupFailed(str(error)) from error
    if ended.exit_code != 0:
        raise BackupFailed(f"pg_dump has failed: {masked_text(ended.output.strip())}")


def libpq_variables(url: URL) -> dict[str, str]:
    """Return what a URL of SQLAlchemy says of a connection, as libpq's environment variables.

    Not as arguments of a program, which every user of the machine can read.
    """
    # The dialect knows what its driver takes: several hosts, with ports or without.
    _, options = url.get_dialect()().create_connect_args(url)
    # Last, because a dialect may have taken them for itself.
    given = {**url.query, **options}
    return {
        _VARIABLES[option]: text
        for option, value in given.items()
        if option in _VARIABLES and (text := _text(value))
    }


def _text(value: object) -> str:
    parts = value if isinstance(value, (list, tuple)) else [value]
    return ",".join("" if part is None else str(part) for part in parts)


#: Environment variables of libpq, by the options of a connection.
_VARIABLES = {
    "host": "PGHOST",
    "hostaddr": "PGHOSTADDR",
    "port": "PGPORT",
    "dbname": "PGDATABASE",
    "database": "PGDATABASE",  # asyncpg and pg8000
    "user": "PGUSER",
    "password": "PGPASSWORD",
    "passfile": "PGPASSFILE",
    "require_auth": "PGREQUIREAUTH",
    "channel_binding": "PGCHANNELBINDING",
    "service": "PGSERVICE",
    "servicefile": "PGSERVICEFILE",
    "options": "PGOPTIONS",
    "application_name": "PGAPPNAME",
    "sslmode": "PGSSLMODE",
    "ssl": "PGSSLMODE",  # asyncpg
    "requiressl": "PGREQUIRESSL",
    "sslnegotiation": "PGSSLNEGOTIATION",
    "sslcompression": "PGSSLCOMPRESSION",
    "sslcert": "PGSSLCERT",
    "sslkey": "PGSSLKEY",
    "sslcertmode": "PGSSLCERTMODE",
    "sslrootcert": "PGSSLROOTCERT",
    "sslcrl": "PGSSLCRL",
    "sslcrldir": "PGSSLCRLDIR",
    "sslsni": "PGSSLSNI",
    "requirepeer": "PGREQUIREPEER",
    "ssl_min_protocol_version": "PGSSLMINPROTOCOLVERSION",
    "ssl_max_protocol_version": "PGSSLMAXPROTOCOLVERSION",
    "min_protocol_version": "PGMINPROTOCOLVERSION",
    "max_protocol_version": "PGMAXPROTOCOLVERSION",
    "gssencmode": "PGGSSENCMODE",
    "krbsrvname": "PGKRBSRVNAME",
    "gsslib": "PGGSSLIB",
    "gssdelegation": "PGGSSDELEGATION",
    "connect_timeout": "PGCONNECT_TIMEOUT",
    "client_encoding": "PGCLIENTENCODING",
    "target_session_attrs": "PGTARGETSESSIONATTRS",
    "load_balance_hosts": "PGLOADBALANCEHOSTS",
}

# Where the dumps are


class _Target(Protocol):
    """A place that holds dumps."""

    def put(self, dump: Path, name: str) -> str:
        """Keep a file; it is complete when it has its name. Returns where it is."""

    def names(self) -> list[str]:
        """Return the names of all files."""

    def remove(self, name: str) -> None:
        """Delete a file."""


def _target(settings: Mapping[str, Any]) -> _Target:
    """Return the folder that the settings name, made if it is not there.

    :raises ConfigurationError: if they name none, or it is a URL and fsspec is not installed.
    """
    target: str = our_setting(settings, "ws_celery.backup.target", default=_NOWHERE)
    if target == _NOWHERE:
        raise ConfigurationError(
            "ws_celery.backup.target is not set. Name a folder, or a URL such as s3://bucket/shop."
        )
    scheme, is_url, path = target.partition("://")
    if is_url and scheme not in ("file", "local"):
        return _Remote(target)
    return _Folder(Path(path if is_url else target))


def _unfinished(name: str) -> str:
    return f"{name}.part"


class _Folder:
    """A folder of this machine, whose dumps are for their owner only."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.mkdir(parents=True, exist_ok=True, mode=0o700)

    def put(self, dump: Path, name: str) -> str:
        unfinished = self._path / _unfinished(name)
        try:
            unfinished.touch(mode=0o600)
            with dump.open("rb") as source, unfinished.open("wb") as copy:
                shutil.copyfileobj(source, copy)
                copy.flush()
                os.fsync(copy.fileno())  # else the name may outlive a loss of power, alone
            return str(unfinished.rename(self._path / name))
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise

    def names(self) -> list[str]:
        return [each.name for each in self._path.iterdir()]

    def remove(self, name: str) -> None:
        (self._path / name).unlink(missing_ok=True)


class _Remote:
    """A folder behind a URL, by fsspec."""

    def __init__(self, url: str) -> None:
        try:
            import fsspec
        except ImportError:
            raise ConfigurationError(
                "ws_celery.backup.target is a URL, which needs fsspec: "
                "pip install 'ws-celery[backup]'."
            ) from None
        self._files, self._path = fsspec.core.url_to_fs(url)
        self._files.makedirs(self._path, exist_ok=True)

    def put(self, dump: Path, name: str) -> str:
        place, unfinished = f"{self._path}/{name}", f"{self._path}/{_unfinished(name)}"
        try:
            self._files.put_file(str(dump), unfinished)
            self._files.mv(unfinished, place)
        except BaseException:
            with suppress(Exception):  # the error that is raised is the first one
                self._files.rm_file(unfinished)
            raise
        return str(self._files.unstrip_protocol(place))

    def names(self) -> list[str]:
        self._files.invalidate_cache()
        return [each.rpartition("/")[2] for each in self._files.ls(self._path, detail=False)]

    def remove(self, name: str) -> None:
        self._files.rm_file(f"{self._path}/{name}")
