"""Running another program to its end: no shell, no endless wait, nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ws_celery.exceptions import WsCeleryError

__all__ = ("Ended", "ProgramError", "run_program")

#: Bytes of the end of the output that are kept.
_KEPT = 64 * 1024

#: Seconds that a program has to clean up when its time is over.
_GRACE = 5.0


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
