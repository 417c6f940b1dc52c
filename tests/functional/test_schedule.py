"""``ws-celery schedule`` in real processes: edits that a running beat sees, probes, bad input."""

from __future__ import annotations

import json
import uuid

import pytest
from sqlalchemy import create_engine, text

APPLICATION = """
import sqlalchemy as sa
import transaction
import zope.sqlalchemy
from pyramid.config import Configurator
from sqlalchemy.orm import sessionmaker
from ws_celery import task

@task(name="note")
def note(request, label):
    request.dbsession.execute(sa.text("INSERT INTO notes (label) VALUES (:l)"), {"l": label})
    zope.sqlalchemy.mark_changed(request.dbsession, request.tm)

def app(global_config, **settings):
    config = Configurator(settings=settings)
    sessions = sessionmaker(sa.create_engine(settings["sqlalchemy.url"]))
    def dbsession(request):
        session = sessions()
        zope.sqlalchemy.register(session, transaction_manager=getattr(
            request, "tm", transaction.manager))
        return session
    config.add_request_method(dbsession, reify=True)
    config.include("pyramid_tm")
    config.include("ws_celery")
    config.add_celery_task(note)
    return config.make_wsgi_app()
"""

INI = """
[app:main]
paste.app_factory = scheduled:app
sqlalchemy.url = {database}
ws_celery.config_uri = %(__file__)s
ws_celery.beat = {beat}

[celery]
broker_url = {broker}
task_default_queue = {queue}
worker_pool = solo
timezone = Europe/Berlin
beat_schedule_filename = %(here)s/schedule

[celerybeat:backup]
task = note
type = timedelta
schedule = {{"hours": 24}}
args = ["backup"]

[celerybeat:rates]
task = note
type = crontab
schedule = 0 * * * *
args = ["rates"]
enabled = false
"""

OFTEN = ("task=note", "type=number", "schedule=0.5", 'args=["often"]')


class Site:
    """An application with its schedule in a database, and the commands of a user."""

    def __init__(self, folder, database, broker, run, start, beat="true"):
        (folder / "scheduled.py").write_text(APPLICATION)
        self.ini = folder / "site.ini"
        self.text = INI.format(
            database=database, broker=broker, queue=f"test-{uuid.uuid4()}", beat=beat
        )
        self.ini.write_text(self.text)
        self.path = str(folder)
        self.engine = create_engine(database)
        with self.engine.begin() as connection:
            connection.execute(text("CREATE TABLE notes (label VARCHAR(50) NOT NULL)"))
        self._run, self._start = run, start

    def run(self, *arguments):
        return self._run("schedule", *arguments, "--ini", str(self.ini), PYTHONPATH=self.path)

    def schedule(self, *arguments, code=0):
        """Run ``ws-celery schedule`` and return its output; its error where it is refused."""
        done = self.run(*arguments)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr if code == 2 else done.stdout

    def json(self, *arguments):
        return json.loads(self.schedule(*arguments, "--json"))

    def start(self, command, *arguments):
        ini = ("--ini", str(self.ini))
        return self._start(command, *ini, *arguments, PYTHONPATH=self.path)

    def count(self, label):
        with self.engine.connect() as connection:
            statement = text("SELECT count(*) FROM notes WHERE label = :label")
            return connection.execute(statement, {"label": label}).scalar_one()


#: Where beat and the commands meet; the commands alone are tested with each store elsewhere.
on_each_database = pytest.mark.parametrize(
    "make_site", ["postgres_url", "sqlite_url"], indirect=True
)


@pytest.fixture
def make_site(request, tmp_path, redis_url, run, start):
    sites = []

    def make(**options):
        database = request.getfixturevalue(getattr(request, "param", "postgres_url"))
        sites.append(Site(tmp_path, database, redis_url, run, start, **options))
        return sites[-1]

    yield make
    for site in sites:
        with site.engine.begin() as connection:
            for table in ("notes", "ws_celery_schedule"):
                connection.execute(text(f"DROP TABLE IF EXISTS {table}"))
        site.engine.dispose()


@pytest.fixture
def site(make_site):
    site = make_site()
    assert "Created the table ws_celery_schedule" in site.schedule("create")
    return site


@on_each_database
def test_what_is_added_edited_and_switched_off_is_seen_by_a_running_beat(site, wait_for):
    site.start("worker")
    beat = site.start("beat", "--loglevel", "INFO")

    site.schedule("add", "often", *OFTEN)
    wait_for(lambda: site.count("often") >= 2, "runs of the added entry")
    site.schedule("edit", "often", 'args=["edited"]')
    wait_for(lambda: site.count("edited") >= 2, "runs of the edited entry")
    site.schedule("disable", "often")
    beat.says("is off")


@on_each_database
def test_what_is_wanted_now_is_sent_once_by_a_running_beat(site, wait_for):
    site.start("worker")
    site.start("beat")

    site.schedule("run", "backup", "rates")  # the latter is off

    wait_for(lambda: site.count("backup") and site.count("rates"), "runs that were asked for")
    site.schedule("add", "often", *OFTEN)
    wait_for(lambda: site.count("often") >= 2, "later ticks")
    assert site.count("backup") == site.count("rates") == 1


@on_each_database
def test_a_probe_sees_a_beat_that_is_gone(site, wait_for):
    assert "No beat has sent anything yet" in site.schedule("health", code=1)
    beat = site.start("beat")
    site.schedule("add", "often", *OFTEN)
    wait_for(lambda: probe(site)["last_tick"], "a tick")
    assert site.schedule("health").endswith("\nhealthy\n")

    beat.process.kill()
    beat.ends()

    wait_for(lambda: probe(site)["overdue"] == ["often"], "a tick that is overdue")


def probe(site):
    done = site.run("health", "--late", "1", "--json")
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


def test_the_schedule_is_listed_with_what_overrides_what(site):
    site.schedule("edit", "backup", "schedule=12h", 'args=["mine"]')
    site.schedule("add", "winter", "task=note", 'args=["x"]', "type=crontab", "schedule=0 3 * * *")
    with site.engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO ws_celery_schedule (name, origin, fields, version, changed_at)"
                " VALUES ('by hand', 'database', :fields, 0, :now)"
            ),
            {"fields": '{"task": "gone", "type": "number", "schedule": "1"}', "now": "2026-01-01"},
        )

    listed = site.schedule("list")
    assert "ini; database: type, schedule, args" in listed
    assert "by hand: the task 'gone' is not registered" in listed
    assert "4 entries." in listed
    shown = site.schedule("show", "backup")
    assert '["backup"] (ini)' in shown
    assert '{"hours": 24} (ini)' in shown
    states = {entry["name"]: entry["state"] for entry in site.json("list")}
    assert states == {"backup": "on", "by hand": "set aside", "rates": "off", "winter": "on"}
    (tick,) = site.json("next", "winter", "--hours", "24")
    assert tick["time"][11:] in ("01:00:00+00:00", "02:00:00+00:00")  # Europe/Berlin


def test_bad_input_is_refused_with_a_sentence(site):
    for arguments, words in (
        (("add", "a", "task=noet", "type=number", "schedule=1"), "did you mean note?"),
        (("edit", "backup"), "Give fields as FIELD=VALUE, or --reset FIELD"),
    ):
        assert words in " ".join(site.schedule(*arguments, code=2).split())


def test_the_schedule_is_carried_as_data(site, tmp_path):
    site.schedule("add", "winter", *OFTEN, "description=100 % cold")
    site.schedule("edit", "backup", 'args=["mine"]')
    file = tmp_path / "schedule.json"
    file.write_text(site.schedule("export"))

    site.schedule("edit", "winter", "schedule=7")
    site.schedule("remove", "backup")
    assert "Added 1, replaced 0, left 1 as they are." in site.schedule(
        "import", str(file), "--once"
    )
    assert site.json("show", "winter")["schedule"] == "every 0:00:07"
    assert "Added 0, replaced 1, left 1" in site.schedule("import", str(file), "--replace")
    assert site.schedule("export") == file.read_text()
    sections = site.schedule("export", "--all", "--format", "ini")
    site.ini.write_text(site.text.partition("[celerybeat:")[0] + sections)
    site.schedule("remove", "winter", "backup")
    entries = {entry["name"]: entry for entry in site.json("list")}
    assert entries["winter"]["fields"]["description"] == "100 % cold"
    assert entries["winter"]["origin"] == "ini"
    assert entries["backup"]["fields"]["args"] == ["mine"]
    assert entries["rates"]["state"] == "off"


def test_without_the_database_part_the_schedule_can_be_looked_at(make_site):
    site = make_site(beat="false")

    assert [entry["name"] for entry in site.json("list")] == ["backup", "rates"]
    assert "every 1 day" in site.schedule("show", "backup")
    assert len(site.json("next", "--hours", "72")) == 3
    for arguments in (("add", "often", *OFTEN), ("health",)):
        assert "ws_celery.beat = true" in site.schedule(*arguments, code=2)


def test_what_is_missing_has_an_exit_code_of_its_own(site):
    assert "ws-celery schedule list" not in site.schedule("show", "nobody", code=1)
    with site.engine.begin() as connection:
        connection.execute(text("DROP TABLE ws_celery_schedule"))
    assert "ws-celery schedule create" in site.schedule("list", code=2)
    site.ini.write_text(site.text.replace(str(site.engine.url.database), "/nowhere/at/all"))
    site.schedule("list", code=69)
