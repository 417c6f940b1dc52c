"""The sections of an INI file and of those that it includes, each value with its place."""

from __future__ import annotations

import os
import re
from codecs import BOM_UTF8
from collections import ChainMap
from collections.abc import Iterator, Mapping
from configparser import BasicInterpolation, InterpolationError, RawConfigParser
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import plaster
from plaster_pastedeploy import Loader as PasteDeployLoader

from ws_celery.converters import Refused, nearest
from ws_celery.exceptions import Fault
from ws_celery.masking import MASK, masked, masked_text
from ws_celery.settings import kinds
from ws_celery.settings.kinds import Kind, Miswritten, miswritten
from ws_celery.settings.options import OF_ONE_CALL

# --- Where a value is written, and what is wrong there ---------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a value is written.

    :param file: name of the file, or what else it is.
    :param section: name of the section, without brackets.
    :param key: the key as it is written.
    :param line: line of the key, counted from 1, where it is known.
    """

    file: str
    section: str
    key: str = ""
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"

    def fault(
        self,
        problem: str,
        *,
        value: object = None,
        expected: str | None = None,
        close: str | None = None,
    ) -> Fault:
        """Return what is wrong with the key here.

        :param value: what stands there; masked if the key, or what it was meant to be, is a secret.
        :param close: what was probably meant: a legal name, or the line as it should be.
        """
        name = f"{self.section} {self.key} {close or ''}"
        shown = None if value is None else str(masked(name, value))
        close = close and masked_text(close)
        if value is not None and self.key.split(" ")[-1] in ("args", "kwargs"):
            shown = MASK  # nobody knows the names of a task's parameters here
        return Fault(problem, self.file, self.line, self.section, self.key, shown, expected, close)

    def key_beside(self, key: str) -> Place:
        """Return the place of a key that is missing here."""
        return Place(self.file, self.section, f"{self.key} {key}".lstrip(), self.line)


@dataclass(frozen=True)
class Renamed:
    """An old spelling that was understood."""

    old: str
    new: str
    place: Place


@dataclass(frozen=True)
class Value:
    """The text of one key, interpolated, and its place; from Python it may be any value.

    :param literal: whether it stands in Python or JSON, which say themselves where a text ends.
    """

    text: object
    place: Place
    literal: bool = False

    def typed(self, kind: Kind) -> Any:
        """Return the value of a kind.

        :raises Refused: if it is of another one, or something stands around it.
        """
        self.check(kind)
        return kind.accept(self.text)

    def check(self, kind: Kind = kinds.text) -> None:
        """Refuse a text of a file that has a comment behind the value, or quotes around it."""
        if isinstance(self.text, str) and not (self.literal or kind.prose):
            error = miswritten(self.text, kind.quotes)
            if error:
                raise error


class Faults(list[Fault]):
    """What is wrong, as it is found."""

    def at(self, place: Place, problem: str, **about: Any) -> None:
        """Add what is wrong with the key at ``place``; see :meth:`Place.fault`."""
        self.append(place.fault(problem, **about))

    @contextmanager
    def catching(self, value: Value, expected: str | None = None) -> Iterator[None]:
        """Add the fault of a value that is refused inside, and go on."""
        try:
            yield
        except Refused as error:
            close = error.close
            if isinstance(error, Miswritten):
                close, expected = _line(value, error.close), None
            self.at(value.place, str(error), value=value.text, expected=expected, close=close)

    def typed(
        self, values: Mapping[str, Value], known: Mapping[str, Kind], also: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """Return the values that are right, typed.

        :param known: the kinds of the keys.
        :param also: other legal keys, for suggestions.
        """
        found = {}
        for key, value in values.items():
            if key in known:
                with self.catching(value, known[key].expected):
                    found[key] = value.typed(known[key])
            elif key in OF_ONE_CALL and "countdown" in known:
                self.at(value.place, OF_ONE_CALL[key], value=value.text)
            else:
                close = nearest(key, (*known, *also))
                self.at(value.place, "this key is not known", value=value.text, close=close)
        return found


def _line(value: Value, bare: str | None) -> str | None:
    """Return the line as it should be."""
    if not bare or "\n" in str(value.text):
        return bare or None
    key = value.place.key
    return f"{key} = {masked(f'{value.place.section} {key}', bare)}"


# --- Names of sections -----------------------------------------------------------------------

#: Kind of section to what its name is.
SECTIONS = {
    "celery": "OPTION",
    "celeryroute": "TASK",
    "celeryqueue": "NAME",
    "celeryannotate": "TASK",
    "celerybeat": "NAME",
}


def is_for_celery(section: str) -> bool:
    """Tell whether a section is one of ours, or was meant to be."""
    return section.partition(":")[0] in SECTIONS or right_spelling(section) is not None


def right_spelling(section: str) -> str | None:
    """Return how a section is written that is one of ours but for a slip."""
    kind, _, name = section.partition(":")
    if kind in SECTIONS and name == name.strip(" \t:") and not miswritten(name):
        return None
    section = section.partition("]")[0].strip(" \t\"'")
    if ":" in section:
        kind, _, bare = section.partition(":")
    else:
        kind, bare = (*re.split(r"[\s.=/]+", section, maxsplit=1), "")[:2]
    bare = bare.strip(" \t:\"'")
    if error := miswritten(bare):
        bare = error.close or ""
    word = re.sub(r"[\W_]", "", kind).lower()
    close = nearest(word, SECTIONS)
    likely = close and word[:1] == "c" and abs(len(close) - len(word)) <= 1
    if word.startswith("celery") or (likely and (bare or close == "celery")):
        return f"[{close or 'celery'}:{bare}]" if bare else f"[{close or 'celery'}]"
    return None


# --- Variables -------------------------------------------------------------------------------

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
        self.headings: dict[str, int] = {}
        self.faults = Faults()
        self._section: str | None = None
        self._value: list[str] | None = None  # the lines of the value that may go on
        self._indent = 0
        for number, line in enumerate(_lines(text), start=1):
            self._read(number, line)

    def raw(self) -> dict[str, dict[str, str]]:
        """Return section to key to value, before interpolation."""
        return {
            section: {key: "\n".join(lines).rstrip() for key, lines in values.items()}
            for section, values in self.values.items()
        }

    def _read(self, number: int, line: str) -> None:
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if text.startswith(("#", ";")):
            return
        if self._value is not None and (not text or indent > self._indent):
            # An empty line inside a value belongs to it, one after it is cut off again.
            self._value.append(text)
        elif text:
            self._indent = indent
            self._begin(number, text)

    def _begin(self, number: int, text: str) -> None:
        """Read a line that begins something."""
        self._value, option = None, _OPTION.match(text)
        if heading := _SECTION.match(text):
            self._add_section(number, heading["name"])
        elif self._section is None:
            problem = "this line stands before the first section"
            self._fail(number, problem, "", expected="a line such as [app:main]")
        elif option and option["key"]:
            self._add(number, self._section, option["key"], option["value"].strip())
        else:
            # The text is not shown: whatever it was meant to be, it may be a password.
            problem = "this line is neither a section nor a key with a value"
            self._fail(number, problem, self._section, expected="KEY = VALUE")

    def _add_section(self, number: int, section: str) -> None:
        first = self.headings.setdefault(section, number)
        if first != number and section != "DEFAULT":
            self._fail(number, f"this section is already there, at line {first}", section)
        self.values.setdefault(section, {})
        self._section = section

    def _add(self, number: int, section: str, key: str, value: str) -> None:
        first = self.lines.setdefault((section, key), number)
        if first != number:
            self._fail(number, f"is already set at line {first}", section, key)
        self._value = self.values[section][key] = [value]

    def _fail(
        self, number: int, problem: str, section: str, key: str = "", expected: str | None = None
    ) -> None:
        self.faults.at(Place(self.file, section, key, number), problem, expected=expected)


def _lines(text: str) -> list[str]:
    # str.splitlines() would also split at characters that end no line in a file.
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def scan(path: str) -> Scan:
    """Read and scan one file; what is wrong with it is in the ``faults`` of the result."""
    data = b""
    try:
        data = Path(path).read_bytes()
        result = Scan(path, data.decode("utf-8-sig"))
    except FileNotFoundError:
        return _unreadable(Fault("there is no such file", path))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problem = f"byte {data[error.start]:#04x} is not UTF-8"
        return _unreadable(Fault(problem, path, line, expected="a file saved as UTF-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return _unreadable(Fault(f"cannot be read ({reason})", path))
    if data.startswith(BOM_UTF8):
        # pserve and all that loads the application would fail at it.
        problem = "the file begins with a byte order mark"
        result.faults.append(Fault(problem, path, 1, expected="UTF-8 without one (without BOM)"))
    return result


def _unreadable(fault: Fault) -> Scan:
    result = Scan(fault.file or "", "")
    result.faults.append(fault)
    return result


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
        loader = loader_of(config_uri)
    except (plaster.PlasterError, ValueError) as error:
        problem = f"cannot be loaded ({str(error).strip()})"
        return [], Faults([Fault(problem, config_uri, expected="an INI file")])
    if not isinstance(loader, PasteDeployLoader) or loader.filepath is None:
        return _from_plaster(loader, config_uri, variables)
    reader = _Reader({**loader.uri.options, **(variables or {})})
    reader.read(loader.uri.path, {})
    return reader.layers, reader.faults


def loader_of(config_uri: str) -> plaster.ILoader:
    """Return what loads a file: its sections, its logging and its application.

    :raises plaster.PlasterError: if nothing that is installed can, or several do.
    """
    uri = plaster.parse_uri(config_uri)
    loaders = _loaders(uri.scheme)
    if len(loaders) != 1:
        return plaster.get_loader(config_uri, protocols=["wsgi"])  # it says what is wrong
    return loaders[0].load(uri)


@cache
def _loaders(scheme: str) -> list[plaster.ILoaderInfo]:
    # Kept, because plaster reads what all installed distributions say of themselves.
    return plaster.find_loaders(scheme, protocols=["wsgi"])


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
        scheme, _, file = text.partition(":")
        if scheme != "config" or not file.strip():
            self.faults.at(value.place, "cannot be followed", value=text, expected="config:FILE")
            return
        target = str(Path(path).parent / file.strip())
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
