"""The processes of one system under test: started again whenever they die."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from tests.chaos.services import owned

__all__ = ("Fleet",)

_TICK = 0.05

#: The applications are modules of the checkout, which is not installed with the library.
_FINDING_US = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}


class Fleet:
    """Processes that a supervisor keeps running; each writes a log of its own.

    :param programs: arguments of Python by the program's name.
    :param folder: where their logs go.
    :param environment: in which they run; ``CHAOS_ROLE`` is added.
    """

    def __init__(
        self, programs: Mapping[str, Sequence[str]], folder: Path, environment: Mapping[str, str]
    ) -> None:
        self.programs = programs
        self._folder = folder
        self._environment = environment
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self.started = 0

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Start a program; from now on it is kept running."""
        # The relay is a thread of beat.
        role = {"beat": "relay", "demand": "web"}.get(name, name)
        with (self._folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                owned([sys.executable, *self.programs[name]]),
                stdout=log,
                stderr=log,
                env={**os.environ, **_FINDING_US, **self._environment, "CHAOS_ROLE": role},
            )
        self._running[name] = process
        self.started += 1
        return process

    def tend(self) -> None:
        """Start again what has died."""
        for name, process in list(self._running.items()):
            if process.poll() is not None:
                self.start(name)

    def wait(self, seconds: float) -> None:
        """Let time go by, and keep the programs running."""
        self.wait_until(lambda: False, seconds)

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Keep the programs running until a condition is true; return whether it was, in time."""
        deadline = time.monotonic() + seconds
        while not (met := condition()) and time.monotonic() < deadline:
            self.tend()
            time.sleep(_TICK)
        return met

    def kill(self, name: str) -> None:
        """Kill a program's main process; it is started again when somebody tends to it."""
        self._running[name].kill()
        self._running[name].wait()

    def children(self, name: str) -> list[psutil.Process]:
        """Return the pool children of a worker."""
        try:
            return psutil.Process(self._running[name].pid).children()
        except psutil.NoSuchProcess:
            return []

    def run(self, name: str) -> None:
        """Run a program that ends by itself."""
        self.start(name).wait()
        del self._running[name]

    def stop(self, name: str) -> None:
        """Kill a program and all its children, and do not start it again."""
        process = self._running.pop(name)
        family = list(_family(process))
        process.kill()
        process.wait()
        for survivor in family:
            with suppress(psutil.NoSuchProcess):
                survivor.kill()

    def stop_all(self) -> None:
        """Stop all programs."""
        for name in list(self._running):
            self.stop(name)


def _family(process: subprocess.Popen[bytes]) -> Iterator[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        yield from psutil.Process(process.pid).children(recursive=True)
