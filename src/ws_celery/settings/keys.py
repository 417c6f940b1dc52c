"""What may stand in the sections that are not ``[celery]`` itself, and of which kind it is."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from kombu import Exchange, Queue

from ws_celery.converters import Refused, nearest
from ws_celery.settings.broker_kinds import (
    COMMANDS,
    COMPRESSION,
    DELIVERY_MODE,
    EXCHANGE_TYPE,
    PRIORITY,
    QUEUE_ARGUMENTS,
    RATE,
    RETRY_POLICY,
    SERIALIZER,
)
from ws_celery.settings.kinds import (
    BASE_URL,
    BOOL,
    LIST,
    MOMENT,
    NAMES,
    PROSE,
    SECONDS,
    TEXT,
    ZONE,
    Kind,
    accept_keys,
    choice,
    json_value_of,
    mapping,
    nullable,
    number,
    whole,
    without_blanks,
)

__all__ = (
    "ANNOTATION_KEYS",
    "CALL_KEYS",
    "ENTRY_KEYS",
    "MESSAGE_KEYS",
    "OUR_SETTINGS",
    "QUEUE_KEYS",
    "ROUTE_KEYS",
    "accept_keys",
)


_SECONDS = nullable(SECONDS)
_WHOLE = nullable(whole())

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
    "queue_arguments": QUEUE_ARGUMENTS,
}

#: ``[celeryannotate:TASK]``: attributes of a task that are read when it is called or run.
ANNOTATION_KEYS: dict[str, Kind] = {
    "rate_limit": nullable(RATE),
    "time_limit": _SECONDS,
    "soft_time_limit": _SECONDS,
    "max_retries": _WHOLE,
    "default_retry_delay": SECONDS,
    "expires": _SECONDS,
    "priority": nullable(PRIORITY),
    "queue": TEXT,
    "exchange": TEXT,
    "routing_key": TEXT,
    "serializer": SERIALIZER,
    "compression": nullable(COMPRESSION),
    "delivery_mode": DELIVERY_MODE,
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
    "timezone": ZONE,
    "relative": BOOL,
    "enabled": BOOL,
    "catch_up": choice("policy", "skip", "once"),
    "overlap": choice("policy", "allow", "skip"),
    "starts_at": MOMENT,
    "expires": MOMENT,
    "description": PROSE,
}


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
    return without_blanks(text)


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
    "ws_celery.base_url.pin": BOOL,
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
    "ws_celery.publish_spool": replace(whole(), example="10000"),
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
