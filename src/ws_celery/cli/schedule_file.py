"""Entries of the schedule as the text of a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ws_celery.converters import Refused, json_value
from ws_celery.exceptions import ConfigurationError

__all__ = ("read_entries", "written")


def read_entries(file: Path) -> dict[str, Any]:
    """Return the entries of a JSON file.

    :raises ConfigurationError: if it holds none.
    """
    try:
        entries = json_value(file.read_text(encoding="utf-8"))
    except (Refused, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"{file}: {error}. `ws-celery schedule export` prints what can be read here."
        ) from None
    if not isinstance(entries, dict):
        raise ConfigurationError(
            f'{file}: is no JSON object of entries, such as {{"nightly": {{"enabled": false}}}}.'
        )
    return entries


def written(entries: Mapping[str, Mapping[str, Any]], form: str) -> Iterator[str]:
    """Yield the lines of a file.

    :param form: ``json`` or ``ini``.
    """
    if form == "json":
        yield json.dumps(entries, indent=2, ensure_ascii=False)
        return
    for name, fields in entries.items():
        yield f"[celerybeat:{name}]"
        for field, value in fields.items():
            yield f"{field} = {_ini_text(value)}"
        yield ""


def _ini_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return " ".join(text.splitlines()).replace("%", "%%")
