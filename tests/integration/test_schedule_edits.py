"""Looking at the schedule and editing it, through the functions that web pages call."""

from __future__ import annotations

import threading
from datetime import datetime, timedelta, timezone

import pytest
from sqlalchemy import text

from ws_celery import inspection, task
from ws_celery.exceptions import EntryRefused, NotFound, NotIncluded, TableError

NIGHTLY = {"task": "work", "type": "crontab", "schedule": "30 3 * * *", "kwargs": {"days": 1}}
INI = """
[celerybeat:backup]
task = work
type = timedelta
schedule = {"hours": 24}
kwargs = {"days": 30, "password": "hush"}
description = From the INI

[celerybeat:off]
task = work
type = crontab
schedule = 0 0 * * *
args = [1]
enabled = false
"""


@task(name="work")
def work(request, days, password=None):
    pass


@pytest.fixture
def make(make_schedule, database):
    return lambda celery=INI: make_schedule(database, work, celery=celery).celery


@pytest.fixture
def app(make):
    return make()


def entry(app, name):
    return inspection.schedule_entry(app, name)


def counted_from(app, name):
    return app.schedule.load()[name].last_run_at


def ran(app, name, ago):
    """Let an entry have had its last tick some time ago; returns when that was."""
    store = app.schedule
    with store.begin() as connection:
        store.register(connection, {name: entry(app, name).origin})
        tick = store.now(connection) - ago
        row = {"entry": name, "last_run_at": tick, "task_id": "t", "sent_at": tick}
        store.advance(connection, [row])
    return tick


def test_entries_of_the_ini_are_there_without_a_word_of_the_database(app):
    backup, off = inspection.schedule_entries(app)

    assert (backup.name, backup.state, backup.origin) == ("backup", "on", "ini")
    assert (backup.edited, backup.last_tick) == ([], None)
    assert backup.fields["kwargs"] == {"days": 30, "password": "********"}
    assert backup.next_tick - datetime.now(timezone.utc) > timedelta(hours=23)
    assert (off.state, off.next_tick) == ("off", None)


def test_an_added_entry_counts_from_now(app):
    inspection.add_schedule_entry(app, "nightly", NIGHTLY)

    nightly = entry(app, "nightly")
    assert (nightly.origin, nightly.state, nightly.edited) == ("database", "on", [])
    assert timedelta(0) <= app.schedule.now() - counted_from(app, "nightly") < timedelta(minutes=1)
    assert (nightly.next_tick.hour, nightly.next_tick.minute) == (3, 30)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"task": "wrok"}, "the task 'wrok' is not registered; did you mean work?"),
        ({"schedule": "30 25 * * *"}, "hour is from 0 to 23"),
        ({"type": "cron"}, "did you mean crontab?"),
        ({"kwargs": {}}, "missing 1 required positional argument: 'days'"),
        ({"kwargs": {"days": 1, "weeks": 2}}, "unexpected keyword argument 'weeks'"),
        ({"args": [1, 2, 3], "kwargs": {}}, "takes from 1 to 2 positional arguments"),
        ({"kwargs": "days"}, "kwargs = '********'"),
        ({"timezoen": "UTC"}, "has the unknown field timezoen; did you mean timezone?"),
        ({"timezone": "Europe/Berln"}, "did you mean Europe/Berlin?"),
        ({"catch_up": "twice"}, "catch_up = 'twice'"),
        ({"options": {"queu": "slow"}}, "has the unknown key queu; did you mean queue?"),
        ({"expires": "2020-01-01T00:00Z"}, "it would never run"),
        ({"type": "clocked", "schedule": "2020-01-01T00:00Z"}, "it would never run"),
        ({"task": None}, "has no task"),
        ({"schedule": None}, "has no schedule"),
    ],
)
def test_what_beat_would_set_aside_is_refused_with_the_reason(app, fields, words):
    fields = {name: value for name, value in {**NIGHTLY, **fields}.items() if value is not None}

    with pytest.raises(EntryRefused) as caught:
        inspection.add_schedule_entry(app, "nightly", fields)

    assert words in str(caught.value)
    assert app.schedule.load() == {}


@pytest.mark.parametrize("name", ["", " ", "a\nb", "n" * 256, "nightly "])
def test_a_name_that_nobody_can_read_is_refused(app, name):
    with pytest.raises(EntryRefused, match="from 1 to 255 characters"):
        inspection.add_schedule_entry(app, name, NIGHTLY)


def test_a_name_is_taken_once(app):
    inspection.add_schedule_entry(app, "nightly", NIGHTLY)

    for name, where in (("nightly", "the database"), ("backup", "the INI file")):
        with pytest.raises(EntryRefused, match=f"from {where}.*schedule edit {name}"):
            inspection.add_schedule_entry(app, name, NIGHTLY)


def test_nothing_is_said_of_an_entry_without_fields(app):
    with pytest.raises(EntryRefused, match="has no task; has no schedule"):
        inspection.add_schedule_entry(app, "nightly", {})


def test_an_edit_counts_more_than_the_ini_and_shows_what_it_overrides(app):
    inspection.edit_schedule_entry(app, "backup", {"catch_up": "once", "kwargs": '{"days": 7}'})

    backup = entry(app, "backup")
    assert set(backup.edited) == {"catch_up", "kwargs"}
    assert backup.overridden == {"kwargs": {"ini": {"days": 30, "password": "********"}}}
    assert (backup.fields["catch_up"], backup.fields["kwargs"]) == ("once", {"days": 7})
    assert app.schedule.load()["backup"].fields["kwargs"] == {"days": 7}


def test_a_field_of_the_schedule_is_edited_with_all_of_the_schedule(app):
    inspection.add_schedule_entry(app, "nightly", NIGHTLY)
    inspection.edit_schedule_entry(app, "nightly", {"timezone": "Asia/Tokyo"})
    inspection.edit_schedule_entry(app, "backup", {"schedule": '{"hours": 1}'})

    assert entry(app, "nightly").next_tick.strftime("%H:%M") == "18:30"
    assert entry(app, "nightly").schedule == "30 3 * * * (Asia/Tokyo)"
    assert entry(app, "backup").schedule == "every 1:00:00"


def test_a_reset_takes_edits_back(app):
    edits = {"type": "crontab", "schedule": "0 1 * * *", "description": "Mine"}
    inspection.edit_schedule_entry(app, "backup", edits)

    inspection.edit_schedule_entry(app, "backup", {}, reset=["schedule"])

    backup = entry(app, "backup")
    assert (backup.schedule, backup.edited) == ("every 1 day, 0:00:00", ["description"])
    with pytest.raises(EntryRefused, match="unknown field descripton; did you mean description"):
        inspection.edit_schedule_entry(app, "backup", {}, reset=["descripton"])


def test_an_edit_of_the_times_does_not_catch_up_with_what_was_not_missed(app):
    inspection.add_schedule_entry(app, "nightly", {**NIGHTLY, "catch_up": "once"})
    ran(app, "nightly", timedelta(days=3))

    inspection.edit_schedule_entry(app, "nightly", {"schedule": "0 * * * *"})

    assert app.schedule.now() - counted_from(app, "nightly") < timedelta(minutes=1)


def test_an_edit_of_something_else_leaves_the_ticks_as_they_are(app):
    tick = ran(app, "backup", timedelta(hours=5))

    inspection.edit_schedule_entry(app, "backup", {"description": "Mine"})

    backup = entry(app, "backup")
    assert (backup.last_tick, backup.task_id) == (tick, "t")
    assert backup.next_tick == tick + timedelta(hours=24)


def test_an_entry_is_switched_off_and_on_again(app):
    ran(app, "backup", timedelta(days=5))

    inspection.disable_schedule_entry(app, "backup")
    assert entry(app, "backup").state == "off"
    inspection.enable_schedule_entry(app, "backup")

    backup = entry(app, "backup")
    assert (backup.state, backup.edited) == ("on", [])
    assert app.schedule.now() - counted_from(app, "backup") < timedelta(minutes=1)


@pytest.mark.parametrize(
    "edit",
    [
        inspection.disable_schedule_entry,
        lambda app, name: inspection.edit_schedule_entry(
            app, name, {"type": "crontab", "schedule": "0 3 * * *"}
        ),
    ],
)
def test_what_an_entry_has_not_missed_is_not_caught_up_with_when_its_edits_are_removed(app, edit):
    edit(app, "backup")
    ran(app, "backup", timedelta(days=7))

    inspection.remove_schedule_entry(app, "backup")

    backup = entry(app, "backup")
    assert (backup.state, backup.edited, backup.origin) == ("on", [], "ini")
    assert app.schedule.now() - counted_from(app, "backup") < timedelta(minutes=1)


def test_an_entry_whose_edits_of_something_else_are_removed_goes_on_with_its_ticks(app):
    inspection.edit_schedule_entry(app, "backup", {"description": "Mine"})
    tick = ran(app, "backup", timedelta(hours=5))

    inspection.remove_schedule_entry(app, "backup")

    assert entry(app, "backup").last_tick == tick


def test_an_entry_that_the_ini_has_switched_off_is_switched_on(app):
    inspection.enable_schedule_entry(app, "off")

    assert (entry(app, "off").state, entry(app, "off").edited) == ("on", ["enabled"])


def test_a_wanted_run_is_shown_until_a_beat_has_sent_it(app):
    inspection.run_schedule_entry(app, "backup")
    assert entry(app, "backup").run_requested_at is not None

    ran(app, "backup", timedelta(0))
    assert entry(app, "backup").run_requested_at is None


def test_removing_deletes_an_entry_of_the_database_and_the_edits_of_others(app):
    inspection.add_schedule_entry(app, "nightly", NIGHTLY)
    inspection.edit_schedule_entry(app, "backup", {"description": "Mine"})

    inspection.remove_schedule_entry(app, "nightly")
    inspection.remove_schedule_entry(app, "backup")

    with pytest.raises(NotFound, match="no schedule entry"):
        entry(app, "nightly")
    assert entry(app, "backup").fields["description"] == "From the INI"
    with pytest.raises(EntryRefused, match="from the INI file, and nothing of it was edited"):
        inspection.remove_schedule_entry(app, "backup")


@pytest.mark.parametrize(
    "edit",
    [
        lambda app: inspection.edit_schedule_entry(app, "gone", {"args": [1]}),
        lambda app: inspection.enable_schedule_entry(app, "gone"),
        lambda app: inspection.disable_schedule_entry(app, "gone"),
        lambda app: inspection.remove_schedule_entry(app, "gone"),
        lambda app: inspection.run_schedule_entry(app, "gone"),
        lambda app: inspection.coming_ticks(app, timedelta(1), ["gone"]),
    ],
)
def test_an_entry_that_is_not_there_is_named(app, edit):
    with pytest.raises(NotFound, match="There is no schedule entry 'gone'"):
        edit(app)


@pytest.fixture
def orphan(app):
    """The name of an entry that the INI had when it was edited."""
    app.schedule.save("orphan", origin="ini", kwargs={"days": 7})
    return "orphan"


def test_an_entry_that_has_left_the_ini_is_orphaned_with_its_edits(app, orphan):
    found = entry(app, orphan)

    assert (found.state, found.origin, found.next_tick) == ("orphaned", "ini", None)
    assert "orphan" not in inspection.export_schedule(app, everything=True)
    for refused in (
        lambda: inspection.run_schedule_entry(app, orphan),
        lambda: inspection.enable_schedule_entry(app, orphan),
        lambda: inspection.edit_schedule_entry(app, orphan, NIGHTLY),
        lambda: inspection.edit_schedule_entry(app, orphan, {}, reset=["kwargs"]),
    ):
        with pytest.raises(EntryRefused, match="schedule remove orphan"):
            refused()


def test_the_name_of_one_that_has_left_the_ini_can_be_used_again(app, orphan):
    inspection.remove_schedule_entry(app, orphan)
    inspection.add_schedule_entry(app, orphan, NIGHTLY)

    found = entry(app, orphan)
    assert (found.origin, found.state) == ("database", "on")


def test_what_was_written_into_the_database_by_hand_is_set_aside_and_mended(app):
    inspection.add_schedule_entry(app, "nightly", NIGHTLY)
    with app.schedule.begin() as connection:
        wrong = '{"task": "wrok", "type": "crontab", "schedule": "30 3 * * *"}'
        connection.execute(
            text("UPDATE ws_celery_schedule SET fields = :fields"), {"fields": wrong}
        )

    nightly = entry(app, "nightly")
    assert (nightly.state, nightly.next_tick) == ("set aside", None)
    assert "'wrok' is not registered" in nightly.problem
    with pytest.raises(EntryRefused, match="wrok"):
        inspection.run_schedule_entry(app, "nightly")
    inspection.disable_schedule_entry(app, "nightly")
    inspection.edit_schedule_entry(app, "nightly", {"task": "work", "args": [1], "enabled": True})
    assert entry(app, "nightly").state == "on"


def test_fields_that_are_no_json_are_set_aside_and_mended(app):
    inspection.add_schedule_entry(app, "nightly", NIGHTLY)
    with app.schedule.begin() as connection:
        connection.execute(text("UPDATE ws_celery_schedule SET fields = '{broken'"))

    assert "no JSON" in entry(app, "nightly").problem
    inspection.edit_schedule_entry(app, "nightly", NIGHTLY)
    assert entry(app, "nightly").state == "on"


BROKEN = '{"task": "work", "type": "crontab", "schedule": "0 3 * * *", "args": [1],}'


@pytest.fixture
def broken(app):
    """The name of an entry that somebody has broken by SQL."""
    inspection.add_schedule_entry(app, "nightly", NIGHTLY)
    with app.schedule.begin() as connection:
        statement = text("UPDATE ws_celery_schedule SET fields = :fields")
        connection.execute(statement, {"fields": BROKEN})
    return "nightly"


def fields_in_the_table(app):
    with app.schedule.begin() as connection:
        return connection.scalar(text("SELECT fields FROM ws_celery_schedule"))


def test_fields_that_cannot_be_read_are_not_overwritten_by_switching_off(app, broken):
    with pytest.raises(EntryRefused, match=r"no JSON.*would be lost.*schedule remove nightly"):
        inspection.disable_schedule_entry(app, broken)
    with pytest.raises(EntryRefused, match="no JSON"):
        inspection.enable_schedule_entry(app, broken)

    assert fields_in_the_table(app) == BROKEN
    inspection.remove_schedule_entry(app, broken)
    assert inspection.export_schedule(app) == {}


def test_fields_that_cannot_be_read_are_left_by_an_import_that_does_not_replace(app, broken):
    outcome = inspection.import_schedule(app, {broken: NIGHTLY}, replace=False)

    assert (outcome.left, fields_in_the_table(app)) == ([broken], BROKEN)
    assert inspection.import_schedule(app, {broken: NIGHTLY}, replace=True).replaced == [broken]
    assert entry(app, broken).state == "on"


# What comes


def test_coming_ticks_of_all_entries_are_in_order(app):
    for name, minutes in (("a", "0,30"), ("b", "15,30")):
        fields = {"task": "work", "type": "crontab", "schedule": f"{minutes} * * * *", "args": [1]}
        inspection.add_schedule_entry(app, name, fields)

    ticks = inspection.coming_ticks(app, timedelta(hours=2), ["a", "b"])

    assert [tick.time for tick in ticks] == sorted(tick.time for tick in ticks)
    assert {(tick.name, tick.time.minute) for tick in ticks} == {
        *(("a", 0), ("a", 30), ("b", 15), ("b", 30)),
    }
    assert inspection.coming_ticks(app, timedelta(hours=2), ["a", "b"], limit=1) == ticks[:1]
    assert inspection.coming_ticks(app, timedelta(hours=30), ["off"]) == []


# Export and import


def test_what_is_exported_is_restored_by_an_import(app):
    inspection.add_schedule_entry(app, "nightly", NIGHTLY)
    inspection.edit_schedule_entry(app, "backup", {"kwargs": {"days": 1, "password": "open"}})
    exported = inspection.export_schedule(app)

    inspection.edit_schedule_entry(app, "nightly", {"schedule": "0 4 * * *", "catch_up": "once"})
    inspection.remove_schedule_entry(app, "backup")
    outcome = inspection.import_schedule(app, exported, replace=True)

    assert (outcome.added, outcome.replaced, outcome.left) == (["backup"], ["nightly"], [])
    assert inspection.export_schedule(app) == exported
    assert exported["backup"] == {"kwargs": {"days": 1, "password": "open"}}
    again = inspection.import_schedule(app, exported, replace=True)
    assert (again.added, again.replaced) == ([], [])


def test_an_import_that_happens_once_leaves_edited_entries_alone(app):
    inspection.add_schedule_entry(app, "nightly", NIGHTLY)

    entries = {
        "nightly": {**NIGHTLY, "schedule": "0 5 * * *"},
        "weekly": {**NIGHTLY, "schedule": "0 5 * * sun"},
    }
    outcome = inspection.import_schedule(app, entries, replace=False)

    assert (outcome.added, outcome.left) == (["weekly"], ["nightly"])
    assert entry(app, "nightly").schedule == "30 3 * * *"
    assert entry(app, "weekly").state == "on"


@pytest.mark.parametrize("fields", [{**NIGHTLY, "task": "wrok"}, {"enabled": False}, "often"])
def test_an_import_is_all_or_nothing(app, fields):
    with pytest.raises(EntryRefused, match="'wrong'"):
        inspection.import_schedule(app, {"nightly": NIGHTLY, "wrong": fields}, replace=True)

    assert inspection.export_schedule(app) == {}


def test_everything_can_be_exported(app):
    inspection.add_schedule_entry(app, "nightly", NIGHTLY)

    exported = inspection.export_schedule(app, everything=True)

    assert list(exported) == ["backup", "nightly", "off"]
    assert exported["off"]["enabled"] is False
    assert exported["backup"]["kwargs"] == {"days": 30, "password": "hush"}


def test_an_entry_whose_time_is_past_is_left_out_of_an_import_and_named(app):
    past = {"type": "clocked", "schedule": "2020-01-01T00:00Z"}
    entries = {
        "once": {**NIGHTLY, **past},
        "season": {**NIGHTLY, "expires": "2020-01-01T00:00Z"},
        "nightly": NIGHTLY,
    }

    outcome = inspection.import_schedule(app, entries, replace=False)

    assert (outcome.added, outcome.over) == (["nightly"], ["once", "season"])
    assert list(inspection.export_schedule(app)) == ["nightly"]


def test_a_one_off_that_has_run_can_be_exported_and_imported(app):
    app.schedule.save("once", **{**NIGHTLY, "type": "clocked", "schedule": "2020-01-01T00:00Z"})
    exported = inspection.export_schedule(app)
    inspection.remove_schedule_entry(app, "once")

    assert inspection.import_schedule(app, exported, replace=True).over == ["once"]


@pytest.mark.parametrize(("schedule", "words"), [(60, "every 0:01:00"), (2.5, "2.500000")])
def test_a_number_of_seconds_is_a_schedule_without_a_type(app, schedule, words):
    entries = {
        "often": {"task": "work", "schedule": schedule, "args": [1]},
        "backup": {"schedule": schedule},
    }
    for _ in range(2):
        inspection.import_schedule(app, entries, replace=True)

    assert [(entry(app, name).state, entry(app, name).problem) for name in entries] == [
        ("on", None),
        ("on", None),
    ]
    assert all(words in entry(app, name).schedule for name in entries)
    inspection.add_schedule_entry(app, "added", {**entries["often"]})
    assert entry(app, "added").state == "on"


def test_what_cannot_be_imported_is_not_exported_and_is_named(app, orphan):
    inspection.add_schedule_entry(app, "nightly", NIGHTLY)
    app.schedule.save("wrong", **{**NIGHTLY, "task": "wrok"})
    app.schedule.save("broken", **NIGHTLY)
    with app.schedule.begin() as connection:
        statement = "UPDATE ws_celery_schedule SET fields = '{broken' WHERE name = 'broken'"
        connection.execute(text(statement))

    assert list(inspection.export_schedule(app)) == ["nightly"]
    assert inspection.unexported_entries(app) == ["broken", orphan, "wrong"]
    assert inspection.unexported_entries(app, everything=True) == ["broken", orphan, "wrong"]


# Health


def test_no_beat_at_all_is_not_healthy(app):
    health = inspection.schedule_health(app)

    assert (health.is_healthy, health.age, health.unseen) == (False, None, ("backup",))


def test_ticks_in_time_are_healthy_and_late_ones_are_named(app):
    ran(app, "backup", timedelta(hours=24, seconds=30))

    in_time = inspection.schedule_health(app)
    late = inspection.schedule_health(app, timedelta(seconds=10))

    assert (in_time.is_healthy, in_time.overdue) == (True, ())
    assert in_time.age == pytest.approx(86430, abs=30)
    assert (late.is_healthy, late.overdue) == (False, ("backup",))


def test_an_entry_that_was_just_added_is_not_healthy_if_no_beat_has_ever_looked(make):
    app = make(celery="")
    inspection.add_schedule_entry(app, "nightly", NIGHTLY)

    health = inspection.schedule_health(app)

    assert (health.is_healthy, health.age, health.unseen) == (False, None, ("nightly",))
    assert entry(app, "nightly").last_tick is None


def test_the_age_is_that_of_what_was_sent_and_never_negative(app):
    ran(app, "backup", timedelta(hours=2))
    inspection.edit_schedule_entry(app, "backup", {"type": "integer", "schedule": 10**6})

    assert inspection.schedule_health(app).age == pytest.approx(7200, abs=60)
    ran(app, "backup", timedelta(hours=-2))  # by a clock that was wrong
    assert inspection.schedule_health(app).age == 0


def test_a_run_that_nobody_has_sent_is_overdue(app):
    ran(app, "backup", timedelta(0))
    inspection.run_schedule_entry(app, "backup")

    assert inspection.schedule_health(app).is_healthy
    health = inspection.schedule_health(app, timedelta(seconds=-60))
    assert health.overdue == ("backup",)


def test_a_run_that_waits_for_the_last_one_is_not_overdue(make, redis_url):
    app = make(celery=f"result_backend = {redis_url}\n{INI}")
    inspection.edit_schedule_entry(app, "backup", {"overlap": "skip"})
    ran(app, "backup", timedelta(0))
    inspection.run_schedule_entry(app, "backup")

    assert inspection.schedule_health(app, timedelta(seconds=-60)).overdue == ()


def test_a_schedule_without_entries_is_healthy(make):
    assert inspection.schedule_health(make(celery="")).is_healthy


# Without


def test_a_missing_table_is_named_with_the_command_that_creates_it(app, database):
    app.schedule.table.drop(database.engine)

    with pytest.raises(TableError, match="ws-celery schedule create"):
        inspection.schedule_entries(app)
    assert inspection.create_schedule(app)
    assert not inspection.create_schedule(app)


def test_without_a_database_the_schedule_can_be_looked_at_and_not_edited(make_app):
    app = make_app(work, celery=INI)

    assert [each.state for each in inspection.schedule_entries(app.registry)] == ["on", "off"]
    assert len(inspection.coming_ticks(app.registry, timedelta(days=3))) == 3
    assert "backup" in inspection.export_schedule(app.registry, everything=True)
    for refused in (
        lambda: inspection.add_schedule_entry(app.registry, "nightly", NIGHTLY),
        lambda: inspection.export_schedule(app.registry),
        lambda: inspection.schedule_health(app.registry),
        lambda: inspection.create_schedule(app.registry),
    ):
        with pytest.raises(NotIncluded, match=r"ws_celery\.beat = true"):
            refused()


def test_two_edits_at_a_time_are_both_kept(app):
    inspection.add_schedule_entry(app, "nightly", NIGHTLY)
    edits = [{"description": "Mine"}, {"catch_up": "once"}, {"options": {"queue": "slow"}}]
    threads = [
        threading.Thread(target=inspection.edit_schedule_entry, args=(app, "nightly", fields))
        for fields in edits
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    fields = app.schedule.load()["nightly"].fields
    assert fields == {
        **NIGHTLY,
        "description": "Mine",
        "catch_up": "once",
        "options": {"queue": "slow"},
    }
