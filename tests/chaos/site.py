"""A system under test: its INI file, its servers, its processes, and what to count there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.chaos.fleet import Fleet
from tests.chaos.models import Base
from tests.chaos.services import Broker, Postgres, Sqlite
from tests.chaos.tally import Tally

from ws_celery.outbox import outbox_table

__all__ = ("SYSTEMS", "Site", "open_site")

#: What is compared, and what its column is called.
SYSTEMS = {"outbox": "outbox", "hook": "after-commit hook", "plain": "plain Celery"}

_INI = """\
[app:main]
use = call:tests.chaos.application:main
pyramid.includes = pyramid_tm ws_celery
tm.manager_hook = pyramid_tm.explicit_manager
sqlalchemy.url = {database}
ws_celery.config_uri = %(__file__)s
ws_celery.outbox = {outbox}
ws_celery.outbox.lease = {lease}
ws_celery.publish_cooldown = 1

[celery]
broker_url = {broker}
imports = tests.chaos.application
beat_schedule_filename = %(here)s/schedule
task_ignore_result = true
task_acks_late = {late}
task_reject_on_worker_lost = {late}
worker_prefetch_multiplier = {prefetch}

[celery:broker_transport_options]
visibility_timeout = 10
unacked_restore_interval = 1
unacked_restore_throttle = 1
"""


class Site:
    """One system, running.

    :param system: a key of :data:`SYSTEMS`.
    :param folder: for its files.
    :param database: its database, which runs.
    :param broker: its broker, which runs.
    :param lease: of the outbox, in seconds.
    :param rate: dispatches per second.
    :param seed: of the order of the dispatches.
    """

    def __init__(
        self,
        system: str,
        folder: Path,
        database: Any,
        broker: Broker,
        *,
        lease: float = 3.0,
        rate: float = 40.0,
        seed: int = 0,
    ) -> None:
        self.system = system
        self.database = database
        self.broker = broker
        self.lease = lease
        self.points = folder / "points"
        self.points.mkdir()
        self.ini = folder / "chaos.ini"
        self._write_ini()
        self.outbox = outbox_table() if system == "outbox" else None
        for metadata in (Base.metadata, *([self.outbox.metadata] if system == "outbox" else [])):
            metadata.create_all(database.engine)
        self.tally = Tally(database.engine, self.outbox)
        self._web = ["--rate", str(rate), "--seed", str(seed)]
        environment = {"CHAOS_POINTS": str(self.points), "CHAOS_INI": str(self.ini)}
        self.fleet = Fleet(self._programs(), folder, environment)

    def _write_ini(self) -> None:
        outbox = self.system == "outbox"
        text = _INI.format(
            database=self.database.url,
            broker=self.broker.url,
            outbox=str(outbox).lower(),
            lease=self.lease,
            late=str(not outbox).lower(),
            prefetch=4 if outbox else 1,
        )
        self.ini.write_text(text)

    def _programs(self) -> dict[str, list[str]]:
        ini = str(self.ini)
        pool = ["--concurrency=2", "--without-mingle", "--without-gossip", "--loglevel=warning"]
        web = ["-m", "tests.chaos.plain" if self.system == "plain" else "tests.chaos.web", ini]
        programs = {
            "web": [*web, *self._web],
            "burst": [*web, "--count=1000", "--kind=delay"],
            "demand": [*web, "--on-demand"],
        }
        if self.system == "plain":
            return {
                "worker": ["-m", "celery", "-A", "tests.chaos.plain", "worker", *pool],
                **programs,
            }
        programs["worker"] = ["-m", "ws_celery", "worker", "--ini", ini, *pool]
        if self.system == "outbox":
            programs["relay"] = ["-m", "ws_celery", "relay", "--ini", ini]
            programs["beat"] = ["-m", "ws_celery", "beat", "--ini", ini]
        return programs

    def start(self, *names: str) -> None:
        """Start programs; all by default."""
        for name in names or self.fleet.programs.keys() - {"burst", "demand"}:
            self.fleet.start(name)

    def arm(self, role: str, point: str) -> Path:
        """Let the next process of a role die at a point; the file is gone when one has."""
        file = self.points / f"{role}.{point}"
        file.touch()
        return file

    def dispatch(self, kind: str) -> None:
        """Let the program ``demand`` make one dispatch, and wait until it has."""
        file = self.points / f"demand.{kind}"
        file.touch()
        if not self.fleet.wait_until(lambda: not file.exists(), 90):
            raise TimeoutError(f"nobody has made the dispatch {kind!r}")

    def pause(self) -> None:
        """Let the web process wait after its present request."""
        (self.points / "pause").touch()

    def go_on(self) -> None:
        """Let it go on."""
        (self.points / "pause").unlink(missing_ok=True)

    def settle(self, seconds: float, since: float = 0.0) -> bool:
        """Wait until all that was dispatched has had its effects; return whether it has in time."""
        return self.fleet.wait_until(lambda: self.tally.outstanding(since) == 0, seconds)


@contextmanager
def open_site(system: str, database: str, **options: Any) -> Iterator[Site]:
    """Open a site with a broker and a database of its own; its programs are still to be started.

    :param system: a key of :data:`SYSTEMS`.
    :param database: ``postgresql`` or ``sqlite``.
    """
    with tempfile.TemporaryDirectory(prefix="ws_celery-", ignore_cleanup_errors=True) as folder:
        make = {"postgresql": Postgres, "sqlite": Sqlite}[database]
        server, broker = make(Path(folder, "database")), Broker(Path(folder, "broker"))
        server.start()
        broker.start()
        try:
            site = Site(system, Path(folder), server, broker, **options)
            try:
                yield site
            finally:
                site.fleet.stop_all()
        finally:
            broker.kill()
            server.stop()
