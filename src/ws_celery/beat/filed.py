"""Beat without a database: Celery's file of last runs, with what our entries say besides."""

from __future__ import annotations

from contextlib import closing
from datetime import datetime, timezone
from heapq import heapify, heapreplace
from pathlib import Path
from typing import Any

from celery import beat
from celery.schedules import schedstate

from ws_celery.beat.entry import Entry
from ws_celery.beat.health import HealthFile
from ws_celery.beat.overlap import is_unfinished
from ws_celery.beat.sending import call
from ws_celery.beat.sources import install
from ws_celery.beat.ticks import due_tick, next_tick
from ws_celery.masking import logger_of

__all__ = ("FileScheduler",)

log = logger_of(__name__)

#: Of all entries, in Celery's heap.
_PRIORITY = 5


class FileScheduler(beat.PersistentScheduler):
    """Celery's persistent scheduler: there may be one beat only.

    :param app: the Celery app.

    The other parameters are those of :class:`celery.beat.PersistentScheduler`.
    """

    def __init__(self, app: Any, **options: Any) -> None:
        self._entries: dict[str, Entry] = {}
        self._ticks: dict[str, datetime] = {}
        self._sent: dict[str, tuple[str, datetime]] = {}
        self._health = HealthFile(app.beat_health_file)
        super().__init__(app, **options)

    def setup_schedule(self) -> None:
        """Read the file, and merge what code and INI say."""
        log.info("The last runs are kept in the file %s", Path(self.schedule_filename).absolute())
        self._entries = install(self.app)
        self._make_sure_of_file()
        super().setup_schedule()

    def install_default_entries(self, data: Any) -> None:
        """Add nothing: what Celery would add is an entry of code."""

    def _make_sure_of_file(self) -> None:
        # Celery asks only for the keys, and knows some of the errors that a value can raise.
        try:
            with closing(self.persistence.open(self.schedule_filename)) as store:
                for key in store:
                    store[key]
                if not isinstance(store.get("entries", {}), dict):
                    raise TypeError("its entries are no dictionary")  # noqa: TRY301
        except Exception as error:  # noqa: BLE001 - whatever the classes of its objects raise
            self._destroy_open_corrupted_schedule(error).close()

    def _destroy_open_corrupted_schedule(self, exc: Exception) -> Any:
        """Set a file aside that cannot be read; Celery would delete it."""
        stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S%f")
        for suffix in self.known_suffixes:
            file = Path(f"{self.schedule_filename}{suffix}")
            if file.exists():
                file.rename(f"{file}.corrupt-{stamp}")
        log.error(
            "The file of the last runs, %s, cannot be read (%r). It is set aside as *.corrupt-%s, "
            "and all entries begin anew",
            Path(self.schedule_filename).absolute(),
            exc,
            stamp,
        )
        return self._open_schedule()

    def tick(self, *args: Any, **options: Any) -> float:
        """Send what is due; returns how many seconds to wait."""
        self._reheap()
        seconds: float = super().tick(*args, **options)
        self._health.write(len(self.schedule), 0)
        return seconds

    def populate_heap(self, *_: Any, **__: Any) -> None:
        """Put the entries in order by our times: Celery would ask the entries themselves."""
        self._heap = [beat.event_t(0, _PRIORITY, entry) for entry in self.schedule.values()]
        self._heap = [self._event(event) for event in self._heap]
        heapify(self._heap)

    def _reheap(self) -> None:
        # Celery before 5.7 leaves an entry on top whose time has moved, and no other has its turn.
        heap = self._heap or []
        for _ in range(len(heap)):
            event = heap[0]
            if event.time > self._when(event.entry, 0) or self.is_due(event.entry).is_due:
                return
            heapreplace(heap, self._event(event))

    def _event(self, event: Any) -> Any:
        is_due, wait = self.is_due(event.entry)
        return event._replace(time=self._when(event.entry, 0 if is_due else wait))

    def is_due(self, entry: Any) -> Any:
        """Tell whether an entry is due, and in how many seconds to ask again."""
        merged = self._entries.get(entry.name)
        if merged is None:
            return super().is_due(entry)
        try:
            return self._is_due(entry, merged)
        except Exception:
            log.exception("The next tick of %s cannot be told; others tick on", entry.name)
            return schedstate(is_due=False, next=self.max_interval)

    def _is_due(self, entry: Any, merged: Entry) -> schedstate:
        now = datetime.now(timezone.utc)
        tick, last = due_tick(merged, entry.last_run_at, now)
        following = next_tick(merged, last or now)
        if tick is not None:
            self._ticks[entry.name] = tick
        else:
            entry.last_run_at = last
        wait = (following - now).total_seconds() if following else self.max_interval
        return schedstate(is_due=tick is not None, next=max(wait, 0.0))

    def reserve(self, entry: Any) -> Any:
        """Take note of the tick that is being sent."""
        tick = self._ticks.get(entry.name)
        self.schedule[entry.name] = new = entry._next_instance(tick)
        return new

    def apply_async(
        self, entry: Any, producer: Any = None, advance: bool = True, **options: Any
    ) -> Any:
        """Send the task of an entry, unless its last run is not finished and that matters."""
        merged = self._entries.get(entry.name)
        if merged is None:
            return super().apply_async(entry, producer=producer, advance=advance, **options)
        try:
            return self._apply(entry, merged, producer)
        finally:
            self._tasks_since_sync += 1  # for beat_sync_every
            if self.should_sync():
                self._do_sync()

    def _apply(self, entry: Any, merged: Entry, producer: Any) -> Any:
        now = datetime.now(timezone.utc)
        if merged.overlap == "skip" and entry.name in self._sent:
            task_id, since = self._sent[entry.name]
            if is_unfinished(self.app, task_id, since, now):
                log.info("%s is not sent: its last run is not finished", entry.name)
                return None
        result = call(self.app, merged, self._ticks.pop(entry.name, now), producer)
        self._sent[entry.name] = result.id, now
        self._health.ticked()
        return result
