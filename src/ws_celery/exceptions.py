"""What can go wrong, in one vocabulary; imports nothing of ours.

Every message is one sentence that says what was wrong and one that names the remedy, because the
command line prints it as it stands.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from kombu.exceptions import EncodeError
from pyramid.exceptions import ConfigurationError as PyramidConfigurationError

__all__ = (
    "ArgumentNotSerializable",
    "BrokerUnavailable",
    "ConfigurationError",
    "Fault",
    "NoCurrentApplication",
    "NotIncluded",
    "NotRunYet",
    "TaskNotRegistered",
    "WsCeleryError",
)


class WsCeleryError(Exception):
    """Base of every error that ws_celery raises on purpose."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with the configuration; its text is one readable line.

    :param problem: what is wrong, as the end of a sentence that begins with section and key; may be
        empty where ``expected`` says it all.
    :param file: name of the file, or what else the value came from.
    :param line: line in that file, counted from 1.
    :param section: name of the section, without brackets.
    :param key: the option, as it is written there.
    :param value: the value, with its secrets masked already.
    :param expected: what would have been right.
    :param nearest: the legal name that is most like the unknown one.
    """

    problem: str
    file: str | None = None
    line: int | None = None
    section: str | None = None
    key: str | None = None
    value: str | None = None
    expected: str | None = None
    nearest: str | None = None

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line) if part is not None)
        subject = " ".join(
            part for part in (f"[{self.section}]" if self.section else "", self.key or "") if part
        )
        if self.value is not None:
            subject += f" = {self.value!r}"
        expected = f"expected {self.expected}" if self.expected else ""
        said = "; ".join(part for part in (self.problem, expected) if part)
        if subject and self.value is None and said.startswith(("is ", "sets ", "has ", "cannot ")):
            subject, said = f"{subject} {said}", ""
        text = ": ".join(part for part in (place, subject, said) if part)
        text = text.rstrip(".") + "."
        return f"{text} Did you mean {self.nearest}?" if self.nearest else text

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)


class ConfigurationError(WsCeleryError, PyramidConfigurationError):
    """Settings, sections or files are wrong: all that is wrong, one line for each fault.

    :param faults: what is wrong; a plain sentence counts as one.
    """

    def __init__(self, *faults: Fault | str) -> None:
        self.faults: tuple[Fault, ...] = tuple(
            fault if isinstance(fault, Fault) else Fault(fault) for fault in faults
        )
        super().__init__(*faults)

    def __str__(self) -> str:
        return "\n".join(str(fault) for fault in self.faults)

    @classmethod
    def of(cls, faults: Iterable[Fault]) -> ConfigurationError:
        """Return the error that shows each of ``faults`` once, in the order of files and lines."""
        ordered = sorted(dict.fromkeys(faults), key=lambda each: (each.file or "", each.line or 0))
        return cls(*ordered)


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
