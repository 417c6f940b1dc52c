"""The relay: the loop that publishes what is due in the outbox; a thread of beat, or alone.

What is due was not published (the broker was down, the process died between commit and publish),
waits for its eta, or has not taken effect within its lease. Each batch is claimed in one short
transaction, which counts the delivery and doubles the lease, and published after it. If the relay
dies in between, the lease brings the rows again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from random import uniform
from time import monotonic
from typing import Any

from celery import signals
from pyramid.config import PHASE3_CONFIG

from ws_celery.applications import get_celery_app
from ws_celery.canary import Canary
from ws_celery.dispatch import Publication
from ws_celery.events import listen
from ws_celery.exceptions import BrokerUnavailable
from ws_celery.masking import logger_of
from ws_celery.outages import BACKOFF, Service
from ws_celery.outbox.deliveries import Deliveries
from ws_celery.settings import our_setting

__all__ = ("BATCH", "Relay", "includeme")

log = logger_of(__name__)

#: How many rows one transaction claims, and one flush publishes.
BATCH = 1000

#: Seconds between two looks at the canary.
WATCH = 3.0


def includeme(config: Any) -> None:
    """Let the application's beat publish what is due in its outbox."""
    config.action("ws_celery.relay", _make, args=(config,), order=PHASE3_CONFIG)


def _make(config: Any) -> None:
    outbox = get_celery_app(config.registry).outbox
    poll = our_setting(config.registry.settings, "ws_celery.outbox.poll", 1.0)
    outbox.relay = Relay(outbox, poll=poll)


class Relay:
    """Publishes what is due in an outbox. Any number of relays may run, in any processes.

    :param outbox: the outbox.
    :param batch: how many rows one transaction claims, and one flush publishes.
    :param poll: seconds between two looks into the outbox.
    :param watch: seconds between two looks at the canary.
    :param health_file: is touched after each turn in which broker and database have answered.
    """

    def __init__(
        self,
        outbox: Any,
        *,
        batch: int = BATCH,
        poll: float = 1.0,
        watch: float = WATCH,
        health_file: Path | None = None,
    ) -> None:
        self.batch = batch
        self.poll = poll
        self.watch = watch
        self.health_file = health_file
        self._outbox = outbox
        self._deliveries = Deliveries(outbox)
        self._canary: Canary | None = None
        self._watch_at = 0.0
        self._broker = Service("The relay", "broker")
        self._database = Service("The relay", "database")
        self._health = Service("The relay", "health file")
        listen(signals.beat_init, self.on_beat_init)

    def on_beat_init(self, sender: Any = None, **_: Any) -> None:
        """Start with beat, and end with the thread that it runs in."""
        if sender.app is self._outbox.app:
            self.start()

    def start(self) -> threading.Thread:
        """Run in a thread of its own until the calling thread ends; returns it.

        It is no daemon: at the end of the process the batch in hand is finished first.
        """
        thread = threading.Thread(target=self.run, args=(threading.current_thread(),), name="relay")
        thread.start()
        return thread

    def run(self, owner: threading.Thread) -> None:
        """Turn until ``owner`` has ended; no error ends it.

        :param owner: the thread to live as long as.
        """
        log.info("The relay of %s has started", self._outbox.rows.table.fullname)
        main = threading.main_thread()

        def wanted() -> bool:
            return owner.is_alive() and main.is_alive()

        while wanted():
            owner.join(self.turn(wanted))
        self.close()
        log.info("The relay has ended")

    def close(self) -> None:
        """Close the connections to the broker."""
        self._outbox.app.publisher.close()
        if self._canary is not None:
            self._canary.close()

    def turn(self, wanted: Callable[[], bool] = lambda: True) -> float:
        """Look at the broker, publish all that is due, and return how many seconds to wait then.

        What fails is logged once, until it works again.

        :param wanted: tells whether another batch is to be taken.
        """
        try:
            more = True
            while more and wanted():
                self._look()
                self._broker.works()
                more = self._sweep()
                self._database.works()
                self._tell_health()
            return self._wait()
        except BrokerUnavailable as error:
            return self._broker.failed(error)
        except self._outbox.errors as error:
            return self._database.failed(error)
        except Exception:
            log.exception("The relay has failed, and goes on")
            return BACKOFF[1]

    def _tell_health(self) -> None:
        if self.health_file is None:
            return
        try:
            self.health_file.touch()
        except OSError as error:
            self._health.failed(error)
        else:
            self._health.works()

    @property
    def canary(self) -> Canary:
        """What tells whether the broker has lost its data; named after the outbox's database."""
        if self._canary is None:
            url, table = self._outbox.engine.url, self._outbox.rows.table.fullname
            place = f"{url.host}:{url.port}/{url.database}/{table}"
            name = sha256(place.encode()).hexdigest()[:16]
            self._canary = Canary(self._outbox.app, f"ws_celery_canary.{name}")
        return self._canary

    # The broker

    def _look(self) -> None:
        if monotonic() < self._watch_at and not self._broker.error:
            return
        if not self.canary.lives():
            self.canary.declare_all()
            self._tell_of_loss(self._deliveries.all_due())
            # Last: who dies before leaves the loss to be seen.
            self.canary.lay()
        elif self._broker.error:
            self.canary.lay()  # a demoted Redis answers, and takes nothing
        # Not all relays at the same time: the first one mends a loss for all.
        self._watch_at = monotonic() + self.watch * uniform(0.5, 1)  # noqa: S311 - no secret

    def _tell_of_loss(self, unfinished: int) -> None:
        if unfinished:
            log.warning(
                "The broker has lost its data, or is new: %d unfinished tasks are sent again",
                unfinished,
            )
        else:  # so it is whenever an outbox is new
            log.info("The broker is watched from now on; no task is unfinished")

    # The outbox

    def _sweep(self) -> bool:
        """Publish one batch; return whether there may be another one."""
        batch = self._deliveries.take(self.batch, self.canary.length)
        if batch.publications:
            self._publish(batch.publications)
            log.debug("The relay has sent %d tasks", len(batch.publications))
        return batch.taken == self.batch

    def _wait(self) -> float:
        due = self._deliveries.seconds_until_due()
        # What is due still is locked by a task that runs.
        return self.poll if due is None or due <= 0 else min(due, self.poll)

    def _publish(self, publications: Sequence[Publication]) -> None:
        """Publish together, else each alone: one message that no broker takes stops no other.

        :raises BrokerUnavailable: if it was the broker; what was not sent is due, and not counted.
        """
        try:
            self._flush(publications)
        except Exception:
            log.debug("A batch of %d tasks was not sent", len(publications), exc_info=True)
            self._make_sure_of_broker(publications)
            for number, publication in enumerate(publications):
                self._publish_alone(publication, publications[number:])

    def _publish_alone(self, publication: Publication, left: Sequence[Publication]) -> None:
        try:
            self._flush([publication])
        except Exception:
            self._make_sure_of_broker(left)
            # It stays counted, and is tried again after its lease.
            name, task_id = publication.task_name, publication.task_id
            log.exception("%s[%s] cannot be sent; others can", name, task_id)

    def _make_sure_of_broker(self, publications: Sequence[Publication]) -> None:
        try:
            self.canary.replace()
        except BrokerUnavailable:
            self._deliveries.give_back([publication.row_id for publication in publications])
            raise

    def _flush(self, publications: Sequence[Publication]) -> None:
        self._outbox.app.publisher.flush(publications)
        self._outbox.published(publications)
