"""Every option of Celery: its kind, its default, and whether it may be none.

The options are those of the installed Celery (``celery.app.defaults``). Its declared types choose
the kinds, except for the corrections below; a test walks the table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from typing import Any

from celery.app.defaults import NAMESPACES, flatten
from celery.concurrency import ALIASES as POOLS

from ws_celery.compat import OLD_NAMES_OF_SETTINGS
from ws_celery.masking import is_secret
from ws_celery.settings.broker_kinds import (
    ANNOTATIONS,
    BACKEND,
    BROKER,
    BROKER_SIDE,
    CALLBACK,
    COMPRESSION,
    CONTENT,
    DATABASE,
    DELIVERY_MODE,
    ENGINE_OPTIONS,
    EXCHANGE_TYPE,
    FAILOVER,
    PORT,
    PRIORITY,
    QUEUE_TYPE,
    QUEUES,
    RATE,
    RETRY_POLICY,
    ROUTES,
    SERIALIZER,
    TABLE_NAMES,
    TLS,
    TRANSPORT,
    TRANSPORT_KEYS,
    TRANSPORT_OPTIONS,
    dotted,
)
from ws_celery.settings.kinds import (
    ANYTHING,
    BLANK,
    BOOL,
    BYTES,
    FORMAT,
    LIST,
    MODULES,
    PROSE,
    SECONDS,
    TEXT,
    WHOLE_SECONDS,
    ZONE,
    Kind,
    choice,
    mapping,
    number,
    whole,
)

__all__ = (
    "CORRECTIONS",
    "KINDS",
    "MISSING",
    "NULLABLE",
    "OLD_NAMES",
    "OPTIONS",
    "REMOVED",
    "WITHOUT_EFFECT",
    "Option",
    "find_option",
    "option_names",
)

_DECLARED: dict[str, Any] = dict(flatten(NAMESPACES))


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


_WHOLE = whole()


def _concurrency(text: str) -> int | str:
    # Celery 5.7 sizes the prefork pool by itself.
    if text == "auto" and _DECLARED["worker_concurrency"].type == "any":
        return text
    return int(_WHOLE.accept(text))


_CONCURRENCY = Kind(
    "int",
    "a whole number of at least 0, or auto",
    "4",
    _concurrency,
    (int,),
    lambda value: value if value == "auto" else _WHOLE.finish(value),
)

#: Kind for each type that Celery declares; a type that is missing here fails a test.
KINDS: dict[Any, Kind] = {
    "any": ANYTHING,
    "bool": BOOL,
    "bytes": BYTES,
    "dict": mapping('{"key": "value"}', TRANSPORT_KEYS),
    "float": number(),
    "int": _WHOLE,
    int: _WHOLE,  # beat_cron_starting_deadline is declared by the class
    "list": LIST,
    "str": TEXT,  # result_compression is declared by another word than all others
    "string": TEXT,
    "tuple": MODULES,
}

_SCHEDULERS = [point.name for point in entry_points(group="celery.beat_schedulers")]

#: Options whose declared type is not what Celery does with the value, or does not say enough.
CORRECTIONS: dict[str, Kind] = {
    # Declared too narrow, or as something else.
    "broker_heartbeat_checkrate": number(),
    "broker_read_url": BROKER_SIDE,
    "broker_transport_options": TRANSPORT_OPTIONS,
    "broker_url": BROKER,  # may be a list
    "broker_use_ssl": TLS,  # may be a mapping
    "broker_write_url": BROKER_SIDE,
    "cassandra_auth_kwargs": mapping('{"username": "celery"}'),
    "cassandra_port": PORT,
    "database_engine_callback": CALLBACK,
    "database_engine_options": ENGINE_OPTIONS,
    "database_table_names": TABLE_NAMES,
    "database_table_schemas": TABLE_NAMES,
    "redis_backend_use_ssl": TLS,
    "result_backend_max_retries": number(most=float("inf")),
    "result_backend_transport_options": TRANSPORT_OPTIONS,
    "result_cache_max": whole(-1),
    "result_expires": SECONDS,
    "task_annotations": ANNOTATIONS,
    "task_default_delivery_mode": DELIVERY_MODE,
    "task_default_priority": PRIORITY,
    "task_publish_retry_policy": RETRY_POLICY,
    "task_queues": QUEUES,
    "task_routes": ROUTES,
    # Completed by the sections, which know how to make schedule entries.
    "beat_schedule": mapping('{"backup": {"task": "backup", "schedule": "24h"}}'),
    "worker_concurrency": _CONCURRENCY,
    # Text that is one of few words, or has a form.
    "accept_content": CONTENT,
    "result_accept_content": CONTENT,
    "beat_scheduler": dotted("class", "celery.beat:PersistentScheduler", *_SCHEDULERS),
    "broker_failover_strategy": FAILOVER,
    "broker_native_delayed_delivery_queue_type": QUEUE_TYPE,
    "broker_port": PORT,
    "broker_transport": TRANSPORT,
    "cosmosdbsql_consistency_level": choice(
        "level", "Session", "BoundedStaleness", "ConsistentPrefix", "Eventual", "Strong"
    ),
    "database_url": DATABASE,
    "event_serializer": SERIALIZER,
    "redis_port": PORT,
    "result_backend": BACKEND,
    "result_compression": COMPRESSION,
    "result_exchange_type": EXCHANGE_TYPE,
    "result_serializer": SERIALIZER,
    "task_compression": COMPRESSION,
    "task_create_missing_queue_exchange_type": EXCHANGE_TYPE,
    "task_create_missing_queue_type": QUEUE_TYPE,
    "task_default_exchange_type": EXCHANGE_TYPE,
    "task_default_queue_type": QUEUE_TYPE,
    "task_default_rate_limit": RATE,
    "task_protocol": whole(1, 2, "2"),
    "task_queue_max_priority": PRIORITY,
    "task_serializer": SERIALIZER,
    "timezone": ZONE,
    "worker_agent": dotted("class", "myapp.worker:Agent"),
    "worker_autoscaler": dotted("class", "celery.worker.autoscale:Autoscaler"),
    "worker_consumer": dotted("class", "celery.worker.consumer:Consumer"),
    "worker_log_datefmt": PROSE,
    "worker_log_format": FORMAT,
    "worker_pool": dotted("class", "prefork", *POOLS),
    "worker_pool_start_method": choice("method", "fork", "spawn"),
    "worker_redirect_stdouts_level": choice(
        "level", "DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"
    ),
    "worker_task_log_datefmt": PROSE,
    "worker_task_log_format": FORMAT,
    "worker_timer": dotted("class", "kombu.asynchronous.timer:Timer"),
    # Times, for which a period reads better than seconds.
    "azureblockblob_connection_timeout": WHOLE_SECONDS,
    "azureblockblob_read_timeout": WHOLE_SECONDS,
    "azureblockblob_retry_initial_backoff_sec": WHOLE_SECONDS,
    "beat_cron_starting_deadline": WHOLE_SECONDS,
    "beat_max_loop_interval": SECONDS,
    "beat_remote_control_max_tick_age": SECONDS,
    "broker_connection_timeout": SECONDS,
    "broker_heartbeat": WHOLE_SECONDS,
    "broker_pool_acquire_timeout": SECONDS,
    "cassandra_entry_ttl": SECONDS,
    "control_queue_expires": SECONDS,
    "control_queue_ttl": SECONDS,
    "cosmosdbsql_max_retry_wait_time": WHOLE_SECONDS,
    "elasticsearch_timeout": SECONDS,
    "event_queue_expires": SECONDS,
    "event_queue_ttl": SECONDS,
    "gcs_ttl": SECONDS,
    "redis_socket_connect_timeout": SECONDS,
    "redis_socket_timeout": SECONDS,
    "result_chord_expires": SECONDS,
    "result_chord_join_timeout": SECONDS,
    "result_chord_retry_interval": SECONDS,
    "result_failure_expires": SECONDS,
    "task_soft_time_limit": SECONDS,
    "task_time_limit": SECONDS,
    "worker_lost_wait": SECONDS,
    "worker_proc_alive_timeout": SECONDS,
    "worker_soft_shutdown_timeout": SECONDS,
    "worker_timer_precision": SECONDS,
    # Empty text means something.
    "azureblockblob_base_path": BLANK,
    "broker_vhost": BLANK,
    "gcs_base_path": BLANK,
    "s3_base_path": BLANK,
    "task_default_exchange": BLANK,
    "task_default_routing_key": BLANK,
}

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
    (
        "broker_connection_max_retries",
        "broker_connection_timeout",
        "broker_heartbeat",
        "broker_pool_limit",
        "control_queue_expires",
        "control_queue_ttl",
        "event_queue_expires",
        "event_queue_ttl",
        "redis_socket_timeout",
        "result_expires",
    )
)

#: Options of Celery's table that nothing in Celery reads, and what it reads instead.
WITHOUT_EFFECT = {"cassandra_bundle_path": "cassandra_secure_bundle_path"}


def _declared_kind(name: str, declared: Any) -> Kind:
    # Nobody can tell what belongs to a password.
    return PROSE if KINDS[declared] is TEXT and is_secret(name) else KINDS[declared]


def _options() -> dict[str, Option]:
    table = {
        name: Option(
            name,
            CORRECTIONS.get(name) or _declared_kind(name, declared.type),
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
    **{old: new for old, new in OLD_NAMES_OF_SETTINGS.items() if old.lower() != new},
}

_MAIL = "tell somebody from the signal task_failure, or with an error tracker"
_LOGGING = "use --logfile and --loglevel, or the logging sections of the INI file"
_MONITOR = "celerymon is gone; Flower took its place"
_TYRANT = "Tokyo Tyrant is gone; use another result_backend"

#: Options that are gone, by their upper-case names, and what to do instead.
REMOVED: dict[str, str] = {
    # Celery 4 sends no mail; a handler of task_failure, or Sentry, does it better.
    "ADMINS": _MAIL,
    "CELERY_SEND_TASK_ERROR_EMAILS": _MAIL,
    "CELERY_TASK_ERROR_WHITELIST": _MAIL,
    "EMAIL_CHARSET": _MAIL,
    "EMAIL_HOST": _MAIL,
    "EMAIL_HOST_PASSWORD": _MAIL,
    "EMAIL_HOST_USER": _MAIL,
    "EMAIL_PORT": _MAIL,
    "EMAIL_TIMEOUT": _MAIL,
    "EMAIL_USE_SSL": _MAIL,
    "EMAIL_USE_TLS": _MAIL,
    "SERVER_EMAIL": _MAIL,
    # Options of the command line: a file and a level belong to one process.
    "CELERYBEAT_LOG_FILE": _LOGGING,
    "CELERYBEAT_LOG_LEVEL": _LOGGING,
    "CELERYD_LOG_FILE": _LOGGING,
    "CELERYD_LOG_LEVEL": _LOGGING,
    "CELERYMON_LOG_FILE": _MONITOR,
    "CELERYMON_LOG_FORMAT": _MONITOR,
    "CELERYMON_LOG_LEVEL": _MONITOR,
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
    "TT_HOST": _TYRANT,
    "TT_PORT": _TYRANT,
}


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
