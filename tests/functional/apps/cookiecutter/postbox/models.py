"""Tables, and ``request.dbsession``, which a test may share through the environ."""

import sqlalchemy as sa
import zope.sqlalchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from ws_celery.beat.store import schedule_table
from ws_celery.outbox import outbox_table


class Base(DeclarativeBase):
    pass


outbox_table(metadata=Base.metadata)
schedule_table(metadata=Base.metadata)


class Letter(Base):
    __tablename__ = "letters"

    id: Mapped[int] = mapped_column(primary_key=True)
    address: Mapped[str]
    stamp: Mapped[str | None] = mapped_column(unique=True)


def get_tm_session(session_factory, transaction_manager) -> Session:
    session = session_factory()
    zope.sqlalchemy.register(session, transaction_manager=transaction_manager)
    return session


def includeme(config):
    config.add_settings({"tm.manager_hook": "pyramid_tm.explicit_manager"})
    config.include("pyramid_tm")
    engine = config.registry.settings.get("dbengine")
    if engine is None:
        engine = sa.create_engine(config.registry.settings["sqlalchemy.url"])
    session_factory = sessionmaker(engine)
    config.registry["dbsession_factory"] = session_factory

    def dbsession(request):
        lent = request.environ.get("app.dbsession")
        return get_tm_session(session_factory, request.tm) if lent is None else lent

    config.add_request_method(dbsession, reify=True)
