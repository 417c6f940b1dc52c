"""Beat: the schedule of an application, from INI, code and database, and what sends it.

``config.include("ws_celery.beat")``, or the setting ``ws_celery.beat = true``, adds the database,
and needs SQLAlchemy. See ``docs/schedules.rst``.
"""

from __future__ import annotations

from typing import Any

from pyramid.config import PHASE3_CONFIG

from ws_celery.app import get_celery_app
from ws_celery.exceptions import ConfigurationError
from ws_celery.settings import our_setting

__all__ = ("SCHEDULER", "Scheduler", "includeme")

#: What ``beat_scheduler`` is, if nobody says otherwise.
SCHEDULER = f"{__name__}:Scheduler"


def includeme(config: Any) -> None:
    """Let the schedule of the application be edited in its database, and any number of beats run.

    Nothing fires twice: each tick is claimed there, together with the row that its task has in the
    outbox.
    """
    # Before the setting is looked at.
    config.action("ws_celery.beat", _switch_on, args=(config,), order=PHASE3_CONFIG - 2)


def _switch_on(config: Any) -> None:
    from ws_celery.beat.store import Store  # SQLAlchemy is needed for no other part of beat

    app = get_celery_app(config.registry)
    if app.conf.beat_scheduler != SCHEDULER:
        raise ConfigurationError(
            f"[celery] beat_scheduler = {app.conf.beat_scheduler} does not read the schedule in "
            "the database. Take it out, or ws_celery.beat = true."
        )
    table = our_setting(config.registry.settings, "ws_celery.beat.table", "ws_celery_schedule")
    app.schedule = Store(app, table)


def Scheduler(app: Any, **options: Any) -> Any:  # noqa: N802 - it takes the place of Celery's class
    """Make the scheduler of ``ws-celery beat``: the database's, or without one Celery's own.

    :param app: the Celery app.
    :param options: as :class:`celery.beat.Scheduler` takes them.
    """
    if app.schedule is None:
        from ws_celery.beat.filed import FileScheduler

        return FileScheduler(app=app, **options)
    from ws_celery.beat.scheduler import DatabaseScheduler

    return DatabaseScheduler(app=app, **options)
