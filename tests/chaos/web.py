"""The web process: requests one after another, as an application server would hand them over.

``python -m tests.chaos.web INI --rate 40 --seed 1`` goes on for ever; with ``--count`` it ends.
While the file ``pause`` is in the directory of the crash points it waits. With ``--on-demand`` it
dispatches what files there ask for.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pyramid.paster import get_app
from pyramid.request import Request
from tests.chaos.models import KINDS

__all__ = ("main", "run")

_WEIGHTS = {
    "delay": 40,
    "countdown": 10,
    "later": 10,
    "chain": 10,
    "aware": 10,
    "group": 10,
    "retry": 10,
}


def main() -> None:
    """Dispatch through the views of the application of an INI file."""
    options = arguments()
    wsgi_app = get_app(options.ini)

    def dispatch(kind: str) -> None:
        Request.blank(f"/dispatch?kind={kind}").get_response(wsgi_app)

    run(dispatch, options)


def arguments() -> Any:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ini")
    parser.add_argument("--rate", type=float, default=0.0, help="dispatches per second")
    parser.add_argument("--count", type=int, help="dispatches in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, help="only this kind of dispatch")
    parser.add_argument("--on-demand", action="store_true", help="wait for files demand.KIND")
    return parser.parse_args()


def run(dispatch: Callable[[str], None], options: Any) -> None:
    """Call ``dispatch`` with one kind of dispatch after the other; errors end a request only."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    if options.on_demand:
        kinds = _demanded(Path(os.environ["CHAOS_POINTS"]))
    else:
        kinds = _kinds(random.Random(options.seed), options.kind)
    done = 0
    while options.count is None or done < options.count:
        _wait_while_paused()
        kind = next(kinds)
        begun = time.monotonic()
        try:
            dispatch(kind)
        except InterruptedError:
            pass  # as it was meant
        except Exception:
            logging.exception("%s failed", kind)
            time.sleep(0.1)
        else:
            done += 1
        if options.rate:
            time.sleep(max(0.0, begun + 1 / options.rate - time.monotonic()))


def _kinds(rng: random.Random, only: str | None) -> Iterator[str]:
    weights = {only: 1} if only else {**_WEIGHTS, "abort": 10}
    while True:
        yield from rng.choices(list(weights), list(weights.values()))


def _demanded(folder: Path) -> Iterator[str]:
    """Yield a kind for each file ``demand.KIND``, which goes when the dispatch has been made."""
    while True:
        for file in folder.glob("demand.*"):
            yield file.suffix[1:]
            file.unlink()
        time.sleep(0.02)


def _wait_while_paused() -> None:
    pause = Path(os.environ.get("CHAOS_POINTS", ""), "pause")
    while pause.exists():
        time.sleep(0.02)


if __name__ == "__main__":
    main()
