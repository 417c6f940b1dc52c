"""The schedule in real processes: the INI of old projects, and edits while beat runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sqlalchemy as sa

from ws_celery.beat.store import schedule_table
from ws_celery.outbox import outbox_table

APPS = Path(__file__).parent / "apps"
#: As the documentation of an older framework has it, to the letter.
OLD_ENTRIES = """
[celerybeat:backup]
task = backup
type = timedelta
schedule = {"hours": 24}

[celerybeat:update_conversion_rates]
task = update_conversion_rates
type = timedelta
schedule = {"hours": 1}
"""
APP = """
from ws_celery import task

@task(name="update_conversion_rates")
def update_conversion_rates(request):
    pass
"""


@pytest.fixture
def engine(postgres_url):
    engine = sa.create_engine(postgres_url)
    metadatas = (schedule_table().metadata, outbox_table().metadata)
    for metadata in metadatas:
        metadata.drop_all(engine)
        metadata.create_all(engine)
    yield engine
    for metadata in metadatas:
        metadata.drop_all(engine)
    engine.dispose()


@pytest.fixture
def site(make_site, engine, redis_url, postgres_url, tmp_path):
    """A site with the two entries, and its schedule in the database."""
    site = make_site(postgres_url, redis_url)
    (tmp_path / "rates.py").write_text(APP)
    text = site.ini.read_text()
    head, _, _ = text.partition("[celerybeat:record]")
    head = head.replace("[app:main]", "[app:main]\nws_celery.outbox = true\nws_celery.beat = true")
    head = head.replace("    myapp.tasks\n", "    myapp.tasks\n    rates\n")
    site.ini.write_text(head + OLD_ENTRIES)
    return site


def test_the_entries_of_an_old_project_run_and_are_edited_while_beat_runs(
    site, engine, start, wait_for, tmp_path
):
    table = schedule_table()
    path = f"{tmp_path}:{APPS}"
    beat = start("beat", "--ini", str(site.ini), "--loglevel", "info", PYTHONPATH=path)

    def state():
        with engine.connect() as connection:
            rows = connection.execute(sa.select(table)).all()
        return {row.name: row for row in rows if row.last_run_at}

    wait_for(lambda: {"backup", "update_conversion_rates"} <= state().keys(), "a look at both", 90)
    edit = (
        sa.update(table)
        .where(table.c.name == "backup")
        .values(fields=json.dumps({"type": "integer", "schedule": 1}), version=table.c.version + 1)
    )
    with engine.begin() as connection:
        connection.execute(edit)

    beat.says("backup is sent: backup[", 60)
    assert "update_conversion_rates is sent" not in beat.text
