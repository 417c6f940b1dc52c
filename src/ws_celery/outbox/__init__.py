"""The outbox: each dispatch is a row of the database until it has taken effect.

``config.include("ws_celery.outbox")``, or the setting ``ws_celery.outbox = true``, switches it on.
The row of a dispatch is written in the transaction that dispatches, and deleted in the transaction
of the task: its deletion is the right to the effect. See ``docs/outbox.rst``.
"""

from __future__ import annotations

from typing import Any

from pyramid.config import PHASE3_CONFIG

from ws_celery.applications import get_celery_app
from ws_celery.outbox.store import Outbox
from ws_celery.outbox.table import outbox_table
from ws_celery.settings import our_setting

__all__ = ("Outbox", "includeme", "outbox_table")


def includeme(config: Any) -> None:
    """Keep the dispatches of the application in its database until they have taken effect."""
    # Before PHASE3, where tasks are registered, and before the setting is looked at.
    config.action("ws_celery.outbox", _switch_on, args=(config,), order=PHASE3_CONFIG - 2)
    config.include("ws_celery.relay")


def _switch_on(config: Any) -> None:
    app = get_celery_app(config.registry)
    settings = config.registry.settings
    app.outbox = Outbox(
        app,
        table=our_setting(settings, "ws_celery.outbox.table", "ws_celery_outbox"),
        lease=our_setting(settings, "ws_celery.outbox.lease", 300.0),
        max_deliveries=our_setting(settings, "ws_celery.outbox.max_deliveries", 10),
    )
