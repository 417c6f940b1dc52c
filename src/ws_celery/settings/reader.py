"""The sections of an INI file and of those that it includes, each value with its place."""

from __future__ import annotations

import os
import re
from codecs import BOM_UTF8
from collections import ChainMap
from collections.abc import Iterator, Mapping
from configparser import BasicInterpolation, InterpolationError, RawConfigParser
from dataclasses import dataclass, field
from pathlib import Path

import plaster
from plaster_pastedeploy import Loader as PasteDeployLoader

from ws_celery.exceptions import Fault
from ws_celery.settings.kinds import Faults, Place, Value

__all__ = (
    "Layer",
    "Scan",
    "expand",
    "expand_environment",
    "interpolation_problem",
    "is_app_key",
    "read_layers",
    "scan",
)

_VARIABLE = re.compile(r"\$(?P<escape>\$)?\{(?:(?P<name>[^{}:]+)(?::-(?P<default>[^{}]*))?\})?")


def expand(raw: str, scope: Mapping[str, str], key: str) -> str:
    """Return ``raw`` with ``%(NAME)s`` and ``${NAME}`` replaced.

    :raises ValueError: with what is wrong; it does not show the text.
    """
    try:
        text = BasicInterpolation().before_get(_parser(), "", key, raw, dict(scope))
    except InterpolationError as error:
        raise ValueError(interpolation_problem(error)) from None
    return expand_environment(text)


def _parser() -> RawConfigParser:
    parser = RawConfigParser()
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    return parser


def interpolation_problem(error: InterpolationError) -> str:
    """Return what is wrong, without the value that the error's own text shows."""
    if reference := getattr(error, "reference", None):
        return (
            f"%({reference})s is not set; set it in [DEFAULT] or with "
            f"--ini-var {reference}=VALUE, and write %% for a percent sign"
        )
    return "a percent sign begins neither %(NAME)s nor %%; write %% for a percent sign"


def expand_environment(text: str) -> str:
    """Return ``text`` with ``${NAME}`` and ``${NAME:-default}`` replaced; ``$${`` means ``${``.

    :raises ValueError: if a variable without a default is not set.
    """

    def replaced(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        if match["escape"]:
            return match[0][1:]
        if name is None:
            raise ValueError(
                "${ begins neither ${NAME} nor ${NAME:-DEFAULT}; write $${ for the characters"
            )
        value = None if "\0" in name else os.environ.get(name, default)
        if value is None:
            raise ValueError(
                f"the environment variable {name} is not set; set it, or write "
                f"${{{name}:-DEFAULT}}, or $${{ for the characters themselves"
            )
        return value

    return _VARIABLE.sub(replaced, text)


_SECTION = re.compile(r"\[(?P<name>.+)\]")
_OPTION = re.compile(r"(?P<key>.*?)\s*[=:]\s*(?P<value>.*)$")


class Scan:
    """The lines of one INI file: raw values by section and key, lines, and faults.

    :param file: name of the file, for faults.
    :param text: its text.
    """

    def __init__(self, file: str, text: str) -> None:
        self.file = file
        self.values: dict[str, dict[str, list[str]]] = {"DEFAULT": {}}
        self.lines: dict[tuple[str, str], int] = {}
        self.faults = Faults()
        self._section: str | None = None
        self._key: str | None = None
        self._indent = 0
        self.headings: dict[str, int] = {}
        for number, line in enumerate(_lines(text), start=1):
            self._read(number, line)

    def raw(self) -> dict[str, dict[str, str]]:
        """Return section to key to value, before interpolation."""
        return {
            section: {key: "\n".join(lines).rstrip() for key, lines in values.items()}
            for section, values in self.values.items()
        }

    def _read(self, number: int, line: str) -> None:
        text = line.strip()
        if text.startswith(("#", ";")):
            return
        if not text:
            # An empty line inside a value belongs to it, one after it is cut off again.
            if self._section is not None and self._key:
                self.values[self._section][self._key].append("")
            return
        indent = len(line) - len(line.lstrip())
        if self._section is not None and self._key and indent > self._indent:
            self.values[self._section][self._key].append(text)
            return
        self._indent = indent
        if heading := _SECTION.match(text):
            self._begin(number, heading["name"])
        elif self._section is None:
            self._fail(number, "stands before the first section", "a line such as [app:main]")
        elif (option := _OPTION.match(text)) and option["key"]:
            self._add(number, self._section, option["key"].rstrip(), option["value"].strip())
        else:
            # The text is not shown: whatever it was meant to be, it may be a password.
            self._fail(number, "is neither a section nor a key with a value", "KEY = VALUE")
            self._key = None

    def _begin(self, number: int, section: str) -> None:
        if section in self.headings and section != "DEFAULT":
            first = self.headings[section]
            problem = f"this section is already there, at line {first}"
            self.faults.append(Fault(problem, self.file, number, section))
        self.headings.setdefault(section, number)
        self.values.setdefault(section, {})
        self._section, self._key = section, None

    def _add(self, number: int, section: str, key: str, value: str) -> None:
        first = self.lines.setdefault((section, key), number)
        if first != number:
            problem = f"is already set at line {first}"
            self.faults.append(Fault(problem, self.file, number, section, key))
        self.values[section][key] = [value]
        self._key = key

    def _fail(self, number: int, problem: str, expected: str) -> None:
        problem = f"this line {problem}"
        self.faults.append(
            Fault(problem, self.file, number, self._section or None, expected=expected)
        )


def _lines(text: str) -> list[str]:
    # str.splitlines() would also split at characters that end no line in a file.
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def scan(path: str) -> Scan:
    """Read and scan one file; what is wrong with it is in the ``faults`` of the result."""
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        reason = "there is no such file" if missing else f"cannot be read ({_reason(error)})"
        result = Scan(path, "")
        result.faults.append(Fault(reason, path))
        return result
    try:
        result = Scan(path, data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        result = Scan(path, "")
        problem = f"byte {data[error.start]:#04x} is not UTF-8"
        result.faults.append(Fault(problem, path, line, expected="a file saved as UTF-8"))
        return result
    if data.startswith(BOM_UTF8):
        # pserve and all that loads the application would fail at it.
        problem = "the file begins with a byte order mark"
        result.faults.append(Fault(problem, path, 1, expected="UTF-8 without one (without BOM)"))
    return result


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


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
