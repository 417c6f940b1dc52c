"""``ws-celery queues``, ``view`` and ``purge``: what waits, and throwing it away."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import click
from celery.bin.purge import purge as celery_purge

from ws_celery import inspection
from ws_celery.app import PyramidCelery
from ws_celery.cli.tables import (
    Answer,
    Listing,
    arguments_of,
    confirm,
    counted,
    echo,
    limit,
    showing,
    time_of,
    with_app,
    yes,
)

__all__ = (
    "clean",
    "purge",
    "queues",
    "view",
)

#: Of how many messages a progress bar is worth while.
_MANY = 5000


def _known(number: int | None) -> str:
    return "-" if number is None else str(number)


def _age(since: datetime | None) -> str:
    if since is None:
        return "-"
    age = datetime.now(timezone.utc) - since
    return str(timedelta(seconds=max(int(age.total_seconds()), 0)))


def _remarks(state: inspection.QueueState) -> Iterator[str]:
    if not state.exists:
        yield "not declared yet"
    if not state.is_used:
        yield "not of this application"
    if any(length for step, length in state.priorities.items() if step):
        steps = (f"{step}: {length}" for step, length in state.priorities.items() if length)
        yield f"by priority {', '.join(steps)}"


_QUEUES: Listing[inspection.QueueState] = Listing(
    {
        "QUEUE": lambda state: state.name,
        "WAITING": lambda state: str(state.waiting) if state.exists else "-",
        "UNACKED": lambda state: _known(state.unacked),
        "CONSUMERS": lambda state: _known(state.consumers),
        "OLDEST": lambda state: _age(state.oldest),
        "": lambda state: ", ".join(_remarks(state)),
    },
    giving_way=("", "QUEUE"),
)

_MESSAGES: Listing[inspection.WaitingMessage] = Listing(
    {
        "ID": lambda message: message.id or "-",
        "TASK": lambda message: message.task or "-",
        "ARGUMENTS": lambda message: message.problem or arguments_of(message.arguments),
        "ETA": lambda message: time_of(message.eta),
        "RETRIES": lambda message: str(message.retries),
        "ORIGIN": lambda message: message.origin or "",
    },
    giving_way=("ARGUMENTS", "ORIGIN", "TASK"),
)


@click.group(invoke_without_command=True)
@showing
def queues(app: PyramidCelery) -> Answer:
    """Show how much waits in which queue; look into one, empty it, delete it."""
    states = inspection.queue_states(app)
    hidden = any(state.unacked is None for state in states if state.exists)
    said = "The broker does not tell how many messages workers have in hand (UNACKED)."
    return _QUEUES.answer(states, after=[said] if hidden else [])


@queues.command
@click.argument("name", metavar="QUEUE")
@limit(10)
@showing
def peek(app: PyramidCelery, name: str, limit: int) -> Answer:
    """Show the messages that are taken next, and leave them there."""
    return _peeked(app, name, limit)


@click.command
@limit(100)
@showing
def view(app: PyramidCelery, limit: int) -> Answer:
    """Show what waits in the default queue; `queues peek` shows it of any."""
    return _peeked(app, app.conf.task_default_queue, limit)


def _peeked(app: PyramidCelery, name: str, limit: int) -> Answer:
    peeked = inspection.peek_queue(app, name, limit)
    of_outbox = (
        "The broker cannot show messages without taking them. These are the unfinished "
        "dispatches to the queue, of which workers may have some:"
    )
    answer = _MESSAGES.answer(
        peeked.messages,
        before=[of_outbox] if peeked.source == "outbox" else [],
        after=[f"{len(peeked.messages)} shown."],
    )
    return replace(answer, data={"source": peeked.source, "messages": answer.data})


@queues.command(name="purge")
@click.argument("name", metavar="QUEUE")
@yes
@with_app
def purge_one(app: PyramidCelery, name: str, yes: bool) -> None:
    """Throw away what waits in a queue, for ever."""
    _throw_away(app, name, yes, "Throw away {numbers} of the queue {name}, for ever?")


@queues.command
@click.argument("name", metavar="QUEUE")
@yes
@with_app
def delete(app: PyramidCelery, name: str, yes: bool) -> None:
    """Throw away a queue, and what waits in it, for ever."""
    question = "Delete the queue {name} with {numbers}, for ever?"
    _throw_away(app, name, yes, question, inspection.delete_queue)
    echo(f"Deleted the queue {name}.")


queues.add_command(copy.copy(delete), "drop")


def _throw_away(
    app: PyramidCelery,
    name: str,
    yes: bool,
    question: str,
    action: Callable[..., inspection.Purged] = inspection.purge_queue,
) -> None:
    state = inspection.queue_state(app, name)
    if not yes:
        confirm(question.format(numbers=_numbers(state), name=name))
    if state.waiting < _MANY:
        purged = action(app, name)
    else:
        with click.progressbar(length=state.waiting, label=name) as bar:
            purged = action(app, name, bar.update)
    _print_purged(app, purged.messages, purged.rows)


def _numbers(state: inspection.QueueState) -> str:
    text = counted(state.waiting, "message")
    unacked = f"{state.unacked} more in the hands of workers" if state.unacked else ""
    consumers = counted(state.consumers, "consumer") if state.consumers else ""
    more = ", ".join(filter(None, (unacked, consumers)))
    return f"{text} ({more})" if more else text


@with_app
def _purge_all(
    app: PyramidCelery,
    force: bool,
    queues: Sequence[str] | None,
    exclude_queues: Sequence[str] | None,
    **_: object,
) -> None:
    """Throw away what waits in all queues of the application, for ever.

    There is no undo.
    """
    used = [state.name for state in inspection.queue_states(app) if state.is_used]
    names = [name for name in queues or used if name not in (exclude_queues or ())]
    total = sum(inspection.queue_state(app, name).waiting for name in names)
    if not force:
        confirm(f"Throw away {counted(total, 'message')} of {', '.join(names)}, for ever?")
    purged = [inspection.purge_queue(app, name) for name in names]
    _print_purged(app, sum(each.messages for each in purged), sum(each.rows for each in purged))


purge = copy.copy(celery_purge)
purge.callback = _purge_all
purge.help = _purge_all.__doc__

clean = copy.copy(purge)
clean.name = "clean"
clean.short_help = "Throw away what waits in all queues; the same as purge."


def _print_purged(app: PyramidCelery, messages: int, rows: int) -> None:
    text = f"Threw away {counted(messages, 'message')}"
    settled = f" and {counted(rows, 'row')} of the outbox" if app.outbox is not None else ""
    echo(f"{text}{settled}.")
