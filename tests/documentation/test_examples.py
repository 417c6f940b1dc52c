"""Every example of README and docs runs, loads or names what there is."""

from __future__ import annotations

import configparser
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from pyramid.config import Configurator
from sybil import Document, Example
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.rest import CodeBlockParser

from ws_celery.cli import main
from ws_celery.config import read_file
from ws_celery.declaration import TaskProxy

ROOT = Path(__file__).parents[2]
PAGES = sorted({*ROOT.glob("*.rst"), *ROOT.glob("docs/**/*.rst")})

#: What examples may run besides our own programs.
OTHER_PROGRAMS = {"ansible-playbook", "coverage", "curl", "pre-commit", "pytest", "python3"}


def examples(page: Path, **evaluators: Callable[[Example], Any]) -> Iterator[Example]:
    parsers = [CodeBlockParser(*evaluator) for evaluator in evaluators.items()]
    yield from Document.parse(str(page), *parsers)


def with_blocks(*languages: str) -> Any:
    """Run a test for each page that has code blocks in one of these languages."""
    found = re.compile(
        rf"^ *\.\. (invisible-)?code-block::? ({'|'.join(languages)})$", re.MULTILINE
    )
    pages = [page for page in PAGES if found.search(page.read_text())]
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


# Python


@with_blocks("python")
def test_the_python_of_a_page_runs(page, site_request, sent, check, monkeypatch):
    monkeypatch.setitem(sys.modules, "example", ModuleType("example"))
    config = Configurator(registry=site_request.registry, autocommit=True)
    run_python = PythonEvaluator()

    def evaluate(example: Example) -> None:
        if example.parsed.startswith("# myapp/"):
            return  # part of the application that is running
        run_python(example)
        for value in list(example.namespace.values()):
            if isinstance(value, TaskProxy):
                config.add_celery_task(value)

    def run(task: Any, *args: Any) -> Any:
        """Run a task as a worker does; return its result."""
        return task.apply(args, throw=True).get()

    names = {"__name__": "example", "request": site_request, "run": run, "sent": sent}
    names["check"] = check
    for example in examples(page, python=evaluate):
        for name, value in names.items():
            example.namespace.setdefault(name, value)
        example.evaluate()


# INI and YAML


@with_blocks("ini")
def test_the_ini_of_a_page_loads(page, tmp_path):
    def evaluate(example: Example) -> None:
        text = str(example.parsed)
        path = tmp_path / "example.ini"
        path.write_text(text if "[celery]" in text else f"{text}\n[celery]\n")
        read_file(str(path))
        sections = configparser.RawConfigParser()
        sections.read(path)
        for section in sections.sections():
            if command := sections[section].get("command"):
                check_command(shlex.split(command))

    for example in examples(page, ini=evaluate):
        example.evaluate()


@with_blocks("yaml")
def test_the_yaml_of_a_page_sets_variables_of_the_role(page):
    known = yaml.safe_load((ROOT / "ansible/roles/ws_celery/defaults/main.yml").read_text())

    def evaluate(example: Example) -> None:
        names = {name for name in yaml.safe_load(example.parsed) if name.startswith("ws_celery_")}
        assert names <= set(known)

    for example in examples(page, yaml=evaluate):
        example.evaluate()


# The shell


@with_blocks("console")
def test_the_commands_of_a_page_exist(page):
    def evaluate(example: Example) -> None:
        for line in example.parsed.replace("\\\n", "").splitlines():
            if line.startswith("$ "):
                for command in line[2:].split("&&"):
                    check_command(shlex.split(command))

    for example in examples(page, console=evaluate):
        example.evaluate()


def check_command(words: list[str]) -> None:
    while re.match(r"\w+=", words[0]):
        del words[0]
    program, arguments = Path(words[0]).name, words[1:]
    if program == "ws-celery":
        check_ws_celery(arguments)
    elif program == "make":
        check_make(arguments)
    elif program == "pip":
        check_extras(re.findall(r"\[(.*)\]", arguments[-1]))
    elif program == "uv":
        run, extra, name, *command = arguments
        assert (run, extra) == ("run", "--extra")
        check_extras([name])
        check_command(command)
    else:
        assert program in OTHER_PROGRAMS


def check_ws_celery(arguments: list[str]) -> None:
    plain = iter(word for word in arguments if not word.startswith("-") and "." not in word)
    command = next(plain, "")
    help_texts = help_of() + help_of(command)
    if command == "multi":
        help_texts += help_of("worker")  # what it does not know is the workers'
    below = next(plain, None)
    if below and re.search(rf"^  {below} ", help_of(command), re.MULTILINE):
        help_texts += help_of(command, below)
    for option in (word.partition("=")[0] for word in arguments if word.startswith("-")):
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", help_texts), option


@cache
def help_of(*commands: str) -> str:
    with redirect_stdout(StringIO()) as output, pytest.raises(SystemExit) as end:
        main([*filter(None, commands), "--help"])
    assert end.value.code == 0, commands
    return output.getvalue()


def check_make(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in arguments:
        name, assigned, _ = word.partition("=")
        rule = rf"(?m)^{name} \?=" if assigned else rf"(?m)^{name}:"
        assert re.search(rule, makefile), word


def check_extras(names: list[str]) -> None:
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    wanted = chain.from_iterable(name.split(",") for name in names)
    assert set(wanted) <= set(setup["options.extras_require"])
