"""A console command or Pyramid script as a task; the INI says which ones may run.

Switched on by ``imports = ws_celery.contrib.commands`` or ``config.include`` of this module.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ws_celery.declaration import task
from ws_celery.exceptions import WsCeleryError
from ws_celery.request import split_request
from ws_celery.settings import our_setting
from ws_celery.tasks import RequestAwareTask

if TYPE_CHECKING:
    from pyramid.config import Configurator
    from pyramid.request import Request

__all__ = (
    "CommandFailed",
    "CommandNotAllowed",
    "Ended",
    "ProgramError",
    "includeme",
    "run_command",
    "run_program",
)

#: Bytes of the end of the output that are kept.
_KEPT = 64 * 1024

#: Seconds that a program has to clean up when its time is over.
_GRACE = 5.0

#: The last word of a command in the INI that lets a call add arguments.
_MORE = "..."

#: Seconds that a command may take.
_TIMEOUT = 3600.0


def includeme(config: Configurator) -> None:
    """Register the task ``run_command``."""
    config.scan(__name__)


class CommandNotAllowed(WsCeleryError):
    """A command is called that the INI does not allow, or not with these arguments."""


class CommandFailed(WsCeleryError):
    """A command has ended with another exit code than 0."""

    def __init__(self, name: str, exit_code: int, output: str) -> None:
        super().__init__(f"The command {name} ended with exit code {exit_code}: {output.strip()}")


class _CommandTask(RequestAwareTask):
    abstract = True

    def apply_async(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *starargs: Any,
        **options: Any,
    ) -> Any:
        """Dispatch, if the command is allowed.

        :raises CommandNotAllowed: at once, if it is not.
        """
        _, given, named = split_request(args, kwargs)
        if given or "name" in named:  # else the arguments do not fit, which Celery says
            name = given[0] if given else named["name"]
            allowed_command(self.app.registry.settings, name, given[1:])
        if named.get("timeout") is not None:
            _seconds(named["timeout"])
        return super().apply_async(args, kwargs, *starargs, **options)


@task(name="run_command", base=_CommandTask)
def run_command(
    request: Request, name: str, *arguments: str, timeout: float | None = None, check: bool = True
) -> dict[str, Any]:
    """Run a command of ``ws_celery.commands``, without a shell.

    A worker that is ended with the task kills it; a worker that is killed may leave it running.

    :param name: its name in the setting.
    :param arguments: added to it, where its line ends in ``...``.
    :param timeout: seconds; at most the setting ``ws_celery.commands.timeout``, which it is if not
        given.
    :param check: whether another exit code than 0 is a failure of the task.
    :return: ``exit_code``, ``output`` (the last 64 KiB of what it printed) and ``seconds``.
    :raises CommandNotAllowed: if the settings of the worker do not allow it, or ``timeout`` is no
        number above 0.
    :raises CommandFailed: if it has failed.
    """
    settings = request.registry.settings
    words = allowed_command(settings, name, arguments)
    longest = our_setting(settings, "ws_celery.commands.timeout", default=_TIMEOUT)
    allowed = longest if timeout is None else min(_seconds(timeout), longest)
    begun = time.monotonic()
    ended = run_program(words, allowed)
    if check and ended.exit_code != 0:
        raise CommandFailed(name, ended.exit_code, ended.output)
    seconds = round(time.monotonic() - begun, 3)
    return {"exit_code": ended.exit_code, "output": ended.output, "seconds": seconds}


def _seconds(timeout: Any) -> float:
    is_number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    # NaN is neither more nor less than any limit: it would be none.
    if not is_number or not math.isfinite(timeout) or timeout <= 0:
        raise CommandNotAllowed(
            f"The timeout of a command has to be a number of seconds, more than 0, not {timeout!r}."
        )
    return float(timeout)


def allowed_command(
    settings: Mapping[str, Any], name: str, arguments: Sequence[str]
) -> tuple[str, ...]:
    """Return program and arguments of an allowed command.

    :raises CommandNotAllowed: if the settings do not allow it.
    """
    commands = our_setting(settings, "ws_celery.commands", default={})
    if name not in commands:
        known = ", ".join(sorted(commands)) or "none"
        raise CommandNotAllowed(
            f"The command {name!r} is not allowed; allowed: {known}. Add a line "
            f"`{name} = program argument` to the setting ws_celery.commands."
        )
    words: tuple[str, ...] = commands[name]
    more = words[-1] == _MORE
    if arguments and not more:
        raise CommandNotAllowed(
            f"The command {name!r} takes no more arguments. To allow them, let its line in "
            f"ws_celery.commands end in {_MORE}"
        )
    if not all(isinstance(each, str) for each in arguments):
        raise CommandNotAllowed(f"The arguments of the command {name!r} have to be texts.")
    return (*words[:-1], *arguments) if more else words


class ProgramError(WsCeleryError):
    """A program could not be run, or had to be stopped."""


@dataclass(frozen=True)
class Ended:
    """How a program has ended.

    :param exit_code: what it returned; below 0 the signal that killed it.
    :param output: the end of what it printed, to stdout and stderr.
    """

    exit_code: int
    output: str


def run_program(
    words: Sequence[str], timeout: float, environment: Mapping[str, str] | None = None
) -> Ended:
    """Run a program and wait for its end.

    It is found beside this Python, where console scripts are, else on the PATH; it gets no input,
    and a session of its own, which is killed as a whole when the time is over or the run is ended.

    :param timeout: seconds.
    :param environment: variables that are added to those of this process.
    :raises ProgramError: if there is no such program, or it takes too long.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    program = shutil.which(words[0], path=path)
    if program is None:
        raise ProgramError(
            f"There is no program {words[0]}. Install it in the environment of the worker, or name "
            "it by its path."
        )
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(  # noqa: S603 - whoever calls has asked the allow-list
            [program, *words[1:]],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
        try:
            exit_code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ProgramError(
                f"{words[0]} was stopped: it took longer than {timeout:g} seconds. "
                f"Its output ended with: {_end_of(output)[-1000:]}"
            ) from None
        finally:
            _stop(process)
        return Ended(exit_code, _end_of(output))


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # what it has left behind, too
    process.wait()


def _end_of(output: IO[bytes]) -> str:
    size = output.seek(0, os.SEEK_END)
    output.seek(max(size - _KEPT, 0))
    return output.read().decode(errors="replace")
