"""What people may look at and do; the command line and web pages only format it."""

from __future__ import annotations

from ws_celery.inspection.health import HealthOfPart, health
from ws_celery.inspection.locks import Holder, free_lock, lock_holder, lock_holders
from ws_celery.inspection.messages import WaitingMessage
from ws_celery.inspection.outbox import (
    OutboxRow,
    OutboxState,
    Retried,
    create_outbox,
    dead_letters,
    discard_outbox_rows,
    find_outbox_rows,
    outbox_row_ids,
    outbox_rows,
    outbox_state,
    retry_outbox_rows,
)
from ws_celery.inspection.queues import (
    Peeked,
    Purged,
    QueueState,
    delete_queue,
    peek_queue,
    purge_queue,
    queue_state,
    queue_states,
)
from ws_celery.inspection.results import Result, forget_results, result_of, stored_results
from ws_celery.inspection.schedule import (
    ComingTick,
    ScheduleEntry,
    coming_ticks,
    create_schedule,
    schedule_entries,
    schedule_entry,
)
from ws_celery.inspection.schedule_edits import (
    add_schedule_entry,
    disable_schedule_entry,
    edit_schedule_entry,
    enable_schedule_entry,
    remove_schedule_entry,
    run_schedule_entry,
)
from ws_celery.inspection.schedule_health import (
    ScheduleHealth,
    schedule_health,
)
from ws_celery.inspection.schedule_transfer import (
    Imported,
    export_schedule,
    import_schedule,
    unexported_entries,
)
from ws_celery.inspection.tasks import RegisteredTask, registered_task, registered_tasks
from ws_celery.inspection.workers import (
    STATES,
    HeldTask,
    WorkerState,
    held_tasks,
    revoke_tasks,
    revoked_ids,
    worker_states,
)

__all__ = (
    "STATES",
    "ComingTick",
    "HealthOfPart",
    "HeldTask",
    "Holder",
    "Imported",
    "OutboxRow",
    "OutboxState",
    "Peeked",
    "Purged",
    "QueueState",
    "RegisteredTask",
    "Result",
    "Retried",
    "ScheduleEntry",
    "ScheduleHealth",
    "WaitingMessage",
    "WorkerState",
    "add_schedule_entry",
    "coming_ticks",
    "create_outbox",
    "create_schedule",
    "dead_letters",
    "delete_queue",
    "disable_schedule_entry",
    "discard_outbox_rows",
    "edit_schedule_entry",
    "enable_schedule_entry",
    "export_schedule",
    "find_outbox_rows",
    "forget_results",
    "free_lock",
    "health",
    "held_tasks",
    "import_schedule",
    "lock_holder",
    "lock_holders",
    "outbox_row_ids",
    "outbox_rows",
    "outbox_state",
    "peek_queue",
    "purge_queue",
    "queue_state",
    "queue_states",
    "registered_task",
    "registered_tasks",
    "remove_schedule_entry",
    "result_of",
    "retry_outbox_rows",
    "revoke_tasks",
    "revoked_ids",
    "run_schedule_entry",
    "schedule_entries",
    "schedule_entry",
    "schedule_health",
    "stored_results",
    "unexported_entries",
    "worker_states",
)
