"""Which key of which section says what, over all layers; the same thing twice is a fault."""

from __future__ import annotations

from dataclasses import dataclass, field

from ws_celery.converters import nearest
from ws_celery.settings.faults import Faults, Place, Value
from ws_celery.settings.layers import Layer
from ws_celery.settings.names import REMOVED, find_option, option_names
from ws_celery.settings.options import OPTIONS

__all__ = ("Block", "Found", "Gathering", "Renamed")


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
    """The keys of one named section, those of nearer layers first."""

    place: Place
    values: dict[str, Value] = field(default_factory=dict)


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

    def gather(self, layers: list[Layer]) -> None:
        """Sort the sections of all layers, the nearest first."""
        for number, layer in enumerate(layers):
            for section, values in layer.sections.items():
                self._section(number, layer.heading(section), values)

    def _section(self, layer: int, heading: Place, values: dict[str, Value]) -> None:
        kind, colon, name = heading.section.partition(":")
        name = name.strip()
        if heading.section == "celery":
            for key, value in values.items():
                self._find(layer, key, value)
        elif kind in _KINDS and not name:
            self._faults.at(heading, "the section has no name", expected=f"[{kind}:{_KINDS[kind]}]")
        elif kind == "celery":
            self._find_keys(layer, name, heading, values)
        elif kind in _KINDS:
            block = self.blocks[kind].setdefault(name, Block(heading))
            block.values.update({**values, **block.values})
        elif _meant_for_us(kind, colon):
            close = nearest(kind, _KINDS)
            self._faults.at(
                heading,
                "this section is not known",
                expected=_SECTIONS,
                close=close and f"[{close}{colon}{name}]",
            )

    def _find(self, layer: int, key: str, value: Value) -> None:
        written, _, inner = key.partition(".")
        name = self._name(written, value)
        if name is not None:
            self._add(name, Found(layer, inner or None, value))

    def _find_keys(
        self, layer: int, written: str, heading: Place, values: dict[str, Value]
    ) -> None:
        name = self._name(written, Value(None, heading))
        if name is None:
            return
        if OPTIONS[name].kind.name not in _MAPPINGS:
            self._faults.at(heading, f"{name} is no mapping; set it in [celery]")
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


def _meant_for_us(kind: str, colon: str) -> bool:
    """Tell whether a section is one of ours but for a slip, or one that we do not have."""
    if kind.lower().startswith("celery"):
        return True
    close = nearest(kind, _KINDS) if kind[:1].lower() == "c" else None
    likely = close is not None and abs(len(close) - len(kind)) <= 1
    return likely and (bool(colon) or close == "celery")
