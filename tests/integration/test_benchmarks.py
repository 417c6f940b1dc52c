"""The benchmarks can be run: with as little work as possible, and no look at the times."""

from __future__ import annotations

from functools import partial
from xml.etree import ElementTree

import pytest
from benchmarks.__main__ import main
from benchmarks.beat import beat
from benchmarks.dispatch import dispatching, dispatching_nothing
from benchmarks.harness import Case, Measurement, measure
from benchmarks.outboxes import latency, sweeping, waiting, working_with_rows
from benchmarks.relays import draining
from benchmarks.report import drawing, table, write
from benchmarks.services import Services
from benchmarks.workers import working
from docutils.core import publish_doctree
from redis import Redis
from sqlalchemy import create_engine, inspect


@pytest.fixture
def services(redis_url, postgres_url):
    return Services(redis_url, postgres_url)


@pytest.mark.parametrize(
    "how",
    [
        partial(dispatching, 2),
        partial(dispatching, 2, results=True, milliseconds=1),
        partial(dispatching, 3, bulk=True),
        dispatching_nothing,
        partial(working, "noop", count=2),
        partial(working, "add_note", count=2),
        partial(dispatching, 2, outbox=True),
        partial(working_with_rows, count=2),
        latency,
        partial(waiting, rows=10),
        partial(sweeping, rows=10),
        partial(draining, rows=3),
    ],
    ids=[
        *("dispatch", "results from afar", "bulk", "nothing", "worker", "worker that inserts"),
        *("outbox", "worker with rows", "latency", "rows that wait", "sweep", "relay"),
    ],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_case_is_measured_and_leaves_nothing_behind(services, how):
    measurement = measure(Case("case", "a case", 1.0, how, rounds=2), services)

    assert len(measurement.ours) == len(measurement.plain) == 2
    assert min(measurement.ours + measurement.plain) > 0
    with Redis.from_url(services.redis) as client:
        assert not client.keys("*benchmark-*")


def test_a_beat_is_measured_and_leaves_nothing_behind(services):
    engine = create_engine(services.database)
    tables = set(inspect(engine).get_table_names())
    started, share, rate = beat(services, entries=20, period=1, seconds=3)

    assert min(started, share, rate) > 0
    assert set(inspect(engine).get_table_names()) == tables
    engine.dispose()
    with Redis.from_url(services.redis) as client:
        assert not client.keys("*benchmark-*")


def test_the_sides_take_turns_and_who_begins_alternates(services):
    turns = []

    class Sides:
        def __init__(self, _services):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            """Nothing to close."""

        def __iter__(self):
            return iter(())

        def ours(self):
            return turns.append("ours") or 1.0

        def plain(self):
            return turns.append("plain") or 2.0

    measurement = measure(Case("case", "a case", 0.5, Sides, rounds=3), services)

    assert turns == ["ours", "plain", "plain", "ours", "ours", "plain"]
    assert (measurement.ratio, measurement.spread, measurement.reached) == (0.5, (0.5, 0.5), True)


def test_table_and_drawing_show_each_case(tmp_path):
    cases = [
        Case("time", "less & less", 0.5, None, rounds=3),
        Case("rate", "more", 0.9, None, rounds=3, work=10),
        Case("both", "much more", 0.9, None, rounds=3, work=10, rate=8),
    ]
    measurements = [Measurement(case, (1.0, 1.5, 2.0), (2.0, 2.0, 2.0)) for case in cases]
    write(tmp_path, measurements, "made up")

    text = (tmp_path / "results.rst").read_text()
    assert text == table(measurements, "made up")
    shown = publish_doctree(text, settings_overrides={"halt_level": 2}).astext().split("\n\n")
    assert shown[-22:] == [
        *("less & less", "1,500.00 ms", "2,000.00 ms", "0.75", "0.62 to 0.88", "≤ 0.50", "missed"),
        *("more", "7 / s", "5 / s", "1.33", "1.17 to 1.67", "≥ 0.90", "reached"),
        *("much more", "7 / s", "5 / s", "1.33", "1.17 to 1.67", "≥ 0.90, 8 / s", "missed"),
        "made up.",
    ]
    image = ElementTree.fromstring((tmp_path / "results.svg").read_text())  # noqa: S314 - ours
    assert [each.text for each in image if each.text][1:3] == ["less & less", "0.75"]
    assert drawing(measurements).count("<rect") == 4


def test_an_unknown_case_is_refused_with_those_that_there_are(capsys):
    with pytest.raises(SystemExit):
        main(["k7"])

    assert "there is no case k7; there are nothing, k1, k10" in capsys.readouterr().err
