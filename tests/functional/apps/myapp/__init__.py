"""A small application as users write them, with views that let tests look from outside."""

from __future__ import annotations

import sqlalchemy as sa
import zope.sqlalchemy
from myapp.models import Base
from pyramid.config import Configurator
from sqlalchemy.orm import Session, sessionmaker


def main(_global_config, **settings):
    config = Configurator(settings=settings)
    engine = sa.create_engine(settings["sqlalchemy.url"])
    Base.metadata.create_all(engine)
    factory = sessionmaker(engine)

    def dbsession(request) -> Session:
        session = factory()
        zope.sqlalchemy.register(session, transaction_manager=request.tm)
        return session

    config.add_request_method(dbsession, reify=True)
    config.add_route("deliveries", "/deliveries")
    config.add_route("review", "/reviews/{id}")
    config.scan()
    return config.make_wsgi_app()
