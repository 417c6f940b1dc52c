from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


class Delivery(Base):
    __tablename__ = "delivery"

    id: Mapped[int] = mapped_column(primary_key=True)
    review_url: Mapped[str | None] = mapped_column(sa.Text)
    pid: Mapped[int | None]


class Run(Base):
    """A run of a task; its row is written in the task's own transaction."""

    __tablename__ = "run"

    id: Mapped[int] = mapped_column(primary_key=True)
    task: Mapped[str] = mapped_column(sa.Text)
    task_id: Mapped[str] = mapped_column(sa.Text)
