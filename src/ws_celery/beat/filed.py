"""Beat without a database: Celery's persistent scheduler, as it is, and a file for probes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from celery import beat

from ws_celery.beat.scheduler import HealthFile
from ws_celery.beat.sources import check_sources, install
from ws_celery.masking import logger_of

__all__ = ("FileScheduler",)

log = logger_of(__name__)

#: Seconds that beat waits at most where a probe looks at its file.
_HEALTHY = 1.0


class FileScheduler(beat.PersistentScheduler):
    """Celery's persistent scheduler, for an application without a schedule in its database.

    :param app: the Celery app.

    The other parameters are those of :class:`celery.beat.PersistentScheduler`.
    """

    def __init__(self, app: Any, **options: Any) -> None:
        self._health = HealthFile(app.beat_health_file)
        super().__init__(app, **options)

    def setup_schedule(self) -> None:
        """Let Celery have what code and INI say.

        :raises ConfigurationError: if it would not obey.
        """
        check_sources(self.app)
        install(self.app)
        log.info("The last runs are kept in the file %s", Path(self.schedule_filename).absolute())
        super().setup_schedule()

    def install_default_entries(self, data: Any) -> None:
        """Add nothing: what Celery would add is an entry of code, which can be switched off."""

    def tick(self, *args: Any, **options: Any) -> float:
        """Send what is due; returns how many seconds to wait."""
        seconds: float = super().tick(*args, **options)
        self._health.write(len(self.schedule), 0)
        return seconds if self.app.beat_health_file is None else min(seconds, _HEALTHY)

    def apply_async(self, *args: Any, **options: Any) -> Any:
        """Send the task of an entry."""
        result = super().apply_async(*args, **options)
        self._health.ticked()
        return result
