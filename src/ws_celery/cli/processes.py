"""Several programs as one command: started in order, stopped in reverse, none left behind."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TextIO

import click

__all__ = ("Processes", "Program")

_CHILD = Path(__file__).with_name("child.py")
_COLOURS = ("cyan", "green", "yellow", "magenta", "blue")
_TICK = 0.1


@dataclass(frozen=True)
class Program:
    """One program of several.

    :param name: short; it stands before each line of output.
    :param command: program and arguments.
    :param ready: tells whether the program serves; the next one is started when it does.
    :param stop_signal: asks it to finish what it is doing.
    :param hint: where to look if it ends by itself.
    """

    name: str
    command: Sequence[str]
    ready: Callable[[], bool] = lambda: True
    stop_signal: int = signal.SIGTERM
    hint: str = ""


class Processes:
    """Runs programs until one of them ends or somebody interrupts.

    Each is a session of its own, so that the terminal's Ctrl-C reaches only this process, which
    asks the main process of each to stop, in reverse order, and waits: a worker finishes the tasks
    it runs while its broker is still there. A second Ctrl-C kills. If this process is killed, the
    kernel kills them (Linux).

    :param programs: in the order of their start.
    :param on_ready: called when all are ready.
    :param output: where their lines go.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        on_ready: Callable[[], None] = lambda: None,
        output: TextIO | None = None,
    ) -> None:
        self._programs = programs
        self._on_ready = on_ready
        self._output = sys.stdout if output is None else output
        self._width = max(len(program.name) for program in programs)
        self._selector = selectors.DefaultSelector()
        self._running: list[tuple[Program, subprocess.Popen[bytes]]] = []
        self._interrupts = 0

    def run(self) -> int:
        """Run the programs; return 0 after an interrupt, else what the one that ended returned."""
        previous = {
            signum: signal.signal(signum, self._interrupt)
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        try:
            code = self._start() or self._watch()
            self._stop()
        finally:
            self._kill()
            for signum, handler in previous.items():
                signal.signal(signum, handler)
        return code

    def _interrupt(self, _signum: int, _frame: FrameType | None) -> None:
        self._interrupts += 1

    def _start(self) -> int:
        for program in self._programs:
            self._spawn(program)
            while not (self._interrupts or program.ready()):
                if code := self._pump():
                    return code
        if not self._interrupts:
            self._on_ready()
        return 0

    def _watch(self) -> int:
        while not self._interrupts:
            if code := self._pump():
                return code
        return 0

    def _spawn(self, program: Program) -> None:
        reading, writing = os.pipe()
        process = subprocess.Popen(  # noqa: S603 - the commands are ours
            [sys.executable, str(_CHILD), str(os.getpid()), *program.command],
            stdin=subprocess.DEVNULL,
            stdout=writing,
            stderr=writing,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        os.close(writing)
        colour = _COLOURS[len(self._running) % len(_COLOURS)]
        prefix = click.style(f"{program.name:{self._width}} | ", fg=colour)
        self._running.append((program, process))
        self._selector.register(reading, selectors.EVENT_READ, _Lines(prefix))

    def _pump(self) -> int:
        """Pass on what the programs print; return an exit code if one of them has ended."""
        self._pass_on(_TICK)
        for program, process in self._running:
            if process.poll() is not None:
                self._pass_on(0)
                code = process.returncode
                self._say(f"{program.name} ended with exit code {code}; stopping. {program.hint}")
                return code if code > 0 else 1
        return 0

    def _pass_on(self, timeout: float) -> None:
        for key, _ in self._selector.select(timeout):
            data = os.read(key.fd, 65536)
            if not data:
                self._selector.unregister(key.fd)
                os.close(key.fd)
            for line in key.data.feed(data):
                click.echo(line, file=self._output)

    def _stop(self) -> None:
        patience = self._interrupts  # before the sentence that invites to another one
        if patience:
            self._say("Stopping; running tasks finish first. Ctrl-C again kills.")
        for program, process in reversed(self._running):
            if process.poll() is None:
                process.send_signal(program.stop_signal)
            while process.poll() is None and self._interrupts <= patience:
                self._pass_on(_TICK)
        self._pass_on(0)

    def _kill(self) -> None:
        for _, process in self._running:
            if process.poll() is None:
                process.kill()
            process.wait()
        for key in list(self._selector.get_map().values()):
            os.close(key.fd)
        self._selector.close()

    def _say(self, message: str) -> None:
        click.echo(click.style(message, bold=True), file=self._output)


class _Lines:
    """Puts a prefix before each complete line of what it is fed."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """Return the complete lines; no data means the end, which completes the last one."""
        *complete, self._rest = (self._rest + data).split(b"\n")
        if not data and self._rest:
            complete, self._rest = [self._rest], b""
        return [self._prefix + line.decode(errors="replace") for line in complete]
