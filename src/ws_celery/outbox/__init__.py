"""The outbox: each dispatch is a row of the database until it has taken effect.

``config.include("ws_celery.outbox")``, or the setting ``ws_celery.outbox = true``, switches it on.
The row of a dispatch is written in the transaction that dispatches, and deleted in the transaction
of the task: its deletion is the right to the effect. See ``docs/outbox.rst``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyramid.config import PHASE3_CONFIG, Configurator

from ws_celery.app import get_celery_app
from ws_celery.exceptions import ConfigurationError
from ws_celery.outbox.relay import Relay
from ws_celery.outbox.store import Outbox
from ws_celery.outbox.tables import outbox_table
from ws_celery.settings import our_setting

if TYPE_CHECKING:
    from ws_celery.app import PyramidCelery

__all__ = ("Outbox", "includeme", "outbox_table")


def includeme(config: Configurator) -> None:
    """Keep the dispatches of the application in its database until they have taken effect."""
    # Before PHASE3, where tasks are registered, and before the setting is looked at.
    config.action("ws_celery.outbox", _switch_on, args=(config,), order=PHASE3_CONFIG - 2)


def _switch_on(config: Configurator) -> None:
    app = get_celery_app(config.registry)
    _refuse_protocol_1(app)
    settings = config.registry.settings
    app.outbox = Outbox(
        app,
        table=our_setting(settings, "ws_celery.outbox.table", "ws_celery_outbox"),
        lease=our_setting(settings, "ws_celery.outbox.lease", 300.0),
        max_deliveries=our_setting(settings, "ws_celery.outbox.max_deliveries", 10),
    )
    app.outbox.relay = Relay(app.outbox, poll=our_setting(settings, "ws_celery.outbox.poll", 1.0))


def _refuse_protocol_1(app: PyramidCelery) -> None:
    # Its messages have no headers: neither the id that a row is kept under nor that of the row.
    if app.conf.task_protocol == 1:
        place = app.configuration and app.configuration.place("task_protocol")
        problem = (
            "has messages without headers, so that the outbox could keep none of them. Leave "
            "task_protocol out, or switch ws_celery.outbox off"
        )
        fault = place.fault(problem, value=1) if place else f"task_protocol = 1 {problem}."
        raise ConfigurationError(fault)
