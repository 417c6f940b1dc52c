"""What may be set: every option of Celery, the keys of the other sections, and settings of our own.

The options are those of the installed Celery. Its declared types choose the kinds, but for the
corrections below; a test walks the table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from inspect import signature
from typing import Any

from celery import Celery, Task
from celery.app.defaults import NAMESPACES, flatten
from celery.concurrency import ALIASES as POOLS
from kombu import Exchange, Queue

from ws_celery.compat import OLD_NAMES_OF_SETTINGS
from ws_celery.converters import Refused, json_value, nearest
from ws_celery.masking import is_secret
from ws_celery.settings import celery_kinds, kinds
from ws_celery.settings.kinds import Kind, accepts, choice, each, mapping, nullable, whole

# --- Keys of the other sections --------------------------------------------------------------

#: Options of a call that end in the message's properties; Celery takes them from a route.
MESSAGE_KEYS: dict[str, Kind] = {
    "queue": replace(kinds.text, types=(Queue,)),
    "exchange": replace(kinds.text, types=(Exchange,)),
    "exchange_type": celery_kinds.exchange_type,
    "routing_key": kinds.text,
    "priority": celery_kinds.priority,
    "serializer": celery_kinds.serializer,
    "compression": celery_kinds.compression,
    "delivery_mode": celery_kinds.delivery_mode,
    "expiration": kinds.seconds,
    "retry": kinds.boolean,
    "retry_policy": celery_kinds.retry_policy,
    "headers": mapping('{"tenant": "a"}'),
    **each(kinds.boolean, "mandatory immediate"),
    **each(kinds.seconds, "timeout confirm_timeout"),
    **each(kinds.text, "correlation_id message_id user_id app_id"),
}

#: Options of a call that Celery itself refuses in a route: ws_celery adds them to the call.
CALL_KEYS: dict[str, Kind] = {
    **each(kinds.seconds, "countdown expires time_limit soft_time_limit"),
    "ignore_result": kinds.boolean,
    "shadow": kinds.text,
}

#: ``[celeryroute:TASK]``, and ``options`` of ``[celerybeat:NAME]``.
ROUTE_KEYS: dict[str, Kind] = {**MESSAGE_KEYS, **CALL_KEYS}

#: ``[celeryqueue:NAME]``.
QUEUE_KEYS: dict[str, Kind] = {
    "exchange": kinds.text,
    "type": celery_kinds.exchange_type,
    "routing_key": kinds.text,
    "priority": celery_kinds.priority,
    **each(kinds.boolean, "durable auto_delete exclusive"),
    **each(kinds.seconds, "expires message_ttl"),
    **each(whole(1), "max_length max_length_bytes"),
    "queue_arguments": celery_kinds.queue_arguments,
}

#: ``[celeryannotate:TASK]``: attributes of a task that are read when it is called or run.
ANNOTATION_KEYS: dict[str, Kind] = {
    "rate_limit": nullable(celery_kinds.rate),
    **each(nullable(kinds.seconds), "time_limit soft_time_limit expires"),
    "max_retries": nullable(whole()),
    "default_retry_delay": kinds.seconds,
    "priority": nullable(celery_kinds.priority),
    **each(kinds.text, "queue exchange routing_key"),
    "serializer": celery_kinds.serializer,
    "compression": nullable(celery_kinds.compression),
    "delivery_mode": celery_kinds.delivery_mode,
    **each(
        kinds.boolean,
        "ignore_result store_eager_result store_errors_even_if_ignored track_started trail",
        "send_events acks_late acks_on_failure_or_timeout retry_on_worker_lost",
    ),
    **each(nullable(kinds.boolean), "acks_on_failure acks_on_timeout reject_on_worker_lost"),
    "resultrepr_maxsize": whole(),
}

_KWARGS = mapping('{"key": "value"}')

#: ``[celerybeat:NAME]``, except for ``schedule``, whose kind is its ``type``.
ENTRY_KEYS: dict[str, Kind] = {
    "task": kinds.text,
    "args": kinds.array,
    "kwargs": _KWARGS,
    "options": _KWARGS,
    "timezone": kinds.zone,
    **each(kinds.boolean, "relative enabled"),
    "catch_up": choice("policy", "skip", "once"),
    "overlap": choice("policy", "allow", "skip"),
    **each(kinds.instant, "starts_at expires"),
    "description": kinds.prose,
}


_QUEUE = mapping("", QUEUE_KEYS, others="no")


@accepts(
    "names of queues by line or comma, or a JSON object of them", "fast, slow", dict, list, tuple
)
def _queues(value: str | Mapping[str, object] | Iterable[object]) -> list[Queue]:
    if isinstance(value, str):
        in_json = value.startswith(("{", "["))
        value = json_value(value) if in_json else kinds.listed.convert(value)
    if isinstance(value, Mapping):
        queues = [make_queue(name, _QUEUE.accept(keys)) for name, keys in value.items()]
    else:
        queues = [_queue(each) for each in value]
    if not queues or len({queue.name for queue in queues}) < len(queues):
        raise Refused("has a queue twice" if queues else "is empty")
    return queues


def _queue(given: object) -> Queue:
    if isinstance(given, Queue):
        return given
    if isinstance(given, str) and given:
        return make_queue(given, {})
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise Refused("has an item that is neither a queue's name nor an object with one")
    keys = {key: value for key, value in given.items() if key != "name"}
    return make_queue(given["name"], _QUEUE.accept(keys))


def make_queue(name: str, keys: Mapping[str, Any]) -> Queue:
    """Return a queue; where exchange and routing key are not given, they are the queue's own.

    Celery's own default would bind it to the default exchange with the default routing key: it
    would take part of what is meant for the default queue.
    """
    options = dict(keys)
    exchange = Exchange(
        options.pop("exchange", name),
        type=options.pop("type", "direct"),
        durable=options.get("durable", True),
    )
    if "priority" in options:
        options["max_priority"] = options.pop("priority")
    return Queue(name, exchange, options.pop("routing_key", name), **options)


# --- Options of one call ---------------------------------------------------------------------

#: Options of one call, refused in what is configured for all calls; with the reason.
OF_ONE_CALL = {
    "task_id": "cannot be set: each call and each tick has an id of its own; leave it out",
    "eta": "cannot be set: all calls would have the same; write countdown, in seconds",
}
#: What beat itself gives to each call.
_OF_BEAT = {"name", "args", "kwargs", "options", "task_id", "producer", "publisher", "connection"}
#: Options of a call that Celery takes, and names nowhere.
_UNNAMED = {"argsrepr", "kwargsrepr", "stamped_headers"}
#: What an INI file could say; a call also takes other objects, such as a datetime.
_PLAIN = (str, int, float, list, tuple, dict)
_ROUTE = mapping("", ROUTE_KEYS, others="no")


def accept_options(values: Mapping[str, Any], *, in_python: bool) -> dict[str, Any]:
    """Return the options of an entry's calls, typed.

    :param in_python: whether they are written in code: then they may be whatever ``apply_async``
        takes, such as the signatures of ``link``.
    :raises Refused: at the first key that is unknown or has a value of another kind.
    """
    for key in ("task_id",) if in_python else OF_ONE_CALL:
        if key in values:
            raise Refused(f"has {key}, which {OF_ONE_CALL[key]}")
    as_given: dict[str, Any] = {}
    if in_python:
        untyped = {*_options_of_a_call(), *values.get("stamped_headers", ())}
        untyped |= {key for key in ROUTE_KEYS if not isinstance(values.get(key), _PLAIN)}
        as_given = {key: value for key, value in values.items() if key in untyped}
    rest = {key: value for key, value in values.items() if key not in as_given}
    return {**as_given, **_ROUTE.convert(rest)}


def _options_of_a_call() -> set[str]:
    """Return those that are not typed."""
    calls = (Task.apply_async, Celery.send_task)
    named = {name for call in calls for name in signature(call).parameters}
    return (named | _UNNAMED) - _OF_BEAT - {"self", *ROUTE_KEYS}


# --- Options of Celery -----------------------------------------------------------------------

_DECLARED: dict[str, Any] = dict(flatten(NAMESPACES))

#: Kind for each type that Celery declares; a type that is missing here fails a test.
KINDS: dict[Any, Kind] = {
    "any": kinds.anything,
    "bool": kinds.boolean,
    "bytes": kinds.passphrase,
    "dict": mapping('{"key": "value"}', celery_kinds.TRANSPORT_KEYS),
    "float": kinds.seconds,  # all but two are times, for which a period reads better
    "int": whole(),
    int: whole(),  # beat_cron_starting_deadline is declared by the class
    "list": kinds.listed,
    "str": kinds.text,  # result_compression is declared by another word than all others
    "string": kinds.text,
    "tuple": kinds.modules,
}


@accepts("a whole number of at least 0, or auto", "4", int, name="int")
def _concurrency(value: str | int) -> int | str:
    # Celery 5.7 sizes the prefork pool by itself.
    if value == "auto" and _DECLARED["worker_concurrency"].type == "any":
        return "auto"
    return int(whole().convert(value))


#: Options whose declared type is not what Celery does with the value, or does not say enough.
_CORRECTIONS: dict[str, Kind] = {
    # Declared too narrow, or as something else.
    "broker_heartbeat_checkrate": kinds.number,
    **each(celery_kinds.broker_side, "broker_read_url broker_write_url"),
    "broker_url": celery_kinds.broker,  # may be a list
    **each(celery_kinds.tls, "broker_use_ssl redis_backend_use_ssl"),  # may be both
    "cassandra_auth_kwargs": mapping('{"username": "celery"}'),
    **each(celery_kinds.port, "broker_port cassandra_port redis_port"),
    "result_backend_max_retries": kinds.unbounded,
    "result_cache_max": whole(-1),
    "task_default_delivery_mode": celery_kinds.delivery_mode,
    **each(celery_kinds.priority, "task_default_priority task_queue_max_priority"),
    "task_protocol": whole(1, 2, "2"),
    "worker_concurrency": _concurrency,
    # Times in whole seconds.
    **each(
        kinds.whole_seconds,
        "azureblockblob_connection_timeout azureblockblob_read_timeout",
        "azureblockblob_retry_initial_backoff_sec beat_cron_starting_deadline broker_heartbeat",
        "cosmosdbsql_max_retry_wait_time",
    ),
    # Mappings with keys that are known.
    "beat_schedule": mapping('{"backup": {"task": "backup", "schedule": "24h"}}'),
    "database_engine_options": celery_kinds.engine_options,
    **each(celery_kinds.table_names, "database_table_names database_table_schemas"),
    "task_annotations": celery_kinds.task_annotations,
    "task_publish_retry_policy": celery_kinds.retry_policy,
    "task_queues": _queues,
    "task_routes": celery_kinds.task_routes,
    **each(
        celery_kinds.transport_options, "broker_transport_options result_backend_transport_options"
    ),
    # Text that is one of few words, or has a form.
    **each(celery_kinds.content, "accept_content result_accept_content"),
    "broker_failover_strategy": celery_kinds.failover_strategy,
    "broker_transport": celery_kinds.transport,
    "cosmosdbsql_consistency_level": choice(
        "level", "Session", "BoundedStaleness", "ConsistentPrefix", "Eventual", "Strong"
    ),
    "database_url": celery_kinds.database,
    **each(celery_kinds.serializer, "event_serializer result_serializer task_serializer"),
    "result_backend": celery_kinds.backend,
    **each(celery_kinds.compression, "result_compression task_compression"),
    **each(
        celery_kinds.exchange_type,
        "result_exchange_type task_create_missing_queue_exchange_type task_default_exchange_type",
    ),
    **each(
        celery_kinds.queue_type,
        "broker_native_delayed_delivery_queue_type task_create_missing_queue_type",
        "task_default_queue_type",
    ),
    "task_default_rate_limit": celery_kinds.rate,
    "timezone": kinds.zone,
    "worker_pool_start_method": choice("method", "fork", "spawn"),
    "worker_redirect_stdouts_level": choice(
        "level", "DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"
    ),
    **each(kinds.prose, "worker_log_datefmt worker_task_log_datefmt"),
    **each(kinds.log_format, "worker_log_format worker_task_log_format"),
    # Code.
    "beat_scheduler": celery_kinds.dotted(
        "celery.beat:PersistentScheduler", *celery_kinds.plugged("celery.beat_schedulers")
    ),
    "database_engine_callback": celery_kinds.function,
    "worker_agent": celery_kinds.dotted("myapp.worker:Agent"),
    "worker_autoscaler": celery_kinds.dotted("celery.worker.autoscale:Autoscaler"),
    "worker_consumer": celery_kinds.dotted("celery.worker.consumer:Consumer"),
    "worker_pool": celery_kinds.dotted("prefork", *POOLS),
    "worker_timer": celery_kinds.dotted("kombu.asynchronous.timer:Timer"),
    # Empty text means something.
    **each(
        kinds.blank,
        "azureblockblob_base_path broker_vhost gcs_base_path s3_base_path task_default_exchange",
        "task_default_routing_key",
    ),
}

#: Options that Celery reads although its table does not have them, and their kinds.
MISSING: dict[str, Kind] = {
    **each(
        kinds.text,
        "cassandra_secure_bundle_path dynamodb_endpoint_url firestore_project redis_client_name",
    ),
    "gcs_threadpool_maxsize": whole(1, example="10"),
    "redis_backend_credential_provider": celery_kinds.function.described(
        "logging:getLogger", "the dotted name of a redis.CredentialProvider"
    ),
    "redis_backend_health_check_interval": kinds.seconds,
    "result_backend_thread_safe": kinds.boolean,
}

#: Options with a default of their own for which none means something all the same: no limit.
_NULLABLE = frozenset(
    (
        *("broker_connection_max_retries", "broker_connection_timeout", "broker_heartbeat"),
        *("broker_pool_limit", "control_queue_expires", "control_queue_ttl"),
        *("event_queue_expires", "event_queue_ttl", "redis_socket_timeout", "result_expires"),
    )
)

#: Options of Celery's table that nothing in Celery reads, and what it reads instead.
WITHOUT_EFFECT = {"cassandra_bundle_path": "cassandra_secure_bundle_path"}


def _kind(name: str, declared: Any) -> Kind:
    kind = _CORRECTIONS.get(name) or KINDS[declared.type]
    if kind is kinds.text and is_secret(name):
        kind = kinds.prose  # nobody can tell what belongs to a password
    return nullable(kind) if declared.default is None or name in _NULLABLE else kind


#: Every option by its lower-case name.
OPTIONS: dict[str, Kind] = {
    **{name: nullable(kind) for name, kind in MISSING.items()},
    **{name: _kind(name, declared) for name, declared in _DECLARED.items()},
}

# --- Names of options ------------------------------------------------------------------------

#: Old upper-case names, to today's: some that Celery's own table does not have, and that table.
OLD_NAMES: dict[str, str] = {
    "BROKER_BACKEND": "broker_transport",
    "CELERY_BACKEND": "result_backend",
    "CELERY_RESULT_EXPIRES": "result_expires",
    "CELERY_AMQP_TASK_RESULT_EXPIRES": "result_expires",
    "CELERYD_TASK_ANNOTATIONS": "task_annotations",
    **{old: new for old, new in OLD_NAMES_OF_SETTINGS.items() if old.lower() != new},
}

#: Options that are gone, by what to do instead; a worker's file and level belong to one process.
_REMOVED = {
    "tell somebody from the signal task_failure, or with an error tracker": (
        "ADMINS CELERY_SEND_TASK_ERROR_EMAILS CELERY_TASK_ERROR_WHITELIST EMAIL_CHARSET EMAIL_HOST "
        "EMAIL_HOST_PASSWORD EMAIL_HOST_USER EMAIL_PORT EMAIL_TIMEOUT EMAIL_USE_SSL EMAIL_USE_TLS "
        "SERVER_EMAIL"
    ),
    "use --logfile and --loglevel, or the logging sections of the INI file": (
        "CELERYBEAT_LOG_FILE CELERYBEAT_LOG_LEVEL CELERYD_LOG_FILE CELERYD_LOG_LEVEL"
    ),
    "celerymon is gone; Flower took its place": (
        "CELERYMON_LOG_FILE CELERYMON_LOG_FORMAT CELERYMON_LOG_LEVEL"
    ),
    "use ws-celery dev --reload while you develop": "CELERYD_AUTORELOADER",
    "add steps to app.steps in code": "CELERYD_BOOT_STEPS",
    "use worker_pool_start_method = spawn, with Celery 5.7 or later": "CELERYD_FORCE_EXECV",
    "the worker has no mediator thread any more; remove it": "CELERYD_MEDIATOR",
    "use worker_timer": "CELERYD_ETA_SCHEDULER",
    "use worker_timer_precision": "CELERYD_ETA_SCHEDULER_PRECISION",
    "use worker_consumer": "CELERYD_LISTENER",
    "use broker_pool_limit": "CELERY_AMQP_TASK_RESULT_CONNECTION_MAX",
    "use control_exchange": "CELERY_BROADCAST_EXCHANGE",
    "it is always fanout; remove it": "CELERY_BROADCAST_EXCHANGE_TYPE",
    "each worker names its own; remove it": "CELERY_BROADCAST_QUEUE",
    "errors of a chord always propagate; remove it": "CELERY_CHORD_PROPAGATES",
    "use database_engine_options": "CELERY_DB_REUSE_MAX",
    "use redis_retry_on_timeout or result_backend_always_retry": "CELERY_REDIS_CONNECT_RETRY",
    "use broker_connection_timeout": "CELERY_TASK_PUBLISH_CONNECTION_TIMEOUT",
    "brokers redirect nobody any more; remove it": "BROKER_INSIST",
    "use cassandra_table": "CASSANDRA_COLUMN_FAMILY",
    "the cassandra backend was written anew; remove it": "CASSANDRA_DETAILED_MODE",
    "use cassandra_read_consistency": "CASSANDRA_READ_CONSISTENCY_LEVEL",
    "riak is gone; use another result_backend": "RIAK_BACKEND_SETTINGS",
    "Tokyo Tyrant is gone; use another result_backend": "TT_HOST TT_PORT",
}

#: The same by their upper-case names.
REMOVED = {name: remedy for remedy, gone in _REMOVED.items() for name in gone.split()}


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


def nearest_option(name: str) -> str | None:
    """Return today's name of the option that ``name`` was probably meant to be."""
    close = nearest(name, (*OPTIONS, *(old.lower() for old in OLD_NAMES)))
    return find_option(close) if close else None


# --- Settings of our own ---------------------------------------------------------------------


@accepts(
    "all, none, or names of installed distributions, by line or comma",
    "none",
    *kinds.listed.types,
    name="list",
)
def _plugins(value: str | Iterable[str]) -> list[str]:
    found: list[str] = kinds.listed.convert(value)
    words = [name.lower() for name in found]
    if {"all", "none"}.isdisjoint(words):
        return found
    if len(words) > 1:
        raise Refused("has all or none beside other names")
    return words


@accepts("auto, database, memory, or the URL of a Redis", "redis://localhost:6379/2")
def _locks(value: str) -> str:
    words = ("auto", "database", "memory")
    if value in words or re.match(r"(rediss?|sentinel|redis\+socket)://", value):
        return celery_kinds.without_blanks(value)
    raise Refused(close=nearest(value, words))


_TABLE = "the name of a table, with its schema or without"

#: Settings of our own, ``ws_celery.*`` in the application's section.
OUR_SETTINGS: dict[str, Kind] = {
    "ws_celery.backup.keep": whole(1),
    "ws_celery.backup.target": kinds.text.described(
        "s3://bucket/shop", "a folder, or a URL that fsspec knows"
    ),
    "ws_celery.backup.timeout": kinds.patience.described("1h"),
    "ws_celery.base_url": kinds.base_url,
    "ws_celery.base_url.pin": kinds.boolean,
    "ws_celery.commands": celery_kinds.commands,
    "ws_celery.commands.timeout": kinds.patience.described("1h"),
    "ws_celery.beat": kinds.boolean,
    "ws_celery.beat.poll": kinds.patience,
    "ws_celery.beat.table": kinds.text.described("tasks.schedule", _TABLE),
    "ws_celery.config_uri": kinds.text.described(
        "%(__file__)s", "the INI file with the [celery...] sections"
    ),
    "ws_celery.dbsession": kinds.text.described(
        "dbsession", "the request's attribute with the SQLAlchemy session"
    ),
    "ws_celery.locks": _locks,
    "ws_celery.outbox": kinds.boolean,
    "ws_celery.outbox.lease": kinds.patience.described("300"),
    "ws_celery.outbox.max_deliveries": whole(1),
    "ws_celery.outbox.poll": kinds.patience.described("1"),
    "ws_celery.outbox.table": kinds.text.described("tasks.outbox", _TABLE),
    "ws_celery.propagate": kinds.names.described(
        "locale, request_id, user",
        "names of what travels with a task: locale, request_id, user, or your own",
    ),
    "ws_celery.publish_spool": whole(example="10000"),
    "ws_celery.publish_timeout": kinds.patience,
    "ws_celery.publish_cooldown": kinds.patience.described("5"),
    "ws_celery.log_arguments": kinds.boolean,
    "ws_celery.mask_arguments": kinds.names.described(
        "email, iban", "names of arguments that are shown to nobody, or all"
    ),
    "ws_celery.plugins": _plugins,
}
