"""The console script ``ws-celery``, and ``python -m ws_celery``."""

from __future__ import annotations

import sys

from celery import maybe_patch_concurrency

__all__ = ("main",)


def main() -> None:
    """Run ``ws-celery`` with the arguments of the process; always exits."""
    # gevent and eventlet have to patch the standard library before it is used: thread-locals made
    # earlier, such as Pyramid's and the transaction manager, would be shared by all tasks.
    maybe_patch_concurrency(["ws-celery", *sys.argv[1:]])
    from ws_celery.cli import main

    main()


if __name__ == "__main__":
    # As the console script: an application is found where it is installed.
    if not getattr(sys.flags, "safe_path", False):  # Python 3.11
        del sys.path[0]
    main()
