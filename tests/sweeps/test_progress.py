"""The terminal's view of a sweep: plain lines where nobody can see a redraw, a grid where someone can."""

import io
from types import SimpleNamespace

from rich.console import Console

from fffsweep.pipeline.stage import Resources, StageRun
from fffsweep.sweeps.graph import PlannedStage
from fffsweep.sweeps.progress import TerminalProgress
from fffsweep.sweeps.record import StageState, TrialState


def record_of(*states):
    stages = []
    for number, state in enumerate(states):
        planned = PlannedStage(f"finetune/0/stsb/{number}", StageRun("finetune", 1, {}, number), Resources(), 0)
        stages.append(StageState(planned, state, duration_s=4.0 if state in ("complete", "reused") else None, worker="host:1"))
        if state == "running":
            stages[-1].progress = {"done": 3, "total": 4, "unit": "steps", "loss": 0.25}
    plan = SimpleNamespace(spec=SimpleNamespace(id="1x8"))
    return SimpleNamespace(config=SimpleNamespace(name="toy"), trials=[TrialState(plan, stages)])


def shown(*records, terminal):
    out = io.StringIO()
    with TerminalProgress(Console(file=out, force_terminal=terminal, width=160)) as progress:
        for record in records:
            progress.update(record, 1)
    return out.getvalue()


def test_plain_lines_say_each_finished_run_once():
    lines = shown(record_of("complete", "running"), record_of("complete", "complete"), terminal=False).splitlines()
    assert lines == [
        "[1/2] 1x8: finetune/0/stsb/0 4.0 s on host:1; 1 left, about 4 s",
        "[2/2] 1x8: finetune/0/stsb/1 4.0 s on host:1; done",
    ]


def test_what_is_reused_is_no_news():
    assert shown(record_of("reused", "waiting"), terminal=False) == ""


def test_a_terminal_shows_the_grid_and_what_runs_where():
    text = shown(record_of("complete", "reused", "running", "failed", "waiting"), terminal=True)
    for expected in ("1x8", "✓", "=", "▶", "✗", "75 %", "0.25 loss", "on host:1"):
        assert expected in text
