"""What is counted: dispatches that were committed, and their effects."""

from __future__ import annotations

import time
import uuid

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

__all__ = ("KINDS", "Base", "Dispatch", "Effect", "new_dispatch")

#: Effects of each kind of dispatch. Those of one that aborts would be phantoms.
KINDS = {
    "delay": 1,
    "countdown": 1,
    "later": 1,
    "chain": 3,
    "aware": 4,
    "group": 3,
    "retry": 1,
    "abort": 1,
}


class Base(DeclarativeBase):
    """The tables of the application."""


class Dispatch(Base):
    """One dispatch; its row is written by the transaction that dispatches."""

    __tablename__ = "dispatch"

    id: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    kind: Mapped[str] = mapped_column(sa.String(16))
    steps: Mapped[int] = mapped_column(comment="effects that it is to have")
    at: Mapped[float] = mapped_column(sa.Float(53))


class Effect(Base):
    """One effect of a task, written in its transaction; nothing keeps it from being there twice."""

    __tablename__ = "effect"

    id: Mapped[int] = mapped_column(primary_key=True)
    dispatch_id: Mapped[str] = mapped_column(sa.String(64), index=True)
    step: Mapped[int]


def new_dispatch(kind: str) -> Dispatch:
    """Make the row of a dispatch; its id tells its time, also where it is never committed."""
    at = time.time()
    key = f"{at:.6f}-{uuid.uuid4().hex}"
    return Dispatch(id=key, kind=kind, steps=KINDS[kind], at=at)
