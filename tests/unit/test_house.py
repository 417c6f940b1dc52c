"""How large the house may become; ``make house`` prints where it is. The bounds may only fall."""

from __future__ import annotations

import pkgutil
import statistics

from tools.house import layers, read_house

import ws_celery

HOUSE = read_house()


def test_there_are_not_more_modules_and_lines_than_there_were():
    assert len(HOUSE.modules) <= 96
    assert sum(HOUSE.lines) <= 25_300


def test_a_module_is_read_in_one_sitting():
    assert statistics.median(HOUSE.lines) <= 260
    assert max(HOUSE.lines) <= 515


def test_a_function_is_read_at_a_glance():
    lengths = HOUSE.function_lines
    assert lengths[len(lengths) * 9 // 10] <= 20


def test_parameters_say_what_they_are():
    assert HOUSE.share_of_any <= 3


def test_there_are_not_more_layers_than_there_were():
    assert layers() <= (7, 0)


def test_no_module_needs_itself_to_be_imported():
    assert HOUSE.circle == []


def test_private_names_of_others_are_in_compat_only():
    assert HOUSE.foreign_private_names == {}


def test_every_module_of_the_package_is_counted():
    expected = {info.name for info in pkgutil.walk_packages(ws_celery.__path__, "ws_celery.")}
    assert {module.name for module in HOUSE.modules} == {"ws_celery", *expected}
