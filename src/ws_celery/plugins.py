"""Installed distributions that bring tasks: the entry points of the group ``ws_celery.tasks``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ws_celery.converters import nearest
from ws_celery.exceptions import ConfigurationError, Fault
from ws_celery.settings.keys import OUR_SETTINGS

__all__ = ("GROUP", "SETTING", "Plugin", "wanted_plugins")

GROUP = "ws_celery.tasks"
SETTING = "ws_celery.plugins"


@dataclass(frozen=True)
class Plugin:
    """An entry point of an installed distribution, which names modules with tasks.

    :param distribution: the name of the distribution, as ``pip list`` shows it.
    """

    distribution: str
    entry_point: EntryPoint

    def modules(self) -> list[str]:
        """Ask the distribution for the names of its modules; they are not imported.

        :raises TypeError: if it does not return names.
        """
        found = self.entry_point.load()()
        names = [found] if isinstance(found, str) else list(found)  # it may be a generator
        if isinstance(found, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"expected a list of names of modules, got {found!r}")
        return names

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Let an error name the distribution, and the way to do without it.

        :raises ConfigurationError: for whatever is raised inside.
        """
        try:
            yield
        except ConfigurationError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".rstrip(".")
            raise ConfigurationError(
                f"The distribution {self.distribution} brings tasks by its entry point "
                f"`{self.entry_point.name} = {self.entry_point.value}` of the group {GROUP}, which "
                f"cannot be loaded ({reason}). Repair or uninstall it, or set {SETTING} to none or "
                "to the names of the others."
            ) from error


def wanted_plugins(settings: Mapping[str, Any]) -> list[Plugin]:
    """Return the installed plugins that the setting ``ws_celery.plugins`` asks for, by name.

    :raises ConfigurationError: if it names one that is not installed.
    """
    wanted = OUR_SETTINGS[SETTING].accept(settings.get(SETTING, "all"))
    if wanted == ["none"]:
        return []
    installed = sorted(_installed(), key=lambda plugin: (plugin.distribution, plugin.entry_point))
    if wanted == ["all"]:
        return installed
    by_name = {_normalized(plugin.distribution): plugin.distribution for plugin in installed}
    if unknown := [name for name in wanted if _normalized(name) not in by_name]:
        raise ConfigurationError(*(_not_installed(name, by_name) for name in unknown))
    names = {by_name[_normalized(name)] for name in wanted}
    return [plugin for plugin in installed if plugin.distribution in names]


def _installed() -> Iterator[Plugin]:
    for entry_point in entry_points(group=GROUP):
        distribution: Any = entry_point.dist
        yield Plugin(distribution.metadata["Name"], entry_point)


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _not_installed(name: str, by_name: Mapping[str, str]) -> Fault:
    problem = f"{SETTING} = {name!r}: no distribution of this name that brings tasks is installed"
    expected = f"all, none, or some of: {', '.join(by_name.values())}" if by_name else "none"
    return Fault(problem, expected=expected, nearest=nearest(name, by_name.values()))
