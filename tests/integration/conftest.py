"""What the integration tests share: a browser whose pages are watched, and one small study that is really trained."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
CHROMIUM = (
    os.environ.get("FFFSWEEP_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
SCREENS = {"desk": ({"width": 1280, "height": 900}, "light"), "phone": ({"width": 390, "height": 844}, "dark")}
PROGRAM = [sys.executable, "-P", "-c", "from fffsweep.cli import main; main()"]


@pytest.fixture(scope="session")
def fffsweep():
    """Runs a command of ours: standard output, or standard error where another exit code than 0 is expected."""

    def run(*arguments, stdin="", code=0):
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "OPTUNA_"))}
        environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(
            [*PROGRAM, *arguments], cwd=CHECKOUT, env=environment, input=stdin, capture_output=True, text=True, timeout=500
        )
        assert ended.returncode == code, f"{ended.stdout}\n{ended.stderr}"
        return ended.stdout if code == 0 else ended.stderr

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory, fffsweep):
    """Results folder: a study of three trials, one pretraining seed each, and its choice 4x3 picked on one fresh seed.

    Needs the wheels that `make data` downloads.
    """
    folder = tmp_path_factory.mktemp("trained")
    small = ["--set", "layouts=[4x3]", "--set", "controls=[reference_dense(60), none]", "--results", str(folder), "--executor", "inline"]
    fffsweep("run", "sweeps/tiny.yaml", *small)
    pick = ["pick", "tiny", "4x3", "--alias", "champion", "--executor", "inline", "--results", str(folder)]
    told = fffsweep(*pick, "--fresh-seeds", "1", "--task", "stsb")
    assert "models:/tiny stsb@champion (version 1)" in told
    assert "on 1 fresh seed" in told
    return folder


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium, or set FFFSWEEP_CHROMIUM to one")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser):
    """Open pages that are watched: what they log as errors and which other hosts they ask for is collected, and must be nothing."""
    contexts, faults = [], []

    def opened(screen):
        viewport, scheme = SCREENS[screen]
        context = browser.new_context(viewport=viewport, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: (faults.append(f"dialog {dialog.message}"), dialog.dismiss()))
        own = ("http://localhost:", "file://", "data:", "blob:")
        page.on("request", lambda request: None if request.url.startswith(own) else faults.append(f"asked for {request.url}"))
        return page

    yield opened
    for context in contexts:
        context.close()
    assert faults == []


@pytest.fixture(scope="session")
def servers():
    """The module `servers` beside this one: PostgreSQL, MLflow and S3 on loopback."""
    from tests.integration import servers as found

    return found


@pytest.fixture(scope="session")
def sweep_config(tmp_path_factory):
    """A sweep over made-up words, seconds long."""
    from fffsweep.sweeps.config import load_config
    from tests.sweeps.conftest import CONFIG, write_data

    folder = tmp_path_factory.mktemp("words")
    write_data(folder)
    path = folder / "tiny-directory.yaml"
    path.write_text(CONFIG.replace("PATH", str(folder)))
    return load_config(path)
