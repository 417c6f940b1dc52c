"""Tables for people, in the terminal that they have."""

from __future__ import annotations

import os

import pytest

from ws_celery.cli.tables import table

TIME = "2035-01-31 12:00:00"
HEADINGS = ("ENTRY", "TASK", "WHEN", "FROM", "LAST TICK", "NEXT TICK")
ROWS = [
    ("nightly-report", "shop.tasks.report", "30 3 * * *", "ini; database: enabled", TIME, TIME),
    ("mails", "shop.tasks.send_mails", "every 0:05:00", "code", TIME, TIME),
]


@pytest.fixture
def lines(monkeypatch):
    """Return the lines of the table in a terminal of so many columns; without one for 0."""

    def lines(columns):
        monkeypatch.setattr(
            "ws_celery.cli.tables.shutil.get_terminal_size",
            lambda fallback: os.terminal_size((columns, 24) if columns else fallback),
        )
        return list(table(HEADINGS, ROWS, 3, 2, 1, 0, left_out=4))

    return lines


@pytest.mark.parametrize("columns", [5, 20, 40, 60, 80, 100, 120])
def test_no_line_is_longer_than_the_terminal(lines, columns):
    assert max(map(len, lines(columns))) <= columns


def test_what_gives_way_is_cut_before_a_column_is_left_out(lines):
    assert "database: enabled" in lines(121)[1]
    heading, first, _ = lines(116)
    assert "LAST TICK" in heading
    assert "ini; database: en..." in first


def test_where_it_is_narrow_a_column_is_left_out(lines):
    heading, first, _ = lines(80)

    assert "LAST TICK" not in heading
    assert (first[:10], first[-19:]) == ("nightly-re", TIME)


def test_without_a_terminal_nothing_is_lost_but_what_gives_way(lines):
    heading, first, _ = lines(0)

    assert "LAST TICK" in heading
    assert first.endswith(TIME)
