"""The views. Each answers as a page and, to ``Accept: application/json``, as JSON."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NoReturn

from celery.states import READY_STATES
from pyramid.config import Configurator
from pyramid.httpexceptions import (
    HTTPBadRequest,
    HTTPClientError,
    HTTPException,
    HTTPNotFound,
    HTTPSeeOther,
    HTTPServiceUnavailable,
)
from pyramid.renderers import JSON as _JSON
from pyramid.request import Request
from pyramid.view import exception_view_config, view_config
from sqlalchemy import Select, func, select

from ws_celery.demo.models import Base, FailedOrder, Order, Receipt, Report, TaskRun, now
from ws_celery.demo.tasks import tick, write_receipt, write_report

__all__ = (
    "Page",
    "includeme",
)

_TEMPLATES = Path(__file__).with_name("templates")
_STATIC = "ws_celery.demo:static/"


@dataclass(frozen=True)
class Page:
    """A small page: what happened, the facts, where to go next.

    :param percent: shows a progress bar, if given.
    :param changing: whether the browser shall ask again every second.
    """

    title: str
    text: str
    facts: Mapping[str, object] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    percent: int | None = None
    changing: bool = False


def includeme(config: Configurator) -> None:
    """Add the renderers ``page``, ``home`` and ``json``."""
    config.add_renderer("page", lambda _info: _page_renderer)
    config.add_renderer("home", lambda _info: _home_renderer)
    json = _JSON(indent=2)
    json.add_adapter(datetime, lambda moment, _request: moment.isoformat())
    config.add_renderer("json", json)


def _home_renderer(_value: object, system: Mapping[str, Any]) -> str:
    return _layout(system["request"], title="ws_celery", body=_template("home.html").template)


def _page_renderer(page: Page, system: Mapping[str, Any]) -> str:
    request = system["request"]
    if page.changing:
        request.response.headers["Refresh"] = "1"
    body = _template("page.html").substitute(
        title=escape(page.title),
        text=escape(page.text),
        progress=""
        if page.percent is None
        else f'<progress max="100" value="{page.percent}"></progress>',
        facts=_each("<div><dt>{}</dt><dd>{}</dd></div>", page.facts),
        links=_each('<a class="button" href="{1}">{0}</a>', page.links),
        home=escape(request.route_path("home")),
    )
    return _layout(request, title=f"{page.title} · ws_celery", body=body)


def _layout(request: Request, title: str, body: str) -> str:
    static: Callable[[str], str] = request.static_path
    return _template("layout.html").substitute(
        title=escape(title),
        body=body,
        home=escape(request.route_path("home")),
        style=escape(static(f"{_STATIC}demo.css")),
        script=escape(static(f"{_STATIC}demo.js")),
        icon=escape(static(f"{_STATIC}icon.svg")),
    )


def _each(form: str, pairs: Mapping[str, object]) -> str:
    return "\n".join(form.format(escape(key), escape(str(value))) for key, value in pairs.items())


def _template(name: str) -> Template:
    return Template(_TEMPLATES.joinpath(name).read_text(encoding="utf-8"))


# Pyramid's decorators have no types.
# mypy: disable-error-code="untyped-decorator"


#: Rows of each kind on the front page.
SHOWN = 20

JSON: dict[str, Any] = {"accept": "application/json", "renderer": "json"}
HTML: dict[str, Any] = {"accept": "text/html", "renderer": "page"}


class OrderFailed(Exception):
    """Something went wrong after the task had been called, as it may in any view."""

    def __init__(self, task_id: str) -> None:
        super().__init__(task_id)
        self.task_id = task_id


class NotThere(HTTPNotFound):
    """The address is right, but what it names does not exist."""


@view_config(route_name="home", accept="text/html", renderer="home")
def home_page(_request: Request) -> dict[str, Any]:
    """Show the front page; its script asks for :func:`home` every second."""
    return {}


@view_config(route_name="home", **JSON)
def home(request: Request) -> dict[str, Any]:
    """Return what happened lately, newest first."""
    runs = select(TaskRun)
    return {
        "web_pid": os.getpid(),
        "time": now(),
        "orders": _newest(request, select(Order)),
        "failed_orders": [
            {**failed.__json__(request), "runs": _count_runs(request, failed.task_id)}
            for failed in _newest(request, select(FailedOrder))
        ],
        "reports": _newest(request, select(Report)),
        "tasks_run": _newest(request, runs.where(TaskRun.task != tick.name)),
        "ticks": _newest(request, runs.where(TaskRun.task == tick.name)),
    }


def _newest(request: Request, query: Select[Any]) -> list[Any]:
    table = query.column_descriptions[0]["entity"]
    return list(request.dbsession.scalars(query.order_by(table.id.desc()).limit(SHOWN)))


def _count_runs(request: Request, task_id: str) -> int:
    query = select(func.count()).where(TaskRun.task_id == task_id)
    count: int = request.dbsession.scalar(query)
    return count


@view_config(route_name="orders", request_method="POST")
def place_order(request: Request) -> HTTPSeeOther:
    """Store an order and call the task that writes its receipt; with ``fail``, fail after that."""
    email, item, fail = _read_order(request)
    order = Order(email=email, item=item)
    request.dbsession.add(order)
    request.dbsession.flush()
    # The message leaves when this request's transaction commits; the id is known now.
    order.task_id = write_receipt.delay(order.id).id
    if fail:
        _fail(request, order)
    return HTTPSeeOther(request.route_path("order", id=order.id))


def _fail(request: Request, order: Order) -> NoReturn:
    failed = FailedOrder(email=order.email, item=order.item, task_id=order.task_id)

    def remember(request: Request) -> None:
        # The order's transaction has aborted by now; this is another one.
        with request.tm:
            request.dbsession.add(failed)

    request.add_finished_callback(remember)
    raise OrderFailed(failed.task_id)


def _read_order(request: Request) -> tuple[str, str, bool]:
    try:
        fields = request.json_body if "json" in request.content_type else request.POST
        email, item, fail = (fields.get(name, "") for name in ("email", "item", "fail"))
    except (ValueError, AttributeError, LookupError, RecursionError):
        raise HTTPBadRequest(
            "Send a form or a JSON object with the fields email and item."
        ) from None
    email = _text("e-mail address", email, longest=254)
    if not re.fullmatch(r"[^@\s]+@[^@\s]+", email):
        raise HTTPBadRequest("This is not an e-mail address: it has to look like ada@example.com.")
    return email, _text("item", item, longest=100), str(fail).lower() in ("1", "true")


def _text(name: str, value: object, longest: int) -> str:
    if not isinstance(value, str) or not value.strip():
        raise HTTPBadRequest(f"The {name} is missing: write it as text.")
    text = value.strip()
    if len(text) > longest:
        raise HTTPBadRequest(f"The {name} is too long: {longest} characters are the most.")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        raise HTTPBadRequest(f"The {name} has characters that cannot be shown, such as a new line.")
    return text


@view_config(route_name="order", **JSON)
def order(request: Request) -> Order:
    """Return one order."""
    return _find(request, Order, "order")


@view_config(route_name="order", **HTML)
def order_page(request: Request) -> Page:
    """Show one order, and ask again until its receipt is there."""
    order = _find(request, Order, "order")
    facts = {
        "Item": order.item,
        "For": order.email,
        "Stored by": f"web process {order.pid}",
        "Task": order.task_id,
    }
    title = f"Order {order.id}"
    if order.receipt is None:
        text = "The order is stored, the task was sent when it committed. A worker takes it now."
        return Page(title, text, facts, changing=True)
    facts["Receipt by"] = f"worker process {order.receipt.pid}"
    text = "A worker has written the receipt; the link was made in the task."
    return Page(title, text, facts, {"Open the receipt": order.receipt.url})


@view_config(route_name="receipt", **JSON)
def receipt(request: Request) -> Receipt:
    """Return the receipt of an order."""
    return _find_receipt(request)


@view_config(route_name="receipt", **HTML)
def receipt_page(request: Request) -> Page:
    """Show the receipt of an order."""
    receipt = _find_receipt(request)
    facts = {
        "Received": receipt.order.item,
        "From": receipt.order.email,
        "On": f"{receipt.time:%Y-%m-%d at %H:%M:%S} UTC",
        "Written by": f"worker process {receipt.pid}",
        "Link": receipt.url,
    }
    order = request.route_path("order", id=receipt.order_id)
    return Page(
        f"Receipt {receipt.id}",
        "You followed a link that request.route_url made inside a task, in another process.",
        facts,
        {f"Order {receipt.order_id}": order},
    )


def _find_receipt(request: Request) -> Receipt:
    order = _find(request, Order, "order")
    if order.receipt is None:
        raise NotThere(f"Order {order.id} has no receipt yet: a worker writes it.")
    return order.receipt


@view_config(route_name="reports", request_method="POST")
def ask_for_report(request: Request) -> HTTPSeeOther:
    """Call the task that writes a report."""
    report = Report(task_id=write_report.delay().id)
    request.dbsession.add(report)
    request.dbsession.flush()
    return HTTPSeeOther(request.route_path("report", id=report.id))


@view_config(route_name="report", **JSON)
def report(request: Request) -> dict[str, Any]:
    """Return a report's progress, from Celery's result backend."""
    report = _find(request, Report, "report")
    return {**report.__json__(request), **_progress(request, report)}


@view_config(route_name="report", **HTML)
def report_page(request: Request) -> Page:
    """Show a report's progress, and ask again until it is ready."""
    report = _find(request, Report, "report")
    progress = _progress(request, report)
    facts = {
        "State": progress["state"],
        "Asked for by": f"web process {report.pid}",
        "Written by": f"worker process {progress['pid']}" if progress["pid"] else "nobody yet",
        "Task": report.task_id,
    }
    return Page(
        f"Report {report.id}",
        "The task tells its progress with update_state(); this page reads the result backend.",
        facts,
        percent=progress["percent"],
        changing=progress["state"] not in READY_STATES,
    )


def _progress(request: Request, report: Report) -> dict[str, Any]:
    result = request.celery_app.AsyncResult(report.task_id)
    try:
        state, info = result.state, result.info
    except getattr(result.backend, "connection_errors", OSError):
        raise HTTPServiceUnavailable("The result backend does not answer.") from None
    known = info if isinstance(info, dict) else {}
    return {"state": state, "percent": known.get("percent", 0), "pid": known.get("pid")}


def _find(request: Request, table: type[Base], what: str) -> Any:
    found = request.dbsession.get(table, int(request.matchdict["id"]))
    if found is None:
        raise NotThere(f"There is no {what} {request.matchdict['id']}.")
    return found


@view_config(route_name="orders", request_method="GET")
@view_config(route_name="reports", request_method="GET")
def lists(request: Request) -> HTTPSeeOther:
    """Go to the front page, where the lists are."""
    return HTTPSeeOther(request.route_path("home"))


@exception_view_config(OrderFailed, **JSON)
def order_failed(error: OrderFailed, request: Request) -> dict[str, Any]:
    """Answer the request that failed."""
    request.response.status_int = 500
    return {
        "error": "The request failed after delay(): the order is rolled back, its task never sent.",
        "task_id": error.task_id,
    }


@exception_view_config(OrderFailed, **HTML)
def order_failed_page(error: OrderFailed, request: Request) -> Page:
    """Show that the request failed, and what that means for its task."""
    request.response.status_int = 500
    return Page(
        "This request failed",
        "It had stored an order and called delay(). Then the view raised: the order is rolled "
        "back, and its task was never sent.",
        {"Web process": os.getpid(), "Task that never was": error.task_id},
    )


@exception_view_config(HTTPClientError, **JSON)
@exception_view_config(HTTPServiceUnavailable, **JSON)
def refused(error: HTTPException, request: Request) -> dict[str, Any]:
    """Say what is wrong with a request."""
    request.response.status_int = error.code
    return {"error": _sentence(error)}


@exception_view_config(HTTPClientError, **HTML)
@exception_view_config(HTTPServiceUnavailable, **HTML)
def refused_page(error: HTTPException, request: Request) -> Page:
    """Show what is wrong with a request."""
    request.response.status_int = error.code
    return Page(error.title, _sentence(error))


def _sentence(error: HTTPException) -> str:
    # Where there is no view, Pyramid's own words are for developers.
    if isinstance(error, HTTPNotFound) and not isinstance(error, NotThere):
        return "There is no page at this address."
    return str(error.detail)
