"""Kinds of values that Celery and kombu have names for: what goes through a broker, and how."""

from __future__ import annotations

import math
import re
import shlex
import socket
import ssl
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from celery.app.backends import BACKEND_ALIASES
from celery.utils import time as celery_time
from celery.utils.imports import symbol_by_name
from kombu.serialization import registry as serializers
from kombu.transport import TRANSPORT_ALIASES

from ws_celery.compat import compression_names
from ws_celery.converters import Refused, json_value, nearest
from ws_celery.settings import kinds
from ws_celery.settings.kinds import Kind, accepts, choice, each, mapping, nullable, whole

# --- Constants of the modules ssl and socket -------------------------------------------------


def _constant(prefix: str, example: str) -> Kind:
    """Return the kind of constants of the module ssl, with ``ssl.`` before their names or not."""
    known = {name: value for name, value in vars(ssl).items() if name.startswith(prefix)}

    def convert(value: str | int | None) -> int | None:
        if value is None:
            return None
        if not isinstance(value, str):
            value = next((name for name, each in known.items() if each == value), "")
        name = value.removeprefix("ssl.").upper()
        return known[_one_of(known, name if name.startswith(prefix) else f"{prefix}{name}")]

    return Kind("constant", f"one of {', '.join(known)}", example, convert, (int, type(None)))


def _in_one_piece(_key: str) -> Kind:
    raise Refused("has to be in one piece, as a JSON object")


def _socket_options(value: str | Mapping[Any, Any]) -> dict[int, int]:
    known = {name: each for name, each in vars(socket).items() if name.startswith("TCP_")}
    found = {}
    for key, number in kinds.json_of(value, Mapping).items():
        if not isinstance(key, int) and key not in known:
            raise Refused(f"has {key}, which is no constant of socket", nearest(key, known))
        found[int(known.get(key, key))] = whole().accept(number)
    return found


socket_options = Kind(
    "dict",
    "a JSON object of constants of the module socket",
    '{"TCP_KEEPIDLE": 60}',
    _socket_options,
    (Mapping,),
    inside=_in_one_piece,
)


# --- Names and URLs that Celery and kombu know -----------------------------------------------


def _one_of(known: Collection[str], value: str) -> str:
    if value not in known:
        raise Refused(close=nearest(value, known))
    return value


@accepts("a serializer such as json", "json")
def serializer(value: str) -> str:
    # `auth` is registered when security is set up.
    return _one_of({*serializers.name_to_type, "auth"}, value)


@accepts("serializers or content types, by line or comma", "json", *kinds.COLLECTIONS, name="list")
def content(value: str | Iterable[Any]) -> list[str]:
    known = {*serializers.name_to_type, *serializers.type_to_name, "auth", "application/data"}
    found: list[str] = kinds.listed.convert(value)
    for name in found:
        if name not in known:
            raise Refused(f"has the unknown content type {name!r}", nearest(name, known))
    return found


@accepts("a compression such as gzip", "gzip")
def compression(value: str) -> str:
    return _one_of(compression_names(), value)


exchange_type = choice(
    "exchange type", "direct", "topic", "fanout", "headers", more=lambda word: word[:2] == "x-"
)
queue_type = choice("queue type", "classic", "quorum")
port = whole(1, 65535, "6379")
priority = whole(0, 255, "5")


@accepts("1, 2, transient or persistent", "persistent", int)
def delivery_mode(value: str | int) -> str | int:
    found = int(value) if value in ("1", "2") else value
    found = found.lower() if isinstance(found, str) else found
    if found not in (1, 2, "transient", "persistent"):
        raise Refused
    return found


@accepts("a rate such as 10/s, 10/m or 10/h", "10/m", int, float)
def rate(value: str | float) -> str | float:
    try:
        usable = 0 <= celery_time.rate(value) < math.inf
    except (KeyError, ValueError):
        usable = False
    if not usable:
        raise Refused
    return value


#: SQLAlchemy's URLs begin so; Celery's and kombu's have a prefix.
_DATABASES = frozenset(
    ("cockroachdb", "mariadb", "mssql", "mysql", "oracle", "postgres", "postgresql", "sqlite")
)
_SCHEME = re.compile(r"(?P<name>[A-Za-z][\w.:-]*)(\+[\w.+:-]*)?://", re.ASCII)


def _scheme(url: object) -> str:
    """Return the scheme of a URL, without what follows a ``+`` in it."""
    match = _SCHEME.match(url) if isinstance(url, str) else None
    if not match:
        raise Refused("is no URL")
    without_blanks(match.string)
    return match["name"]


def without_blanks(url: str) -> str:
    """Return a URL, if it is one without blanks.

    :raises Refused: if it has one.
    """
    if re.search(r"\s", url):
        raise Refused("has a blank, which a URL writes as %20")
    return url


def _check_url(url: str, what: str, known: Collection[str], prefix: str) -> None:
    """Refuse a URL whose scheme is neither known nor a dotted name.

    :param what: what the scheme is the name of.
    :param prefix: what stands before the URL of a database.
    """
    scheme = _scheme(url)
    if scheme in _DATABASES:
        # SQLAlchemy has forgotten the short name.
        url = re.sub("^postgres(?!ql)", "postgresql", url)
        raise Refused("is the URL of a database", f"{prefix}+{url}")
    if scheme == "embedded":
        if not Path(url.partition("://")[2]).is_absolute():
            raise Refused("needs an absolute directory, such as embedded://%(here)s/var")
    elif scheme not in known and not re.search(r"[.:]", scheme):
        raise Refused(f"has the unknown {what} {scheme}", nearest(scheme, (*known, "embedded")))


@accepts(
    "a broker URL, or several by line or comma", "redis://localhost:6379/0", list, tuple, name="URL"
)
def broker(value: str | list[Any] | tuple[Any, ...]) -> str | list[str]:
    urls = _urls(value)
    if not urls:
        raise Refused("is empty")
    for url in urls:
        _check_url(url, "transport", TRANSPORT_ALIASES, "sqla")
    if len(urls) > 1 and any(url.startswith("embedded:") for url in urls):
        raise Refused("the embedded broker stands alone, not among other URLs")
    return urls[0] if len(urls) == 1 else urls


def _urls(value: str | list[Any] | tuple[Any, ...]) -> list[Any]:
    if not isinstance(value, str):
        return list(value)
    if value.startswith("["):
        return list(json_value(value))
    # A comma separates where another URL follows; hosts of one URL may have commas between them.
    parts = re.split(r"(?:[\s,]+|;\s+)(?=[A-Za-z][\w.+-]*://)|\s*\n\s*", value)
    return [part.strip().rstrip(",") for part in parts if part.strip()]


def _broker_side(value: str | list[Any] | tuple[Any, ...]) -> str | list[str]:
    found: str | list[str] = broker.convert(value)
    if isinstance(found, str) and found.startswith("embedded:"):
        raise Refused("the embedded broker is for broker_url, which both read and write")
    return found


broker_side = replace(broker, convert=_broker_side)


@accepts("the URL or name of a result backend", "redis://localhost:6379/1", name="URL")
def backend(value: str) -> str:
    known = {*BACKEND_ALIASES, *plugged("celery.result_backends")}
    if "://" in value:
        _check_url(value, "result backend", known, "db")
        return value
    if re.search("[/@]", value):
        raise Refused("is no URL")
    if value not in known and not ("." in value and _DOTTED.fullmatch(value)):
        raise Refused("is no result backend that Celery knows", nearest(value, known))
    return value


@cache
def plugged(group: str) -> list[str]:
    return [point.name for point in entry_points(group=group)]


@accepts("a database URL", "postgresql://localhost/celery", name="URL")
def database(value: str) -> str:
    _scheme(value)
    return value


# --- Code ----------------------------------------------------------------------------------

_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*[.:][^\W\d]\w*")


def resolve(name: str) -> Any:
    """Return what a dotted name, ``package.module:name`` or ``package.module.name``, stands for.

    :raises Refused: if it cannot be imported.
    """
    if not _DOTTED.fullmatch(name):
        raise Refused
    try:
        return symbol_by_name(name)
    except Exception as error:  # noqa: BLE001  whatever the imported module does
        raise Refused(f"cannot be imported ({type(error).__name__}: {error})") from None


@accepts("a transport of kombu, or its dotted name", "redis")
def transport(value: str) -> str:
    return value if _DOTTED.fullmatch(value) else _one_of(TRANSPORT_ALIASES, value)


@accepts("the dotted name of a function", "logging:getLogger", object, name="callable")
def function(value: object) -> object:
    found = resolve(value) if isinstance(value, str) else value
    if not callable(found):
        raise Refused("cannot be called")
    return found


@accepts("round-robin, shuffle or the dotted name of a function", "shuffle", object)
def failover_strategy(value: object) -> object:
    return value if value in ("round-robin", "shuffle") else function.convert(value)


def dotted(example: str, *aliases: str) -> Kind:
    """Return the kind of a class by dotted name or alias, which Celery imports where it is used."""

    def convert(value: str | type) -> str | type:
        if isinstance(value, type) or value in aliases or _DOTTED.fullmatch(value):
            return value
        raise Refused(close=nearest(value, aliases))

    words = f"{', '.join(aliases)} or " if aliases else ""
    return Kind("class", f"{words}the dotted name of a class", example, convert, (type,))


# --- What mappings have inside ---------------------------------------------------------------

_SECONDS = nullable(kinds.seconds)
_WHOLE = nullable(whole())


@accepts("a JSON array of whole numbers", "[0, 3, 6, 9]", list, name="list")
def _steps(value: str | list[Any]) -> list[int]:
    found = kinds.array.convert(value)
    if not found:
        raise Refused("is empty")
    return [whole().accept(step) for step in found]


retry_policy = mapping(
    '{"max_retries": 3, "interval_step": 0.2}',
    {
        "max_retries": _WHOLE,
        **each(kinds.number, "interval_start interval_step"),
        "interval_max": nullable(kinds.number),
        "timeout": _SECONDS,
        "retry_errors": replace(kinds.anything, expected="classes of exceptions, from Python"),
    },
    others="no",
)
table_names = mapping('{"task": "results"}', each(kinds.text, "task group"), others="no")
engine_options = mapping(
    '{"pool_recycle": "1h"}',
    {
        **each(kinds.boolean, "hide_parameters pool_pre_ping pool_use_lifo"),
        **each(whole(-1), "max_overflow pool_size"),
        "isolation_level": kinds.text,
        "pool_recycle": kinds.seconds_or_minus_one,
        "pool_timeout": kinds.seconds,
    },
    others="unlike",
)
queue_arguments = mapping(
    '{"x-queue-type": "quorum"}',
    {
        **each(kinds.text, "x-dead-letter-exchange x-dead-letter-routing-key"),
        **each(whole(), "x-max-length x-max-length-bytes x-message-ttl"),
        "x-delivery-limit": whole(-1),
        "x-expires": whole(1),
        "x-max-priority": priority,
        "x-overflow": choice("overflow", "drop-head", "reject-publish", "reject-publish-dlx"),
        "x-queue-mode": choice("mode", "default", "lazy"),
        "x-queue-type": choice("queue type", "classic", "quorum", "stream"),
        "x-single-active-consumer": kinds.boolean,
    },
    others="unlike",
)
#: Keys of transport options and the like that would be mistaken for another type. The rest has the
#: type that its text looks like.
TRANSPORT_KEYS = {
    **each(
        kinds.text,
        "client_name control_folder data_folder_in data_folder_out database global_keyprefix",
        "groupmeta_collection master_name processed_folder queue_name_prefix region sep",
        "taskmeta_collection unacked_index_key unacked_key unacked_mutex_key user username",
    ),
    **each(
        kinds.boolean,
        "confirm_publish is_secure login_method_strict retry_on_timeout socket_keepalive",
        "store_processed",
    ),
    **each(
        Kind("bool or text", "true, false or text", "true", kinds.anything.convert, (bool,)),
        "fanout_patterns fanout_prefix",
    ),
    **each(
        _SECONDS,
        "health_check_interval polling_interval socket_connect_timeout socket_timeout",
        "unacked_restore_interval visibility_timeout",
    ),
    **each(_WHOLE, "max_connections max_retries wait_time_seconds"),
    **each(kinds.number, "interval_max interval_start interval_step"),
    "password": kinds.prose,
    "priority_steps": _steps,
    "queue_order_strategy": choice("strategy", "round_robin", "priority", "sorted"),
    "retry_policy": retry_policy,
    "socket_keepalive_options": socket_options,
}
transport_options = mapping('{"visibility_timeout": 43200}', TRANSPORT_KEYS, others="unlike")
_TLS_KEYS = mapping(
    '{"cert_reqs": "CERT_REQUIRED"}',
    {
        **each(
            kinds.text,
            "ca_certs certfile ciphers keyfile server_hostname",
            "ssl_ca_certs ssl_ca_path ssl_certfile ssl_ciphers ssl_keyfile",
        ),
        **each(kinds.boolean, "server_side ssl_check_hostname"),
        **each(_constant("CERT_", "CERT_REQUIRED"), "cert_reqs ssl_cert_reqs"),
        **each(kinds.anything, "ssl_ca_data ssl_min_version"),
        "ssl_password": kinds.prose,
        "ssl_version": _constant("PROTOCOL_", "PROTOCOL_TLS_CLIENT"),
    },
    others="unlike",
)


def _tls(value: str | bool | Mapping[str, object]) -> object:
    in_keys = value.startswith("{") if isinstance(value, str) else isinstance(value, Mapping)
    return (_TLS_KEYS if in_keys else kinds.boolean).convert(value)


tls = replace(
    _TLS_KEYS,
    name="bool or dict",
    expected="true, false or a JSON object",
    convert=_tls,
    types=(bool, Mapping),
)


# --- What the sections complete --------------------------------------------------------------


def _json_or_code(value: object) -> object:
    if not isinstance(value, str):
        return value
    return json_value(value) if value.startswith(("{", "[")) else resolve(value)


task_routes = Kind(
    "routes",
    "a JSON object of tasks and queues, or the dotted name of a router",
    '{"myapp.tasks.*": {"queue": "slow"}}',
    _json_or_code,
    (object,),
)
task_annotations = Kind(
    "annotations",
    "a JSON object of tasks and their attributes, or a dotted name",
    '{"myapp.tasks.slow": {"rate_limit": "10/m"}}',
    _json_or_code,
    (object,),
)


def _lines(value: str) -> dict[str, str]:
    commands: dict[str, str] = {}
    for line in filter(None, map(str.strip, value.splitlines())):
        name, _, command = (part.strip() for part in line.partition("="))
        if name in commands:
            raise Refused(f"has {name} twice")
        commands[name] = command
    return commands


@accepts(
    "a line `name = program argument ...` for each command; the last word ... lets a call add more",
    "update_index = update_index site.ini ...",
    dict,
    prose=True,
)
def commands(value: str | dict[str, str]) -> dict[str, tuple[str, ...]]:
    # By line, so that a program has its own spaces and commas.
    given = _lines(value) if isinstance(value, str) else value
    return {name: _words(name, command) for name, command in given.items()}


def _words(name: str, command: str) -> tuple[str, ...]:
    if not re.fullmatch(r"[A-Za-z_][\w.-]*", name):
        raise Refused(f"has a line without a name, or the name {name!r}")
    try:
        found = tuple(shlex.split(command))
        words = shlex.split(command, posix=False)
    except ValueError as error:
        raise Refused(f"has {name}: {error}") from None
    if any(word.startswith((";", "#")) for word in words):
        raise Refused(f"has {name} with ; or # before a word, which needs quotes or its own line")
    if not found or found[0] == "...":
        raise Refused(f"has {name} without a program")
    return found
