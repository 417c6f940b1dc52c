"""Kinds of values that Celery and kombu have names for: what goes through a broker, and how."""

from __future__ import annotations

import math
import re
import ssl
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from celery.app.backends import BACKEND_ALIASES
from celery.utils.time import rate
from kombu import compression
from kombu.serialization import registry as serializers
from kombu.transport import TRANSPORT_ALIASES

from ws_celery.converters import Refused, json_value, nearest
from ws_celery.settings.kinds import BOOL, LIST, Kind, choice, json_value_of, mapping, whole

__all__ = (
    "BACKEND",
    "BROKER",
    "COMPRESSION",
    "CONTENT",
    "DATABASE",
    "DELIVERY_MODE",
    "EXCHANGE_TYPE",
    "PORT",
    "PRIORITY",
    "QUEUES",
    "QUEUE_TYPE",
    "RATE",
    "RETRY_POLICY",
    "SERIALIZER",
    "TLS",
    "TRANSPORT",
)


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


BROKER = Kind(
    "URL",
    "a broker URL, or several by line or comma",
    "redis://localhost:6379/0",
    _broker,
    (list, tuple),
    lambda urls: urls if isinstance(urls, str) else _one_or_all(list(urls)),
)
BACKEND = Kind("URL", "the URL or name of a result backend", "redis://localhost:6379/1", _backend)
DATABASE = Kind("URL", "a database URL", "postgresql://localhost/celery", _database)
TRANSPORT = Kind("transport", "a transport of kombu, or its dotted name", "redis", _transport)


def _one_of(known: set[str], text: str) -> str:
    if text not in known:
        raise Refused(close=nearest(text, known))
    return text


def _serializer(text: str) -> str:
    # `auth` is registered when security is set up.
    return _one_of({*serializers.name_to_type, "auth"}, text)


def _content(values: list[Any]) -> list[str]:
    known = {*serializers.name_to_type, *serializers.type_to_name, "auth", "application/data"}
    for value in LIST.finish(values):
        if value not in known:
            raise Refused(f"has the unknown content type {value!r}", nearest(value, known))
    return list(values)


def _compression(text: str) -> str:
    return _one_of({*compression._aliases, *compression._encoders}, text)


SERIALIZER = Kind("serializer", "a serializer such as json", "json", _serializer)
CONTENT = replace(
    LIST, expected="serializers or content types, by line or comma", example="json", finish=_content
)
COMPRESSION = Kind("compression", "a compression such as gzip", "gzip", _compression)
EXCHANGE_TYPE = choice(
    "exchange type", "direct", "topic", "fanout", "headers", more=lambda text: text[:2] == "x-"
)
QUEUE_TYPE = choice("queue type", "classic", "quorum")
PORT = whole(1, 65535, "6379")
PRIORITY = whole(0, 255, "5")


def _mode(value: int | str) -> int | str:
    if value not in (1, 2, "transient", "persistent"):
        raise Refused
    return value


DELIVERY_MODE = Kind(
    "delivery mode",
    "1, 2, transient or persistent",
    "persistent",
    lambda text: int(text) if text in ("1", "2") else text.lower(),
    (int,),
    _mode,
)


def _names_or_json(text: str) -> Any:
    return json_value(text) if text.startswith(("{", "[")) else LIST.convert(text)


def _not_empty(value: Any) -> Any:
    if not value:
        raise Refused
    return value


#: Completed by the sections, which know how to make queues.
QUEUES = Kind(
    "queues",
    "names of queues by line or comma, or a JSON object of them",
    "fast, slow",
    _names_or_json,
    (dict, list, tuple),
    _not_empty,
)


def _policy(value: dict[str, Any]) -> dict[str, Any]:
    """Check the keys and numbers of a retry policy."""
    for key, amount in value.items():
        if key not in _POLICY:
            raise Refused(f"has the unknown key {key}", nearest(key, _POLICY))
        if amount is None and key in ("max_retries", "interval_max", "timeout"):
            continue
        if isinstance(amount, bool) or not isinstance(amount, (int, float)) or amount < 0:
            raise Refused(f"has {key} = {amount!r}, which is no number of at least 0")
    return dict(value)


_POLICY = ("max_retries", "interval_start", "interval_step", "interval_max", "timeout")
RETRY_POLICY = mapping('{"max_retries": 3, "interval_step": 0.2}', _policy)


def _rate(text: str) -> str:
    try:
        valid = math.isfinite(rate(text)) and rate(text) >= 0
    except (KeyError, ValueError):
        valid = False
    if not valid:
        raise Refused
    return text


RATE = Kind("rate", "a rate such as 10/s, 10/m or 10/h", "10/m", _rate, (int, float))


def _with_ssl_constants(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return TLS options with the names of constants, such as ``CERT_REQUIRED``, resolved."""
    return {key: _ssl_constant(key, value) for key, value in options.items()}


_SSL_PREFIXES = {"cert_reqs": "CERT_", "ssl_cert_reqs": "CERT_", "ssl_version": "PROTOCOL_"}


def _ssl_constant(key: str, value: Any) -> Any:
    prefix = _SSL_PREFIXES.get(key)
    if prefix is None or not isinstance(value, str) or not value.startswith(prefix):
        return value
    names = [name for name in dir(ssl) if name.startswith(prefix)]
    if value not in names:
        raise Refused(f"has {key} = {value!r}, which is no constant of ssl", nearest(value, names))
    return getattr(ssl, value)


def _tls(text: str) -> Any:
    return json_value_of(dict)(text) if text.startswith("{") else BOOL.convert(text)


TLS = Kind(
    "bool or dict",
    "true, false or a JSON object",
    '{"cert_reqs": "CERT_REQUIRED"}',
    _tls,
    (bool, Mapping),
    lambda value: value if isinstance(value, bool) else _with_ssl_constants(value),
)
