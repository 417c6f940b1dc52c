"""Which key of which section says what, over all layers; the same thing twice is a fault."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ws_celery.converters import nearest
from ws_celery.schedules import KEYS_OF_TYPES
from ws_celery.settings.kinds import Faults, Place, Value, miswritten
from ws_celery.settings.options import OPTIONS, REMOVED, find_option, option_names

if TYPE_CHECKING:
    from ws_celery.settings.reader import Layer

__all__ = ("Block", "Found", "Gathering", "Renamed", "is_for_celery")


@dataclass(frozen=True)
class Renamed:
    """An old spelling that was understood."""

    old: str
    new: str
    place: Place


@dataclass(frozen=True)
class Found:
    """A value of an option as it was found.

    :param layer: number of the layer, 0 for the nearest.
    :param key: the key of a mapping, with dots between levels; ``None`` for the option as a whole.
    :param value: the value.
    """

    layer: int
    key: str | None
    value: Value


@dataclass
class Block:
    """The keys of one named section, by layer, the nearest first."""

    place: Place
    layers: list[dict[str, Value]] = field(default_factory=list)

    @property
    def values(self) -> dict[str, Value]:
        """The keys as they count: the nearer layer beats the one that it includes."""
        found: dict[str, Value] = {}
        for layer in reversed(self.layers):
            kinds = {each["type"].text for each in (found, layer) if "type" in each}
            if len(kinds) > 1:
                # What belongs to another type of schedule means nothing to this one.
                for key in ("schedule", *KEYS_OF_TYPES):
                    found.pop(key, None)
            found.update(layer)
        return found


#: Kind of section to what its name is.
_KINDS = {
    "celery": "OPTION",
    "celeryroute": "TASK",
    "celeryqueue": "NAME",
    "celeryannotate": "TASK",
    "celerybeat": "NAME",
}
_SECTIONS = "one of [celery], " + ", ".join(f"[{kind}:{name}]" for kind, name in _KINDS.items())
#: Kinds of options that may have a section of their own.
_MAPPINGS = ("dict", "bool or dict")


class Gathering:
    """Sorts what layers contain; its attributes are the result.

    :param faults: where to add what is wrong.
    """

    def __init__(self, faults: Faults) -> None:
        self.options: dict[str, list[Found]] = {}
        self.blocks: dict[str, dict[str, Block]] = {kind: {} for kind in _KINDS}
        self.renamed: list[Renamed] = []
        self._faults = faults
        self._headings: dict[tuple[int, str, str], Place] = {}

    def gather(self, layers: list[Layer]) -> None:
        """Sort the sections of all layers, the nearest first."""
        for number, layer in enumerate(layers):
            for section, values in layer.sections.items():
                self._section(number, layer.heading(section), values)

    def _section(self, layer: int, heading: Place, values: dict[str, Value]) -> None:
        kind, _, name = heading.section.partition(":")
        if heading.section == "celery":
            for key, value in values.items():
                self._find(layer, key, value)
        elif meant := _right_spelling(heading.section):
            problem = "this section is not known"
            self._faults.at(heading, problem, expected=_SECTIONS, close=meant)
        elif kind in _KINDS and not name:
            self._faults.at(heading, "the section has no name", expected=f"[{kind}:{_KINDS[kind]}]")
        elif kind == "celery":
            self._find_keys(layer, name, heading, values)
        elif kind in _KINDS and self._is_new(layer, kind, name, heading):
            self.blocks[kind].setdefault(name, Block(heading)).layers.append(values)

    def _is_new(self, layer: int, kind: str, name: str, heading: Place) -> bool:
        first = self._headings.setdefault((layer, kind, name), heading)
        if first is not heading:
            problem = f"this section is already there, as [{first.section}] at {first}"
            self._faults.at(heading, problem)
        return first is heading

    def _find(self, layer: int, key: str, value: Value) -> None:
        written, dot, inner = key.partition(".")
        name = self._name(written, value)
        if name is None:
            return
        if dot and not _is_mapping(name):
            problem = f"{name} is no mapping; it has no keys"
            self._faults.at(value.place, problem, value=value.text)
            return
        self._add(name, Found(layer, inner if dot else None, value))

    def _find_keys(
        self, layer: int, written: str, heading: Place, values: dict[str, Value]
    ) -> None:
        name = self._name(written, Value(None, heading))
        if name is None:
            return
        if not _is_mapping(name):
            self._faults.at(heading, f"{name} is no mapping; set it in [celery]")
            return
        if not self._is_new(layer, "celery", name, heading):
            return
        for key, value in values.items():
            self._add(name, Found(layer, key, value))

    def _name(self, written: str, value: Value) -> str | None:
        name = find_option(written)
        if name is None:
            self._unknown(written, value)
        elif name != written:
            self.renamed.append(Renamed(written, name, value.place))
        return name

    def _unknown(self, written: str, value: Value) -> None:
        instead = REMOVED.get(written.upper())
        if instead:
            problem = f"Celery has no such option any more: {instead}"
            self._faults.at(value.place, problem, value=value.text)
            return
        close = nearest(written, option_names())
        self._faults.at(
            value.place,
            "is no option of Celery",
            value=value.text,
            close=find_option(close) if close else None,
        )

    def _add(self, name: str, new: Found) -> None:
        others = self.options.setdefault(name, [])
        for other in others:
            same = other.key == new.key or None in (other.key, new.key)
            if other.layer == new.layer and same:
                first = other.value.place
                self._faults.at(
                    new.value.place,
                    f"sets {name}, which [{first.section}] {first.key} at {first} sets as well; "
                    "keep one of them",
                )
                return
        others.append(new)


def _is_mapping(option: str) -> bool:
    return OPTIONS[option].kind.name in _MAPPINGS


def is_for_celery(section: str) -> bool:
    """Tell whether a section is one of ours, or was meant to be."""
    return section.partition(":")[0] in _KINDS or _right_spelling(section) is not None


def _right_spelling(section: str) -> str | None:
    """Return how a section is written that is one of ours but for a slip."""
    kind, _, name = section.partition(":")
    if kind in _KINDS and name == name.strip(" \t:") and not miswritten(name):
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
    close = nearest(word, _KINDS)
    likely = close and word[:1] == "c" and abs(len(close) - len(word)) <= 1
    if word.startswith("celery") or (likely and (bare or close == "celery")):
        return f"[{close or 'celery'}:{bare}]" if bare else f"[{close or 'celery'}]"
    return None
