"""Tables for people: as wide as the terminal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

__all__ = ("arguments_of", "table", "time_of")

#: Width of a table whose terminal is not known, such as in a pipe: no line is cut there.
_USUAL = 120
#: To how many characters a column gives way, as long as that is enough, and at most.
_NARROW, _NARROWEST = 20, 10


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *giving_way: int,
    left_out: int | None = None,
    whole: bool = False,
) -> Iterator[str]:
    """Yield the lines of a table.

    :param giving_way: numbers of the columns that are cut where the terminal is narrow, the first
        one first.
    :param left_out: number of the column that is left out where that is not enough.
    :param whole: whether lines are longer than the terminal rather than cut at their end; in a pipe
        nothing is cut then.
    """
    columns = shutil.get_terminal_size((0, 0)).columns
    width = 0 if whole else columns
    full = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    room = columns or (sum(full) * 2 if whole else _USUAL)
    widths = _fitted(dict(enumerate(full)), giving_way, room, _NARROW)
    if width and _length(widths) > width:
        kept = {number: each for number, each in enumerate(full) if number != left_out}
        widths = _fitted(kept, giving_way, width, _NARROW)
        widths = _fitted(widths, giving_way, width, _NARROWEST)
    for row in (headings, *rows):
        line = _line(row, widths)
        yield _cut(line, width) if width else line


def _line(cells: Sequence[str], widths: Mapping[int, int]) -> str:
    texts = {number: " ".join(cells[number].split()) for number in widths}
    cut = (_cut(texts[number], width).ljust(width) for number, width in widths.items())
    return "  ".join(cut).rstrip()


def _fitted(
    widths: Mapping[int, int], giving_way: Sequence[int], room: int, narrowest: int
) -> dict[int, int]:
    fitted = dict(widths)
    for number in giving_way:
        left = room - (_length(fitted) - fitted[number])
        fitted[number] = min(fitted[number], max(left, narrowest))
    return fitted


def _length(widths: Mapping[int, int]) -> int:
    return sum(widths.values()) + 2 * (len(widths) - 1)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."[:width]


def arguments_of(call: Mapping[str, Any] | None) -> str:
    """Return the arguments of a call, ``args`` and ``kwargs``, as Python writes them."""
    if call is None:
        return ""
    shown = [json.dumps(value, default=str) for value in call["args"]]
    named = [f"{name}={json.dumps(value, default=str)}" for name, value in call["kwargs"].items()]
    return f"({', '.join(shown + named)})"


def time_of(time: datetime | None) -> str:
    """Return a time in UTC, to the second; nothing if there is none."""
    return "" if time is None else time.astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
