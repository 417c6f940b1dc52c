"""Sphinx directive ``settings-table``: what the configuration accepts, from the tables in the code.

The pages cannot fall behind the code, because they are made from it at each build.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from celery.app.defaults import DEFAULTS
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from ws_celery.masking import MASK, is_secret
from ws_celery.settings.celery_kinds import TRANSPORT_KEYS
from ws_celery.settings.kinds import Kind
from ws_celery.settings.options import (
    ANNOTATION_KEYS,
    CALL_KEYS,
    ENTRY_KEYS,
    MESSAGE_KEYS,
    OLD_NAMES,
    OPTIONS,
    OUR_SETTINGS,
    QUEUE_KEYS,
    REMOVED,
)

Rows = Iterator[tuple[str, ...]]


def options() -> Rows:
    """Rows of all options of Celery: name, what is accepted, an example, the default."""
    yield "Option", "Accepts", "Example", "Default"
    for name, kind in sorted(OPTIONS.items()):
        default = DEFAULTS.get(name)
        shown = MASK if default and is_secret(name) else repr(default)
        yield f"``{name}``", kind.expected, f"``{kind.example}``", f"``{shown}``"


def keys(kinds: Mapping[str, Kind]) -> Callable[[], Rows]:
    """Return the function that gives the rows of a table of keys."""

    def rows() -> Rows:
        yield "Key", "Accepts", "Example"
        for name, kind in kinds.items():
            yield f"``{name}``", kind.expected, f"``{kind.example}``"

    return rows


def old_names() -> Rows:
    """Rows of old names that do not follow from today's."""
    yield "Old name", "Today"
    for old, new in sorted(OLD_NAMES.items()):
        if old.removeprefix("CELERY_").lower() != new:
            yield f"``{old}``", f"``{new}``"


def removed() -> Rows:
    """Rows of names that are gone."""
    yield "Name", "Instead"
    for name, instead in sorted(REMOVED.items()):
        yield f"``{name}``", instead


TABLES: dict[str, Callable[[], Rows]] = {
    "options": options,
    "route": keys(MESSAGE_KEYS),
    "call": keys(CALL_KEYS),
    "queue": keys(QUEUE_KEYS),
    "annotation": keys(ANNOTATION_KEYS),
    "entry": keys(ENTRY_KEYS),
    "transport": keys(TRANSPORT_KEYS),
    "ours": keys(OUR_SETTINGS),
    "old": old_names,
    "removed": removed,
}


class SettingsTable(SphinxDirective):
    """``.. settings-table:: NAME``, one of :data:`TABLES`."""

    required_arguments: ClassVar[int] = 1

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        lines = [".. list-table::", "   :header-rows: 1", ""]
        for row in TABLES[self.arguments[0]]():
            first, *others = row
            lines += [f"   * - {first}", *(f"     - {cell}" for cell in others)]
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app: Any) -> dict[str, bool]:
    """Add the directive."""
    app.add_directive("settings-table", SettingsTable)
    return {"parallel_read_safe": True}
