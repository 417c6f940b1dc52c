"""The house in figures: how much there is to read, and how far a reader has to walk.

``make house`` prints them; ``tests/unit/test_house.py`` holds them loosely. Nothing is imported but
for the journeys, which run in a program of their own (``tools/journeys.py``).
"""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "ws_celery"

#: The one module that may touch what others keep to themselves.
COMPAT = f"{PACKAGE}.compat"

_ITSELF = ("self", "cls")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Module:
    """One module: its dotted name, its text and its syntax."""

    name: str
    text: str
    is_package: bool

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())

    @property
    def functions(self) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
        return [node for node in ast.walk(self.tree) if isinstance(node, _FUNCTIONS)]

    def imports(self, nodes: Iterable[ast.AST] | None = None) -> Iterator[tuple[str, str | None]]:
        """Yield the module and the name of each import.

        :param nodes: where to look; by default everywhere, in functions and for types only, too.
        """
        for node in ast.walk(self.tree) if nodes is None else nodes:
            if isinstance(node, ast.Import):
                yield from ((alias.name, None) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from ((node.module or "", alias.name) for alias in node.names)


@dataclass(frozen=True)
class House:
    """All modules of the package."""

    modules: tuple[Module, ...]

    @property
    def lines(self) -> list[int]:
        return [module.lines for module in self.modules]

    @property
    def function_lines(self) -> list[int]:
        functions = (each for module in self.modules for each in module.functions)
        return sorted(each.end_lineno - each.lineno + 1 for each in functions)

    @cached_property
    def graph(self) -> dict[str, set[str]]:
        """Module to the modules of ours that it imports; a package that holds it is none."""
        return {module.name: self._ours(module, module.imports()) for module in self.modules}

    @cached_property
    def loading(self) -> dict[str, set[str]]:
        """Module to the modules of ours that are imported when it is, unlike those for types."""
        return {
            module.name: self._ours(module, module.imports(module.tree.body))
            for module in self.modules
        }

    def _ours(self, module: Module, imports: Iterable[tuple[str, str | None]]) -> set[str]:
        names = {module.name for module in self.modules}
        wanted = {
            found if (found := f"{source}.{name}") in names else source for source, name in imports
        }
        return (wanted & names) - {module.name}

    @property
    def with_one_reader(self) -> int:
        """How many modules are imported by exactly one other."""
        readers = [sum(name in each for each in self.graph.values()) for name in self.graph]
        return readers.count(1)

    @property
    def circle(self) -> list[str]:
        """Modules that import each other in a circle; empty without one."""
        return _circle(self.loading)

    @property
    def in_circles_of_types(self) -> int:
        """How many modules are in circles, if imports for types and in functions count, too."""
        graph = {name: set(targets) for name, targets in self.graph.items()}
        found: set[str] = set()
        while circle := _circle(graph):
            found.update(circle)
            graph[circle[1]].discard(circle[0])
        return len(found)

    @property
    def share_of_any(self) -> float:
        """How many of a hundred parameters are annotated as ``Any``."""
        annotations = [
            ast.unparse(argument.annotation) if argument.annotation else ""
            for module in self.modules
            for function in module.functions
            for argument in _parameters(function)
        ]
        return 100 * annotations.count("Any") / len(annotations)

    @cached_property
    def foreign_private_names(self) -> dict[str, set[str]]:
        """Private names of other packages, with the modules that use them, but for ``compat``."""
        ours = {name for module in self.modules for name in _defined(module.tree)}
        found: dict[str, set[str]] = {}
        for module in self.modules:
            if module.name != COMPAT:
                for name in _foreign(module, ours):
                    found.setdefault(name, set()).add(module.name)
        return found


def _circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return [each for each in every if each.arg not in _ITSELF]


def _is_private(name: str | None) -> bool:
    return bool(name) and name.startswith("_") and not name.endswith("__") and name != "_"


def _defined(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in _ITSELF:
                yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def _foreign(module: Module, ours: set[str]) -> Iterator[str]:
    for source, name in module.imports():
        if source.split(".")[0] != PACKAGE and source != "__future__":
            parts = [*source.split("."), name]
            yield from (f"{source}.{part}" for part in parts[1:] if _is_private(part))
    own = set(_defined(module.tree))
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            itself = isinstance(node.value, ast.Name) and node.value.id in _ITSELF
            if node.attr not in (ours if itself else own):
                yield node.attr


def read_house(source: Path = ROOT / "src") -> House:
    """Read the package below ``source``."""
    found = []
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        found.append(Module(name, path.read_text(), is_package))
    return House(tuple(found))


def layers(pyproject: Path = ROOT / "pyproject.toml") -> tuple[int, int]:
    """Return how many layers the contract on imports has, and how many inner ones there are."""
    # Read by its shape: Python 3.10 has no parser of TOML.
    found = re.findall(r"^layers = \[\n(.*?)^\]", pyproject.read_text(), re.DOTALL | re.MULTILINE)
    return len(found[0].splitlines()), len(found) - 1


def figures(house: House) -> Iterable[tuple[str, str]]:
    """Yield what ``make house`` prints: what it is, and how much."""
    lengths = house.function_lines
    yield "modules / lines", f"{len(house.modules)} / {sum(house.lines):,}"
    yield (
        "median module / longest / under 60 lines",
        f"{statistics.median(house.lines):.0f} / {max(house.lines)} / "
        f"{sum(lines < 60 for lines in house.lines)}",
    )
    yield "modules with one reader", str(house.with_one_reader)
    yield (
        "lines of a function: median / 90 of 100 / longest",
        f"{statistics.median(lengths):.0f} / {lengths[len(lengths) * 9 // 10]} / {lengths[-1]}",
    )
    yield "parameters typed Any", f"{house.share_of_any:.1f} %"
    yield "layers / inner contracts", "{} / {}".format(*layers())
    yield "circle of imports", " > ".join(house.circle) or "none"
    yield "modules in circles, types and functions too", str(house.in_circles_of_types)
    yield "private names of others outside compat", str(len(house.foreign_private_names))


def main() -> None:
    """Print the figures, and the journeys."""
    house = read_house()
    rows = list(figures(house))
    width = max(len(title) for title, _ in rows)
    for title, figure in rows:
        print(f"{title:{width}}  {figure}", flush=True)
    if "--names" in sys.argv:
        for name, users in sorted(house.foreign_private_names.items()):
            print(f"    {name}: {', '.join(sorted(users))}")
    subprocess.run([sys.executable, ROOT / "tools" / "journeys.py"], check=True)


if __name__ == "__main__":
    main()
