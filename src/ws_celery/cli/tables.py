"""What commands print: listings as a table or as JSON, in words that a terminal can show.

A command that shows something returns an :class:`Answer`, most often that of a :class:`Listing`;
:func:`showing` makes the output, ``--json`` and the exit code out of it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import wraps
from itertools import chain
from typing import Any, Generic, Protocol, TypeVar

import click

from ws_celery.masking import printable

__all__ = (
    "Answer",
    "Listing",
    "arguments_of",
    "confirm",
    "counted",
    "echo",
    "fields_of",
    "limit",
    "show",
    "showing",
    "table",
    "time_of",
    "with_app",
    "yes",
)

#: Width of a table whose terminal is not known, such as in a pipe: no line is cut there.
_USUAL = 120
#: To how many characters a column gives way, as long as that is enough, and at most.
_NARROW, _NARROWEST = 20, 10

Command = TypeVar("Command", bound=Callable[..., object])


class Record(Protocol):
    """What can be listed."""

    def as_dict(self) -> Mapping[str, object]:
        """Return the fields as JSON has them."""


RecordT = TypeVar("RecordT", bound=Record)


@dataclass(frozen=True)
class Answer:
    """What a command has found.

    :param lines: what people read.
    :param data: what ``--json`` prints.
    :param exit_code: of the command.
    :param safe: whether a terminal may be given the lines as they are, with their colours.
    """

    lines: Iterable[str]
    data: object
    exit_code: int = 0
    safe: bool = False


@dataclass(frozen=True)
class Listing(Generic[RecordT]):
    """How records of one class are listed.

    :param columns: for each heading, what returns the text of a cell.
    :param giving_way: the columns that are cut where the terminal is narrow, the first one first.
    :param left_out: the column that is left out where that is not enough.
    """

    columns: Mapping[str, Callable[[RecordT], str]]
    giving_way: Sequence[str] = ()
    left_out: str | None = None

    def answer(
        self, records: Sequence[RecordT], *, before: Iterable[str] = (), after: Iterable[str] = ()
    ) -> Answer:
        """Return what a command says of records.

        :param before: lines before the table.
        :param after: lines after it; without any records, they stand alone.
        """
        headings = list(self.columns)
        rows = [[cell(record) for cell in self.columns.values()] for record in records]
        left_out = None if self.left_out is None else headings.index(self.left_out)
        giving_way = map(headings.index, self.giving_way)
        lines = table(headings, rows, *giving_way, left_out=left_out) if rows else ()
        return Answer(chain(before, lines, after), [record.as_dict() for record in records])


def showing(function: Callable[..., Answer]) -> Callable[..., None]:
    """Let a command print what its function answers, with ``--json`` as JSON.

    The function is given the Celery app, and the command's options. That of a group is not called
    if one of the group's commands is.
    """

    @click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
    @click.pass_context
    @wraps(function)
    def command(context: click.Context, /, as_json: bool, **options: object) -> None:
        if context.invoked_subcommand is None:
            show(context, function(context.obj.app, **options), as_json=as_json)

    return command


def show(context: click.Context, answer: Answer, *, as_json: bool) -> None:
    """Print an answer, and end the command with its exit code."""
    if as_json:
        echo(json.dumps(answer.data, indent=2, default=str))
    else:
        for line in answer.lines:
            click.echo(line) if answer.safe else echo(line)
    context.exit(answer.exit_code)


def with_app(function: Callable[..., None]) -> Callable[..., None]:
    """Give the function of a command the Celery app before the command's options."""

    @click.pass_context
    @wraps(function)
    def command(context: click.Context, /, **options: object) -> None:
        function(context.obj.app, **options)

    return command


def limit(default: int) -> Callable[[Command], Command]:
    """Return the option of a listing that says how many records are shown at most."""
    # As all databases take it.
    kind = click.IntRange(1, 2**31 - 1)
    return click.option("--limit", type=kind, default=default, show_default=True)


def yes(command: Command) -> Command:
    """Let a command have the option that answers what :func:`confirm` would ask."""
    return click.option("--yes", is_flag=True, help="Do not ask.")(command)


def confirm(question: str) -> None:
    """Ask, and end the command unless the answer is yes."""
    # Programs read the standard output of --json.
    as_json = click.get_current_context().params.get("as_json", False)
    click.confirm(printable(question), abort=True, err=as_json)


def echo(text: str = "", *, err: bool = False) -> None:
    """Print a text; what a terminal would obey is shown instead."""
    click.echo(printable(text), err=err)


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


def fields_of(fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each field: its name and its value, if it has one."""
    width = max(map(len, fields))
    for name, value in fields.items():
        if value not in (None, ""):
            yield f"{name.ljust(width)}  {printable(str(value), lines=False)}"


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


def counted(number: int, noun: str) -> str:
    """Return a number and what it counts: ``1 task``, ``2 tasks``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
