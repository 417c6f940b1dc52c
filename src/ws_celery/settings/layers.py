"""The sections of an INI file and of those that it includes, each value with its place."""

from __future__ import annotations

import os
import re
from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import plaster
from plaster_pastedeploy import Loader as PasteDeployLoader

from ws_celery.exceptions import Fault
from ws_celery.settings.faults import Faults, Place, Value
from ws_celery.settings.inifile import Scan, scan
from ws_celery.settings.interpolation import expand

__all__ = ("Layer", "is_app_key", "read_layers")

#: What a relative file that is included is written after.
_INCLUDE = "config:"


@dataclass
class Layer:
    """The sections of one file. Included files are layers of their own, which this one beats."""

    file: str
    sections: dict[str, dict[str, Value]] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)

    def heading(self, section: str) -> Place:
        """Return the place of a section."""
        return Place(self.file, section, line=self.lines.get(section))


def read_layers(
    config_uri: str, variables: Mapping[str, str] | None = None
) -> tuple[list[Layer], Faults]:
    """Read the ``[celery...]`` sections of a file and of those it includes.

    ``use = config:FILE`` in ``[celery]`` includes; the file that includes beats the one included.

    :param config_uri: what plaster takes; loaders other than PasteDeploy's give no line numbers.
    :param variables: values for ``%(NAME)s``, taken literally; they beat ``[DEFAULT]``.
    :return: the layers, the nearest first, and what is wrong.
    """
    try:
        loader = plaster.get_loader(config_uri, protocols=["wsgi"])
    except (plaster.PlasterError, ValueError) as error:
        problem = f"cannot be loaded ({str(error).strip()})"
        return [], Faults([Fault(problem, config_uri, expected="an INI file")])
    if not isinstance(loader, PasteDeployLoader) or loader.filepath is None:
        return _from_plaster(loader, config_uri, variables)
    reader = _Reader({**loader.uri.options, **(variables or {})})
    reader.read(loader.uri.path, {})
    return reader.layers, reader.faults


def _from_plaster(
    loader: plaster.ILoader, config_uri: str, variables: Mapping[str, str] | None
) -> tuple[list[Layer], Faults]:
    layer = Layer(config_uri)
    # Sections of others may hold what only they can interpolate.
    for section in loader.get_sections():
        if not re.match(r"\W*celery|app:", section, re.IGNORECASE):
            continue
        settings = loader.get_settings(section, dict(variables or {}))
        layer.sections[section] = {
            key: Value(value, Place(config_uri, section, key)) for key, value in settings.items()
        }
    return [layer], Faults()


class _Reader:
    """Reads a file and, through ``use = config:...``, those below it."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self.layers: list[Layer] = []
        self.faults = Faults()
        # Literally: a password given on the command line may contain %.
        self._variables = {key: value.replace("%", "%%") for key, value in variables.items()}
        self._open: list[str] = []

    def read(self, path: str, nearer: Mapping[str, str]) -> None:
        self._open.append(_identity(path))
        scanned = scan(path)
        self.faults.extend(scanned.faults)
        raw = scanned.raw()
        # A file's own [DEFAULT] gives way to that of the file which includes it.
        variables = {**raw.pop("DEFAULT"), **nearer, **self._variables}
        absolute = Path(path).absolute()
        own = {"here": str(absolute.parent), "__file__": str(absolute)}
        scope = {**variables, **{key: value.replace("%", "%%") for key, value in own.items()}}
        layer = Layer(path, lines=scanned.headings)
        self.layers.append(layer)
        for section, values in raw.items():
            layer.sections[section] = dict(self._values(section, values, scope, scanned))
        include = layer.sections.get("celery", {}).pop("use", None)
        if include is not None:
            self._include(include, path, variables)
        self._open.pop()

    def _values(
        self, section: str, values: Mapping[str, str], scope: Mapping[str, str], scanned: Scan
    ) -> Iterator[tuple[str, Value]]:
        for written, raw in values.items():
            place = Place(scanned.file, section, written, scanned.lines[section, written])
            if not _is_ours(section, written):
                # May hold what only others can interpolate.
                yield written, Value(raw, place)
                continue
            key, text = written, raw
            if written.startswith("get "):  # PasteDeploy: the value of a variable
                key, text = written[4:].strip(), f"%({raw})s"
            try:
                yield key, Value(expand(text, ChainMap(dict(values), dict(scope)), key), place)
            except ValueError as error:
                self.faults.at(place, str(error))

    def _include(self, value: Value, path: str, variables: Mapping[str, str]) -> None:
        text = str(value.text)
        if not text.startswith(_INCLUDE) or not text[len(_INCLUDE) :].strip():
            self.faults.at(value.place, "cannot be followed", value=text, expected="config:FILE")
            return
        target = str(Path(path).parent / text[len(_INCLUDE) :].strip())
        identity = _identity(target)
        if identity in self._open:
            circle = [*self._open[self._open.index(identity) :], identity]
            names = " -> ".join(Path(name).name for name in circle)
            self.faults.at(value.place, f"includes itself ({names})", value=text)
        elif "\0" in identity or not Path(identity).exists():
            self.faults.at(value.place, "there is no such file", value=text)
        else:
            self.read(target, variables)


def _identity(path: str) -> str:
    # A null byte, which no file can have in its name, is an error to realpath.
    return path if "\0" in path else os.path.realpath(path)


def _is_ours(section: str, key: str) -> bool:
    return section.lower().startswith("celery") or (section.startswith("app:") and is_app_key(key))


def is_app_key(key: str) -> bool:
    """Tell whether a key of the application's section is one of ours."""
    return key.startswith(("celery.", "ws_celery."))
