"""Tells what of a call cannot travel in a message, and what to pass instead."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from kombu.exceptions import EncodeError
from kombu.serialization import dumps

from ws_celery.exceptions import ArgumentNotSerializable, OptionNotSendable

__all__ = ("blame_argument", "refuse_misread")

#: The keys of an object that kombu writes for a UUID or a time, and reads as one.
_FORM = frozenset(("__type__", "__value__"))

_MISREAD = (
    "an object with the keys __type__ and __value__ only would be read as another value, or not "
    "at all"
)

#: What has no parts.
_PLAIN = frozenset((str, int, bool, float, bytes, type(None)))


def blame_argument(
    error: EncodeError,
    task: str,
    args: Iterable[Any] | None,
    kwargs: Mapping[str, Any] | None,
    serializer: str | None,
) -> None:
    """Raise the error that says which argument is to blame for ``error``, if one is.

    :param serializer: its name; ``None`` for JSON.
    :raises ArgumentNotSerializable: an ``EncodeError``, too.
    """
    serializer = serializer or "json"
    for name, value in _named(args, kwargs):
        for culprit in _culprits(value, serializer):
            raise ArgumentNotSerializable(task, name, serializer, _advice(culprit)) from error


def refuse_misread(
    task: str,
    args: Iterable[Any] | None,
    kwargs: Mapping[str, Any] | None,
    serializer: str | None,
    options: Mapping[str, Any],
) -> None:
    """Refuse what can be written as JSON and is read as something else; the worker would meet it.

    :param options: of the call; headers and callbacks travel, too.
    :raises ArgumentNotSerializable: if it is in an argument.
    :raises OptionNotSendable: if it is in an option.
    """
    if serializer in (None, "json") and (_is_misread(args) or _is_misread(kwargs)):
        name = next(name for name, value in _named(args, kwargs) if _is_misread(value))
        advice = f"{_MISREAD}. Name another key, or pass its text, by json.dumps()"
        raise ArgumentNotSerializable(task, name, "json", advice)
    if _is_misread(options):
        name = next(name for name, value in options.items() if _is_misread(value))
        raise OptionNotSendable(f"{task}: the option {name!r}", _MISREAD)


def _is_misread(value: Any) -> bool:
    try:
        return _has_form(value)
    except RecursionError:
        return False  # it is its own part, and cannot be written


def _has_form(value: Any) -> bool:
    if isinstance(value, dict):
        if len(value) == len(_FORM) and value.keys() == _FORM:
            return True
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return False
    for each in value:  # noqa: SIM110 - at each call, and this is half of what any() takes
        if type(each) not in _PLAIN and _has_form(each):
            return True
    return False


def _named(
    args: Iterable[Any] | None, kwargs: Mapping[str, Any] | None
) -> Iterator[tuple[str, Any]]:
    for number, value in enumerate(args or (), 1):
        yield f"argument {number}", value
    for name, value in (kwargs or {}).items():
        yield f"argument {name!r}", value


def _culprits(value: Any, serializer: str, around: tuple[Any, ...] = ()) -> Iterator[Any]:
    """Yield what does not serialise, the smallest parts of it."""
    try:
        dumps(value, serializer=serializer)
    except Exception:  # noqa: BLE001 - values have encoders of their own, which may raise anything
        around = (*around, value)
        # What is a part of itself has no smallest one.
        parts = [part for part in _parts(value) if not any(part is each for each in around)]
        culprits = [found for part in parts for found in _culprits(part, serializer, around)]
        yield from culprits or [value]


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return [*value, *value.values()]
    return value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else ()


def _advice(value: Any) -> str:
    kind = type(value).__name__
    sqlalchemy = sys.modules.get("sqlalchemy")
    state: Any = sqlalchemy and sqlalchemy.inspect(value, raiseerr=False)
    if hasattr(state, "identity_key") and hasattr(state, "mapper"):
        keys = ", ".join(column.key for column in state.mapper.primary_key)
        return (
            f"a {kind} is a row of the database. Pass its key ({keys}), and load it in the task; "
            "a new one has its key after session.flush()"
        )
    return f"it has a {kind}. Pass numbers, texts, lists and dictionaries"
