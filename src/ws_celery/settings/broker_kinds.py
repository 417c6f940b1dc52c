"""Kinds of values that Celery and kombu have names for: what goes through a broker, and how."""

from __future__ import annotations

import math
import re
import shlex
import socket
import ssl
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from celery.app.backends import BACKEND_ALIASES
from celery.utils.imports import symbol_by_name
from celery.utils.time import rate
from kombu.serialization import registry as serializers
from kombu.transport import TRANSPORT_ALIASES

from ws_celery.compat import compression_names
from ws_celery.converters import Refused, json_value, nearest
from ws_celery.settings.kinds import (
    ANYTHING,
    BOOL,
    LIST,
    PROSE,
    SECONDS,
    TEXT,
    Kind,
    choice,
    json_value_of,
    mapping,
    nullable,
    number,
    whole,
    without_blanks,
)

__all__ = (
    "ANNOTATIONS",
    "BACKEND",
    "BROKER",
    "BROKER_SIDE",
    "CALLBACK",
    "COMMANDS",
    "COMPRESSION",
    "CONTENT",
    "DATABASE",
    "DELIVERY_MODE",
    "ENGINE_OPTIONS",
    "EXCHANGE_TYPE",
    "FAILOVER",
    "PORT",
    "PRIORITY",
    "QUEUES",
    "QUEUE_ARGUMENTS",
    "QUEUE_TYPE",
    "RATE",
    "RETRY_POLICY",
    "ROUTES",
    "SERIALIZER",
    "TABLE_NAMES",
    "TLS",
    "TRANSPORT",
    "TRANSPORT_KEYS",
    "TRANSPORT_OPTIONS",
    "dotted",
)

#: SQLAlchemy's URLs begin so; Celery's and kombu's have a prefix.
_DATABASES = frozenset(
    ("cockroachdb", "mariadb", "mssql", "mysql", "oracle", "postgres", "postgresql", "sqlite")
)
_URL = re.compile(r"(?P<scheme>[A-Za-z][\w.+:-]*)://", re.ASCII)


def _urls(text: str) -> list[str]:
    # A comma separates where another URL follows; hosts of one URL may have commas between them.
    parts = re.split(r"(?:[\s,]+|;\s+)(?=[A-Za-z][\w.+-]*://)|\s*\n\s*", text)
    return [part.strip().rstrip(",") for part in parts if part.strip()]


def _broker(text: str) -> Any:
    urls = json_value(text) if text.startswith("[") else _urls(text)
    return _one_or_all(urls)


def _one_or_all(urls: list[Any]) -> Any:
    if not urls:
        raise Refused("is empty")
    for url in urls:
        _known_transport(url)
    if len(urls) > 1 and any(map(_is_embedded, urls)):
        raise Refused("the embedded broker stands alone, not among other URLs")
    return urls[0] if len(urls) == 1 else urls


def _is_embedded(url: str) -> bool:
    """Tell whether the URL is ``embedded://DIRECTORY``.

    :raises Refused: if it is, and the directory is not absolute.
    """
    scheme, _, directory = url.partition("://")
    if scheme == "embedded" and not Path(directory).is_absolute():
        raise Refused("needs an absolute directory, such as embedded://%(here)s/var")
    return scheme == "embedded"


def _not_embedded(urls: Any) -> Any:
    found = _one_or_all([urls] if isinstance(urls, str) else list(urls))
    if isinstance(found, str) and _is_embedded(found):
        raise Refused("the embedded broker is for broker_url, which both read and write")
    return found


def _known_transport(url: Any) -> None:
    match = _URL.match(url) if isinstance(url, str) else None
    if not match:
        raise Refused("is no URL")
    without_blanks(url)
    known = {*TRANSPORT_ALIASES, "embedded"}
    transport = match["scheme"].partition("+")[0]
    if transport in _DATABASES:
        raise _is_database("sqla", url)
    if transport not in known and not re.search(r"[.:]", transport):
        raise Refused(f"has the unknown transport {transport}", nearest(transport, known))
    _is_embedded(url)


def _is_database(prefix: str, url: str) -> Refused:
    # SQLAlchemy has forgotten the short name.
    known = re.sub("^postgres(?!ql)", "postgresql", url)
    return Refused("is the URL of a database", f"{prefix}+{known}")


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
    if not separator and re.search("[/@]", text):
        raise Refused("is no URL")
    if not text or "\n" in text or (not separator and ":" in text and "." not in text):
        raise Refused
    if separator and name in _DATABASES:
        raise _is_database("db", text)
    if name not in known and not re.fullmatch(r"[\w.]+[.:]\w+", name):
        raise Refused("is no result backend that Celery knows", nearest(name, known))
    _is_embedded(text)
    return without_blanks(text)


def _database(text: str) -> str:
    if not _URL.match(text) or "\n" in text:
        raise Refused("is no URL")
    return without_blanks(text)


BROKER = Kind(
    "URL",
    "a broker URL, or several by line or comma",
    "redis://localhost:6379/0",
    _broker,
    (list, tuple),
    lambda urls: urls if isinstance(urls, str) else _one_or_all(list(urls)),
)
BROKER_SIDE = replace(BROKER, finish=_not_embedded)
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
    return _one_of(compression_names(), text)


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


def _all(kind: Kind, *names: str) -> dict[str, Kind]:
    return dict.fromkeys(" ".join(names).split(), kind)


_SECONDS = nullable(SECONDS)
_WHOLE = nullable(whole())

RETRY_POLICY = mapping(
    '{"max_retries": 3, "interval_step": 0.2}',
    {
        "max_retries": _WHOLE,
        "interval_start": number(),
        "interval_step": number(),
        "interval_max": nullable(number()),
        "timeout": _SECONDS,
        "retry_errors": replace(ANYTHING, expected="classes of exceptions, from Python"),
    },
    others="no",
)
TABLE_NAMES = mapping('{"task": "results"}', {"task": TEXT, "group": TEXT}, others="no")
ENGINE_OPTIONS = mapping(
    '{"pool_recycle": "1h"}',
    {
        **_all(BOOL, "hide_parameters pool_pre_ping pool_use_lifo"),
        **_all(whole(-1), "max_overflow pool_size"),
        "isolation_level": TEXT,
        "pool_recycle": replace(SECONDS, finish=number(least=-1).finish),
        "pool_timeout": SECONDS,
    },
    others="unlike",
)
QUEUE_ARGUMENTS = mapping(
    '{"x-queue-type": "quorum"}',
    {
        **_all(TEXT, "x-dead-letter-exchange x-dead-letter-routing-key"),
        **_all(whole(), "x-max-length x-max-length-bytes x-message-ttl"),
        "x-delivery-limit": whole(-1),
        "x-expires": whole(1),
        "x-max-priority": whole(0, 255),
        "x-overflow": choice("overflow", "drop-head", "reject-publish", "reject-publish-dlx"),
        "x-queue-mode": choice("mode", "default", "lazy"),
        "x-queue-type": choice("queue type", "classic", "quorum", "stream"),
        "x-single-active-consumer": BOOL,
    },
    others="unlike",
)


def _steps(values: Any) -> list[int]:
    if not values:
        raise Refused("is empty")
    return [whole().accept(value) for value in values]


_STEPS = Kind(
    "list", "a JSON array of whole numbers", "[0, 3, 6, 9]", json_value_of(list), (list,), _steps
)
_BOOL_OR_TEXT = Kind("bool or text", "true, false or text", "true", ANYTHING.convert, (bool,))


def _socket_options(values: Mapping[Any, Any]) -> dict[int, int]:
    names = {name: each for name, each in vars(socket).items() if name.startswith("TCP_")}
    found = {}
    for key, value in values.items():
        if not isinstance(key, int) and key not in names:
            raise Refused(f"has {key}, which is no constant of socket", nearest(key, names))
        found[int(names.get(key, key))] = whole().accept(value)
    return found


def _in_one_piece(_key: str) -> Kind:
    raise Refused("has to be in one piece, as a JSON object")


_SOCKET_OPTIONS = Kind(
    "dict",
    "a JSON object of constants of the module socket",
    '{"TCP_KEEPIDLE": 60}',
    json_value_of(dict),
    (Mapping,),
    _socket_options,
    inside=_in_one_piece,
)

#: Keys of transport options and the like that would be mistaken for another type. The rest has the
#: type that its text looks like.
TRANSPORT_KEYS: dict[str, Kind] = {
    **_all(
        TEXT,
        "client_name control_folder data_folder_in data_folder_out database global_keyprefix",
        "groupmeta_collection master_name processed_folder queue_name_prefix region sep",
        "taskmeta_collection unacked_index_key unacked_key unacked_mutex_key user username",
    ),
    **_all(BOOL, "confirm_publish is_secure login_method_strict retry_on_timeout"),
    **_all(BOOL, "socket_keepalive store_processed"),
    **_all(_BOOL_OR_TEXT, "fanout_patterns fanout_prefix"),
    **_all(
        _SECONDS,
        "health_check_interval polling_interval socket_connect_timeout socket_timeout",
        "unacked_restore_interval visibility_timeout",
    ),
    **_all(_WHOLE, "max_connections max_retries wait_time_seconds"),
    **_all(number(), "interval_max interval_start interval_step"),
    "password": PROSE,
    "priority_steps": _STEPS,
    "queue_order_strategy": choice("strategy", "round_robin", "priority", "sorted"),
    "retry_policy": RETRY_POLICY,
    "socket_keepalive_options": _SOCKET_OPTIONS,
}
TRANSPORT_OPTIONS = mapping('{"visibility_timeout": 43200}', TRANSPORT_KEYS, others="unlike")


def _rate(text: str) -> str:
    try:
        valid = math.isfinite(rate(text)) and rate(text) >= 0
    except (KeyError, ValueError):
        valid = False
    if not valid:
        raise Refused
    return text


RATE = Kind("rate", "a rate such as 10/s, 10/m or 10/h", "10/m", _rate, (int, float))


def _constant(prefix: str, example: str, *none: type) -> Kind:
    """Return the kind of constants of the module ssl, with ``ssl.`` before their names or not."""
    names = {name: value for name, value in vars(ssl).items() if name.startswith(prefix)}
    family: Any = type(names[example])

    def convert(text: str) -> Any:
        name = text.removeprefix("ssl.").upper()
        for each in (name, f"{prefix}{name}"):
            if each in names:
                return names[each]
        raise Refused(close=nearest(name, names))

    def check(value: Any) -> Any:
        try:
            return None if value is None else family(value)
        except ValueError:
            raise Refused from None

    return Kind("constant", f"one of {', '.join(names)}", example, convert, (int, *none), check)


_CERTIFICATES = _constant("CERT_", "CERT_REQUIRED", type(None))
_PROTOCOL = _constant("PROTOCOL_", "PROTOCOL_TLS_CLIENT")
_TLS = mapping(
    '{"cert_reqs": "CERT_REQUIRED"}',
    {
        **_all(
            TEXT,
            "ca_certs certfile ciphers keyfile server_hostname",
            "ssl_ca_certs ssl_ca_path ssl_certfile ssl_ciphers ssl_keyfile",
        ),
        **_all(BOOL, "server_side ssl_check_hostname"),
        **_all(_CERTIFICATES, "cert_reqs ssl_cert_reqs"),
        **_all(ANYTHING, "ssl_ca_data ssl_min_version"),
        "ssl_password": PROSE,
        "ssl_version": _PROTOCOL,
    },
    others="unlike",
)


def _tls(text: str) -> Any:
    return json_value_of(dict)(text) if text.startswith("{") else BOOL.convert(text)


TLS = replace(
    _TLS,
    name="bool or dict",
    expected="true, false or a JSON object",
    convert=_tls,
    types=(bool, Mapping),
    finish=lambda value: value if isinstance(value, bool) else _TLS.finish(value),
)


_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*[.:][^\W\d]\w*")


def _resolve(text: str) -> Any:
    """Return what a dotted name, ``package.module:name`` or ``package.module.name``, stands for.

    :raises Refused: if it cannot be imported.
    """
    if not _DOTTED.fullmatch(text):
        raise Refused
    try:
        return symbol_by_name(text)
    except Exception as error:  # noqa: BLE001  whatever the imported module does
        raise Refused(f"cannot be imported ({type(error).__name__}: {error})") from None


def _callback(value: Any) -> Any:
    """Return ``value`` if it can be called."""
    if not callable(value):
        raise Refused("cannot be called")
    return value


CALLBACK = Kind(
    "callable", "the dotted name of a function", "logging:getLogger", _resolve, (object,), _callback
)


def dotted(name: str, example: str, *aliases: str) -> Kind:
    """Return the kind of a class by dotted name or alias, which Celery imports where it is used."""

    def convert(text: str) -> str:
        if text in aliases or _DOTTED.fullmatch(text):
            return text
        raise Refused(close=nearest(text, aliases))

    words = f"{', '.join(aliases)} or " if aliases else ""
    return Kind(name, f"{words}the dotted name of a class", example, convert, (type,))


FAILOVER = Kind(
    "failover strategy",
    "round-robin, shuffle or the dotted name of a function",
    "shuffle",
    lambda text: text if text in ("round-robin", "shuffle") else _callback(_resolve(text)),
    (object,),
    lambda value: value if isinstance(value, str) else _callback(value),
)


def _routers(value: Any) -> Any:
    """Resolve the dotted names of routers; check that a mapping has mappings or queue names."""
    if isinstance(value, str):
        return _resolve(value)
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
        return _resolve(value)
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


ROUTES = Kind(
    "routes",
    "a JSON object of tasks and queues, or the dotted name of a router",
    '{"myapp.tasks.*": {"queue": "slow"}}',
    _json_or_name,
    (object,),
    _routers,
)
ANNOTATIONS = Kind(
    "annotations",
    "a JSON object of tasks and their attributes, or a dotted name",
    '{"myapp.tasks.slow": {"rate_limit": "10/m"}}',
    _json_or_name,
    (object,),
    _annotations,
)


_NAME = re.compile(r"[A-Za-z_][\w.-]*")


def _lines(text: str) -> dict[str, str]:
    commands: dict[str, str] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, command = (part.strip() for part in line.partition("="))
        if name in commands:
            raise Refused(f"has {name} twice")
        commands[name] = command
    return commands


def _split(commands: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    found = {}
    for name, command in commands.items():
        if not _NAME.fullmatch(name):
            raise Refused(f"has a line without a name, or the name {name!r}")
        try:
            found[name] = tuple(shlex.split(command))
            words = shlex.split(command, posix=False)
        except ValueError as error:
            raise Refused(f"has {name}: {error}") from None
        if any(word.startswith((";", "#")) for word in words):
            raise Refused(
                f"has {name} with ; or # before a word, which needs quotes or its own line"
            )
        if not found[name] or found[name][0] == "...":
            raise Refused(f"has {name} without a program")
    return found


#: By line, so that a program has its own spaces and commas.
COMMANDS = Kind(
    "commands",
    "a line `name = program argument ...` for each command; the last word ... lets a call add more",
    "update_index = update_index site.ini ...",
    _lines,
    (dict,),
    _split,
    prose=True,
)
