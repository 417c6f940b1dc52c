"""The report of ``ws-celery check``: what was read, what was found, and both for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ws_celery.masking import masked

if TYPE_CHECKING:
    from ws_celery.settings import Place, Setting

__all__ = ("ERROR", "NOTE", "WARNING", "Finding", "Report", "shown")

ERROR, WARNING, NOTE = "error", "warning", "note"


@dataclass(frozen=True)
class Finding:
    """One thing that somebody should know.

    :param severity: ``error``, ``warning`` or ``note``.
    :param code: a short name that stays the same, for programs.
    :param text: what it is, and the remedy.
    :param file: where it is written, as far as that is known.
    :param line: line in that file.
    """

    severity: str
    code: str
    text: str
    file: str | None = None
    line: int | None = None

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line) if part is not None)
        return f"{place}: {self.text}" if place else self.text

    @classmethod
    def at(cls, place: Place | None, severity: str, code: str, text: str) -> Finding:
        """Return the finding about what is written at ``place``."""
        if place is None:
            return cls(severity, code, text)
        return cls(severity, code, text, place.file, place.line)


@dataclass
class Report:
    """The result of :func:`examine`.

    :param config_uri: what was examined.
    :param rows: what was read.
    :param findings: what was found, errors first.
    """

    config_uri: str
    rows: list[Setting] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def exit_code(self, strict: bool = False) -> int:
        """Return 2 if there are errors, 1 if ``strict`` and there are warnings, else 0."""
        severities = {finding.severity for finding in self.findings}
        if ERROR in severities:
            return 2
        return 1 if strict and WARNING in severities else 0

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can hold; secrets are masked."""
        return {
            "config_uri": self.config_uri,
            "settings": [
                {
                    "category": row.category,
                    "name": row.name,
                    "value": shown(row),
                    "type": row.type,
                    "file": row.place.file,
                    "line": row.place.line,
                    "section": row.place.section,
                    "key": row.place.key or None,
                }
                for row in self.rows
            ],
            "findings": [asdict(finding) for finding in self.findings],
        }


def _entry(fields: Mapping[str, Any]) -> str:
    """Return an entry as people write it, with what it lacks left out."""
    when = ""
    if "schedule" in fields:
        kind = f"{fields['type']}: " if fields.get("type") else ""
        zone = f", {fields['timezone']}" if fields.get("timezone") else ""
        when = f"{kind}{fields['schedule']}{zone}"
    what = f"-> {fields['task']}" if "task" in fields else ""
    off = "(off)" if fields.get("enabled") is False else ""
    return " ".join(filter(None, (when, what, off)))


def shown(row: Setting) -> str:
    """Return the value of a setting for people, on one line, its secrets masked."""
    value = row.value
    if row.category == "entry":
        return _entry(value)
    if row.name == "beat_schedule":
        return ", ".join(value)  # each entry has a row of its own
    if row.category == "queue":
        kind = value.exchange.type
        return f"exchange {value.exchange.name} ({kind}), routing key {value.routing_key}"
    if row.category in ("route", "annotation"):
        pairs = masked("", value).items()
        return ", ".join(f"{key} = {inner}" for key, inner in pairs)
    value = masked(row.name, value)
    if isinstance(value, (list, tuple)):
        return ", ".join(str(getattr(each, "name", each)) for each in value)
    return "none" if value is None else str(value)
