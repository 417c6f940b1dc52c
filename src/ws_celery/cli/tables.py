"""What commands print for people: tables as wide as the terminal, and text that it can show."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

import click
from celery.bin.base import CLIContext

from ws_celery.app import PyramidCelery
from ws_celery.masking import MASK, masked_text, printable
from ws_celery.shown_arguments import shown_value

__all__ = (
    "LIMIT",
    "HealthFile",
    "SafeContext",
    "arguments_of",
    "confirm",
    "echo",
    "fields_of",
    "table",
    "time_of",
)

#: How many to show at most, as all databases take it.
LIMIT = click.IntRange(1, 2**31 - 1)


class HealthFile(click.Path):
    """A file that can be written, or made. It is not yet: that would tell that all is well."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        file = cast("Path", super().convert(value, param, ctx))
        folder = file.parent
        if not (folder.is_dir() and (file.exists() or os.access(folder, os.W_OK | os.X_OK))):
            self.fail(
                f"'{folder}' is no folder that a file can be made in. Make it, or name another "
                "one.",
                param,
                ctx,
            )
        return file


#: What Celery writes in colours, and what it says of a message that it moves.
_COLOURS = re.compile(r"(\x1b\[[\d;]*m)")
_MIGRATED = re.compile(r"(Migrating task \S+: ).*", re.DOTALL)

#: Width of a table whose terminal is not known, such as in a pipe: no line is cut there.
_USUAL = 120
#: To how many characters a column gives way, as long as that is enough, and at most.
_NARROW, _NARROWEST = 20, 10


def echo(text: str = "", *, err: bool = False) -> None:
    """Print a text; what a terminal would obey is shown instead."""
    click.echo(printable(text), err=err)


def confirm(question: str, *, err: bool = False) -> None:
    """Ask, and end the command unless the answer is yes."""
    click.confirm(printable(question), abort=True, err=err)


class SafeContext(CLIContext):
    """What Celery's own commands print with; what workers answer is shown without its secrets."""

    def style(self, message: str | None = None, **options: Any) -> str | None:
        """Return a text with its colours, as in Celery."""
        styled: str | None = super().style(message and printable(message), **options)
        return styled

    def pretty(self, n: Any) -> tuple[str, str]:
        """Return an answer as text, as in Celery."""
        status, text = super().pretty(self._shown(n))
        return status, text

    def echo(self, message: Any = None, **options: Any) -> None:
        """Print a text, or a value."""
        super().echo(self._safe(message), **options)

    def _safe(self, message: Any) -> Any:
        if not isinstance(message, str):
            return self._shown(message)
        if message.startswith(("{", "[")):  # --json
            with suppress(ValueError):
                return json.dumps(self._shown(json.loads(message)))
        text = masked_text(_MIGRATED.sub(rf"\g<1>{MASK}", message))
        parts = enumerate(_COLOURS.split(text))
        return "".join(part if number % 2 else printable(part) for number, part in parts)

    def _shown(self, value: Any) -> Any:
        if isinstance(self.app, PyramidCelery):
            value = shown_value(self.app, "", value)
        return _printable_within(value)


def _printable_within(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_printable_within(key): _printable_within(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_printable_within(each) for each in value]
    return printable(value) if isinstance(value, str) else value


def fields_of(fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each field: its name and its value, if it has one."""
    width = max(map(len, fields))
    for name, value in fields.items():
        if value not in (None, ""):
            yield f"{name.ljust(width)}  {printable(str(value), lines=False)}"


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
    rows = [[printable(" ".join(cell.split())) for cell in row] for row in rows]
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
    cut = (_cut(cells[number], width).ljust(width) for number, width in widths.items())
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
