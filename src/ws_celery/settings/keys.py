"""What may stand in the sections that are not ``[celery]`` itself, and of which kind it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from kombu import Exchange, Queue

from ws_celery.converters import Refused, nearest, untyped
from ws_celery.settings.broker_kinds import (
    COMPRESSION,
    DELIVERY_MODE,
    EXCHANGE_TYPE,
    PRIORITY,
    RATE,
    RETRY_POLICY,
    SERIALIZER,
)
from ws_celery.settings.command_kinds import COMMANDS
from ws_celery.settings.faults import OF_ONE_CALL
from ws_celery.settings.kinds import (
    BASE_URL,
    BOOL,
    LIST,
    MOMENT,
    NAMES,
    SECONDS,
    TEXT,
    ZONE,
    Kind,
    choice,
    json_value_of,
    mapping,
    number,
    whole,
)

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
    "meant_transport_key",
)


def _nullable(kind: Kind) -> Kind:
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


_SECONDS = _nullable(SECONDS)
_WHOLE = _nullable(whole())
_BOOL_OR_TEXT = Kind("bool or text", "true, false or text", "true", untyped, (bool,))

#: Options of a call that end in the message's properties; Celery takes them from a route.
MESSAGE_KEYS: dict[str, Kind] = {
    "queue": replace(TEXT, types=(Queue,)),
    "exchange": replace(TEXT, types=(Exchange,)),
    "exchange_type": EXCHANGE_TYPE,
    "routing_key": TEXT,
    "priority": PRIORITY,
    "serializer": SERIALIZER,
    "compression": COMPRESSION,
    "delivery_mode": DELIVERY_MODE,
    "expiration": SECONDS,
    "retry": BOOL,
    "retry_policy": RETRY_POLICY,
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
    "type": EXCHANGE_TYPE,
    "routing_key": TEXT,
    "priority": PRIORITY,
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
    "rate_limit": _nullable(RATE),
    "time_limit": _SECONDS,
    "soft_time_limit": _SECONDS,
    "max_retries": _WHOLE,
    "default_retry_delay": SECONDS,
    "expires": _SECONDS,
    "priority": _nullable(PRIORITY),
    "queue": TEXT,
    "exchange": TEXT,
    "routing_key": TEXT,
    "serializer": SERIALIZER,
    "compression": _nullable(COMPRESSION),
    "delivery_mode": DELIVERY_MODE,
    "ignore_result": BOOL,
    "store_eager_result": BOOL,
    "store_errors_even_if_ignored": BOOL,
    "track_started": BOOL,
    "trail": BOOL,
    "send_events": BOOL,
    "acks_late": BOOL,
    "acks_on_failure_or_timeout": BOOL,
    "acks_on_failure": _nullable(BOOL),
    "acks_on_timeout": _nullable(BOOL),
    "reject_on_worker_lost": _nullable(BOOL),
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
    "timezone": ZONE,
    "relative": BOOL,
    "enabled": BOOL,
    "catch_up": choice("policy", "skip", "once"),
    "overlap": choice("policy", "allow", "skip"),
    "starts_at": MOMENT,
    "expires": MOMENT,
    "description": TEXT,
}


def _steps(values: Any) -> list[int]:
    if not values:
        raise Refused("is empty")
    return [whole().accept(value) for value in values]


_STEPS = Kind(
    "list", "a JSON array of whole numbers", "[0, 3, 6, 9]", json_value_of(list), (list,), _steps
)

#: Keys of transport options and the like that would be mistaken for another type. The rest has the
#: type that its text looks like.
TRANSPORT_KEYS: dict[str, Kind] = {
    "client_name": TEXT,
    "confirm_publish": BOOL,
    "control_folder": TEXT,
    "data_folder_in": TEXT,
    "data_folder_out": TEXT,
    "database": TEXT,
    "fanout_patterns": _BOOL_OR_TEXT,
    "fanout_prefix": _BOOL_OR_TEXT,
    "global_keyprefix": TEXT,
    "groupmeta_collection": TEXT,
    "health_check_interval": _SECONDS,
    "interval_max": number(),
    "interval_start": number(),
    "interval_step": number(),
    "is_secure": BOOL,
    "login_method_strict": BOOL,
    "master_name": TEXT,
    "max_connections": _WHOLE,
    "max_retries": _WHOLE,
    "password": TEXT,
    "polling_interval": _SECONDS,
    "priority_steps": _STEPS,
    "processed_folder": TEXT,
    "queue_name_prefix": TEXT,
    "queue_order_strategy": choice("strategy", "round_robin", "priority", "sorted"),
    "region": TEXT,
    "retry_on_timeout": BOOL,
    "sep": TEXT,
    "socket_connect_timeout": _SECONDS,
    "socket_keepalive": BOOL,
    "socket_timeout": _SECONDS,
    "store_processed": BOOL,
    "taskmeta_collection": TEXT,
    "unacked_index_key": TEXT,
    "unacked_key": TEXT,
    "unacked_mutex_key": TEXT,
    "unacked_restore_interval": _SECONDS,
    "user": TEXT,
    "username": TEXT,
    "visibility_timeout": _SECONDS,
    "wait_time_seconds": _WHOLE,
}


def meant_transport_key(key: str) -> str | None:
    """Return the known key of transport options that an unknown one is a slip of."""
    if key in TRANSPORT_KEYS:
        return None
    close = get_close_matches(key.lower(), TRANSPORT_KEYS, n=1, cutoff=0.85)
    return close[0] if close else None


#: A time to wait: never none at all.
_PATIENCE = replace(
    SECONDS,
    expected="more than 0 seconds",
    example="2",
    finish=number(least=1e-9, most=86400).finish,
)


def _plugins(values: Any) -> list[str]:
    names: list[str] = LIST.finish(values)
    words = [name.lower() for name in names]
    if {"all", "none"}.isdisjoint(words):
        return names
    if len(words) > 1:
        raise Refused("has all or none beside other names")
    return words


#: Which installed distributions may bring tasks.
_PLUGINS = replace(
    LIST,
    expected="all, none, or names of installed distributions, by line or comma",
    example="none",
    finish=_plugins,
)


def _place(text: str) -> str:
    words = ("auto", "database", "memory")
    if text not in words and not re.match(r"(rediss?|sentinel|redis\+socket)://", text):
        raise Refused(close=nearest(text, words))
    return text


#: Where one-instance locks are kept.
_LOCKS = replace(
    TEXT,
    expected="auto, database, memory, or the URL of a Redis",
    example="redis://localhost:6379/2",
    finish=_place,
)

#: Settings of our own, ``ws_celery.*`` in the application's section.
OUR_SETTINGS: dict[str, Kind] = {
    "ws_celery.backup.keep": whole(1),
    "ws_celery.backup.target": replace(
        TEXT, expected="a folder, or a URL that fsspec knows", example="s3://bucket/shop"
    ),
    "ws_celery.backup.timeout": replace(_PATIENCE, example="1h"),
    "ws_celery.base_url": BASE_URL,
    "ws_celery.commands": COMMANDS,
    "ws_celery.commands.timeout": replace(_PATIENCE, example="1h"),
    "ws_celery.beat": BOOL,
    "ws_celery.beat.poll": replace(_PATIENCE, example="2"),
    "ws_celery.beat.table": replace(
        TEXT, expected="the name of a table, with its schema or without", example="tasks.schedule"
    ),
    "ws_celery.config_uri": replace(
        TEXT, expected="the INI file with the [celery...] sections", example="%(__file__)s"
    ),
    "ws_celery.dbsession": replace(
        TEXT, expected="the request's attribute with the SQLAlchemy session", example="dbsession"
    ),
    "ws_celery.locks": _LOCKS,
    "ws_celery.outbox": BOOL,
    "ws_celery.outbox.lease": replace(_PATIENCE, example="300"),
    "ws_celery.outbox.max_deliveries": whole(1),
    "ws_celery.outbox.poll": replace(_PATIENCE, example="1"),
    "ws_celery.outbox.table": replace(
        TEXT, expected="the name of a table, with its schema or without", example="tasks.outbox"
    ),
    "ws_celery.propagate": replace(
        NAMES,
        expected="names of what travels with a task: locale, request_id, user, or your own",
        example="locale, request_id, user",
    ),
    "ws_celery.publish_timeout": _PATIENCE,
    "ws_celery.publish_cooldown": replace(_PATIENCE, example="5"),
    "ws_celery.log_arguments": BOOL,
    "ws_celery.mask_arguments": replace(
        NAMES,
        expected="names of arguments that are shown to nobody, or all",
        example="email, iban",
    ),
    "ws_celery.plugins": _PLUGINS,
}


def accept_keys(values: Mapping[str, Any], kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """Return the values of a JSON object, typed.

    :raises Refused: at the first key that is unknown or has a value of another kind.
    """
    found = {}
    for key, value in values.items():
        if key in OF_ONE_CALL and "countdown" in kinds:
            raise Refused(f"has {key}, which {OF_ONE_CALL[key]}")
        if key not in kinds:
            raise Refused(f"has the unknown key {key}", nearest(key, kinds))
        try:
            found[key] = kinds[key].accept(value)
        except Refused as error:
            problem = f"{error}; expected " if str(error) else "expected "
            raise Refused(f"has {key}: {problem}{kinds[key].expected}", error.close) from None
    return found
