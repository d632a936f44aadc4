"""The trials of a driven sweep and the stage runs that they share: which run is how far, and who needs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from fffsweep.pipeline.store import DamagedArtifact, Manifest, Store
from fffsweep.sweeps.graph import PlannedStage, TrialPlan
from fffsweep.sweeps.record import StageState, TrialState

DONE = ("complete", "reused")
READ_BY_DRIVER = ("collect", "rung")
ENDED = ("complete", "failed", "pruned")


class Book:
    """Grows with the sweep: trials are added, and plans of trials become longer. Used by one thread.

    `trials` is the record's own list, in the order in which they came. durations: seconds of stage runs by key as an earlier record had
    them, so that a large study goes on without its manifests being read one by one; those that the driver reads itself are read.
    say: told of results that cannot be read.
    """

    def __init__(
        self,
        store: Store,
        trials: list[TrialState],
        durations: Mapping[str, float] = MappingProxyType({}),
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._store, self.trials, self._say = store, trials, say
        self._durations = {key: durations[key] for key in store.keys() if key in durations} if durations else {}  # noqa: SIM118 - no dict
        self._by_id: dict[str, TrialState] = {}
        self._by_key: dict[str, list[tuple[TrialState, StageState]]] = {}
        self._failed: set[str] = set()

    def adopt(self, plan: TrialPlan) -> tuple[TrialState, list[StageState]]:
        """Take up a plan, of a new trial or in the place of what a trial had. Returns the trial and the stages that it gained.

        Runs that the plan no longer has stay known, as other trials may read them and some may be under way; nothing reads a
        collected result.
        """
        trial = self._by_id.get(plan.spec.id)
        if trial is None:
            trial = self._by_id[plan.spec.id] = TrialState(plan, [])
            self.trials.append(trial)
        known = {(stage.planned.label, stage.planned.run.key): stage for stage in trial.stages}
        kept = {(planned.label, planned.run.key) for planned in plan.stages}
        for place, stage in known.items():
            if place not in kept and stage.planned.run.stage == "collect" and stage.state in DONE:
                users = self._by_key[place[1]]
                users[:] = [(user, state) for user, state in users if state is not stage]
                if not users:
                    del self._by_key[place[1]]
        gained = [StageState(planned) for planned in plan.stages if (planned.label, planned.run.key) not in known]
        for stage in gained:
            known[stage.planned.label, stage.planned.run.key] = stage
            self._enter(trial, stage)
        trial.plan, trial.state, trial.error = plan, "waiting", None
        trial.stages = [known[planned.label, planned.run.key] for planned in plan.stages]
        return trial, gained

    def _enter(self, trial: TrialState, stage: StageState) -> None:
        key = stage.planned.run.key
        users = self._by_key.setdefault(key, [])
        if users:
            first = users[0][1]
            stage.state, stage.duration_s, stage.attempts, stage.error = first.state, first.duration_s, first.attempts, first.error
        elif key in self._durations and stage.planned.run.stage not in READ_BY_DRIVER:
            stage.state, stage.duration_s = "reused", self._durations[key]
        elif (manifest := self.take(key)) is not None:
            stage.state, stage.duration_s = "reused", manifest.duration_s
        users.append((trial, stage))

    def take(self, key: str) -> Manifest | None:
        """A key's manifest, None if there is none. A damaged one is withdrawn, so that its result is made again."""
        try:
            return self._store.get(key)
        except KeyError:
            return None
        except DamagedArtifact as error:
            self._say(f"{error}; it is withdrawn, and its result made again")
            self._store.forget(key)
            return None

    def __len__(self) -> int:
        return len(self._by_key)

    def __contains__(self, key: str) -> bool:
        return key in self._by_key

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_key)

    def trial(self, name: str) -> TrialState:
        return self._by_id[name]

    def users(self, key: str) -> list[tuple[TrialState, StageState]]:
        """Every trial that needs a stage run, with its state of it."""
        return self._by_key[key]

    def needed(self, trial: TrialState) -> list[str]:
        """Keys of all runs that a trial needs, those that it reads of other trials too, upstream before downstream."""
        found: dict[str, None] = {}

        def take(key: str) -> None:
            if key not in found and key in self:
                for upstream in self.planned(key).run.inputs.values():
                    take(upstream)
                found[key] = None

        for stage in trial.stages:
            take(stage.planned.run.key)
        return list(found)

    def planned(self, key: str) -> PlannedStage:
        return self._by_key[key][0][1].planned

    def state(self, key: str) -> str:
        return self._by_key[key][0][1].state

    def set_state(self, key: str, state: str) -> None:
        for _, stage in self._by_key[key]:
            stage.state = state  # type: ignore[assignment]

    def set_failed(self, key: str) -> None:
        """From now on trials that need this run are broken."""
        self._failed.add(key)

    def broken(self, trial: TrialState) -> str | None:
        """Why a trial cannot be finished: a stage of its own, or one that it reads of another trial, failed. None if it can."""
        if not self._failed:
            return None
        for stage in trial.stages:
            for key in (stage.planned.run.key, *stage.planned.run.inputs.values()):
                if key in self._failed:
                    user, state = self._by_key[key][0]
                    whose = "" if user is trial else f" of trial {user.plan.spec.id}"
                    return f"{state.planned.label}{whose} failed: {last_line(state.error)}"
        return None

    def is_over(self) -> bool:
        """Whether no trial has anything left to do."""
        return all(trial.state in ENDED for trial in self.trials)


def last_line(message: str | None) -> str:
    """What a traceback comes down to."""
    return ((message or "").strip().splitlines() or ["no message"])[-1]
