"""Which database a dump is of, and how the program that makes it is told."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ("libpq_variables", "title_of")

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

#: What tells one server from another.
_SERVER = ("PGSERVICE", "PGHOSTADDR", "PGHOST", "PGPORT")

#: Characters of a name that a file has, at most: file systems allow 255 bytes for all of it.
_LONGEST = 50


def libpq_variables(url: Any) -> dict[str, str]:
    """Return what a URL of SQLAlchemy says of a connection, as libpq's environment variables.

    Not as arguments of a program, which every user of the machine can read.
    """
    # The dialect knows how its driver is told: several hosts, with ports or without.
    _, options = url.get_dialect()().create_connect_args(url)
    # Last, because a dialect may have taken them for itself.
    given = {**url.query, **options}
    return {
        _VARIABLES[option]: text
        for option, value in given.items()
        if option in _VARIABLES and (text := _text(value))
    }


def title_of(url: Any) -> str:
    """Return a name for the dumps of one database, which those of no other have."""
    if url.get_backend_name() == "sqlite":
        path = Path(url.database).absolute()
        return _title(path.stem, [str(path)])
    given = {**os.environ, **libpq_variables(url)}
    return _title(url.database, [*(given.get(name, "") for name in _SERVER), url.database])


def _title(name: str, identity: Iterable[str]) -> str:
    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:10]
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', name)[:_LONGEST]}-{digest}"


def _text(value: Any) -> str:
    parts = value if isinstance(value, (list, tuple)) else [value]
    return ",".join("" if part is None else str(part) for part in parts)
