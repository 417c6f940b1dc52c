"""Errors travel from a worker's children to its main process, pickled, and arrive as they were."""

from __future__ import annotations

import pickle

import pytest
from tests.errors import error_classes, example_of

from ws_celery import exceptions


@pytest.mark.parametrize("cls", error_classes(), ids=lambda cls: cls.__qualname__)
def test_an_error_is_the_same_after_its_way_between_processes(cls):
    error = example_of(cls)
    error.seen = "in a child"

    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own

    assert type(again) is cls
    assert again.args == error.args
    assert vars(again) == vars(error)
    assert (str(again), repr(again)) == (str(error), repr(error))


def test_the_walk_over_the_errors_finds_those_of_all_modules():
    found = {cls.__name__ for cls in error_classes()}
    public = {
        name for name in exceptions.__all__ if issubclass(getattr(exceptions, name), Exception)
    }

    assert public <= found
    assert {"BackupFailed", "Refused", "OrderFailed", "_NotHealthy"} <= found
