"""What was measured, as the documentation shows it: a table and a drawing."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from textwrap import wrap
from xml.sax.saxutils import escape

from redis import Redis
from sqlalchemy import create_engine

from benchmarks.harness import Case, Measurement
from benchmarks.services import Services

__all__ = ("drawing", "surroundings", "table", "write")

PACKAGES = ("celery", "kombu", "redis", "pyramid", "transaction", "SQLAlchemy")

#: Pixels of the drawing: of a row, of the titles, of the bars' part.
ROW, TITLES, BARS = 30, 400, 400

#: The longest bar: a higher ratio is told by its number.
LONGEST = 1.6


def surroundings(services: Services) -> str:
    """Return what the numbers depend on."""
    with Redis.from_url(services.redis) as client:
        redis = client.info("server")["redis_version"]
    engine = create_engine(services.database)
    with engine.connect() as connection:
        server = ".".join(map(str, connection.dialect.server_version_info or ()))
        database = f"{engine.dialect.name} {server}"
    engine.dispose()
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        f"{os.cpu_count()} cores, Python {platform.python_version()}, {packages}; "
        f"servers on the same machine: Redis {redis}, {database}"
    )


def table(measurements: Sequence[Measurement], footing: str) -> str:
    """Return the measurements as a table of reStructuredText."""
    rows = [("", "ws_celery", "compared with", "ratio", "half of the rounds", "goal", "")]
    rows += [_row(measurement) for measurement in measurements]
    lines = [".. list-table::", "    :header-rows: 1", ""]
    for first, *others in rows:
        lines.append(f"    * - {first}".rstrip())
        lines += [f"      - {cell}".rstrip() for cell in others]
    return "\n".join([*lines, "", *wrap(f"{footing}.", 100), ""])


def _row(measurement: Measurement) -> tuple[str, ...]:
    case = measurement.case
    ours, plain = (_quantity(value, case.work is not None) for value in measurement.medians)
    low, high = measurement.spread
    return (
        case.title,
        ours,
        plain,
        f"**{measurement.ratio:.2f}**",
        f"{low:.2f} to {high:.2f}",
        _goal(case),
        "reached" if measurement.reached else "missed",
    )


def _goal(case: Case) -> str:
    goal = f"{'≥' if case.work else '≤'} {case.goal:.2f}"
    return f"{goal}, {_quantity(case.rate, rate=True)}" if case.rate else goal


def _quantity(value: float, rate: bool) -> str:
    return f"{value:,.0f} / s" if rate else f"{value * 1000:,.2f} ms"


def drawing(measurements: Sequence[Measurement]) -> str:
    """Return the ratios as bars: an image in SVG."""
    scale = BARS / LONGEST
    one = TITLES + scale
    height = ROW * (len(measurements) + 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{TITLES + BARS + 60}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<line x1="{one:.0f}" y1="{ROW}" x2="{one:.0f}" y2="{height}" stroke="#888888"/>',
        f'<text x="{one:.0f}" y="20" text-anchor="middle" fill="#555555">plain Celery = 1</text>',
    ]
    for number, measurement in enumerate(measurements, 1):
        parts += _bar(measurement, number * ROW, scale)
    return "\n".join([*parts, "</svg>", ""])


def _bar(measurement: Measurement, top: int, scale: float) -> list[str]:
    width = min(measurement.ratio, LONGEST) * scale
    goal = TITLES + min(measurement.case.goal, LONGEST) * scale
    middle, color = top + ROW * 2 // 3, "#2a7a4b" if measurement.reached else "#b8651b"
    return [
        f'<text x="{TITLES - 8}" y="{middle}" text-anchor="end">'
        f"{escape(measurement.case.title)}</text>",
        f'<rect x="{TITLES}" y="{top + 6}" width="{width:.0f}" height="{ROW - 12}" '
        f'fill="{color}"/>',
        f'<line x1="{goal:.0f}" y1="{top + 3}" x2="{goal:.0f}" y2="{top + ROW - 3}" '
        'stroke="#000000" stroke-width="2"/>',
        f'<text x="{TITLES + width + 6:.0f}" y="{middle}">{measurement.ratio:.2f}</text>',
    ]


def write(directory: Path, measurements: Sequence[Measurement], footing: str) -> None:
    """Write ``results.rst`` and ``results.svg``."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.rst").write_text(table(measurements, footing))
    (directory / "results.svg").write_text(drawing(measurements))
