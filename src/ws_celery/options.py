"""Every option of Celery: its kind, its names, and what became of those that are gone.

The options are those of the installed Celery (``celery.app.defaults``). Its declared types choose
the kinds, except for the corrections below; a test walks the table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from celery.app import defaults
from celery.app.backends import BACKEND_ALIASES
from celery.app.defaults import NAMESPACES, flatten
from celery.concurrency import ALIASES as POOLS
from kombu import compression
from kombu.serialization import registry as serializers
from kombu.transport import TRANSPORT_ALIASES

from ws_celery.converters import (
    BLANK,
    BOOL,
    BYTES,
    CALLBACK,
    FORMAT,
    LIST,
    MODULES,
    RATE,
    SECONDS,
    TEXT,
    TLS,
    ZONE,
    Kind,
    Refused,
    choice,
    dotted,
    json_value,
    mapping,
    nearest,
    number,
    resolve,
    untyped,
    whole,
)

__all__ = (
    "KINDS",
    "OLD_NAMES",
    "REMOVED",
    "Option",
    "find_option",
    "kind_of",
    "option_names",
)


@dataclass(frozen=True)
class Option:
    """One option of Celery.

    :param name: its lower-case name.
    :param kind: what it accepts.
    :param default: Celery's default.
    :param nullable: whether ``none`` is a value.
    """

    name: str
    kind: Kind
    default: Any
    nullable: bool

    def accept(self, value: object) -> Any:
        """Return the typed value.

        :raises Refused: if ``value`` is not one.
        """
        empty = value.strip().lower() == "none" if isinstance(value, str) else value is None
        return None if empty and self.nullable else self.kind.accept(value)

    @property
    def expected(self) -> str:
        """What is accepted, in words."""
        return f"{self.kind.expected}, or none" if self.nullable else self.kind.expected


# --- Kinds that know Celery -------------------------------------------------------------------

_URL = re.compile(r"(?P<scheme>[A-Za-z][\w.+:-]*)://", re.ASCII)


def _urls(text: str) -> list[str]:
    # A comma separates where another URL follows; hosts of one URL may have commas between them.
    parts = re.split(r"[\s,]+(?=[A-Za-z][\w.+-]*://)|\s*\n\s*", text)
    return [part.strip().rstrip(",") for part in parts if part.strip()]


def _broker(text: str) -> Any:
    urls = json_value(text) if text.startswith("[") else _urls(text)
    return _one_or_all(urls)


def _one_or_all(urls: list[Any]) -> Any:
    if not urls:
        raise Refused("is empty")
    for url in urls:
        _known_transport(url)
    return urls[0] if len(urls) == 1 else urls


def _known_transport(url: Any) -> None:
    match = _URL.match(url) if isinstance(url, str) else None
    if not match:
        raise Refused("is no URL")
    known = {*TRANSPORT_ALIASES, "embedded"}
    transport = match["scheme"].partition("+")[0]
    if transport not in known and not re.search(r"[.:]", transport):
        raise Refused(f"has the unknown transport {transport}", nearest(transport, known))


def _transport(text: str) -> str:
    if text not in TRANSPORT_ALIASES and not re.fullmatch(r"[\w.]+[.:]\w+", text):
        raise Refused(close=nearest(text, TRANSPORT_ALIASES))
    return text


@cache
def _extensions() -> set[str]:
    return {point.name for point in entry_points(group="celery.result_backends")}


def _backend(text: str) -> str:
    scheme, separator, _ = text.partition("://")
    name = scheme.partition("+")[0]
    known = {*BACKEND_ALIASES, *_extensions(), "embedded"}
    if not text or "\n" in text or (not separator and ":" in text and "." not in text):
        raise Refused
    if name not in known and not re.fullmatch(r"[\w.]+[.:]\w+", name):
        raise Refused("is no result backend that Celery knows", nearest(name, known))
    return text


def _database(text: str) -> str:
    if not _URL.match(text) or "\n" in text:
        raise Refused("is no URL")
    return text


_BROKER = Kind(
    "URL", "a broker URL, or several by line or comma", "redis://localhost:6379/0", _broker,
    (list, tuple), lambda urls: urls if isinstance(urls, str) else _one_or_all(list(urls)),
)  # fmt: skip
_BACKEND = Kind("URL", "the URL or name of a result backend", "redis://localhost:6379/1", _backend)
_DATABASE = Kind("URL", "a database URL", "postgresql://localhost/celery", _database)
_TRANSPORT = Kind("transport", "a transport of kombu, or its dotted name", "redis", _transport)


def _serializer(text: str) -> str:
    # `auth` is registered when security is set up.
    known = {*serializers.name_to_type, "auth"}
    if text not in known:
        raise Refused(close=nearest(text, known))
    return text


def _content(values: list[Any]) -> list[str]:
    known = {*serializers.name_to_type, *serializers.type_to_name, "auth", "application/data"}
    for value in LIST.finish(values):
        if value not in known:
            raise Refused(f"has the unknown content type {value!r}", nearest(value, known))
    return list(values)


def _compression(text: str) -> str:
    known = {*compression._aliases, *compression._encoders}
    if text not in known:
        raise Refused(close=nearest(text, known))
    return text


_SERIALIZER = Kind("serializer", "a serializer such as json", "json", _serializer)
_CONTENT = replace(
    LIST, expected="serializers or content types, by line or comma", example="json", finish=_content
)
_COMPRESSION = Kind("compression", "a compression such as gzip", "gzip", _compression)
_EXCHANGE = choice(
    "exchange type", "direct", "topic", "fanout", "headers", more=lambda text: text[:2] == "x-"
)
_QUEUE_TYPE = choice("queue type", "classic", "quorum")
_PORT = whole(1, 65535, "6379")
_PRIORITY = whole(0, 255, "5")
_LEVEL = choice("level", "DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def _mode(text: str) -> int | str:
    if text.lower() in ("transient", "persistent"):
        return text.lower()
    return int(text) if text in ("1", "2") else _refuse()


def _refuse() -> Any:
    raise Refused


_MODE = Kind(
    "delivery mode", "1, 2, transient or persistent", "persistent", _mode, (int,),
    lambda value: value if value in (1, 2, "transient", "persistent") else _refuse(),
)  # fmt: skip


def _concurrency(text: str) -> int | str:
    # Celery 5.7 sizes the prefork pool by itself.
    if text == "auto" and _DECLARED["worker_concurrency"].type == "any":
        return text
    return int(whole().accept(text))


_CONCURRENCY = Kind(
    "int", "a whole number of at least 0, or auto", "4", _concurrency, (int,),
    lambda value: value if value == "auto" else whole().finish(value),
)  # fmt: skip

_FAILOVER = Kind(
    "failover strategy",
    "round-robin, shuffle or the dotted name of a function",
    "shuffle",
    lambda text: text if text in ("round-robin", "shuffle") else resolve(text),
    (object,),
    lambda value: value if isinstance(value, str) or callable(value) else _refuse(),
)


def _routers(value: Any) -> Any:
    """Resolve the dotted names of routers; check that a mapping has mappings or queue names."""
    if isinstance(value, str):
        return resolve(value)
    if isinstance(value, (list, tuple)):
        return [_router(each) for each in value]
    if callable(value):
        return value
    if not all(isinstance(route, (str, dict)) and route for route in value.values()):
        raise Refused("has a route that is neither a queue name nor an object")
    return dict(value)


def _router(value: Any) -> Any:
    # A pair of pattern and route, or a router like those that stand alone.
    if isinstance(value, (list, tuple)):
        if len(value) != 2 or not isinstance(value[0], str):
            raise Refused("has a route that is no pair of pattern and queue")
        return tuple(value)
    if not isinstance(value, (str, dict)) and not callable(value):
        raise Refused("has an item that is no router")
    return _routers(value)


def _annotations(value: Any) -> Any:
    if isinstance(value, str):
        return resolve(value)
    if isinstance(value, (list, tuple)):
        return [_annotations(each) for each in value]
    if not isinstance(value, dict):
        return value
    if not all(isinstance(annotation, dict) for annotation in value.values()):
        raise Refused("has an annotation that is no object")
    return dict(value)


def _json_or_name(text: str) -> Any:
    if not text:
        raise Refused("is empty")
    return json_value(text) if text[0] in "{[" else text


_ROUTES = Kind(
    "routes", "a JSON object of tasks and queues, or the dotted name of a router",
    '{"myapp.tasks.*": {"queue": "slow"}}', _json_or_name, (object,), _routers,
)  # fmt: skip
_ANNOTATIONS = Kind(
    "annotations", "a JSON object of tasks and their attributes, or a dotted name",
    '{"myapp.tasks.slow": {"rate_limit": "10/m"}}', _json_or_name, (object,), _annotations,
)  # fmt: skip
#: Completed by the sections, which know how to make queues and schedule entries.
_QUEUES = Kind(
    "queues", "names of queues by line or comma, or a JSON object of them", "fast, slow",
    lambda text: json_value(text) if text[:1] in ("{", "[") else LIST.convert(text),
    (dict, list, tuple), lambda value: value or _refuse(),
)  # fmt: skip
_SCHEDULE = mapping('{"backup": {"task": "backup", "schedule": "24h"}}')


def retry_policy(value: dict[str, Any]) -> dict[str, Any]:
    """Check the keys and numbers of a retry policy."""
    for key, number_ in value.items():
        if key not in _POLICY:
            raise Refused(f"has the unknown key {key}", nearest(key, _POLICY))
        if number_ is None and key in ("max_retries", "interval_max", "timeout"):
            continue
        if isinstance(number_, bool) or not isinstance(number_, (int, float)) or number_ < 0:
            raise Refused(f"has {key} = {number_!r}, which is no number of at least 0")
    return dict(value)


_POLICY = ("max_retries", "interval_start", "interval_step", "interval_max", "timeout")
_RETRY_POLICY = mapping('{"max_retries": 3, "interval_step": 0.2}', retry_policy)
_MIXED = Kind("any", "JSON or text", "4", untyped, (object,))

#: Kind for each type that Celery declares; a type that is missing here fails a test.
KINDS: dict[Any, Kind] = {
    "any": _MIXED,
    "bool": BOOL,
    "bytes": BYTES,
    "dict": mapping('{"key": "value"}'),
    "float": number(),
    "int": whole(),
    int: whole(),  # beat_cron_starting_deadline is declared by the class
    "list": LIST,
    "str": TEXT,  # result_compression is declared by another word than all others
    "string": TEXT,
    "tuple": MODULES,
}

#: Options whose declared type is not what Celery does with the value, or does not say enough.
CORRECTIONS: dict[str, Kind] = {
    # Declared too narrow, or as something else.
    "broker_heartbeat_checkrate": number(),
    "broker_read_url": _BROKER,
    "broker_url": _BROKER,  # may be a list
    "broker_use_ssl": TLS,  # may be a mapping
    "broker_write_url": _BROKER,
    "cassandra_auth_kwargs": mapping('{"username": "celery"}'),
    "cassandra_port": _PORT,
    "database_engine_callback": CALLBACK,
    "redis_backend_use_ssl": TLS,
    "result_backend_max_retries": number(most=float("inf")),
    "result_cache_max": whole(-1),
    "result_expires": SECONDS,
    "task_annotations": _ANNOTATIONS,
    "task_default_delivery_mode": _MODE,
    "task_default_priority": _PRIORITY,
    "task_publish_retry_policy": _RETRY_POLICY,
    "task_queues": _QUEUES,
    "task_routes": _ROUTES,
    "beat_schedule": _SCHEDULE,
    "worker_concurrency": _CONCURRENCY,
    # Text that is one of few words, or has a form.
    "accept_content": _CONTENT,
    "result_accept_content": _CONTENT,
    "beat_scheduler": dotted("class", "celery.beat:PersistentScheduler", *(
        point.name for point in entry_points(group="celery.beat_schedulers")
    )),
    "broker_failover_strategy": _FAILOVER,
    "broker_native_delayed_delivery_queue_type": _QUEUE_TYPE,
    "broker_port": _PORT,
    "broker_transport": _TRANSPORT,
    "cosmosdbsql_consistency_level": choice(
        "level", "Session", "BoundedStaleness", "ConsistentPrefix", "Eventual", "Strong"
    ),
    "database_url": _DATABASE,
    "event_serializer": _SERIALIZER,
    "redis_port": _PORT,
    "result_backend": _BACKEND,
    "result_compression": _COMPRESSION,
    "result_exchange_type": _EXCHANGE,
    "result_serializer": _SERIALIZER,
    "task_compression": _COMPRESSION,
    "task_create_missing_queue_exchange_type": _EXCHANGE,
    "task_create_missing_queue_type": _QUEUE_TYPE,
    "task_default_exchange_type": _EXCHANGE,
    "task_default_queue_type": _QUEUE_TYPE,
    "task_default_rate_limit": RATE,
    "task_protocol": whole(1, 2, "2"),
    "task_queue_max_priority": _PRIORITY,
    "task_serializer": _SERIALIZER,
    "timezone": ZONE,
    "worker_agent": dotted("class", "myapp.worker:Agent"),
    "worker_autoscaler": dotted("class", "celery.worker.autoscale:Autoscaler"),
    "worker_consumer": dotted("class", "celery.worker.consumer:Consumer"),
    "worker_log_format": FORMAT,
    "worker_pool": dotted("class", "prefork", *POOLS),
    "worker_pool_start_method": choice("method", "fork", "spawn"),
    "worker_redirect_stdouts_level": _LEVEL,
    "worker_task_log_format": FORMAT,
    "worker_timer": dotted("class", "kombu.asynchronous.timer:Timer"),
    # Times, for which a period reads better than seconds.
    **dict.fromkeys(
        ("event_queue_expires", "event_queue_ttl", "gcs_ttl", "result_chord_expires",
         "result_failure_expires", "task_soft_time_limit", "task_time_limit",
         "worker_soft_shutdown_timeout"),
        SECONDS,
    ),
    # Empty text means something.
    **dict.fromkeys(("azureblockblob_base_path", "gcs_base_path", "s3_base_path",
                     "task_default_exchange", "task_default_routing_key", "broker_vhost"), BLANK),
}  # fmt: skip

#: Options that Celery reads although its table does not have them, and their kinds.
MISSING: dict[str, Kind] = {
    "cassandra_secure_bundle_path": TEXT,
    "dynamodb_endpoint_url": TEXT,
    "firestore_project": TEXT,
    "gcs_threadpool_maxsize": whole(1, example="10"),
    "redis_backend_credential_provider": replace(
        CALLBACK, expected="the dotted name of a redis.CredentialProvider"
    ),
    "redis_backend_health_check_interval": SECONDS,
    "redis_client_name": TEXT,
    "result_backend_thread_safe": BOOL,
}

#: Options with a default of their own for which none means something all the same: no limit.
NULLABLE = frozenset(
    ("broker_connection_max_retries", "broker_connection_timeout", "broker_heartbeat",
     "broker_pool_limit", "control_queue_expires", "control_queue_ttl", "event_queue_expires",
     "event_queue_ttl", "redis_socket_timeout", "result_expires")
)  # fmt: skip

#: Options of Celery's table that nothing in Celery reads, and what it reads instead.
WITHOUT_EFFECT = {"cassandra_bundle_path": "cassandra_secure_bundle_path"}

_DECLARED: dict[str, Any] = dict(flatten(NAMESPACES))


def _options() -> dict[str, Option]:
    table = {
        name: Option(
            name,
            CORRECTIONS.get(name) or KINDS[declared.type],
            declared.default,
            declared.default is None or name in NULLABLE,
        )
        for name, declared in _DECLARED.items()
    }
    missing = {name: Option(name, kind, None, nullable=True) for name, kind in MISSING.items()}
    return {**missing, **table}


OPTIONS: dict[str, Option] = _options()

#: Old spellings that Celery's own table does not have.
_OLDER = {
    "BROKER_BACKEND": "broker_transport",
    "CELERY_BACKEND": "result_backend",
    "CELERY_RESULT_EXPIRES": "result_expires",
    "CELERY_AMQP_TASK_RESULT_EXPIRES": "result_expires",
    "CELERYD_TASK_ANNOTATIONS": "task_annotations",
}

#: Old upper-case names, to today's.
OLD_NAMES: dict[str, str] = {
    **_OLDER,
    **{old: new for old, new in defaults._TO_NEW_KEY.items() if old.lower() != new},
}

#: Options that are gone, by their upper-case names, and what to do instead.
REMOVED: dict[str, str] = {
    # Celery 4 sends no mail; a handler of task_failure, or Sentry, does it better.
    **dict.fromkeys(
        ("CELERY_SEND_TASK_ERROR_EMAILS", "CELERY_TASK_ERROR_WHITELIST", "ADMINS", "SERVER_EMAIL",
         "EMAIL_HOST", "EMAIL_PORT", "EMAIL_HOST_USER", "EMAIL_HOST_PASSWORD", "EMAIL_USE_SSL",
         "EMAIL_USE_TLS", "EMAIL_TIMEOUT", "EMAIL_CHARSET"),
        "tell somebody from the signal task_failure, or with an error tracker",
    ),
    # Options of the command line: a file and a level belong to one process.
    **dict.fromkeys(
        ("CELERYD_LOG_FILE", "CELERYD_LOG_LEVEL", "CELERYBEAT_LOG_FILE", "CELERYBEAT_LOG_LEVEL"),
        "use --logfile and --loglevel, or the logging sections of the INI file",
    ),
    **dict.fromkeys(
        ("CELERYMON_LOG_FILE", "CELERYMON_LOG_FORMAT", "CELERYMON_LOG_LEVEL"),
        "celerymon is gone; Flower took its place",
    ),
    "CELERYD_AUTORELOADER": "use ws-celery dev --reload while you develop",
    "CELERYD_BOOT_STEPS": "add steps to app.steps in code",
    "CELERYD_FORCE_EXECV": "use worker_pool_start_method = spawn, with Celery 5.7 or later",
    "CELERYD_MEDIATOR": "the worker has no mediator thread any more; remove it",
    "CELERYD_ETA_SCHEDULER": "use worker_timer",
    "CELERYD_ETA_SCHEDULER_PRECISION": "use worker_timer_precision",
    "CELERYD_LISTENER": "use worker_consumer",
    "CELERY_AMQP_TASK_RESULT_CONNECTION_MAX": "use broker_pool_limit",
    "CELERY_BROADCAST_EXCHANGE": "use control_exchange",
    "CELERY_BROADCAST_EXCHANGE_TYPE": "it is always fanout; remove it",
    "CELERY_BROADCAST_QUEUE": "each worker names its own; remove it",
    "CELERY_CHORD_PROPAGATES": "errors of a chord always propagate; remove it",
    "CELERY_DB_REUSE_MAX": "use database_engine_options",
    "CELERY_REDIS_CONNECT_RETRY": "use redis_retry_on_timeout or result_backend_always_retry",
    "CELERY_TASK_PUBLISH_CONNECTION_TIMEOUT": "use broker_connection_timeout",
    "BROKER_INSIST": "brokers redirect nobody any more; remove it",
    "CASSANDRA_COLUMN_FAMILY": "use cassandra_table",
    "CASSANDRA_DETAILED_MODE": "the cassandra backend was written anew; remove it",
    "CASSANDRA_READ_CONSISTENCY_LEVEL": "use cassandra_read_consistency",
    "RIAK_BACKEND_SETTINGS": "riak is gone; use another result_backend",
    "TT_HOST": "Tokyo Tyrant is gone; use another result_backend",
    "TT_PORT": "Tokyo Tyrant is gone; use another result_backend",
}  # fmt: skip


def find_option(name: str) -> str | None:
    """Return today's name of an option, whatever its spelling; ``None`` if it is none.

    Accepted are today's names, the upper-case names of Celery 3 and 4, both in any case, and
    today's names with ``CELERY_`` before them.
    """
    lower, upper = name.lower(), name.upper()
    if lower in OPTIONS:
        return lower
    if upper in OLD_NAMES:
        return OLD_NAMES[upper]
    without = lower.removeprefix("celery_")
    return without if without in OPTIONS else None


def option_names() -> list[str]:
    """Return all names that may be suggested: today's, then old ones in both cases."""
    return [*OPTIONS, *(old.lower() for old in OLD_NAMES)]


def kind_of(value: object) -> str:
    """Return the name of the type of a value, for people."""
    return "none" if value is None else type(value).__name__
