"""``python -m ws_celery`` is ``ws-celery``."""

from ws_celery.cli import main

if __name__ == "__main__":
    main()
