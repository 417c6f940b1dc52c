"""A web request that inserts one row and dispatches k tasks, against commit and apply_async."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import Any

from pyramid.config import global_registries
from pyramid.request import Request

from benchmarks.harness import Case, Sides, stopwatch
from benchmarks.plain import plain_celery
from benchmarks.proxy import delayed
from benchmarks.services import Services
from benchmarks.site import DISPATCH, main, noop
from ws_celery import get_celery_app

__all__ = ("CASES", "dispatching", "dispatching_nothing", "settings_of", "site")

#: Requests in one measurement of the request that dispatches nothing.
REQUESTS = 10


def _one_by_one(count: int) -> None:
    for number in range(count):
        noop.delay(number)


def _in_bulk(count: int) -> None:
    noop.delay_many((number,) for number in range(count))


@contextmanager
def dispatching(  # noqa: PLR0913 - what the cases vary
    count: int,
    services: Services,
    *,
    bulk: bool = False,
    results: bool = False,
    outbox: bool = False,
    milliseconds: float = 0,
) -> Iterator[Sides]:
    """Open the sides: dispatch in the request, or after its commit by an app of Celery's own.

    :param count: how many tasks.
    :param bulk: whether our side calls ``delay_many()`` once.
    :param outbox: whether our side has an outbox.
    :param results: whether results are kept, in Redis.
    :param milliseconds: how far the broker is away.
    """
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(services.table())
        our_queue, queue = enter(services.queue()), enter(services.queue())
        broker = enter(delayed(services.redis, milliseconds)) if milliseconds else services.redis
        backend = broker if results else None
        table = enter(services.outbox()) if outbox else None
        ours = enter(site(services, settings_of(broker, our_queue, backend), table))
        without_us = enter(site(services))
        celery = enter(closing(plain_celery(broker, queue, backend)))
        dispatch = partial(_in_bulk if bulk else _one_by_one, count)
        task = celery.tasks["noop"]

        def our_side() -> float:
            with stopwatch() as seconds:
                ours(dispatch)
            services.empty(our_queue)
            if table:
                services.clear(table)
            return seconds()

        def plain_side() -> float:
            with stopwatch() as seconds:
                without_us(_nothing)
                sent = [task.apply_async((number,)) for number in range(count)]
            services.empty(queue)
            for result in sent:
                celery.backend.remove_pending_result(result)  # as when it has been fetched
            return seconds()

        yield Sides(our_side, plain_side)


@contextmanager
def dispatching_nothing(services: Services) -> Iterator[Sides]:
    """Open the sides of the request that dispatches nothing: with the include and without."""
    with ExitStack() as stack:
        stack.enter_context(services.table())
        settings = settings_of(services.redis, stack.enter_context(services.queue()))
        sites = (site(services, settings), site(services))
        yield Sides(*(partial(_requests, stack.enter_context(site)) for site in sites))


def _requests(site: Callable[..., None]) -> float:
    with stopwatch() as seconds:
        for _ in range(REQUESTS):
            site(_nothing)
    return seconds()


def _nothing() -> None:
    """Dispatch nothing."""


def settings_of(broker: str, queue: str, result_backend: str | None = None) -> dict[str, str]:
    """Return the settings of Celery of an application."""
    settings = {
        "celery.broker_url": broker,
        "celery.task_default_queue": queue,
        "celery.task_ignore_result": str(result_backend is None),
    }
    return {**settings, "celery.result_backend": result_backend} if result_backend else settings


@contextmanager
def site(
    services: Services, celery: dict[str, str] | None = None, outbox: str | None = None
) -> Iterator[Callable[[Callable[[], Any]], None]]:
    """Yield what makes a request to a new application.

    :param celery: settings of Celery; without them ws_celery is not included.
    :param outbox: the table of its outbox, if it has one.
    """
    settings = {
        "sqlalchemy.url": services.database,
        "pyramid.includes": "pyramid_tm ws_celery" if celery else "pyramid_tm",
        "tm.manager_hook": "pyramid_tm.explicit_manager",
        **(celery or {}),
        **({"ws_celery.outbox": "true", "ws_celery.outbox.table": outbox} if outbox else {}),
    }
    with ExitStack() as stack:
        application = main({}, **settings)
        stack.callback(global_registries.remove, application.registry)
        stack.callback(application.registry["engine"].dispose)
        if celery:
            stack.enter_context(closing(get_celery_app(application.registry)))

        def request(dispatch: Callable[[], Any]) -> None:
            response = Request.blank("/", {DISPATCH: dispatch}).get_response(application)
            if response.text != "done":
                raise RuntimeError(response.text)

        yield request


def _case(name: str, title: str, goal: float, rounds: int, count: int, **options: Any) -> Case:
    return Case(name, title, goal, partial(dispatching, count, **options), rounds)


CASES = (
    Case("nothing", "10 requests that dispatch nothing", 1.03, dispatching_nothing, 200),
    _case("k1", "1 task", 1.0, 300, 1),
    _case("k10", "10 tasks", 0.65, 150, 10),
    _case("k100", "100 tasks", 0.45, 60, 100),
    _case("k1-results", "1 task, results in Redis", 0.9, 300, 1, results=True),
    _case("k10-results", "10 tasks, results in Redis", 0.5, 150, 10, results=True),
    _case("k100-results", "100 tasks, results in Redis", 0.35, 60, 100, results=True),
    _case("k100-bulk", "100 tasks by delay_many", 0.2, 100, 100, bulk=True),
    _case("k10000-bulk", "10,000 tasks by delay_many", 0.15, 5, 10_000, bulk=True),
    _case("k100-far", "100 tasks, broker 1 ms away", 0.1, 40, 100, milliseconds=1),
)
