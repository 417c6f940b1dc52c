"""The ways in which a system fails; each is injected while dispatches go on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import psutil
from tests.chaos.site import Site

__all__ = ("FAULTS", "POINTS", "Fault", "faults_of")

#: Seconds in which an armed point must be reached.
_PATIENCE = 20.0

_LIBRARY = ("outbox", "hook")
_ALL = ("outbox", "hook", "plain")
_POSTGRESQL = "postgresql"

#: Where processes kill themselves: role, point, what it is, and the systems that get there.
POINTS = (
    ("web", "dispatch.begun", "dispatch: before the rows are written", ("outbox",)),
    ("web", "dispatch.written", "dispatch: after the rows are written", ("outbox",)),
    ("web", "dispatch.committed", "dispatch: after the commit", _ALL),
    ("web", "publish.begun", "publish: before", _LIBRARY),
    ("web", "publish.middle", "publish: half of the bytes sent", _LIBRARY),
    ("web", "publish.done", "publish: after", _ALL),
    ("worker", "claim.begun", "claim: before", ("outbox",)),
    ("worker", "claim.done", "claim: after", ("outbox",)),
    ("worker", "run.middle", "run: in the middle", _ALL),
    ("worker", "dispatch.written", "chain: after the next row is written", ("outbox",)),
    ("worker", "commit.begun", "commit: before", _ALL),
    ("worker", "commit.done", "commit: after", _ALL),
    ("worker", "publish.begun", "chain: after the commit, before the publish", ("outbox",)),
    ("worker", "handover.begun", "RequestAwareTask: after the run", ("outbox",)),
    (
        "worker",
        "handover.committed",
        "RequestAwareTask: next row written",
        ("outbox",),
    ),
    ("worker", "handover.done", "RequestAwareTask: after the publish", ("outbox",)),
    ("worker", "acknowledge.begun", "acknowledge: before", _ALL),
    ("worker", "retry.aborted", "retry: after the abort", ("outbox",)),
    ("worker", "retry.rewritten", "retry: after the row is rewritten", ("outbox",)),
    ("worker", "retry.published", "retry: after the publish", ("outbox",)),
    ("relay", "take.locked", "relay: rows claimed, not committed", ("outbox",)),
    ("relay", "publish.begun", "relay: claim committed", ("outbox",)),
    ("relay", "publish.middle", "relay: half of the bytes sent", ("outbox",)),
    ("relay", "publish.done", "relay: after the publish", ("outbox",)),
)


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    :param name: as the table shows it.
    :param inject: makes it happen; tells whether it did.
    :param systems: where it can happen.
    :param databases: likewise.
    """

    name: str
    inject: Callable[[Site, random.Random], bool]
    systems: tuple[str, ...] = _ALL
    databases: tuple[str, ...] = ("postgresql", "sqlite")


def faults_of(system: str, database: str) -> list[Fault]:
    """Return the faults that can happen to a system."""
    return [fault for fault in FAULTS if system in fault.systems and database in fault.databases]


def _crash(role: str, point: str, site: Site, _rng: random.Random) -> bool:
    armed = site.arm(role, point)
    died = site.fleet.wait_until(lambda: not armed.exists(), _PATIENCE)
    armed.unlink(missing_ok=True)
    return died


def _kill(name: str, site: Site, rng: random.Random) -> bool:
    site.fleet.wait(rng.random())
    site.fleet.kill(name)
    return True


def _kill_child(site: Site, rng: random.Random) -> bool:
    if not site.fleet.wait_until(lambda: bool(site.fleet.children("worker")), _PATIENCE):
        return False
    site.fleet.wait(rng.random())
    with suppress(psutil.NoSuchProcess, IndexError):
        rng.choice(site.fleet.children("worker")).kill()
        return True
    return False


def _lose_broker(site: Site, rng: random.Random) -> bool:
    site.broker.kill()
    site.fleet.wait(rng.uniform(0, 3))
    site.broker.start()
    return True


def _restart_broker(site: Site, rng: random.Random) -> bool:
    site.fleet.wait(rng.random())
    site.broker.restart()
    return True


def _empty_broker(site: Site, rng: random.Random) -> bool:
    site.fleet.wait(rng.random())
    site.broker.empty()
    return True


def _crash_database(site: Site, rng: random.Random) -> bool:
    site.database.crash()
    site.fleet.wait(rng.uniform(0, 2))
    site.database.start()
    return True


def _disconnect(site: Site, rng: random.Random) -> bool:
    site.fleet.wait(rng.random())
    site.database.disconnect_all()
    return True


def _cut(server: str, site: Site, rng: random.Random) -> bool:
    proxy = getattr(site, server).proxy
    proxy.cut()
    site.fleet.wait(rng.uniform(0.1, 2))
    proxy.mend()
    return True


def _freeze(server: str, site: Site, rng: random.Random) -> bool:
    proxy = getattr(site, server).proxy
    proxy.freeze()
    site.fleet.wait(rng.uniform(0.5, 4))
    proxy.mend()
    return True


def _crashes() -> Iterator[Fault]:
    for role, point, name, systems in POINTS:
        yield Fault(name, partial(_crash, role, point), systems)


FAULTS = (
    *_crashes(),
    Fault("SIGKILL of the web process", partial(_kill, "web")),
    Fault("SIGKILL of the worker", partial(_kill, "worker")),
    Fault("SIGKILL of a pool child", _kill_child),
    Fault("SIGKILL of the relay", partial(_kill, "relay"), ("outbox",)),
    Fault("SIGKILL of beat", partial(_kill, "beat"), ("outbox",)),
    Fault("broker killed, its data lost", _lose_broker),
    Fault("broker restarted, its data kept", _restart_broker),
    Fault("FLUSHALL", _empty_broker),
    Fault("database crashed", _crash_database, databases=(_POSTGRESQL,)),
    Fault("database connections terminated", _disconnect, databases=(_POSTGRESQL,)),
    Fault("network to the broker cut", partial(_cut, "broker")),
    Fault("network to the broker silent", partial(_freeze, "broker")),
    Fault("network to the database cut", partial(_cut, "database"), databases=(_POSTGRESQL,)),
    Fault("network to the database silent", partial(_freeze, "database"), databases=(_POSTGRESQL,)),
)
