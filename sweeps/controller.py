"""The driver of a sweep: hands stage runs to an executor as their inputs appear, and records what comes back.

Started again on the same study it goes on: what has a manifest is reused, what was killed resumes from its checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from fffsweep.pipeline.lease import Claim
from fffsweep.pipeline.remote_store import open_store
from fffsweep.pipeline.stage import Metrics, Resources
from fffsweep.sweeps.book import DONE, ENDED, Book, last_line
from fffsweep.sweeps.config import SweepConfig
from fffsweep.sweeps.decisions import Decisions
from fffsweep.sweeps.executors import Event, Executor, InlineExecutor
from fffsweep.sweeps.ledger import Ledger
from fffsweep.sweeps.limits import check_fits_here
from fffsweep.sweeps.patience import Patience, patient
from fffsweep.sweeps.ray_executor import RayExecutor
from fffsweep.sweeps.ready import ReadyRuns
from fffsweep.sweeps.record import Lease, Record, TrialState, check_extends, check_writable, durations, left_out, load, study_folder
from fffsweep.sweeps.slices import InlineOptions, Remainder, Slice
from fffsweep.sweeps.stopping import ATTEMPT, catching_signals, clear_flags, stop_flag
from fffsweep.sweeps.strategy import Changes, SearchTrials, Strategy
from fffsweep.sweeps.studies import check_sampler
from fffsweep.sweeps.verify import examine

_POLL_S = 0.5
_RETRY_WAIT_S = 2.0  # doubles with every attempt
_RANKS = 10**9  # attempts that a driver may make before its ranks reach those of the next one


class Listener(Protocol):
    """Whoever watches a sweep, such as the terminal."""

    def update(self, record: Record, num_running: int) -> None:
        """The record changed; `num_running` stage runs are under way."""
        ...

    def say(self, line: str) -> None:
        """Something worth a line of its own."""
        ...


@dataclass(frozen=True)
class Outcome:
    """How a sweep ended. Stage runs are counted once each, however many trials share them. remainder: of a part, else None."""

    state: str
    num_run: int
    num_reused: int
    failed_trials: tuple[str, ...]
    wall_s: float
    remainder: Remainder | None = None


def run_sweep(
    config: SweepConfig,
    results: Path,
    listener: Listener,
    executor: str = "ray",
    address: str | None = None,
    options: InlineOptions = InlineOptions(),
) -> Outcome:
    """Run a sweep, or what is left of it, to its end, or as much of it as `options` say.

    Raises ConfigError before anything is started if the study exists with another config, is being driven by another process, the
    options do not fit, or a stage asks for more than the machine has, ConnectionError if the store cannot be reached.
    """
    check_sampler(config)
    options.check(config, executor)
    if executor == "ray" and address is None:
        check_fits_here(config)
    folder = study_folder(results, config.name)
    stored = load(folder)
    check_extends(config, stored)
    check_writable(results)
    open_store(results / "store").has("any")  # a store that refuses from the start is told of, not waited for
    lease = Lease(folder)
    try:
        return Controller(config, None, results, folder, listener, executor, address, stored, lease, options).run()
    finally:
        lease.release()


class Controller:
    """State of one driven sweep. One thread; the executor brings the parallelism."""

    def __init__(
        self,
        config: SweepConfig,
        strategy: Strategy | None,
        results: Path,
        folder: Path,
        listener: Listener,
        executor: str,
        address: str | None,
        stored: dict[str, object] | None,
        lease: Lease,
        options: InlineOptions = InlineOptions(),
    ) -> None:
        self._config, self._listener, self._lease = config, listener, lease
        self._executor_name, self._address = executor, address
        self._patience = Patience(listener.say)
        self._files = open_store(results / "store")
        self._store = patient(self._files, self._patience)
        self._record, self._stored = Record(folder, config, []), stored
        if stored is not None:
            self._record.created_at = float(str(stored["created_at"]))
        self._device, self._slice = options.device, Slice(options, self._store) if options.is_part else None
        self._ledger = Ledger(config, results, self._store, listener.say)
        self._stop_file = stop_flag(folder, os.environ.get(ATTEMPT))
        self._book = Book(self._store, self._record.trials, durations(stored), listener.say)
        decisions = Decisions(folder, partial(self._patience.insist, "results folder"))
        self._strategy = strategy or SearchTrials(config, folder, self._metrics_of, self._ledger.sampling, decisions)
        self._running: dict[str, Resources] = {}
        self._shared, self._alone = (ReadyRuns(self._is_ready, self._resources) for _ in range(2))
        self._attempts: dict[str, int] = defaultdict(int)
        self._not_before: dict[str, float] = {}
        self._told: dict[str, str] = {}
        self._num_run, self._next_update, self._stopping = 0, 0.0, False

    def run(self) -> Outcome:
        start, changes = time.monotonic(), self._strategy.start()
        if self._slice is not None:
            self._slice.check([plan.spec.id for plan in changes.plans])
        clear_flags(self._stop_file.parent, os.environ.get(ATTEMPT))
        self._store.tidy()
        self._event("started", executor=self._executor_name)
        self._adopt(changes)
        self._save(force=True)
        reused = sum(self._book.state(key) == "reused" for key in self._book)
        known = f"reused {reused} of {len(self._book)} stage runs from {self._store.root}" if reused else None
        for line in filter(None, (known, left_out(self._config, self._stored, self._book))):
            self._listener.say(line)
        self._draw(1)
        if not self._book.is_over():
            with catching_signals(self._stop, lambda: self._stopping):
                self._drive()
            self._store.tidy()  # of runs, too, whose process was killed after it published their result
        for trial in self._record.trials:
            if trial.state == "running":  # begun, and nothing runs any more
                trial.state = "waiting"
        failed = tuple(trial.plan.spec.id for trial in self._record.trials if trial.state == "failed")
        unfinished = any(trial.state not in ENDED for trial in self._record.trials)
        self._record.state = "stopped" if unfinished else "failed" if len(failed) == len(self._record.trials) else "complete"
        self._ledger.close()
        if self._ledger.num_untold:
            self._listener.say(
                f"MLflow was not told of {self._ledger.num_untold} runs; "
                f"fffsweep verify {shlex.quote(self._config.name)} --repair tells them"
            )
        self._event("ended", state=self._record.state, failed=failed)
        self._save(force=True)
        remainder = None if self._slice is None or self._stopping else self._slice.remainder(self._book)
        return Outcome(self._record.state, self._num_run, reused, failed, time.monotonic() - start, remainder)

    def _drive(self) -> None:
        executor = self._start_executor()
        try:
            while True:
                self._patience.insist("results folder", self._lease.require)
                if self._stopping or self._patience.insist("results folder", self._stop_file.exists):
                    self._stop()
                if not self._stopping:
                    self._draw(self._num_slots(executor))
                    self._open_next()
                    self._submit_ready(executor)
                if not self._running and (self._stopping or self._book.is_over() or (self._slice is not None and self._slice.is_over)):
                    return
                for event in executor.wait(_POLL_S):
                    self._handle(event)
                self._save()
        finally:
            executor.close()

    def _start_executor(self) -> Executor:
        claim = Claim(self._config.name, self._lease.epoch * _RANKS)
        if self._executor_name == "inline":
            return InlineExecutor(self._files, lambda: self._stopping or self._stop_file.exists(), self._handle, claim, self._device)
        return RayExecutor(self._files, self._stop_file, self._address, claim)

    def _draw(self, num_slots: int) -> None:
        """Take up new trials until enough are under way: one at a point that others have run ends as it comes."""
        while (changes := self._strategy.more(num_slots)).plans:
            self._adopt(changes)
        self._adopt(changes)

    def _open_next(self) -> None:
        """In a part of a sweep, let the next trial begin once the one before has ended."""
        if self._slice is not None and (trial := self._slice.next(self._book)) is not None:
            self._queue(self._book.needed(trial))

    def _queue(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._queue_of(key).add(key, self._book.planned(key).run.inputs.values())

    def _submit_ready(self, executor: Executor) -> None:
        """Fill what is free, first trials first. A run that needs a whole node waits until nothing else can be started, unless nodes are
        kept for such runs."""
        now, capacity = time.monotonic(), executor.capacity

        def accept(key: str) -> bool | None:
            if self._not_before.get(key, 0) > now:
                return False
            wanted = self._resources(key)
            if not capacity.has_room(wanted, self._running.values()):
                if not capacity.fits(wanted):
                    self._say_once(key, capacity.lacking(wanted))
                return None
            self._running[key] = wanted
            return True

        for key in self._shared.take(accept):
            self._submit(key, executor)
        if capacity.bench or not self._shared:
            for key in self._alone.take(accept):
                self._submit(key, executor)

    def _submit(self, key: str, executor: Executor) -> None:
        self._attempts[key] += 1
        for trial, stage in self._book.users(key):
            stage.state, stage.attempts = "running", self._attempts[key]
            if trial.state == "waiting":
                trial.state = "running"
        self._event("submitted", key=key, stage=self._book.planned(key).run.stage, attempt=self._attempts[key])
        executor.submit(self._book.planned(key).run, self._running[key])

    def _queue_of(self, key: str) -> ReadyRuns:
        return self._alone if self._book.planned(key).resources.exclusive else self._shared

    def _resources(self, key: str) -> Resources:
        planned = self._book.planned(key)
        return self._config.limits_of(planned.run.stage).applied(planned.resources)

    def _is_ready(self, key: str) -> bool:
        if key not in self._book or self._book.state(key) != "waiting" or key in self._running:
            return False
        return all(self._book.state(upstream) in DONE for upstream in self._book.planned(key).run.inputs.values())

    def _handle(self, event: Event) -> None:
        if event.kind == "progress":
            if event.key not in self._running:  # heard of after its end, when nothing may need it any more
                return
            for _, stage in self._book.users(event.key):
                stage.worker = event.worker
                stage.progress = event.progress or stage.progress
            self._save()
            return
        self._running.pop(event.key, None)
        if event.kind == "finished":
            self._finished(event)
        elif event.kind == "stopped":
            self._wait_again(event.key)
            self._stopping = True
        else:
            self._failed(event)
        self._save()

    def _finished(self, event: Event) -> None:
        manifest = self._store.get(event.key)
        self._num_run += 1
        self._event("finished", key=event.key, duration_s=manifest.duration_s, worker=event.worker)
        users = list(self._book.users(event.key))
        for trial, stage in users:
            stage.state, stage.duration_s, stage.worker, stage.progress = "complete", manifest.duration_s, event.worker, None
            if trial.state != "complete":
                self._ledger.stage_finished(trial, stage)
        for queue in (self._shared, self._alone):
            queue.done(event.key)
        self._settle([trial for trial, _ in users])

    def _withdraw(self, key: str) -> None:
        """Have a result that is damaged, or gone, made again, unless that is under way already: several of its readers may notice."""
        if key in self._running or self._book.state(key) not in DONE:
            return
        if self._store.has(key):
            if not examine(self._store, key).is_damaged:
                return
            self._store.forget(key)
        self._ledger.withdrawn(key)
        self._wait_again(key)

    def _failed(self, event: Event) -> None:
        """Retry what the infrastructure broke, remake what was damaged, and give up on what the code does wrong."""
        planned = self._book.planned(event.key)
        self._event("failed", key=event.key, fault=event.fault, message=event.message)
        if event.fault in ("busy", "preempted"):  # nobody's fault, so no try is lost
            self._attempts[event.key] -= 1
        retries = self._config.limits_of(planned.run.stage).retries
        retry = event.fault != "code" and self._attempts[event.key] <= (self._config.retries if retries is None else retries)
        if retry and event.damaged_key is not None:
            self._withdraw(event.damaged_key)
        if retry:
            if event.fault == "infrastructure":
                self._store.has(event.key)  # an outage of the store is waited for here and costs one try, not all of them
            self._say_once(event.key, f"{last_line(event.message)}; trying again")
            wait_s = 0 if event.fault == "preempted" else _RETRY_WAIT_S * 2 ** max(0, self._attempts[event.key] - 1)
            self._not_before[event.key] = time.monotonic() + min(wait_s, 60.0)
            self._wait_again(event.key)
            return
        self._listener.say(f"{planned.label} failed: {last_line(event.message)}")
        self._book.set_failed(event.key)
        for trial, stage in self._book.users(event.key):
            stage.state, stage.error, stage.worker = "failed", event.message, event.worker
            self._ledger.stage_failed(trial, stage)
        self._settle(list(self._record.trials))

    def _adopt(self, changes: Changes) -> None:
        """Do what the strategy says: trials come, go on, or end."""
        for name, constraints in changes.tell.items():
            self._ledger.tell(self._book.trial(name), constraints)
        touched = []
        for plan in changes.plans:
            trial, gained = self._book.adopt(plan)
            if len(gained) == len(trial.stages):
                self._ledger.open_trial(trial)
            if self._slice is not None:
                self._slice.changed(plan.spec.id)
            elif plan.spec.id not in changes.pruned:
                self._queue(stage.planned.run.key for stage in trial.stages)
            for stage in gained:
                if stage.state in DONE:
                    self._ledger.stage_finished(trial, stage)
            touched.append(trial)
        for name, reason in changes.pruned.items():
            trial = self._book.trial(name)
            trial.state, trial.error = "pruned", reason
            self._ledger.trial_pruned(trial)
        self._settle(touched)

    def _settle(self, trials: list[TrialState]) -> None:
        """Close trials that are whole, or can no longer be, let others stand at their rung, and act on what the strategy makes of it."""
        for trial in trials:
            if trial.state in ENDED or trial.state == "paused":
                continue
            if all(stage.state in DONE for stage in trial.stages):
                trial.state = "complete" if trial.plan.is_whole else "paused"
                if trial.plan.is_whole:
                    self._ledger.trial_finished(trial)
                self._adopt(self._strategy.finished(trial.plan.spec.id))
            elif (broken := self._book.broken(trial)) is not None:
                changes = self._strategy.failed(trial.plan.spec.id)
                if (seeds := changes.kept.get(trial.plan.spec.id)) is None:
                    trial.state, trial.error = "failed", broken
                    self._ledger.trial_failed(trial)
                else:
                    self._event("kept", trial=trial.plan.spec.id, seeds=seeds, reason=broken)
                    self._listener.say(f"trial {trial.plan.spec.id} stays as it was, with {seeds} of its seeds, and gets no more: {broken}")
                self._adopt(changes)

    def _metrics_of(self, key: str) -> Metrics | None:
        return None if (manifest := self._book.take(key)) is None else manifest.metrics

    def _num_slots(self, executor: Executor) -> int:
        """Searched trials that can go on side by side; inline it is one after another."""
        if self._executor_name == "inline":
            return 1
        training = self._config.stages.pretrain or self._config.stages.convert
        return max(1, executor.capacity.cpus // (training.cpus if training is not None else 1))

    def _wait_again(self, key: str) -> None:
        self._book.set_state(key, "waiting")
        self._queue_of(key).touch(key)

    def _save(self, force: bool = False) -> None:
        with self._patience.tolerating():
            self._record.save(force)
        start = time.monotonic()
        if force or start >= self._next_update:  # looking at a whole study costs: at most a twentieth of the time
            self._listener.update(self._record, len(self._running))
            self._next_update = time.monotonic() + 20 * (time.monotonic() - start)

    def _say_once(self, key: str, what: str) -> None:
        """Something about a stage run, unless it was the last thing said of it."""
        if self._told.get(key) != what:
            self._listener.say(f"{self._book.planned(key).label}: {what}")
        self._told[key] = what

    def _event(self, kind: str, **facts: object) -> None:
        with self._patience.tolerating():
            self._record.event(kind, **facts)

    def _stop(self) -> None:
        """Have running stages save themselves; asked for again and again, as a full disk may refuse the flag that they poll."""
        if not self._stopping:
            self._listener.say("stopping: running stages save their state; the same command goes on from there")
        self._stopping = True
        with contextlib.suppress(OSError):
            self._stop_file.touch()
