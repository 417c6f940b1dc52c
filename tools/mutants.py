"""Mutants: one change of the code each, which has to be seen by a test; ``make mutants`` runs them.

Each is made in a copy of ``src``, never in the work tree, and only the tests that it names are run.
``NAME ...`` runs only those whose file has one of these names in it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path("ws_celery")

_PYTEST = (
    "-m",
    "pytest",
    "-x",
    "-q",
    "-p",
    "no:randomly",
    "-p",
    "no:cacheprovider",
    "--timeout=20",
)

#: Seconds that the tests of one mutant may take: more than they need on a busy machine. A test that
#: does not end is ended by pytest, unless its fixtures do not end either.
_PATIENCE = 240

#: What is said of a mutant that makes them take longer.
HANGS = "its tests do not end"

#: What is said of a mutant that no test sees, though nobody has told a reason.
SURVIVED = "SURVIVED"

#: What is said of a mutant whose tests could not be run; it stops no other.
NOT_RUN = "was not run"

#: What pytest returns when a test has failed.
_FAILED = 1


class NotRun(Exception):
    """Tests that could not be run: none was selected, all were skipped, or pytest has failed."""


class Mutant(NamedTuple):
    """A change, and who is to see it.

    :param file: below the package.
    :param old: what occurs there once.
    :param new: what takes its place.
    :param tests: a file below ``tests``, and after a blank what pytest's ``-k`` selects of it.
    :param reason: why nothing is to be seen.
    """

    file: str
    old: str
    new: str
    tests: str
    reason: str = ""


# fmt: off
CLAIMS, RETRIES = "integration/test_outbox_claims.py", "integration/test_outbox_retries.py"
OUTBOX, CHAINS = "integration/test_outbox.py", "integration/test_outbox_chains.py"
LATE, OTHERS = "integration/test_outbox_late.py", "integration/test_outbox_of_others.py"
OWN, RELAY = "integration/test_own_commits.py", "integration/test_relay.py"
SESSIONS, SPOOL = "integration/test_outbox_sessions.py", "integration/test_spool.py"
BEAT, SAVEPOINTS = "integration/test_beat.py", "integration/test_savepoints.py"
RUNS, DISPATCH = "unit/test_runs.py", "unit/test_dispatch.py"
FLUSH = "unit/test_publishing.py"

MUTANTS = (
    # The outbox: a run
    Mutant("outbox/runs.py", "self._outbox.attempt(rows.forget_expiry, self._row_id)", "pass", f"{LATE} not_undone"),
    Mutant("outbox/runs.py", "if not self._execute(txn, rows.is_there, self._row_id)", "if False", f"{CLAIMS} dead_letter_that_comes_late or duplicate"),
    Mutant("outbox/runs.py", "if self._txn is not txn", "if self._txn is None", f"{OWN} abort or once"),
    Mutant("outbox/runs.py", "        self.end(txn)\n", "", f"{OWN} once or dies or ends"),
    Mutant("outbox/runs.py", ' or txn.status != "Committed"', "", f"{OWN} go_on_after"),
    Mutant("outbox/runs.py", "run_of(context).attempts_left = 0", "pass", f"{OWN} conflict"),
    Mutant("outbox/runs.py", "self._execute(txn, rows.delete, [self._row_id]) == 1", "self._execute(txn, rows.claim, self._row_id)", f"{OWN} outlives"),
    Mutant("outbox/runs.py", "self._row_id, self._txn = self._rest, None", "self._row_id = self._rest", f"{OWN} go_on_after", "no later transaction is the one that has committed: it is only let go"),
    Mutant("transactional.py", "self.request.callbacks = self.request.chain = None", "pass", CHAINS),
    Mutant("outbox/runs.py", "(result,), chain=rest, **options", "(result,), **options", f"{OUTBOX} chain"),
    Mutant("outbox/runs.py", "and error.statement is None", "and False", f"{OUTBOX} cannot_connect"),
    Mutant("outbox/runs.py", "return isinstance(error, DBAPIError) and error.connection_invalidated", "return False", f"{OUTBOX} database"),
    Mutant("outbox/runs.py", "rows.forget_expiry(connection, self._row_id)", "pass", f"{CHAINS} expire"),
    Mutant("outbox/runs.py", "        run.is_settled = True\n        self._task", "        self._task", CHAINS),
    Mutant("outbox/runs.py", "self._task.request.callbacks = self._task.request.chain = None", "pass", CHAINS),
    Mutant("outbox/runs.py", "if not run.is_settled and not outbox.rows.delete", "if not outbox.rows.delete", f"{CHAINS} retry"),
    Mutant("outbox/runs.py", "outbox.keep(connection, publications)\n        except", "pass\n        except", CHAINS),
    # The outbox: its rows
    Mutant("outbox/store.py", 'headers.get("id") is None or not', "not", f"{OUTBOX} event"),
    Mutant("outbox/store.py", "wait - self.lease / 10 if far", "wait if far", f"{RELAY} far_eta"),
    Mutant("app.py", "for each in publications if not each.waits]", "for each in publications]", f"{OUTBOX} far_eta"),
    Mutant("outbox/store.py", "if each.anonymous and", "if each.task_name not in self.app.tasks and", f"{RELAY} knows_other"),
    Mutant("outbox/runs.py", "row_id = None if run.is_settled else row", "row_id = row", RETRIES),
    Mutant("outbox/runs.py", "first.row_id = uuid4()", "first.row_id = row_id", f"{RETRIES} before_the_retry"),
    Mutant("outbox/runs.py", " or task.request.id != task_id", "", RETRIES),
    Mutant("outbox/rows.py", "and_(columns.id.in_(list(ids)), columns.due_at.is_not(None))", "columns.id.in_(list(ids))", f"{OUTBOX} given_up_late"),
    Mutant("outbox/rows.py", ".values(due_at=self._later, deliveries=0, died_at", ".values(due_at=self._later, died_at", f"{OUTBOX} retry"),
    Mutant("outbox/rows.py", "columns.deliveries + 1 >= most", "columns.deliveries + 1 > most", f"{OUTBOX} loss"),
    Mutant("outbox/rows.py", "lease=case((longest, LONGEST_LEASE), else_=columns.lease * 2)", "lease=columns.lease * 2", f"{RELAY} never_longer"),
    Mutant("outbox/rows.py", "columns.deliveries > 0, alive)", "columns.deliveries > 0)", f"{RELAY} failed_meanwhile"),
    Mutant("outbox/rows.py", '"lease": columns.lease / 2}', '"lease": columns.lease}', f"{RELAY} counted or doubled or delivery"),
    Mutant("outbox/rows.py", ".offset(length - 1)", ".offset(length)", f"{RELAY} queue or backlog or waits"),
    Mutant("outbox/rows.py", 'due = self._due(limit).cte("due")', 'due = self._due(limit - 1).cte("due")', f"{RELAY} two_relays and postgres"),
    Mutant("outbox/worker.py", "(states.SUCCESS, states.IGNORED)", "(states.SUCCESS,)", f"{OUTBOX} commits_nothing"),
    Mutant("outbox/worker.py", " or isinstance(exception, WorkerLostError)", "", f"{OUTBOX} killed"),
    Mutant("outbox/worker.py", "self._outbox.attempt(self._outbox.rows.delete_expired, row_id)", "self.delete(row_id)", LATE),
    Mutant("outbox/store.py", 'options["headers"]["expires"] = None', "pass", LATE),
    Mutant("outbox/store.py", "if not same:", "if False:", f"{RELAY} of_another_task"),
    Mutant("outbox/store.py", '"declare", "exchange", "expiration"', '"declare", "exchange"', LATE, "Celery gives none; of a call that does, nothing is promised when the relay sends it"),
    Mutant("outbox/store.py", "publication.anonymous = anonymous", "pass", f"{RELAY} other"),
    Mutant("outbox/store.py", "        self._hooked = False\n        self.write()", "        self.write()", f"{OUTBOX} hook", "what a later hook dispatches is written as the data manager begins to commit, too"),
    Mutant("outbox/store.py", "if any(each.tx.is_active for each in mine)", "if True", SESSIONS),
    Mutant("outbox/store.py", "            and publication.row_id not in self._written\n", "", f"{OUTBOX} hook or listener"),
    Mutant("outbox/store.py", "and publication not in self._late", "", SESSIONS, "no session commits before all is written, so that nothing is late then"),
    Mutant("outbox/relay.py", "row.deliveries >= self", "row.deliveries > self", f"{RELAY} too_often"),
    Mutant("outbox/relay.py", "elif row.error is not None:", "elif False:", f"{OWN} dies or outlives"),
    Mutant("outbox/relay.py", "        except BrokerUnavailable:\n            self.release(ids)\n", "        except BrokerUnavailable:\n", f"{RELAY} broker"),
    Mutant("outbox/relay.py", "self._rows.postpone(connection, early)", "pass", f"{RELAY} eta"),
    Mutant("outbox/relay.py", "if row.queue and _was_sent(row)", "if row.queue", f"{RELAY} others_wait"),
    # The relay
    Mutant("outbox/relay.py", "            self.canary.declare_all()\n", "            self.canary.declare_all()\n            self.canary.put()\n", f"{RELAY} loss"),
    Mutant("outbox/relay.py", "return batch.leased == self.batch", "return False", f"{RELAY} two_relays"),
    Mutant("outbox/relay.py", "due is None or due <= 0", "due is None", f"{RELAY} locked or runs or not_due"),
    Mutant("outbox/relay.py", "publications[number:])", "publications[number + 1 :])", f"{RELAY} between_two"),
    Mutant("outbox/relay.py", "        self._outbox.published(publications)\n", "", f"{RELAY} another_program"),
    Mutant("outbox/relay.py", "if not self.is_there():", "if False:", f"{RELAY} met_while_sending"),
    Mutant("outbox/relay.py", "> _ENOUGH:", ">= 1:", f"{RELAY} lost or canaries"),
    # Transactions
    Mutant("transactions.py", "        txn.set_data(self._app, None)\n", "", DISPATCH),
    Mutant("transactions.py", "if not (committed and publications)", "if not publications", DISPATCH),
    Mutant("transactions.py", "self._kept = set(publications)", "self._kept = publications", DISPATCH),
    Mutant("transactions.py", "        if self._journal is not None:\n            self._journal.write()\n", "        pass\n", SESSIONS),
    Mutant("transactions.py", ' and txn.status != "Commit failed"', "", DISPATCH),
    Mutant("transactions.py", "            if not begun:\n                watcher.forget_begun()\n", "", f"{DISPATCH} made_in_passing_before"),
    Mutant("transactions.py", "        self._begun = None\n        if not self.is_active()", "        if not self.is_active()", DISPATCH),
    Mutant("transactions.py", "return txn if txn is None or txn is received_in() else None", "return txn", DISPATCH),
    Mutant("transactions.py", "and last.request is request and", "and", SESSIONS),
    Mutant("transactions.py", " and last.session_transactions == opened", "", f"{SAVEPOINTS} savepoint"),
    Mutant("transactions.py", "or any(txn.getAfterAbortHooks())", "", DISPATCH),
    Mutant("transactions.py", "session.registry() if session.registry.has() else None", "session.registry()", f"{SAVEPOINTS} scoped"),
    Mutant("transactions.py", "session_transaction = session_transaction.parent", "break", f"{SAVEPOINTS} outer"),
    Mutant("publishing.py", "row_id is not None and not publication.anonymous:", "row_id is not None:", f"{CLAIMS} tell_its_row"),
    # After the commit
    Mutant("publishing.py", "        self._down_until = monotonic() + self.timeout\n", "", FLUSH),
    Mutant("publishing.py", "if self.spool.waiting or self.spool.in_hand:", "if False:", f"{FLUSH} overtakes"),
    Mutant("publishing.py", "if self.spool.waiting or self.spool.in_hand:", "if self.spool.waiting:", f"{FLUSH} overtakes"),
    Mutant("publishing.py", "if any(publication.anonymous for publication in sent):", "if False:", f"{OUTBOX} another_program"),
    Mutant("spool.py", "others = [each for each in publications[attempt.begun :]", "others = [each for each in publications[attempt.sent :]", f"{SPOOL} refused or frozen or still"),
    Mutant("spool.py", "doubtful if not each.row_id]", "doubtful]", f"{OUTBOX} may_have_been_sent"),
    Mutant("publishing.py", "if start and monotonic() > deadline", "if monotonic() > deadline", f"{SPOOL} time_is_over"),
    Mutant("publishing.py", ' or attempt.begun == 1:', ":", f"{SPOOL} rabbitmq_refuses"),
    Mutant("publishing.py", " or isinstance(attempt.error, PartlyRefused)", "", f"{SPOOL} refused"),
    Mutant("spool.py", "self.waiting.extendleft(reversed(left))", "self.waiting.extendleft(left)", f"{SPOOL} demoted"),
    Mutant("spool.py", " - sum(map(_bytes_of, batch))", "", f"{SPOOL} large or demoted"),
    Mutant("spool.py", "if passes and attempt.refused and", "if attempt.refused and", f"{SPOOL} demoted"),
    Mutant("spool.py", "        self._refused = attempt.refused\n", "", f"{SPOOL} never_takes"),
    Mutant("spool.py", "or self._bytes > LARGEST", "", f"{SPOOL} too_large"),
    # Tasks
    Mutant("transactional.py", "conflict = cut_off = False", "pass", f"{OWN} conflict"),
    Mutant("transactional.py", "run.manager and run.attempts_left and exc", "run.manager and exc", f"{RUNS} retry_for_a_conflict"),
    Mutant("transactional.py", "        self._send_retries(run)\n        run.claim = None\n", "        run.claim = None\n", RETRIES),
    Mutant("transactional.py", "follow_up = None  # the row is the retry's", "pass", RETRIES, "without a claim nobody calls it: an empty transaction more"),
    Mutant("transactional.py", "        run.claim = None\n        return True", "        return False", RETRIES),
    Mutant("transactional.py", "        run.claim = None\n", "", f"{CLAIMS} and_a_replacement"),
    Mutant("transactional.py", "if not (run.replacement or follow_up):", "if not run.replacement:", f"{CHAINS} next_of_a_chain"),
    Mutant("transactional.py", "        if _is_ended(run.manager):\n            self._begin_again(run, request)\n", "", f"{OWN} end_its_transaction"),
    Mutant("transactional.py", " and not isinstance(error, Abandoned)", "", f"{CLAIMS} without_effect"),
    Mutant("tasks.py", "headers.pop(ROW_HEADER, None)", "pass", f"{CLAIMS} of_its_own and sqlite"),
    Mutant("tasks.py", "self.app.transactions.abort_leftovers(begun=True)", "pass", f"{RUNS} left"),
    Mutant("transactions.py", "            transaction.abort()\n", "            pass\n", f"{RUNS} left"),
    # Beat
    Mutant("beat/claims.py", "                if name in entries  # a", "                #  a", f"{BEAT} case"),
    Mutant("beat/claims.py", "self._outbox.keep(connection, publications)", "pass", f"{BEAT} three_beats or written_together"),
    Mutant("beat/claims.py", "or claim.known.last_run_at or now", "or now", f"{BEAT} result", "sent_at is written with each tick: only rows of an earlier version lack it"),
    Mutant("beat/claims.py", "claim.known.sent_at or claim.known.last_run_at", "claim.known.last_run_at", f"{BEAT} result"),
    Mutant("beat/claims.py", "        self._broker_failed = True\n        self._app", "        self._app", f"{BEAT} broker"),
    Mutant("beat/claims.py", "is not None and claim.tick is None:", "is not None:", f"{BEAT} due_and_wanted"),
    Mutant("beat/claims.py", " and not self.waits\n", "\n", f"{BEAT} not_written"),
    Mutant("beat/scheduler.py", "or known.seen_at is None", "", f"{BEAT} notes"),
    Mutant("beat/claims.py", "self.known.run_requested_at if self.waits else None", "None", f"{BEAT} wanted_run"),
    Mutant("outbox/runs.py", 'late or outbox.engine', 'outbox.engine', f"{CLAIMS} without_effect"),
)
# fmt: on


def killer_of(mutant: Mutant, source: Path) -> str:
    """Return the test that fails with a mutant, or ``""``; ``source`` is the copy to change.

    :raises NotRun: if nobody can tell.
    """
    path = source / SOURCE / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        sys.exit(f"{mutant.file} does not have this once: {mutant.old!r}. Write it anew.")
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        return failure_of(pytest(source, *_selected(mutant.tests)))
    except subprocess.TimeoutExpired:
        return HANGS
    finally:
        path.write_text(text)


def _selected(tests: str) -> Iterator[str]:
    pattern, _, names = tests.partition(" ")
    yield from sorted(map(str, (ROOT / "tests").glob(pattern)))
    if names:
        yield from ("-k", names)


def pytest(
    source: Path, *options: str, patience: float | None = _PATIENCE
) -> subprocess.CompletedProcess[str]:
    """Run tests with another source."""
    environment = {**os.environ, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *_PYTEST, *options]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=patience,
    )


def failure_of(done: subprocess.CompletedProcess[str]) -> str:
    """Return the test that has failed, or ``""`` if none has.

    :raises NotRun: if none has passed either.
    """
    if done.returncode != _FAILED and (done.returncode or " passed" not in done.stdout):
        raise NotRun(f"{done.stdout}{done.stderr}".strip())
    found = re.search(r"^(?:FAILED|ERROR) (tests/.+?)(?: - |$)", done.stdout, re.MULTILINE)
    return found[1] if found else ""


def fate_of(mutant: Mutant, source: Path, killers: set[str]) -> str:
    """Return what has become of a mutant; put who has killed it into ``killers``."""
    try:
        killer = killer_of(mutant, source)
    except NotRun as error:
        *_, last = ["", *str(error).splitlines()]
        return f"{NOT_RUN}: {last}"
    if killer:
        killers.add(killer)
        return killer
    return f"expected: {mutant.reason}" if mutant.reason else SURVIVED


def main() -> None:
    """Print what has become of each mutant; fail if one has survived without a reason."""
    chosen = [
        each for each in MUTANTS if not sys.argv[1:] or any(a in each.file for a in sys.argv[1:])
    ]
    fates: list[str] = []
    killers: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(shutil.copytree(ROOT / "src", Path(folder) / "src"))
        for mutant in chosen:
            fates.append(fate_of(mutant, source, killers))
            print(
                f"{mutant.file}: {mutant.old!r:.60} -> {mutant.new!r:.40}: {fates[-1]}", flush=True
            )
        # Who kills has to be well without a mutant.
        wanted = sorted(killers - {HANGS})
        if unwell := wanted and failure_of(pytest(source, *wanted, patience=None)):
            sys.exit(f"{unwell} fails without a mutant, too.")
    survivors = fates.count(SURVIVED)
    not_run = sum(fate.startswith(NOT_RUN) for fate in fates)
    print(
        f"{len(chosen)} mutants, {survivors} have survived without a reason, {not_run} were not run"
    )
    sys.exit(bool(survivors or not_run))


if __name__ == "__main__":
    main()
