"""What travels around the body of a message: headers and properties, as copies that stay the same.

A message that is deferred is written by the broker's library after the commit. What that cannot
write would take all messages of the transaction with it, so that it is found out at the call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from amqp.serialization import dumps as dumps_amqp
from kombu.compression import get_encoder
from kombu.utils import json

from ws_celery.exceptions import OptionNotSendable

__all__ = ("freeze_envelope",)

#: What every broker takes and nobody can change.
_PLAIN = frozenset((str, bool, float, type(None)))

#: The smallest whole number that has no place in a header of AMQP.
_TOO_BIG = 2**63

#: Options of a publish that end in the message beside its headers, and what they have to be.
_NUMBERS: dict[str, Any] = {"priority": int, "expiration": (int, float)}

#: Options of a publish that are not written into the message.
_OF_PUBLISH = frozenset(
    (
        *("declare", "exchange", "routing_key", "retry", "retry_policy", "delivery_mode"),
        *("mandatory", "immediate", "timeout", "confirm_timeout"),
        *("content_type", "content_encoding", "compression", "headers", *_NUMBERS),
    )
)


def freeze_envelope(options: dict[str, Any], driver: str) -> None:
    """Replace what could be changed after the call by copies of it.

    :param options: of a publish, as :meth:`kombu.Producer.publish` takes them.
    :param driver: the ``driver_type`` of the transport.
    :raises OptionNotSendable: if the broker's library could not write one of them.
    """
    headers = options.get("headers") or {}
    task = str(headers.get("task"))
    options["headers"] = _frozen(headers, headers, driver, f"{task}: the header")
    own = options.keys() - _OF_PUBLISH
    options.update(_frozen(options, own, driver, f"{task}: the option"))
    for name, problem in _wrong(options):
        raise OptionNotSendable(f"{task}: the option {name!r}", problem)


def _frozen(
    values: Mapping[str, Any], names: Iterable[str], driver: str, what: str
) -> dict[str, Any]:
    frozen = {}
    for name in names:
        value = values[name]
        if type(value) not in _PLAIN:
            try:
                value = _copy(value, driver)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
                raise OptionNotSendable(f"{what} {name!r}", problem) from error
        frozen[name] = value
    return frozen


def _wrong(options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, kind in _NUMBERS.items():
        value = options.get(name)
        if value is not None and not isinstance(value, kind):
            yield name, f"{value!r} is no number"
    if compression := options.get("compression"):
        try:
            get_encoder(compression)
        except (KeyError, TypeError):
            yield "compression", f"{compression!r} is not known to kombu"


def _copy(value: Any, driver: str) -> Any:
    if type(value) in _PLAIN or (type(value) is int and -_TOO_BIG <= value < _TOO_BIG):
        return value
    if isinstance(value, dict) and {type(key) for key in value} <= {str}:
        return {key: _copy(item, driver) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copy(item, driver) for item in value]
    if driver == "amqp":
        dumps_amqp("F", [{"": value}])  # numbers, times and the like: nobody changes them
        return value
    return json.loads(json.dumps(value))
