"""The page of settings is complete."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from ws_celery.settings import options
from ws_celery.settings.options import OPTIONS, REMOVED

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def tables():
    pytest.importorskip("sphinx", reason="Sphinx is not installed")
    spec = importlib.util.spec_from_file_location(
        "settings_tables", DOCS / "_ext" / "settings_tables.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TABLES


def test_the_page_shows_every_table(tables):
    shown = re.findall(r"settings-table:: (\w+)", (DOCS / "settings.rst").read_text())

    assert sorted(shown) == sorted(tables)


@pytest.mark.parametrize(
    ("table", "names"),
    [
        ("options", OPTIONS),
        ("removed", REMOVED),
        ("queue", options.QUEUE_KEYS),
        ("annotation", options.ANNOTATION_KEYS),
        ("entry", options.ENTRY_KEYS),
        ("ours", options.OUR_SETTINGS),
    ],
)
def test_a_table_has_every_name_and_says_what_is_accepted(tables, table, names):
    headings, *rows = tables[table]()

    assert {row[0].strip("`") for row in rows} == set(names)
    assert all(len(row) == len(headings) and all(row) for row in rows)
