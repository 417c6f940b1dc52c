"""``ws-celery relay``: publish what is due in the outbox, without a beat."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Any

import click
from celery.bin.base import LOG_LEVEL

from ws_celery.cli.values import HealthFile
from ws_celery.exceptions import ConfigurationError, WsCeleryError
from ws_celery.masking import logger_of

__all__ = ("relay",)

log = logger_of(__name__)


@click.command
@click.option(
    "--batch",
    type=click.IntRange(1, 100_000),
    default=1000,
    show_default=True,
    help="How many messages one transaction claims and one flush sends.",
)
@click.option(
    "--health-file",
    type=HealthFile(),
    help="Touch FILE whenever database and broker have answered, at least every few seconds.",
)
@click.option("-l", "--loglevel", type=LOG_LEVEL, default="INFO", show_default=True)
@click.option("-f", "--logfile", help="Where to log to. [default: stderr]")
@click.pass_context
def relay(
    context: click.Context, batch: int, health_file: Path | None, loglevel: str, logfile: str | None
) -> None:
    """Send what is due in the outbox: what could not be published, has an eta, or got lost.

    Every beat does so too, in a thread. Any number of both may run at once. SIGTERM and SIGINT let
    it finish the batch in hand.
    """
    app = context.obj.app
    if app.outbox is None:
        raise ConfigurationError(
            "The application has no outbox: there is nothing to send. Switch it on with "
            "`ws_celery.outbox = true`."
        )
    app.log.setup(loglevel, logfile)
    app.outbox.relay.batch = batch
    app.outbox.relay.health_file = health_file
    _check(app.outbox)
    _run(app.outbox.relay)


def _check(outbox: Any) -> None:
    try:
        with outbox.begin() as connection:
            outbox.rows.seconds_until_due(connection)
    except WsCeleryError:
        raise  # it would not mend itself
    except outbox.errors as error:
        log.debug("%s", error)  # a database that is down comes back; the relay says so


def _run(relay: Any) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _end)
    # It ends with the main thread; signals reach only that one. Not join(): one that a signal
    # interrupts takes the thread for ended, and Python would not wait for it.
    thread = relay.start()
    while thread.is_alive():
        time.sleep(1)


def _end(signum: int, _frame: Any) -> None:
    signal.signal(signum, signal.SIG_DFL)  # a second one kills
    sys.exit(0)
