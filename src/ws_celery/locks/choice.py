"""Where the locks of an application are."""

from __future__ import annotations

from typing import Any

from kombu import Connection

from ws_celery.exceptions import ConfigurationError
from ws_celery.locks.holding import Store
from ws_celery.locks.memory import MemoryStore
from ws_celery.settings import our_setting

__all__ = ("store_of",)

_REDIS = ("redis", "rediss", "sentinel", "valkey", "valkeys")


def store_of(app: Any) -> Store:
    """Return the store that ``ws_celery.locks`` names.

    If it is not set: the Redis of the broker, else that of the results, else the database; this
    process where the broker is ``memory://``.
    """
    conf = app.conf
    wanted = our_setting(app.registry.settings, "ws_celery.locks", "auto")
    if wanted == "auto":
        wanted = _default(conf)
    if wanted == "memory":
        return MemoryStore()
    if wanted == "database":
        from ws_celery.locks.postgresql import PostgresqlStore  # needs SQLAlchemy

        return PostgresqlStore(app)
    if wanted == conf.result_backend:
        options, ssl = conf.result_backend_transport_options, conf.redis_backend_use_ssl
    else:
        options, ssl = conf.broker_transport_options, conf.broker_use_ssl
    return _redis_store(app, wanted, dict(options or {}), ssl)


def _default(conf: Any) -> Any:
    broker = conf.broker_write_url or conf.broker_url
    for url in (broker, conf.result_backend):
        if _is_redis(url):
            return url
    return "memory" if _scheme(broker) == "memory" else "database"


def _redis_store(app: Any, url: str, options: dict[str, Any], ssl: Any) -> Store:
    try:
        from ws_celery.locks.redis_store import RedisStore
    except ImportError as error:
        raise ConfigurationError(
            f"The locks are in Redis, and redis-py is missing ({error}). "
            "Install `ws-celery[redis]`, or set `ws_celery.locks = database`."
        ) from error
    prefix = options.get("global_keyprefix", "")
    for option in ("socket_connect_timeout", "socket_timeout"):
        options.setdefault(option, app.publisher.timeout)
    connection = Connection(url, transport_options=options, ssl=ssl or False)
    return RedisStore(connection, prefix)


def _is_redis(url: Any) -> bool:
    return _scheme(url) in _REDIS


def _scheme(url: Any) -> str:
    first = url[0] if isinstance(url, (list, tuple)) and url else url
    return str(first or "").partition("://")[0].partition("+")[0]
