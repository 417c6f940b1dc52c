"""With the outbox no loss and no duplicate: one test for each thing that it is promised against.

Every committed dispatch of a TransactionalTask takes effect exactly once in the database that holds
the outbox. The processes are real, and dispatch all the time while the fault happens.
"""

from __future__ import annotations

import random
import time

import pytest
import sqlalchemy as sa
from tests.chaos.faults import FAULTS
from tests.chaos.site import open_site

#: Seconds until what must come has come, on a machine that has other things to do.
PATIENCE = 90

pytestmark = pytest.mark.timeout(4 * PATIENCE)

_KILLS = [fault for fault in FAULTS if fault.name.startswith("SIGKILL")]
_FAULTS = {fault.name: fault for fault in FAULTS}


@pytest.fixture(scope="module")
def site():
    with open_site("outbox", "postgresql", lease=2.0) as site:
        site.pause()
        site.start()
        yield site


@pytest.mark.parametrize("kill", _KILLS, ids=[kill.name for kill in _KILLS])
def test_through_kill_9_of_any_process_at_any_moment(site, kill):
    _takes_effect_exactly_once(site, kill)


def test_through_a_broker_that_is_down_and_restarted_without_its_data(site):
    _takes_effect_exactly_once(site, _FAULTS["broker killed, its data lost"])


def test_through_a_broker_that_is_restarted_with_its_data(site):
    _takes_effect_exactly_once(site, _FAULTS["broker restarted, its data kept"])


def test_through_a_broker_that_is_emptied(site):
    _takes_effect_exactly_once(site, _FAULTS["FLUSHALL"])


def test_through_redelivery(site):
    begun = time.time()
    site.fleet.stop("worker")
    _dispatch(site, 20)
    site.pause()
    twice = site.broker.deliver_again("celery")
    site.fleet.start("worker")

    assert twice  # others wait for their time, or for the one before them
    _check(site, begun)


def test_through_a_database_that_is_not_there_when_the_task_runs(site):
    """The worker gives such a message up; it is sent again after its lease."""
    begun = time.time()
    site.fleet.stop("worker")
    _dispatch(site, 20)
    site.pause()
    site.database.crash()
    site.fleet.start("worker")
    given_up = site.fleet.wait_until(lambda: not site.broker.holds("celery"), PATIENCE)
    site.database.start()

    assert given_up
    _check(site, begun)


def test_messages_that_nobody_can_read_are_dead_letters_and_stop_no_other(site, run):
    """One is no text, so that the relay cannot send it; the other one is no JSON."""
    begun = time.time()
    site.fleet.stop("worker")
    _dispatch(site, 20)
    site.pause()
    bodies = _bodies(site, 2)
    _write(site, dict(zip(bodies, (b"\xff", b"["), strict=True)))
    site.broker.empty()
    site.fleet.start("worker")

    assert site.fleet.wait_until(lambda: _bodies(site).keys() == bodies.keys(), PATIENCE)
    assert site.fleet.wait_until(lambda: all(row["error"] for row in site.tally.rows()), PATIENCE)
    _write(site, bodies)
    retried = run("outbox", "retry", "--all-dead", "--ini", str(site.ini), PYTHONPATH=".")
    assert retried.returncode == 0, retried.stderr
    _check(site, begun)


def _bodies(site, limit=None):
    """Return the bodies of the messages in the outbox by the ids of their rows."""
    statement = sa.select(site.outbox.c.id, site.outbox.c.body).limit(limit)
    with site.database.engine.connect() as connection:
        return {row.id: row.body for row in connection.execute(statement)}


def _write(site, bodies):
    with site.database.engine.begin() as connection:
        for row_id, body in bodies.items():
            change = sa.update(site.outbox).where(site.outbox.c.id == row_id).values(body=body)
            connection.execute(change)


@pytest.fixture
def waiting(site):
    """1,000 tasks that wait for a worker; returns when the first was dispatched."""
    begun = time.time()
    for name in ("web", "worker"):
        site.fleet.stop(name)
    site.go_on()
    site.fleet.run("burst")
    yield begun
    site.pause()
    site.fleet.start("web")


def test_through_a_broker_that_loses_1000_tasks(site, waiting):
    site.fleet.start("worker")
    site.broker.kill()
    site.broker.start()

    _check(site, waiting, dispatches=1000)


def _takes_effect_exactly_once(site, fault):
    begun = time.time()
    _dispatch(site, 10)
    assert fault.inject(site, random.Random(fault.name))  # noqa: S311 - no secret
    _dispatch(site, 10)
    site.pause()
    _check(site, begun)


def _dispatch(site, number):
    """Let the web process go on until it has dispatched so often."""
    wanted = site.tally.dispatches() + number
    site.go_on()
    assert site.fleet.wait_until(lambda: site.tally.dispatches() >= wanted, PATIENCE)


def _check(site, begun, dispatches=20):
    assert site.settle(PATIENCE, begun), site.tally.rows()
    counts = site.tally.counts([(begun, time.time())])
    assert counts.dispatches >= dispatches
    assert (counts.lost, counts.duplicates, counts.phantoms) == (0, 0, 0)
