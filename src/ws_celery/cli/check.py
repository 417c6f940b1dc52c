"""``ws-celery check``: print what was read from where, and what was found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ws_celery.checks import Finding, Report, examine, shown
from ws_celery.cli.application import find_ini
from ws_celery.cli.tables import Answer, counted, showing, table
from ws_celery.masking import printable

if TYPE_CHECKING:
    from ws_celery.settings import Place, Setting

__all__ = ("check",)

_COLORS = {"error": "red", "warning": "yellow", "note": "blue"}


@click.command
@click.option("--strict", is_flag=True, help="Exit with 1 if there are warnings.")
@showing
def check(_app: object, strict: bool) -> Answer:
    """Print the configuration with its origins, and what is wrong or doubtful.

    Exit code 0 if nothing is wrong, 1 with --strict if there are warnings, 2 if there are errors.
    """
    report = examine(find_ini(None))
    return Answer(_lines(report), report.as_dict(), report.exit_code(strict), safe=True)


def _lines(report: Report) -> Iterator[str]:
    if report.rows:
        rows = [(_name(row), shown(row), row.type, _origin(row.place)) for row in report.rows]
        # The value gives way, not its place.
        yield from table(("SETTING", "VALUE", "TYPE", "FROM"), rows, 1, whole=True)
        yield ""
    for finding in report.findings:
        yield f"{_severity(finding)} {printable(str(finding))}"
    yield printable(_summary(report))


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
    counts = [counted(severities.count(name), name) for name in ("error", "warning")]
    return f"{report.config_uri}: {', '.join(counts)}."
