"""What several commands check of their options before they begin."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from ws_celery.cli.outbox import list_rows
from ws_celery.cli.queues import peek, view
from ws_celery.cli.results import results
from ws_celery.cli.schedule import next_ticks
from ws_celery.cli.worker import beat, relay


@pytest.mark.parametrize("command", [relay, beat])
def test_a_health_file_where_none_can_be_made_is_refused(command, tmp_path):
    file = tmp_path / "missing" / "health"

    result = CliRunner().invoke(command, ["--health-file", str(file)])

    assert result.exit_code == 2
    assert f"'{file.parent}' is no folder" in " ".join(result.output.split())


@pytest.mark.parametrize("command", [list_rows, results, peek, next_ticks, view])
@pytest.mark.parametrize("limit", ["0", "9" * 20])
def test_a_limit_that_no_database_takes_is_refused(command, limit):
    arguments = ["name"] if command is peek else []

    result = CliRunner().invoke(command, ["--limit", limit, *arguments])

    assert result.exit_code == 2
    assert "is not in the range" in result.output
