"""A process that kills itself at any step of a dispatch: its effect comes, and once.

The points are those of ``make chaos``. Worker and relay are shared by all of them and started again
when they die, as a supervisor would do it; they are real processes.
"""

from __future__ import annotations

import time

import pytest
from tests.chaos.faults import POINTS
from tests.chaos.site import open_site

#: Seconds until what must come has come, on a machine that has other things to do.
PATIENCE = 90

pytestmark = pytest.mark.timeout(4 * PATIENCE)

#: On SQLite, where rows are not locked and the claim comes last: what differs there.
_ON_SQLITE = (
    "web.dispatch.committed",
    "worker.claim.done",
    "worker.commit.begun",
    "worker.handover.committed",
)

#: Which dispatch gets to the points that not every one of them reaches.
_KINDS = {"retry": "retry", "relay": "later", "chain": "chain", "RequestAwareTask": "aware"}


@pytest.fixture(scope="module")
def site():
    with open_site("outbox", "postgresql", lease=1.0) as site:
        site.start("demand", "worker", "relay")
        yield site


@pytest.fixture(scope="module")
def sqlite_site():
    with open_site("outbox", "sqlite", lease=1.0) as site:
        site.start("demand", "worker", "relay")
        yield site


def _points(*names):
    for role, point, name, systems in POINTS:
        if "outbox" in systems and (not names or f"{role}.{point}" in names):
            yield pytest.param(role, point, _KINDS.get(name.partition(":")[0], "group"), id=name)


@pytest.mark.parametrize(("role", "point", "kind"), list(_points()))
def test_a_process_that_dies_there_loses_and_doubles_nothing(site, role, point, kind):
    _die_and_converge(site, role, point, kind)


@pytest.mark.parametrize(("role", "point", "kind"), list(_points(*_ON_SQLITE)))
def test_so_it_is_on_sqlite(sqlite_site, role, point, kind):
    _die_and_converge(sqlite_site, role, point, kind)


def _die_and_converge(site, role, point, kind):
    begun = time.time()
    armed = site.arm(role, point)
    site.dispatch(kind)

    assert site.fleet.wait_until(lambda: not armed.exists(), PATIENCE), "nobody got there"
    assert site.settle(PATIENCE, begun), site.tally.rows()
    counts = site.tally.counts([(begun, time.time())])
    assert counts.dispatches >= 1
    assert (counts.lost, counts.duplicates, counts.phantoms) == (0, 0, 0)
