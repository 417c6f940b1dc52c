"""A network between us and the broker: a TCP proxy that lets every byte travel for a while.

Run as a program, so that it does not share our interpreter: it prints its port, and ends with its
standard input.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from urllib.parse import urlsplit

from benchmarks.services import ROOT

__all__ = ("delayed",)


@contextmanager
def delayed(url: str, milliseconds: float) -> Iterator[str]:
    """Yield the URL by which the server of ``url`` answers ``milliseconds`` later than it does.

    Half of the time is spent on the way there, half on the way back; what follows closely travels
    together, as in a network.
    """
    parts = urlsplit(url)
    command = [sys.executable, "-m", "benchmarks.proxy"]
    command += [parts.hostname, str(parts.port), str(milliseconds / 2000)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, cwd=ROOT, **pipes) as process:
        port = process.stdout.readline().strip()
        host = f"{parts.hostname}:{parts.port}"
        try:
            yield url.replace(host, f"{parts.hostname}:{port}")
        finally:
            process.stdin.close()


def _serve(listener: socket.socket, target: tuple[str, int], seconds: float) -> None:
    while True:
        client, _ = listener.accept()
        server = socket.create_connection(target)
        for source, sink in ((client, server), (server, client)):
            sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            way: SimpleQueue[tuple[float, bytes]] = SimpleQueue()
            threading.Thread(target=_depart, args=(source, way, seconds), daemon=True).start()
            threading.Thread(target=_arrive, args=(way, sink), daemon=True).start()


def _depart(source: socket.socket, way: SimpleQueue[tuple[float, bytes]], seconds: float) -> None:
    data = b"-"
    while data:
        try:
            data = source.recv(1 << 16)
        except OSError:
            data = b""
        way.put((time.monotonic() + seconds, data))


def _arrive(way: SimpleQueue[tuple[float, bytes]], sink: socket.socket) -> None:
    while True:
        due, data = way.get()
        time.sleep(max(0.0, due - time.monotonic()))
        try:
            if data:
                sink.sendall(data)
            else:
                sink.shutdown(socket.SHUT_WR)
        except OSError:
            return
        if not data:
            return


if __name__ == "__main__":
    host, port, seconds = sys.argv[1:]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)  # noqa: T201 - who has started it reads it
        arguments = (listener, (host, int(port)), float(seconds))
        threading.Thread(target=_serve, args=arguments, daemon=True).start()
        sys.stdin.read()
