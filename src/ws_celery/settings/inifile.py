"""The lines of an INI file: what stands in it, where, and what is wrong with its form.

The file is read once, as bytes, and scanned here: neither plaster nor configparser tell line
numbers, both stop at the first fault, and both drop a key that ``[DEFAULT]`` has as well. What the
scan sees is what configparser sees; a test compares them.
"""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from pathlib import Path

from ws_celery.exceptions import Fault
from ws_celery.settings.faults import Faults

__all__ = ("Scan", "scan")

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
