"""The demonstration application: orders with receipts, a long report, a schedule.

``development.ini`` runs it, and so does ``ws-celery demo``. Read :mod:`~ws_celery.demo.tasks` and
:mod:`~ws_celery.demo.views` first: they show how tasks are written and called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyramid.config import Configurator

if TYPE_CHECKING:
    from pyramid.router import Router

__all__ = ("main",)


def main(_global_config: dict[str, str], **settings: str) -> Router:
    """Make the WSGI application: what an INI file's ``use = egg:ws-celery#demo`` calls."""
    with Configurator(settings=settings) as config:
        config.include(".models")
        config.include(".views")
        config.add_route("home", "/")
        config.add_route("orders", "/orders")
        config.add_route("order", "/orders/{id:[0-9]{1,15}}")
        config.add_route("receipt", "/orders/{id:[0-9]{1,15}}/receipt")
        config.add_route("reports", "/reports")
        config.add_route("report", "/reports/{id:[0-9]{1,15}}")
        config.add_static_view("static", "static")
        config.scan()
        return config.make_wsgi_app()
