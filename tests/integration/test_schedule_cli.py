"""``ws-celery schedule``: what it prints, what it takes, and what it refuses."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from ws_celery import inspection, task
from ws_celery.beat.sources import entries_of
from ws_celery.cli.schedule import schedule
from ws_celery.exceptions import ConfigurationError, EntryRefused, NotFound

INI = """
[celerybeat:backup]
task = work
type = timedelta
schedule = {"hours": 24}
kwargs = {"days": 30, "password": "hush"}

[celerybeat:off]
task = work
type = crontab
schedule = 0 0 * * *
args = [1]
enabled = false
"""
WEEKLY = ("task=work", "type=crontab", "schedule=0 3 * * sun", "args=[7]")


@task(name="work")
def work(request, days, password=None):
    pass


@pytest.fixture
def app(make_schedule, sqlite):
    return make_schedule(sqlite, work, celery=INI).celery


@pytest.fixture
def run(app, monkeypatch):
    """Run a command; returns its exit code and its output."""

    def run(*arguments):
        monkeypatch.setenv("COLUMNS", "250")
        result = CliRunner().invoke(schedule, arguments, obj=SimpleNamespace(app=app))
        if isinstance(result.exception, Exception):
            raise result.exception
        return result.exit_code, result.output

    return run


def test_create_makes_the_table_and_finds_it_there(app, run, sqlite):
    app.schedule.table.drop(sqlite.engine)

    assert run("create") == (0, "Created the table ws_celery_schedule.\n")
    assert run("create") == (0, "The table ws_celery_schedule is there already.\n")


def test_list_shows_where_entries_are_from_and_what_is_wrong(app, run):
    run("add", "weekly", *WEEKLY)
    run("edit", "backup", "catch_up=once")
    app.schedule.save("broken", task="gone", type="number", schedule="1")

    code, output = run("list")

    assert code == 0
    lines = {line.split("  ")[0]: line for line in output.splitlines()}
    assert "ini; database: catch_up" in lines["backup"]
    assert "0 3 * * sun" in lines["weekly"]
    assert "set aside" in lines["broken"]
    assert "broken: the task 'gone' is not registered" in output
    assert output.endswith("4 entries.\n")


def test_one_entry_and_none_are_counted_as_such(make_schedule, sqlite, run, app):
    for name in ("backup", "off"):
        app.configuration.entries.pop(name)
    assert run("list") == (0, "0 entries.\n")
    run("add", "weekly", *WEEKLY)
    assert run("list")[1].endswith("1 entry.\n")


def test_json_is_what_programs_read(run):
    backup, off = json.loads(run("list", "--json")[1])

    assert (backup["name"], off["state"]) == ("backup", "off")
    assert backup == json.loads(run("show", "backup", "--json")[1]) | {
        "next_tick": backup["next_tick"]
    }
    (tick,) = json.loads(run("next", "--json", "--hours", "30")[1])
    assert (tick["name"], tick["task"]) == ("backup", "work")
    assert json.loads(run("health", "--json")[1])["unseen"] == ["backup"]


def test_show_prints_each_field_and_what_it_overrides(app, run):
    run("edit", "backup", 'kwargs={"days": 7}')
    run("run", "backup")
    app.schedule.save("broken", task="gone", type="number", schedule="1")

    output = run("show", "backup")[1]

    (line,) = [line for line in output.splitlines() if line.startswith("kwargs")]
    assert re.split(r"\s{2,}", line)[1:] == [
        *('{"days": 7}', "database", '{"days": 30, "password": "********"} (ini)'),
    ]
    assert "wanted     now, since 2" in output
    assert "last tick  none that is known" in output
    assert "problem    the task 'gone'" in run("show", "broken")[1]


def test_show_tells_the_last_task(app, run):
    with app.schedule.begin() as connection:
        app.schedule.register(connection, {"backup": "ini"})
        now = app.schedule.now(connection)
        row = {"entry": "backup", "last_run_at": now, "task_id": "1-2-3", "sent_at": now}
        app.schedule.advance(connection, [row])

    assert "last task  1-2-3" in run("show", "backup")[1]
    code, output = run("health")
    assert code == 0
    assert re.match(r"The last tick was \d s ago\.", output)
    assert output.endswith("\nhealthy\n")


def test_next_says_where_it_stops(run):
    output = run("next", "--hours", "80", "--limit", "2")[1]

    assert output.count("backup") == 2
    assert "The first 2; --limit shows more." in output
    assert run("next", "off")[1] == "No tick in the next 24 hours.\n"


def test_health_names_what_no_beat_has_looked_at(run):
    code, output = run("health")

    assert code == 1
    assert output.splitlines() == [
        "No beat has sent anything yet.",
        "No beat has looked at: backup.",
        "not healthy",
    ]


def test_edits_tell_the_next_tick(run):
    added = run("add", "weekly", *WEEKLY)[1]
    assert added.startswith("weekly: 0 3 * * sun; the next tick is 2")
    assert added.endswith("03:00:00 UTC.\n")
    assert run("disable", "weekly", "backup")[1] == "weekly is off.\nbackup is off.\n"
    assert run("edit", "weekly", "args=[8]")[1] == "weekly: 0 3 * * sun; off.\n"
    assert "the next tick is" in run("enable", "weekly")[1]
    assert run("edit", "backup", "--reset", "enabled")[1].startswith("backup: every 1 day")
    assert "nothing of weekly any more" in run("remove", "weekly")[1]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("add", "a", "taks=work"), EntryRefused, "unknown field taks; did you mean task?"),
        (("add", "backup", *WEEKLY), EntryRefused, "ws-celery schedule edit backup"),
        (("edit", "backup", "--reset", "arg"), EntryRefused, "did you mean args?"),
        (("show", "gone"), NotFound, "ws-celery schedule list"),
        (("import", __file__, "--once"), ConfigurationError, "is not JSON"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_remedy(run, arguments, error, words):
    with pytest.raises(error) as caught:
        run(*arguments)

    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("add", "a", "work"), "'work' is not of the form FIELD=VALUE"),
        (("add", "a", "task=work", "task=work"), "task is given twice"),
        (("edit", "backup"), "Give fields as FIELD=VALUE, or --reset FIELD"),
        (("import", __file__, "--once", "--replace"), "Give --once or --replace"),
    ],
)
def test_what_is_not_said_rightly_is_a_usage_error(run, arguments, words):
    code, output = run(*arguments)

    assert code == 2
    assert words in " ".join(output.split())


def test_an_import_of_something_else_is_refused(run, tmp_path):
    file = tmp_path / "schedule.json"
    file.write_text("[1]")

    with pytest.raises(ConfigurationError, match="no JSON object of entries"):
        run("import", str(file), "--once")


def test_an_export_is_imported_again(run, tmp_path):
    run("add", "weekly", *WEEKLY)
    file = tmp_path / "schedule.json"
    file.write_text(run("export")[1])
    run("edit", "weekly", "args=[8]")

    assert "Added 0, replaced 0, left 1" in run("import", str(file), "--once")[1]
    assert "Added 0, replaced 1, left 0" in run("import", str(file), "--replace")[1]
    assert run("export")[1] == file.read_text()


def test_what_is_left_out_of_an_export_or_an_import_is_named(run, app, tmp_path):
    run("add", "weekly", *WEEKLY)
    app.schedule.save("orphan", origin="ini", args=[1])
    past = dict(pair.split("=", 1) for pair in WEEKLY) | {"expires": "2020-01-01T00:00Z"}
    file = tmp_path / "schedule.json"
    file.write_text(json.dumps({"season": past}))

    assert "Left out, because they cannot be imported: orphan." in run("export")[1]
    assert "Left out, because their time is past: season." in run("import", str(file), "--once")[1]


def test_the_sections_of_an_export_are_read_as_they_were(run, app, make_app):
    inspection.add_schedule_entry(
        app,
        "weekly",
        {
            **dict(pair.split("=", 1) for pair in WEEKLY),
            "type": "timedelta",
            "schedule": '{"hours": 24}',
            "kwargs": {"password": "100%"},
            "description": "100 % of %(here)s",
            "starts_at": "2027-01-01T00:00Z",
        },
    )
    sections = run("export", "--all", "--format", "ini")[1]

    other = make_app(work, celery=sections, ws_celery__beat="true").celery

    read = {name: entry.as_fields() for name, entry in entries_of(other, {}).items()}
    assert read == inspection.export_schedule(app, everything=True)
    assert "relative" not in sections
