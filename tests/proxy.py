"""A network that can be slow, go silent or fail: a TCP proxy for tests, chaos and benchmarks.

``python -m tests.proxy HOST PORT SECONDS`` is one in a process of its own: it prints its port, and
ends with its standard input.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from urllib.parse import urlsplit

__all__ = ("Proxy", "delayed")

ROOT = Path(__file__).parent.parent


class Proxy:
    """Passes on what comes to a free port of this machine, until it is told not to.

    :param connect: opens a connection to the server behind it.
    :param delay: seconds that each byte travels; what follows closely travels together.
    """

    def __init__(self, connect: Callable[[], socket.socket], delay: float = 0.0) -> None:
        self._connect = connect
        self._delay = delay
        self._sockets: set[socket.socket] = set()
        self._open = threading.Event()
        self._open.set()
        self._refusing = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        #: Where clients connect to.
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Close all connections, and new ones, too, until :meth:`mend`."""
        self._refusing = True
        self.reset()

    def freeze(self) -> None:
        """Let all connections go silent until :meth:`thaw` or :meth:`mend`."""
        self._open.clear()

    def thaw(self) -> None:
        """Let what was silent arrive."""
        self._open.set()

    def mend(self) -> None:
        """Be a good network again, for new connections; those that are silent are closed."""
        if not self._open.is_set():
            self.reset()
        self._refusing = False
        self._open.set()

    def reset(self) -> None:
        """Close all connections; what they have in hand is lost."""
        for each in list(self._sockets):
            _shut(each)

    def close(self) -> None:
        """End: close all connections, and take no more."""
        self._refusing = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._open.set()
        self.reset()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            self._sockets.add(client)
            self._open.wait()
            if not self._refusing:
                with suppress(OSError), self._connect() as server:
                    self._sockets.add(server)
                    for way in (self._way(client, server), self._way(server, client)):
                        way.join()
                    self._sockets.discard(server)
                    _shut(server)
            self._sockets.discard(client)
            _shut(client)

    def _way(self, source: socket.socket, sink: socket.socket) -> threading.Thread:
        """Start one way of a connection; return the thread that ends with it."""
        if sink.family != socket.AF_UNIX:
            sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        travelling: SimpleQueue[tuple[float, bytes]] = SimpleQueue()
        threading.Thread(target=self._depart, args=(source, travelling), daemon=True).start()
        arrival = threading.Thread(target=self._arrive, args=(travelling, sink), daemon=True)
        arrival.start()
        return arrival

    def _depart(self, source: socket.socket, travelling: SimpleQueue[tuple[float, bytes]]) -> None:
        data = b"-"
        while data:
            try:
                data = source.recv(65536)
            except OSError:
                data = b""
            travelling.put((time.monotonic() + self._delay, data))

    def _arrive(self, travelling: SimpleQueue[tuple[float, bytes]], sink: socket.socket) -> None:
        with suppress(OSError):
            while True:
                due, data = travelling.get()
                if (seconds := due - time.monotonic()) > 0:
                    time.sleep(seconds)
                self._open.wait()
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                sink.sendall(data)


def _shut(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)  # closing alone would not wake its reader


@contextmanager
def delayed(url: str, milliseconds: float) -> Iterator[str]:
    """Yield the URL by which the server of ``url`` answers ``milliseconds`` later than it does.

    Half of the time is spent on the way there, half on the way back. The proxy is a process of its
    own, so that it does not share our interpreter.
    """
    parts = urlsplit(url)
    command = [sys.executable, "-m", "tests.proxy"]
    command += [parts.hostname, str(parts.port), str(milliseconds / 2000)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, cwd=ROOT, **pipes) as process:
        port = process.stdout.readline().strip()
        host = f"{parts.hostname}:{parts.port}"
        try:
            yield url.replace(host, f"{parts.hostname}:{port}")
        finally:
            process.stdin.close()


if __name__ == "__main__":
    host, port, seconds = sys.argv[1:]
    proxy = Proxy(lambda: socket.create_connection((host, int(port))), float(seconds))
    print(proxy.port, flush=True)  # noqa: T201 - who has started it reads it
    sys.stdin.read()
