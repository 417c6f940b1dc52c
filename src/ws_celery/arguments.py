"""Tells which argument of a call cannot travel in a message, and what to pass instead."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from kombu.exceptions import EncodeError
from kombu.serialization import dumps

from ws_celery.exceptions import ArgumentNotSerializable

__all__ = ("blame_argument",)


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
    named = {f"argument {number}": value for number, value in enumerate(args or (), 1)}
    named.update({f"argument {name!r}": value for name, value in (kwargs or {}).items()})
    for name, value in named.items():
        for culprit in _culprits(value, serializer):
            raise ArgumentNotSerializable(task, name, serializer, _advice(culprit)) from error


def _culprits(value: Any, serializer: str) -> Iterator[Any]:
    """Yield what does not serialise, the smallest parts of it."""
    try:
        dumps(value, serializer=serializer)
    except Exception:  # noqa: BLE001 - values have encoders of their own, which may raise anything
        culprits = [found for part in _parts(value) for found in _culprits(part, serializer)]
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
