"""What the cases talk to; whatever they make there is removed again."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from redis import Redis
from sqlalchemy import create_engine
from sqlalchemy.schema import CreateSchema, DropSchema

from benchmarks.site import Base
from ws_celery.outbox import outbox_table

__all__ = ("ROOT", "Services")

#: Where the programs that are measured are started: they import this package.
ROOT = Path(__file__).parents[1]


#: Under which keys kombu remembers a queue.
BINDINGS = ("_kombu.binding", "_kombu.binding_permanent")


@dataclass(frozen=True)
class Services:
    """URLs of a Redis and a database, that others may use at the same time."""

    redis: str
    database: str

    @contextmanager
    def queue(self) -> Iterator[str]:
        """Yield the name of a new queue."""
        name = f"benchmark-{uuid.uuid4().hex}"
        try:
            yield name
        finally:
            self.empty(name, *(f"{prefix}.{name}" for prefix in BINDINGS))

    def empty(self, *keys: str) -> None:
        """Remove what is under these keys of Redis, a queue's messages for example."""
        with Redis.from_url(self.redis) as client:
            client.delete(*keys)

    @contextmanager
    def outbox(self) -> Iterator[str]:
        """Yield the name of an outbox's table, which is there and empty."""
        table = outbox_table(f"benchmark_{uuid.uuid4().hex}")
        engine = create_engine(self.database)
        table.create(engine)
        try:
            yield table.name
        finally:
            table.drop(engine)
            engine.dispose()

    @contextmanager
    def schema(self) -> Iterator[str]:
        """Yield the name of a schema of the database, which is there and empty."""
        name = f"benchmark_{uuid.uuid4().hex}"
        engine = create_engine(self.database)
        with engine.begin() as connection:
            connection.execute(CreateSchema(name))
        try:
            yield name
        finally:
            with engine.begin() as connection:
                connection.execute(DropSchema(name, cascade=True))
            engine.dispose()

    def clear(self, table: str) -> None:
        """Remove the rows of an outbox."""
        engine = create_engine(self.database)
        with engine.begin() as connection:
            connection.execute(outbox_table(table).delete())
        engine.dispose()

    @contextmanager
    def table(self) -> Iterator[None]:
        """Have the table of the application, empty."""
        engine = create_engine(self.database)
        Base.metadata.drop_all(engine)
        Base.metadata.create_all(engine)
        try:
            yield
        finally:
            Base.metadata.drop_all(engine)
            engine.dispose()
