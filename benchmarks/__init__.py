"""What ws_celery costs, measured side by side with Celery alone: ``make bench``."""
