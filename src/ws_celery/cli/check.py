"""``ws-celery check``: print what was read from where, and what was found."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ws_celery.checks import Finding, Report, examine, shown
from ws_celery.cli.application import find_ini
from ws_celery.cli.tables import echo, table
from ws_celery.masking import printable

if TYPE_CHECKING:
    from ws_celery.settings import Place, Setting

__all__ = ("check",)

_HEADINGS = ("SETTING", "VALUE", "TYPE", "FROM")
_COLORS = {"error": "red", "warning": "yellow", "note": "blue"}


@click.command
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.option("--strict", is_flag=True, help="Exit with 1 if there are warnings.")
def check(as_json: bool, strict: bool) -> None:
    """Print the configuration with its origins, and what is wrong or doubtful.

    Exit code 0 if nothing is wrong, 1 with --strict if there are warnings, 2 if there are errors.
    """
    report = examine(find_ini(None))
    if as_json:
        echo(json.dumps(report.as_dict(), indent=2))
    else:
        for line in _lines(report):
            click.echo(line)
    sys.exit(report.exit_code(strict))


def _lines(report: Report) -> Iterator[str]:
    if report.rows:
        yield from _table(report)
        yield ""
    for finding in report.findings:
        yield f"{_severity(finding)} {printable(str(finding))}"
    yield printable(_summary(report))


def _table(report: Report) -> Iterator[str]:
    rows = [(_name(row), shown(row), row.type, _origin(row.place)) for row in report.rows]
    yield from table(_HEADINGS, rows, 1, whole=True)  # the value gives way, not its place


def _name(row: Setting) -> str:
    return row.name if row.category == "option" else f"{row.category} {row.name}"


def _origin(place: Place) -> str:
    # Shorter, where the file is in the current directory or below.
    path, here = Path(place.file), Path.cwd()
    file = path.relative_to(here) if path.is_relative_to(here) else path
    return str(file) if place.line is None else f"{file}:{place.line}"


def _severity(finding: Finding) -> str:
    return click.style(f"{finding.severity}:", fg=_COLORS[finding.severity], bold=True)


def _summary(report: Report) -> str:
    severities = [finding.severity for finding in report.findings]
    counts = [
        f"{severities.count(name)} {name}{'' if severities.count(name) == 1 else 's'}"
        for name in ("error", "warning")
    ]
    return f"{report.config_uri}: {', '.join(counts)}."
