"""Where dumps are kept: a folder, or what fsspec knows."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from ws_celery.exceptions import ConfigurationError

__all__ = ("Store", "store_of")

#: Schemes of URLs that are folders of this machine.
_LOCAL = ("file", "local")


class Store(Protocol):
    """A place that holds dumps."""

    def put(self, dump: Path, name: str) -> str:
        """Keep a file; it is complete when it has its name. Returns where it is."""

    def names(self) -> list[str]:
        """Return the names of all files."""

    def remove(self, name: str) -> None:
        """Delete a file."""


def store_of(target: str) -> Store:
    """Return what a folder or URL names, made if it is not there.

    :raises ConfigurationError: if it is a URL, and fsspec is not installed.
    """
    scheme, is_url, rest = target.partition("://")
    if not is_url:
        return _Folder(Path(target))
    return _Folder(Path(rest)) if scheme in _LOCAL else _Remote(target)


def _unfinished(name: str) -> str:
    return f"{name}.part"


class _Folder:
    """A folder of this machine, whose dumps are for their owner only."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.mkdir(parents=True, exist_ok=True, mode=0o700)

    def put(self, dump: Path, name: str) -> str:
        unfinished = self._path / _unfinished(name)
        try:
            unfinished.touch(mode=0o600)
            with dump.open("rb") as source, unfinished.open("wb") as copy:
                while block := source.read(1 << 20):
                    copy.write(block)
                copy.flush()
                os.fsync(copy.fileno())  # else the name may outlive a loss of power, alone
            return str(unfinished.rename(self._path / name))
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise

    def names(self) -> list[str]:
        return [each.name for each in self._path.iterdir()]

    def remove(self, name: str) -> None:
        (self._path / name).unlink(missing_ok=True)


class _Remote:
    """A folder behind a URL, by fsspec."""

    def __init__(self, url: str) -> None:
        try:
            import fsspec
        except ImportError:
            raise ConfigurationError(
                "ws_celery.backup.target is a URL, which needs fsspec: "
                "pip install 'ws-celery[backup]'."
            ) from None
        self._files, self._path = fsspec.core.url_to_fs(url)
        self._files.makedirs(self._path, exist_ok=True)

    def put(self, dump: Path, name: str) -> str:
        place, unfinished = f"{self._path}/{name}", f"{self._path}/{_unfinished(name)}"
        try:
            self._files.put_file(str(dump), unfinished)
            self._files.mv(unfinished, place)
        except BaseException:
            with suppress(Exception):  # what went wrong is told, not what follows from it
                self._files.rm_file(unfinished)
            raise
        return str(self._files.unstrip_protocol(place))

    def names(self) -> list[str]:
        self._files.invalidate_cache()
        return [each.rpartition("/")[2] for each in self._files.ls(self._path, detail=False)]

    def remove(self, name: str) -> None:
        self._files.rm_file(f"{self._path}/{name}")
