"""``ws-celery queues`` and ``ws-celery purge``: what waits, and throwing it away."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

import click
from celery.bin.purge import purge as celery_purge

from ws_celery import inspection
from ws_celery.cli.tables import LIMIT, arguments_of, confirm, echo, table, time_of
from ws_celery.cli.worker import worker
from ws_celery.inspection import Purged, QueueState, WaitingMessage

__all__ = (
    "clean",
    "purge",
    "queues",
    "run",
    "view",
)

_HEADINGS = ("QUEUE", "WAITING", "UNACKED", "CONSUMERS", "OLDEST", "")
_MESSAGES = ("ID", "TASK", "ARGUMENTS", "ETA", "RETRIES", "ORIGIN")

#: Of how many messages a progress bar is worth while.
_MANY = 5000

_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
_yes = click.option("--yes", is_flag=True, help="Do not ask.")


@click.group(invoke_without_command=True)
@_as_json
@click.pass_context
def queues(context: click.Context, as_json: bool) -> None:
    """Show how much waits in which queue; look into one, empty it, delete it."""
    if context.invoked_subcommand is not None:
        return
    states = inspection.queue_states(context.obj.app)
    if as_json:
        echo(json.dumps([state.as_dict() for state in states], indent=2))
        return
    for line in table(_HEADINGS, [_cells(state) for state in states], 5, 0):
        echo(line)
    if any(state.unacked is None for state in states if state.exists):
        echo("The broker does not tell how many messages workers have in hand (UNACKED).")


@queues.command
@click.argument("name", metavar="QUEUE")
@click.option("--limit", type=LIMIT, default=10, show_default=True)
@_as_json
@click.pass_context
def peek(context: click.Context, name: str, limit: int, as_json: bool) -> None:
    """Show the messages that are taken next, and leave them there."""
    peeked = inspection.peek_queue(context.obj.app, name, limit)
    if as_json:
        found = [message.as_dict() for message in peeked.messages]
        echo(json.dumps({"source": peeked.source, "messages": found}, indent=2, default=str))
        return
    if peeked.source == "outbox":
        echo(
            "The broker cannot show messages without taking them. These are the unfinished "
            "dispatches to the queue, of which workers may have some:"
        )
    if peeked.messages:
        for line in table(_MESSAGES, [_message(each) for each in peeked.messages], 2, 5, 1):
            echo(line)
    echo(f"{len(peeked.messages)} shown.")


@queues.command(name="purge")
@click.argument("name", metavar="QUEUE")
@_yes
@click.pass_context
def purge_one(context: click.Context, name: str, yes: bool) -> None:
    """Throw away what waits in a queue, for ever."""
    _throw_away(context.obj.app, name, yes, "Throw away {numbers} of the queue {name}, for ever?")


@queues.command
@click.argument("name", metavar="QUEUE")
@_yes
@click.pass_context
def delete(context: click.Context, name: str, yes: bool) -> None:
    """Throw away a queue, and what waits in it, for ever."""
    question = "Delete the queue {name} with {numbers}, for ever?"
    _throw_away(context.obj.app, name, yes, question, inspection.delete_queue)
    echo(f"Deleted the queue {name}.")


queues.add_command(copy.copy(delete), "drop")


@click.pass_context
def _purge_all(
    context: click.Context,
    /,
    force: bool,
    queues: Sequence[str] | None,
    exclude_queues: Sequence[str] | None,
    **_: Any,
) -> None:
    """Throw away what waits in all queues of the application, for ever.

    There is no undo.
    """
    app = context.obj.app
    states = [state for state in inspection.queue_states(app) if state.is_used]
    names = list(queues or [state.name for state in states])
    names = [name for name in names if name not in (exclude_queues or ())]
    found = [inspection.queue_state(app, name) for name in names]
    total = sum(state.waiting for state in found)
    if not force:
        question = f"Throw away {_count(total, 'message')} of {', '.join(names)}, for ever?"
        confirm(question)
    done = [inspection.purge_queue(app, name) for name in names]
    purged = Purged(sum(each.messages for each in done), sum(each.rows for each in done))
    echo(_said(purged, app))


purge = copy.copy(celery_purge)
purge.callback = _purge_all
purge.help = _purge_all.__doc__


def _throw_away(
    app: Any,
    name: str,
    yes: bool,
    question: str,
    action: Callable[..., Purged] = inspection.purge_queue,
) -> None:
    state = inspection.queue_state(app, name)
    if not yes:
        confirm(question.format(numbers=_numbers(state), name=name))
    if state.waiting < _MANY:
        purged = action(app, name)
    else:
        with click.progressbar(length=state.waiting, label=name) as bar:
            purged = action(app, name, bar.update)
    echo(_said(purged, app))


def _said(purged: Purged, app: Any) -> str:
    text = f"Threw away {_count(purged.messages, 'message')}"
    rows = f" and {_count(purged.rows, 'row')} of the outbox" if app.outbox is not None else ""
    return f"{text}{rows}."


def _numbers(state: QueueState) -> str:
    text = _count(state.waiting, "message")
    hand = f"{state.unacked} more in the hands of workers" if state.unacked else ""
    takers = f"{_count(state.consumers, 'consumer')}" if state.consumers else ""
    more = ", ".join(filter(None, (hand, takers)))
    return f"{text} ({more})" if more else text


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _cells(state: QueueState) -> tuple[str, ...]:
    remarks = list(_remarks(state))
    if not state.exists:
        return (state.name, "-", "-", "-", "-", ", ".join(remarks))
    return (
        state.name,
        str(state.waiting),
        _known(state.unacked),
        _known(state.consumers),
        _age(state.oldest),
        ", ".join(remarks),
    )


def _remarks(state: QueueState) -> Iterator[str]:
    if not state.exists:
        yield "not declared yet"
    if not state.is_used:
        yield "not of this application"
    if any(length for step, length in state.priorities.items() if step):
        steps = (f"{step}: {length}" for step, length in state.priorities.items() if length)
        yield f"by priority {', '.join(steps)}"


def _message(message: WaitingMessage) -> tuple[str, ...]:
    return (
        message.id or "-",
        message.task or "-",
        message.problem or arguments_of(message.arguments),
        time_of(message.eta),
        str(message.retries),
        message.origin or "",
    )


def _known(number: int | None) -> str:
    return "-" if number is None else str(number)


def _age(since: datetime | None) -> str:
    if since is None:
        return "-"
    age = datetime.now(timezone.utc) - since
    return str(timedelta(seconds=max(int(age.total_seconds()), 0)))


def _renamed(command: click.Command, name: str, short_help: str) -> click.Command:
    alias = copy.copy(command)
    alias.name, alias.short_help = name, short_help
    return alias


run = _renamed(worker, "run", "Start worker instance; the same as worker.")
clean = _renamed(purge, "clean", "Throw away what waits in all queues; the same as purge.")


@click.command
@click.option("--limit", type=LIMIT, default=100, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.pass_context
def view(context: click.Context, limit: int, as_json: bool) -> None:
    """Show what waits in the default queue; `queues peek` shows it of any."""
    name = context.obj.app.conf.task_default_queue
    context.invoke(peek, name=name, limit=limit, as_json=as_json)
