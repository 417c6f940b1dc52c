"""ARCHITECTURE.rst leads to what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "ws_celery"
TEXT = (ROOT / "ARCHITECTURE.rst").read_text(encoding="utf-8")

#: What Celery's own names in the text are.
OF_OTHERS = {"Celery.producer_or_acquire", "app.Task", "config.add_request_propagator"}


def test_every_file_is_there():
    named = set(re.findall(r"``([\w/]+\.(?:py|rst))``", TEXT))
    missing = [name for name in named if not ((SOURCE / name).exists() or (ROOT / name).exists())]

    assert len(named) > 20
    assert missing == []


@pytest.mark.parametrize(
    ("file", "name"), re.findall(r"``([\w/]+\.py)``:\s+``([\w.]+)``", TEXT), ids=lambda each: each
)
def test_every_name_is_in_its_file(file, name):
    text = (SOURCE / file).read_text(encoding="utf-8")
    for part in name.split("."):
        assert re.search(rf"\b(?:def|class) {part}\b|^{part}\b", text, re.MULTILINE), part


def test_every_class_with_a_method_is_somewhere():
    code = "\n".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py"))
    names = set(re.findall(r"``([A-Z]\w+)\.(\w+)``", TEXT))

    assert [
        f"{cls}.{method}"
        for cls, method in names
        if f"{cls}.{method}" not in OF_OTHERS
        and not (re.search(rf"class {cls}\b", code) and re.search(rf"def {method}\b", code))
    ] == []


def test_every_band_has_all_of_its_modules():
    contract = re.search(
        r'^containers = \["ws_celery"\]\nlayers = \[\n(.*?)^\]',
        (ROOT / "pyproject.toml").read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )
    bands = [set(re.findall(r"\w+", line)) for line in contract[1].splitlines()]
    block = TEXT.split("PyramidCelery``::")[1].split("``app`` does not know")[0]
    told = [set(re.findall(r"[a-z_]+", line)) for line in re.split(r"\n(?=    \w)", block)]

    assert len(bands) == 7
    assert all(any(band <= words for words in told) for band in bands)
