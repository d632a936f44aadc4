"""A sweep in the terminal: a grid of trials x stages that lives, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from statistics import median

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fffsweep.sweeps.record import Record, StageState, TrialState

_MARKS = {
    "waiting": ("·", "dim"),
    "running": ("▶", "bold yellow"),
    "complete": ("✓", "green"),
    "reused": ("=", "cyan"),
    "failed": ("✗", "bold red"),
}


class TerminalProgress:
    """Listener for a person: redraws in place on a terminal, says each finished stage run on a line elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._live = Live(console=self._console, refresh_per_second=4) if self._console.is_terminal else None
        self._start = time.monotonic()
        self._said: set[str] = set()
        self._num_running = 0

    def __enter__(self) -> TerminalProgress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def update(self, record: Record, num_running: int) -> None:
        self._num_running = num_running
        if self._live:
            self._live.update(self._grid(record))
            return
        fresh: dict[str, str] = {}
        for trial in record.trials:
            for stage in trial.stages:
                key = stage.planned.run.key
                if stage.state == "complete" and key not in self._said and key not in fresh:
                    fresh[key] = f"{trial.plan.spec.id}: {stage.planned.label} {stage.duration_s or 0:.1f} s on {stage.worker}"
        if fresh:
            self._said |= fresh.keys()
            counts, left = _counts(record), self._left(record)
            self.say("\n".join(f"[{counts['done']}/{counts['total']}] {line}; {left}" for line in fresh.values()))

    def _grid(self, record: Record) -> Table:
        counts = _counts(record)
        elapsed_s = time.monotonic() - self._start
        title = f"{record.config.name}: {counts['done']} of {counts['total']} stage runs, {elapsed_s:.0f} s, {self._left(record)}"
        table = Table(title=title, title_justify="left")
        names = list(dict.fromkeys(stage.planned.run.stage for trial in record.trials for stage in trial.stages))
        for column in ("trial", *names, "now"):
            table.add_column(column)
        for trial in self._shown(record):
            by_name: dict[str, list[StageState]] = defaultdict(list)
            for stage in trial.stages:
                by_name[stage.planned.run.stage].append(stage)
            running = [stage for stage in trial.stages if stage.state == "running"]
            table.add_row(trial.plan.spec.id, *(_marks(by_name[name]) for name in names), "; ".join(map(_describe, running[:2])))
        return table

    def _shown(self, record: Record) -> list[TrialState]:
        """All trials if they fit on the screen, else those that something can be said of now."""
        room = max(5, self._console.height - 6)
        if len(record.trials) <= room:
            return record.trials
        return [trial for trial in record.trials if trial.state in ("running", "failed")][-room:]

    def _left(self, record: Record) -> str:
        """Time left, from the durations seen so far, as if as many runs went on at once as now."""
        seen: dict[str, dict[str, float]] = defaultdict(dict)
        remaining: dict[str, str] = {}
        for trial in record.trials:
            for stage in trial.stages:
                run = stage.planned.run
                if stage.duration_s is not None:
                    seen[run.stage][run.key] = stage.duration_s
                elif stage.state in ("waiting", "running"):
                    remaining[run.key] = run.stage
        if not remaining:
            return "done"
        if any(name not in seen for name in remaining.values()):
            return f"{len(remaining)} left"
        seconds = sum(median(seen[name].values()) for name in remaining.values()) / max(1, self._num_running)
        return f"{len(remaining)} left, about {seconds:.0f} s"


def _counts(record: Record) -> Counter[str]:
    states = {stage.planned.run.key: stage.state for trial in record.trials for stage in trial.stages}
    return Counter(total=len(states), done=sum(state in ("complete", "reused") for state in states.values()))


def _marks(stages: list[StageState]) -> Text:
    text = Text()
    for stage in stages:
        mark, style = _MARKS[stage.state]
        text.append(mark, style)
    return text


def _describe(stage: StageState) -> str:
    """`pretrain/0 42 % 15,200 tokens/s on host:123`."""
    parts = [stage.planned.label]
    progress = stage.progress or {}
    if progress.get("total"):
        parts.append(f"{100 * progress['done'] / progress['total']:.0f} %")
    parts += [f"{value:,.4g} {name}" for name, value in progress.items() if name not in ("done", "total", "unit")][:2]
    if stage.worker:
        parts.append(f"on {stage.worker}")
    return " ".join(parts)
