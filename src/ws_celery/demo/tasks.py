"""The tasks. They are written like views: a request first, and its ``dbsession``."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

from pyramid.request import Request
from sqlalchemy import select

from ws_celery import RequestAwareTask, TransactionalTask, task
from ws_celery.demo.models import Order, Receipt, TaskRun

__all__ = ("tick", "write_receipt", "write_report")

log = logging.getLogger(__name__)

#: A report takes so many steps of so many seconds.
REPORT_STEPS, REPORT_PAUSE = 20, 0.25

#: Runs of each task that are remembered.
RUNS_KEPT = 200


@task(base=TransactionalTask, bind=True, ignore_result=True)
def write_receipt(self: TransactionalTask, request: Request, order_id: int) -> None:
    """Write the receipt of an order: all of this commits, or nothing."""
    request.dbsession.add(TaskRun.of(self))
    order = request.dbsession.scalars(select(Order).where(Order.id == order_id)).one()
    if order.receipt is None:  # a message may be delivered twice
        order.receipt = Receipt(url=request.route_url("receipt", id=order.id))
    log.info("Receipt for order %d", order_id)


@task(base=RequestAwareTask, bind=True)
def write_report(self: RequestAwareTask, request: Request) -> dict[str, Any]:
    """Write a report that takes a while, telling how far it is.

    No transaction is open meanwhile, so that nobody waits for this task.
    """
    with request.tm:
        request.dbsession.add(TaskRun.of(self))
    progress = {"percent": 0, "pid": os.getpid()}
    for step in range(REPORT_STEPS):
        progress["percent"] = 100 * step // REPORT_STEPS
        self.update_state(state="PROGRESS", meta=progress)
        time.sleep(REPORT_PAUSE)
    log.info("Report %s is ready", self.request.id)
    return {**progress, "percent": 100}


@task(base=TransactionalTask, bind=True, ignore_result=True)
def tick(self: TransactionalTask, request: Request) -> None:
    """Note that the schedule is alive; and forget what nobody looks at any more."""
    request.dbsession.add(TaskRun.of(self))
    for each in (tick, write_receipt, write_report):
        TaskRun.forget_old(request.dbsession, each.name, keep=RUNS_KEPT)
