"""What may stand in the sections that are not ``[celery]`` itself, and of which kind it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ws_celery.converters import (
    BOOL,
    RATE,
    SECONDS,
    TEXT,
    Kind,
    Refused,
    choice,
    json_value_of,
    mapping,
    nearest,
    number,
    untyped,
    whole,
)
from ws_celery.options import CORRECTIONS, retry_policy

__all__ = (
    "ANNOTATION_KEYS",
    "CALL_KEYS",
    "ENTRY_KEYS",
    "MESSAGE_KEYS",
    "OUR_SETTINGS",
    "QUEUE_KEYS",
    "ROUTE_KEYS",
    "TRANSPORT_KEYS",
    "accept_keys",
    "nullable",
)

_PRIORITY = CORRECTIONS["task_default_priority"]
_SERIALIZER = CORRECTIONS["task_serializer"]
_COMPRESSION = CORRECTIONS["task_compression"]
_EXCHANGE_TYPE = CORRECTIONS["task_default_exchange_type"]


def nullable(kind: Kind) -> Kind:
    """Return the same kind with ``none`` for a value as well."""

    def convert(text: str) -> Any:
        return None if text.lower() == "none" else kind.convert(text)

    return replace(
        kind,
        expected=f"{kind.expected}, or none",
        convert=convert,
        types=(*kind.types, type(None)),
        finish=lambda value: None if value is None else kind.finish(value),
    )


#: Options of a call that end in the message's properties; Celery takes them from a route.
MESSAGE_KEYS: dict[str, Kind] = {
    "queue": TEXT,
    "exchange": TEXT,
    "exchange_type": _EXCHANGE_TYPE,
    "routing_key": TEXT,
    "priority": _PRIORITY,
    "serializer": _SERIALIZER,
    "compression": _COMPRESSION,
    "delivery_mode": CORRECTIONS["task_default_delivery_mode"],
    "expiration": SECONDS,
    "retry": BOOL,
    "retry_policy": mapping('{"max_retries": 3}', retry_policy),
    "headers": mapping('{"tenant": "a"}'),
    "mandatory": BOOL,
    "immediate": BOOL,
    "timeout": SECONDS,
    "confirm_timeout": SECONDS,
    "correlation_id": TEXT,
    "message_id": TEXT,
    "user_id": TEXT,
    "app_id": TEXT,
}

#: Options of a call that Celery itself refuses in a route: ws_celery adds them to the call.
CALL_KEYS: dict[str, Kind] = {
    "countdown": SECONDS,
    "expires": SECONDS,
    "time_limit": SECONDS,
    "soft_time_limit": SECONDS,
    "ignore_result": BOOL,
    "shadow": TEXT,
}

#: ``[celeryroute:TASK]``, and ``options`` of ``[celerybeat:NAME]``.
ROUTE_KEYS: dict[str, Kind] = {**MESSAGE_KEYS, **CALL_KEYS}

#: ``[celeryqueue:NAME]``.
QUEUE_KEYS: dict[str, Kind] = {
    "exchange": TEXT,
    "type": _EXCHANGE_TYPE,
    "routing_key": TEXT,
    "priority": _PRIORITY,
    "durable": BOOL,
    "auto_delete": BOOL,
    "exclusive": BOOL,
    "expires": SECONDS,
    "message_ttl": SECONDS,
    "max_length": whole(1),
    "max_length_bytes": whole(1),
    "queue_arguments": mapping('{"x-queue-type": "quorum"}'),
}

#: ``[celeryannotate:TASK]``: attributes of a task that are read when it is called or run.
ANNOTATION_KEYS: dict[str, Kind] = {
    "rate_limit": nullable(RATE),
    "time_limit": nullable(SECONDS),
    "soft_time_limit": nullable(SECONDS),
    "max_retries": nullable(whole()),
    "default_retry_delay": SECONDS,
    "expires": nullable(SECONDS),
    "priority": nullable(_PRIORITY),
    "queue": TEXT,
    "exchange": TEXT,
    "routing_key": TEXT,
    "serializer": _SERIALIZER,
    "compression": nullable(_COMPRESSION),
    "delivery_mode": CORRECTIONS["task_default_delivery_mode"],
    "ignore_result": BOOL,
    "store_eager_result": BOOL,
    "store_errors_even_if_ignored": BOOL,
    "track_started": BOOL,
    "trail": BOOL,
    "send_events": BOOL,
    "acks_late": BOOL,
    "acks_on_failure_or_timeout": BOOL,
    "acks_on_failure": nullable(BOOL),
    "acks_on_timeout": nullable(BOOL),
    "reject_on_worker_lost": nullable(BOOL),
    "retry_on_worker_lost": BOOL,
    "resultrepr_maxsize": whole(),
}

_ARGS = Kind("list", "a JSON array", "[1, 2]", json_value_of(list), (list, tuple))
_KWARGS = mapping('{"key": "value"}')

#: ``[celerybeat:NAME]``, except for ``schedule``, whose kind is its ``type``.
ENTRY_KEYS: dict[str, Kind] = {
    "task": TEXT,
    "args": _ARGS,
    "kwargs": _KWARGS,
    "options": _KWARGS,
    "timezone": CORRECTIONS["timezone"],
    "relative": BOOL,
    "enabled": BOOL,
}

#: Keys of transport options and the like that would be mistaken for another type. The rest has the
#: type that its text looks like.
TRANSPORT_KEYS: dict[str, Kind] = {
    **dict.fromkeys(
        ("visibility_timeout", "socket_timeout", "socket_connect_timeout", "polling_interval",
         "health_check_interval", "unacked_restore_interval"),
        nullable(SECONDS),
    ),
    **dict.fromkeys(
        ("fanout_prefix", "fanout_patterns"),
        Kind("bool or text", "true, false or text", "true", untyped, (bool,)),
    ),
    **dict.fromkeys(
        ("socket_keepalive", "retry_on_timeout", "confirm_publish", "login_method_strict",
         "is_secure", "store_processed"),
        BOOL,
    ),
    **dict.fromkeys(
        ("global_keyprefix", "queue_name_prefix", "master_name", "region", "data_folder_in",
         "data_folder_out", "processed_folder", "control_folder", "client_name", "sep",
         "unacked_key", "unacked_index_key", "unacked_mutex_key", "username", "password", "user",
         "database", "taskmeta_collection", "groupmeta_collection"),
        TEXT,
    ),
    **dict.fromkeys(("max_connections", "max_retries", "wait_time_seconds"), nullable(whole())),
    **dict.fromkeys(("interval_start", "interval_step", "interval_max"), number()),
    "queue_order_strategy": choice("strategy", "round_robin", "priority", "sorted"),
}  # fmt: skip

#: Settings of our own, ``ws_celery.*`` in the application's section.
OUR_SETTINGS: dict[str, Kind] = {
    "ws_celery.config_uri": replace(
        TEXT, expected="the INI file with the [celery...] sections", example="%(__file__)s"
    ),
}


def accept_keys(values: Mapping[str, Any], kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """Return the values of a JSON object, typed.

    :raises Refused: at the first key that is unknown or has a value of another kind.
    """
    found = {}
    for key, value in values.items():
        if key not in kinds:
            raise Refused(f"has the unknown key {key}", nearest(key, kinds))
        try:
            found[key] = kinds[key].accept(value)
        except Refused as error:
            problem = f"{error}; expected " if str(error) else "expected "
            raise Refused(f"has {key}: {problem}{kinds[key].expected}", error.close) from None
    return found
