"""Any text as an INI file is a configuration or a ConfigurationError; nothing is passed over."""

from __future__ import annotations

import configparser
import io
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ws_celery.exceptions import ConfigurationError
from ws_celery.settings import read_configuration, survey
from ws_celery.settings.options import (
    ANNOTATION_KEYS,
    ENTRY_KEYS,
    OLD_NAMES,
    OPTIONS,
    QUEUE_KEYS,
    REMOVED,
    ROUTE_KEYS,
)
from ws_celery.settings.reader import Scan

relaxed = settings(
    max_examples=100,
    deadline=None,
    # The file is written anew for each example.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

options = st.one_of(*map(st.sampled_from, (list(OPTIONS), list(OLD_NAMES), list(REMOVED))))
keys_of_options = st.builds("{}.{}".format, options, st.sampled_from(["x", "x.y", ""]))
other_keys = st.sampled_from(
    [*ROUTE_KEYS, *QUEUE_KEYS, *ANNOTATION_KEYS, *ENTRY_KEYS, "type", "schedule", "use", "a.b", "."]
)
names = st.sampled_from(
    [
        "celery",
        "celery:broker_transport_options",
        "celery:beat_schedule",
        "celery:broker_use_ssl",
        "celery:task_routes",
        "celerybeat:a",
        "celerybeat:b",
        "celeryroute:a.*",
        "celeryqueue:q",
        "celeryannotate:t",
        "celeryannotate:*",
        "app:main",
        "DEFAULT",
        "celeryx",
        "celery:",
    ]
)
texts = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [
            "1",
            "-1",
            "true",
            "none",
            "{}",
            "[]",
            '{"a": 1}',
            '{"a": {"task": "t", "schedule": 1}}',
            '["a", "b"]',
            '[["a", {"queue": "q"}]]',
            "24h",
            "* * * * *",
            "crontab",
            "timedelta",
            "solar",
            "number",
            "%(here)s",
            "%(x)s",
            "%",
            "${X",
            "${NOT_SET}",
            "${X:-1}",
            "nan",
            "config:x.ini",
            "redis://a:b@c",
            "inf",
            "1e400",
            "9" * 5000,
            '{"minute": 0}',
            '"',
            "[",
            "Europe/Berlin",
            "../..",
            "Europe",
            "os:path",
            "x:y",
            "a b\n  c",
            "json",
            "memory://",
        ]
    ),
)
lines = st.builds(
    "{} = {}".format, st.one_of(options, keys_of_options, other_keys, st.text(max_size=8)), texts
)
sections = st.builds(
    lambda name, body: "\n".join([f"[{name}]", *body]),
    st.one_of(names, st.text(max_size=10)),
    st.lists(lines, max_size=4),
)
likely = st.lists(sections, max_size=4).map("\n".join)


def check(path, data):
    path.write_bytes(data)
    configuration, faults = survey(str(path))
    if faults:
        with pytest.raises(ConfigurationError) as caught:
            read_configuration(str(path))
        assert len(str(caught.value).splitlines()) >= len(caught.value.faults)
        json.dumps([fault.as_dict() for fault in faults])
    else:
        assert read_configuration(str(path)).settings.keys() == configuration.settings.keys()


@relaxed
@given(likely)
def test_what_looks_like_a_configuration_is_one_or_is_refused(tmp_path, text):
    check(tmp_path / "app.ini", text.encode("utf-8", "surrogatepass"))


@relaxed
@given(st.one_of(st.binary(max_size=300), st.text().map(lambda text: f"[celery]\n{text}".encode())))
def test_any_bytes_are_a_configuration_or_are_refused(tmp_path, data):
    check(tmp_path / "app.ini", data)


@relaxed
@given(
    st.sampled_from(["celery", "celeryroute:a", "celeryqueue:a", "celeryannotate:a"]),
    st.dictionaries(
        st.one_of(
            options, keys_of_options, other_keys, st.from_regex(r"[a-z_]{1,12}", fullmatch=True)
        ),
        st.sampled_from(["1", "true", "none", "{}", "a", "memory://"]),
        min_size=1,
        max_size=4,
    ),
)
def test_no_key_is_passed_over(tmp_path, section, keys):
    path = tmp_path / "app.ini"
    body = "\n".join(f"{key} = {text}" for key, text in keys.items())
    path.write_text(
        f"[celery]\n[{section}]\n{body}" if section != "celery" else f"[celery]\n{body}"
    )

    configuration, faults = survey(str(path))

    told = {fault.line for fault in faults}
    first = 2 if section == "celery" else 3
    for number, key in enumerate(keys, start=first):
        read = any(row.place.line == number for row in configuration.rows)
        inside = any(row.place.section == section and key in str(row.value)
                     for row in configuration.rows if row.category != "option")  # fmt: skip
        queue = section == "celeryqueue:a" and bool(configuration.settings.get("task_queues"))
        assert number in told or read or inside or queue, key


@relaxed
@given(st.sampled_from(list(OPTIONS)), st.sampled_from(["1", "false", "memory://", "UTC"]))
def test_only_a_mapping_has_keys(tmp_path, name, text):
    path = tmp_path / "app.ini"
    path.write_text(f"[celery]\n{name}.x = {text}\n")

    _, faults = survey(str(path))

    refused = any(fault.problem == f"{name} is no mapping; it has no keys" for fault in faults)
    assert refused == ("dict" not in OPTIONS[name].name)


@settings(max_examples=1000, deadline=None)
@given(st.text("ab=:[]#;% \t\n\r\x0b\x85x", max_size=80))
def test_the_scan_sees_what_configparser_sees(text):
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str
    scan = Scan("app.ini", text)
    try:
        parser.read_file(io.StringIO(text.replace("\r\n", "\n").replace("\r", "\n")))
    except configparser.Error:
        assert scan.faults
        return

    assert not scan.faults
    raw = scan.raw()
    assert raw.pop("DEFAULT") == dict(parser.defaults())
    own = {name: dict(parser[name]) for name in parser.sections()}
    for name, values in own.items():
        inherited = {key for key in parser.defaults() if key not in raw[name]}
        assert raw[name] == {key: text for key, text in values.items() if key not in inherited}
    assert raw.keys() == own.keys()


def test_lines_are_counted_through_comments_continuations_and_empty_lines():
    scan = Scan(
        "app.ini",
        "# comment\n[celery]\r\nimports =\n  a\n\n  # inside\n  b\n; comment\nbroker_url: x\n",
    )

    assert scan.lines == {("celery", "imports"): 3, ("celery", "broker_url"): 9}
    assert scan.raw()["celery"] == {"imports": "\na\n\nb", "broker_url": "x"}


@pytest.mark.parametrize(
    ("data", "line", "words"),
    [
        (b"[celery]\na = 1\n\nb = \xff\n", 4, "byte 0xff is not UTF-8; expected a file saved as"),
        (
            b"\xef\xbb\xbf[celery]\na = 1\n",
            1,
            "the file begins with a byte order mark; expected UTF",
        ),
        (b"\xef\xbb\xbf[celery]\na = 1\n", 2, "[celery] a = '1': is no option of Celery"),
        (b"a = 1\n", 1, "this line stands before the first section"),
        (b"[celery]\nhunter2\n", 2, "this line is neither a section nor a key with a value"),
        (b"[celery]\n= hunter2\n", 2, "this line is neither a section nor a key with a value"),
        (b"[celery]\nimports = a\n[x]\n[celery]\n", 4, "this section is already there, at line 1"),
        (b"[celery]\nimports = a\nimports = b\n", 3, "imports is already set at line 2"),
    ],
)
def test_a_file_that_is_no_ini_file_is_told_with_the_line(tmp_path, data, line, words):
    path = tmp_path / "app.ini"
    path.write_bytes(data)

    _, faults = survey(str(path))

    (fault,) = (fault for fault in faults if words in str(fault))
    assert (fault.file, fault.line) == (str(path), line)
    assert "hunter2" not in str(fault)
