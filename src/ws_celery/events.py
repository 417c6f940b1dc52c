"""What an application can subscribe to with ``config.add_subscriber``; imports nothing of ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = ("PublishFailed", "TaskMessage", "TasksPublished")


class TaskMessage(NamedTuple):
    """A task that has been dispatched."""

    name: str
    id: str


class TasksPublished:
    """The deferred messages of one transaction have been handed to the broker.

    Sent after each flush, in the thread that has committed. What a subscriber raises is logged.

    :param app: the Celery app.
    :param publications: what was published.
    """

    def __init__(self, app: Any, publications: Sequence[Any]) -> None:
        self.app = app
        self._publications = tuple(publications)

    @property
    def tasks(self) -> list[TaskMessage]:
        """Names and ids, in the order of the calls."""
        return [TaskMessage(p.task_name, p.task_id) for p in self._publications if p.task_id]


class PublishFailed(TasksPublished):
    """The transaction has committed, and these of its messages may not have reached the broker.

    :param error: the reason.
    """

    def __init__(self, app: Any, publications: Sequence[Any], error: BaseException) -> None:
        super().__init__(app, publications)
        self.error = error
