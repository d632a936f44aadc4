"""The button of the web app: `fffsweep pick` as a process of its own, so that a page answers at once and the pick outlives it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fffsweep.dashboards.choice import ChoiceError, Notebook, check_alias, summary
from fffsweep.dashboards.queries import StudyView

_MOST_FRESH = 20


def begin(view: StudyView, form: Mapping[str, str]) -> None:
    """Start the pick that a form asks for. Raises ChoiceError if it cannot be, ValueError for an unknown trial."""
    trial, alias = view.trial(form.get("trial", "")), check_alias(form.get("alias", ""))
    fresh, task = form.get("fresh_seeds", ""), form.get("task", "")
    if not fresh.isdecimal() or int(fresh) > _MOST_FRESH:
        raise ChoiceError(f"fresh seeds {fresh!r}: expected a whole number from 0 to {_MOST_FRESH}")
    if not trial.metrics:
        raise ChoiceError(f"trial {trial.id!r} is {trial.state}: only a finished trial can be picked")
    if any(is_running(each) for each in view.picks()):
        raise ChoiceError(f"another pick of study {view.name!r} is under way: wait until it has ended")
    options = ["--alias", alias, "--fresh-seeds", fresh, "--results", str(view.results), *(["--task", task] if task else [])]
    note = Notebook(view.folder, alias)
    pid = start(["pick", *options, "--", view.name, trial.id], note.path.with_suffix(".log"))
    note.write("running", trial.id, message="starting", pid=pid)


def start(arguments: list[str], log: Path) -> int:
    """Run `fffsweep` with these arguments in a session of its own, its output in `log`; the process's id."""
    program = "import sys; from fffsweep.cli import main; main(sys.argv[1:])"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments], stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True
        )
    threading.Thread(target=process.wait, daemon=True).start()  # else it stays a zombie, which looks alive
    return process.pid


def shown(view: StudyView) -> list[dict[str, Any]]:
    """The study's picks, newest first, each with `state` as it truly is and the end of its log where it failed."""
    found = []
    for pick in view.picks():
        state = "failed" if pick["state"] == "running" and not is_running(pick) else pick["state"]
        log = view.folder / "picks" / f"{pick['alias']}.log"
        said = log.read_text(errors="replace")[-2000:] if state == "failed" and log.exists() else ""
        found.append({**pick, "state": state, "log": said, "lines": summary(pick["evidence"]) if "evidence" in pick else []})
    return found


def is_running(pick: Mapping[str, Any]) -> bool:
    """Whether a pick that says so is under way: its process may have been killed since."""
    if pick["state"] != "running":
        return False
    if pick["host"] != platform.node():
        return True
    try:
        os.kill(pick["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
