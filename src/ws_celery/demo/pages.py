"""HTML without a template language: every value is escaped, so that a page says what it is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from pyramid.renderers import JSON

__all__ = ("Page", "includeme")

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


def includeme(config: Any) -> None:
    """Add the renderers ``page``, ``home`` and ``json``."""
    config.add_renderer("page", lambda _info: _page_renderer)
    config.add_renderer("home", lambda _info: _home_renderer)
    json = JSON(indent=2)
    json.add_adapter(datetime, lambda moment, _request: moment.isoformat())
    config.add_renderer("json", json)


def _home_renderer(_value: Any, system: Mapping[str, Any]) -> str:
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


def _layout(request: Any, title: str, body: str) -> str:
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
