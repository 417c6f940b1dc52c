"""The options that Celery's beat and worker read count with what we put in their place."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import FunctionType

import pytest
from celery import beat
from celery.app.defaults import NAMESPACES
from sqlalchemy import select
from tests.waiting import SOON, wait_for

import ws_celery
from ws_celery import ConfigurationError, task
from ws_celery.beat import Scheduler
from ws_celery.cli.application import check_schedule

EVERY_SECOND = {"task": "work", "type": "integer", "schedule": 1}


@task(name="work")
def work(request):
    pass


@pytest.fixture
def make(make_schedule, sqlite):
    def make(celery):
        return make_schedule(sqlite, work, ws_celery__beat__poll="60", celery=celery).celery

    return make


@pytest.fixture
def scheduler_of():
    made = []

    def start(app):
        check_schedule(app)
        made.append(beat.Service(app, scheduler_cls=app.conf.beat_scheduler).scheduler)
        return made[-1]

    yield start
    for scheduler in made:
        scheduler.close()


def schedule(make, scheduler_of, **_):
    app = make('beat_schedule = {"e": {"task": "work", "type": "integer", "schedule": 1}}')
    scheduler = scheduler_of(app)
    scheduler.tick()

    assert set(app.schedule.load()) == {"e"}


def scheduler(make, scheduler_of, **_):
    assert isinstance(scheduler_of(make("")), type(Scheduler(make(""), lazy=True)))
    with pytest.raises(Exception, match="PersistentScheduler does not read the schedule in"):
        make("beat_scheduler = celery.beat:PersistentScheduler")


def max_loop_interval(make, scheduler_of, caplog, monkeypatch, **_):
    app, slept = make("beat_max_loop_interval = 0.2"), []
    monkeypatch.setattr("ws_celery.beat.store.time.sleep", slept.append)
    scheduler = scheduler_of(app)
    scheduler.tick()
    caplog.set_level("INFO")

    app.schedule.save("e", **EVERY_SECOND)

    def seen():
        scheduler.tick()
        return "e is sent" in caplog.text

    wait_for(seen, SOON / 2)  # ws_celery.beat.poll is longer
    assert 0 < max(slept) <= 0.2


def sync_every(make, scheduler_of, **_):
    app = make("beat_sync_every = 1")
    app.schedule.save("e", **EVERY_SECOND)
    scheduler = scheduler_of(app)

    def sent():
        scheduler.tick()
        with app.schedule.begin() as connection:  # what is written there another process can see
            return connection.scalar(select(app.schedule.table.c.sent_at))

    wait_for(sent, SOON)


def schedule_filename(make, scheduler_of, tmp_path, **_):
    # What `ws-celery check` says of it is a test of its own.
    scheduler = scheduler_of(make(f"beat_schedule_filename = {tmp_path}/schedule"))
    scheduler.tick()

    assert not Path(tmp_path, "schedule").exists()
    assert "schedule -> table ws_celery_schedule" in scheduler.info


def cron_starting_deadline(make, **_):
    with pytest.raises(ConfigurationError, match=r"catch_up of an entry says .* Take it out\."):
        check_schedule(make("beat_cron_starting_deadline = 600"))


def enable_remote_control(make, **_):
    app = make("beat_enable_remote_control = true")

    assert beat.Service(app, scheduler_cls=app.conf.beat_scheduler).remote_control


def remote_control_max_tick_age(make, **_):
    app = make("beat_remote_control_max_tick_age = 7")

    assert beat.BeatPidbox(beat.Service(app)).max_tick_age == 7


OPTIONS_OF_BEAT = {
    each.__name__: each
    for each in (
        cron_starting_deadline,
        enable_remote_control,
        max_loop_interval,
        remote_control_max_tick_age,
        schedule,
        schedule_filename,
        scheduler,
        sync_every,
    )
}


@pytest.mark.parametrize("option", sorted(NAMESPACES["beat"]))
def test_each_option_of_beat_is_obeyed_or_refused(
    option, make, scheduler_of, caplog, monkeypatch, tmp_path
):
    OPTIONS_OF_BEAT[option](
        make=make,
        scheduler_of=scheduler_of,
        caplog=caplog,
        monkeypatch=monkeypatch,
        tmp_path=tmp_path,
    )


#: Options that Celery reads in what a method of ours replaces; ws_celery.beat.sources reads these.
REPLACED = {
    "ws_celery.beat.scheduler.FileScheduler.install_default_entries": ["result_expires"],
    "ws_celery.beat.scheduler.DatabaseScheduler.setup_schedule": ["beat_schedule"],
}


def test_no_method_of_ours_replaces_one_of_celery_that_reads_an_option():
    modules = [
        importlib.import_module(each.name)
        for each in pkgutil.walk_packages(ws_celery.__path__, "ws_celery.")
        if not each.name.startswith(("ws_celery.contrib", "ws_celery.__main__"))
    ]
    found = {}
    for cls in {each for module in modules for each in vars(module).values() if _is_ours(each)}:
        for name, method in vars(cls).items():
            if isinstance(method, FunctionType) and (left := _left_out(cls, name, method)):
                found[f"{cls.__module__}.{cls.__qualname__}.{name}"] = sorted(left)
    assert found == REPLACED


def _is_ours(found):
    # type(), as a proxy would look for its application.
    return issubclass(type(found), type) and found.__module__.startswith("ws_celery.")


def _left_out(cls, name, method):
    """Return the options that the inherited method reads, and the overriding one does not."""
    parent = next((vars(each)[name] for each in cls.__mro__[1:] if name in vars(each)), None)
    module = getattr(parent, "__module__", "") or ""
    if not module.startswith(("celery.", "kombu.")):
        return set()
    own, replaced = inspect.getsource(method), inspect.getsource(parent)
    if "super()" in own:
        return set()
    read = re.findall(r"conf\.([a-z_]+)|either\(\s*'(\w+)'", replaced)
    return {one or other for one, other in read} - set(re.findall(r"\w+", own))
