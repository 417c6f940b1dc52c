"""What can go wrong, in one vocabulary; imports nothing of ours.

Every message is one sentence that says what was wrong and one that names the remedy, because the
command line prints it as it stands.
"""

from __future__ import annotations

from kombu.exceptions import EncodeError
from pyramid.exceptions import ConfigurationError as PyramidConfigurationError

__all__ = (
    "ArgumentNotSerializable",
    "BrokerUnavailable",
    "ConfigurationError",
    "NoCurrentApplication",
    "NotIncluded",
    "NotRunYet",
    "TaskNotRegistered",
    "WsCeleryError",
)


class WsCeleryError(Exception):
    """Base of every error that ws_celery raises on purpose."""


class ConfigurationError(WsCeleryError, PyramidConfigurationError):
    """A setting, section or file is wrong; the message names file, section, key and remedy."""


class NotIncluded(WsCeleryError):
    """The Pyramid application has no Celery app because it does not include ws_celery."""

    def __init__(self, where: str = "This Pyramid application") -> None:
        super().__init__(
            f"{where} does not include ws_celery. Add `pyramid.includes = ws_celery` to its "
            f'[app:main] section, or call config.include("ws_celery").'
        )


class NoCurrentApplication(WsCeleryError):
    """A task or ``celery_app`` was used where no single Pyramid application can be told."""

    def __init__(self, what: str, candidates: int) -> None:
        found = (
            "no Pyramid application that includes ws_celery is loaded"
            if not candidates
            else f"{candidates} applications that include ws_celery are loaded in this process"
        )
        super().__init__(
            f"Cannot tell which application {what} belongs to: {found}. Pass the request as the "
            "first argument, or run the code inside `with pyramid.paster.bootstrap(...)`."
        )


class TaskNotRegistered(WsCeleryError):
    """A task is used, or named in a schedule, that the application has not registered."""

    def __init__(self, name: str, where: str = "") -> None:
        super().__init__(
            f"{where}{': ' if where else ''}the task {name!r} is not registered. Call "
            "config.scan() on its module, or list the module under `imports` in the [celery] "
            "section."
        )


class ArgumentNotSerializable(WsCeleryError, EncodeError):
    """An argument of a call cannot be written into a message."""

    def __init__(self, task: str, argument: str, serializer: str, advice: str) -> None:
        super().__init__(f"{task}: {argument} cannot be serialized with {serializer}: {advice}.")


class NotRunYet(WsCeleryError):
    """The result of an eager task is wanted before the transaction has committed."""

    def __init__(self, name: str, task_id: str) -> None:
        super().__init__(
            f"The task {name}[{task_id}] has not run: with task_always_eager it runs when the "
            "transaction commits. Ask for its result after the commit."
        )


class BrokerUnavailable(WsCeleryError):
    """The broker does not answer; the embedded one may not be running."""
