"""A network that can fail: a TCP proxy whose connections are cut, or go silent."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

__all__ = ("Proxy",)

_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Proxy:
    """Passes on what comes to a free port of this machine, until it is told not to.

    :param connect: opens a connection to the server behind it.
    """

    def __init__(self, connect: Callable[[], Awaitable[_Streams]]) -> None:
        self._connect = connect
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._open = asyncio.Event()
        self._open.set()
        self._refusing = False
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        server = self._run(asyncio.start_server(self._serve, "127.0.0.1", 0))
        #: Where clients connect to.
        self.port: int = server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Reset all connections, and new ones, too, until :meth:`mend`."""
        self._run(self._cut())

    def freeze(self) -> None:
        """Let all connections go silent until :meth:`mend`, which resets them."""
        self._loop.call_soon_threadsafe(self._open.clear)

    def mend(self) -> None:
        """Be a good network again, for new connections."""
        self._run(self._mend())

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _cut(self) -> None:
        self._refusing = True
        self._reset()

    async def _mend(self) -> None:
        if not self._open.is_set():
            self._reset()
        self._refusing = False
        self._open.set()

    def _reset(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            writer.transport.abort()
            return
        ends = {writer}
        self._writers |= ends
        with suppress(OSError):
            await self._open.wait()
            there = await self._connect()
            ends.add(there[1])
            self._writers |= ends
            await asyncio.gather(self._pass(reader, there[1]), self._pass(there[0], writer))
        self._writers -= ends
        for end in ends:
            end.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                await self._open.wait()
                writer.write(data)
                await writer.drain()
        writer.close()
