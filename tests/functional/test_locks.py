"""Workers of all kinds that are killed while they hold a lock: never two at once, and soon free.

``python -m tests.chaos.locks`` does the same with more of everything.
"""

from __future__ import annotations

import pytest
from tests.chaos.locks import open_turns

ATTEMPTS = 12


@pytest.mark.parametrize(
    ("pool", "place"),
    [
        ("prefork", "redis"),
        ("prefork", "database"),
        ("threads", "redis"),
        ("gevent", "redis"),
        ("solo", "redis"),
    ],
)
@pytest.mark.timeout(300)
def test_runs_take_turns_though_holders_are_killed(pool, place, redis_url, postgres_url):
    locks = "auto" if place == "redis" else place
    options = {"locks": locks, "pool": pool, "workers": 2, "concurrency": 2}
    with open_turns(redis_url, postgres_url, **options) as (turns, send):
        for number in range(ATTEMPTS):
            send(number, 0.3)
        assert turns.fleet.wait_until(lambda: turns.done() > 2, 60), "no turn was taken"
        while not turns.freed:
            assert turns.done() < ATTEMPTS, "no holder was met"
            turns.kill_holder()
        # kombu takes a message off Redis before it notes that it has: a worker that is killed
        # between loses it. A prefork worker lives on, and only its child is killed.
        whole = pool != "prefork"
        if whole and not turns.fleet.wait_until(lambda: turns.done() == ATTEMPTS, 80):
            for number in range(ATTEMPTS):
                send(number, 0.3)
        assert turns.fleet.wait_until(lambda: turns.done() == ATTEMPTS, 140 if whole else 220), (
            "turns are missing"
        )
        outcome = turns.outcome()

    assert outcome.together == outcome.stale == 0
    assert outcome.turns == outcome.value >= ATTEMPTS
    assert max(outcome.freed) < 10
