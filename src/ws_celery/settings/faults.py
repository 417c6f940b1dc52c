"""Where a value is written, and what is wrong there: collected, so that all of it can be told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ws_celery.converters import Refused, nearest
from ws_celery.exceptions import Fault
from ws_celery.masking import MASK, masked, masked_text
from ws_celery.settings.kinds import OF_ONE_CALL, TEXT, Kind, Miswritten, miswritten

__all__ = ("Faults", "Place", "Value")


@dataclass(frozen=True)
class Place:
    """Where a value is written.

    :param file: name of the file, or what else it is.
    :param section: name of the section, without brackets.
    :param key: the key as it is written.
    :param line: line of the key, counted from 1, where it is known.
    """

    file: str
    section: str
    key: str = ""
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"

    def fault(
        self,
        problem: str,
        *,
        value: object = None,
        expected: str | None = None,
        close: str | None = None,
    ) -> Fault:
        """Return what is wrong with the key here.

        :param value: what stands there; masked if the key, or what it was meant to be, is a secret.
        :param close: what was probably meant: a legal name, or the line as it should be.
        """
        name = f"{self.section} {self.key} {close or ''}"
        shown = None if value is None else str(masked(name, value))
        close = close and masked_text(close)
        if value is not None and self.key in ("args", "kwargs"):
            shown = MASK  # nobody knows the names of a task's parameters here
        return Fault(problem, self.file, self.line, self.section, self.key, shown, expected, close)

    def key_beside(self, key: str) -> Place:
        """Return the place of a key that is missing here."""
        return Place(self.file, self.section, f"{self.key} {key}".lstrip(), self.line)


@dataclass(frozen=True)
class Value:
    """The text of one key, interpolated, and its place; from Python it may be any value.

    :param literal: whether it stands in Python or JSON, which say themselves where a text ends.
    """

    text: object
    place: Place
    literal: bool = False

    def typed(self, kind: Kind) -> Any:
        """Return the value of a kind.

        :raises Refused: if it is of another one, or something stands around it.
        """
        self.check(kind)
        return kind.accept(self.text)

    def check(self, kind: Kind = TEXT) -> None:
        """Refuse a text of a file that has a comment behind the value, or quotes around it."""
        if isinstance(self.text, str) and not (self.literal or kind.prose):
            error = miswritten(self.text, kind.quotes)
            if error:
                raise error


class Faults(list[Fault]):
    """What is wrong, as it is found."""

    def at(self, place: Place, problem: str, **about: Any) -> None:
        """Add what is wrong with the key at ``place``; see :meth:`Place.fault`."""
        self.append(place.fault(problem, **about))

    @contextmanager
    def catching(self, value: Value, expected: str | None = None) -> Iterator[None]:
        """Add the fault of a value that is refused inside, and go on."""
        try:
            yield
        except Refused as error:
            close = error.close
            if isinstance(error, Miswritten):
                close, expected = _line(value, error.close), None
            self.at(value.place, str(error), value=value.text, expected=expected, close=close)

    def typed(
        self, values: Mapping[str, Value], kinds: Mapping[str, Kind], also: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """Return the values that are right, typed.

        :param also: other legal keys, for suggestions.
        """
        found = {}
        for key, value in values.items():
            kind = kinds.get(key)
            if kind is None:
                reason = OF_ONE_CALL.get(key) if "countdown" in kinds else None
                close = None if reason else nearest(key, (*kinds, *also))
                problem = reason or "this key is not known"
                self.at(value.place, problem, value=value.text, close=close)
                continue
            with self.catching(value, kind.expected):
                found[key] = value.typed(kind)
        return found


def _line(value: Value, bare: str | None) -> str | None:
    """Return the line as it should be."""
    if not bare or "\n" in str(value.text):
        return bare or None
    key = value.place.key
    return f"{key} = {masked(f'{value.place.section} {key}', bare)}"
