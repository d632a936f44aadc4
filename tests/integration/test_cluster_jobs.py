"""Sweeps sent to a real cluster: started by `fffsweep cluster start`, followed, stopped, resumed; and who may speak to it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.chaos.cluster import wait_for
from tests.sweeps.conftest import CONFIG, write_data

pytestmark = [pytest.mark.integration, pytest.mark.slow]
CHECKOUT = Path(__file__).resolve().parent.parent.parent
PROGRAM = [sys.executable, "-P", "-c", "from fffsweep.cli import main; main()"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Head:
    """A running head, and the environment of somebody who holds its token."""

    address: str
    environment: dict[str, str]
    process: subprocess.Popen[bytes]

    def fffsweep(self, *arguments: str, code: int = 0, **environment: str) -> str:
        command = [*PROGRAM, *arguments, "--address", self.address]
        ended = subprocess.run(command, cwd=CHECKOUT, env={**self.environment, **environment}, capture_output=True, text=True, timeout=300)
        assert ended.returncode == code, ended.stdout + ended.stderr
        return ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    home = tmp_path_factory.mktemp("home")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**kept, "HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    dashboard = free_port()
    command = [*PROGRAM, "cluster", "start", "--block", "--port", str(free_port()), "--dashboard-port", str(dashboard), "--"]
    command += ["--num-cpus=2", f"--object-store-memory={80 * 2**20}"]
    log = (home / "head.log").open("wb")
    process = subprocess.Popen(command, cwd=CHECKOUT, env=environment, stdout=log, stderr=log)

    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", dashboard)) == 0

    wait_for(answers, (home / "head.log").read_text() or "the dashboard", 180)
    yield Head(f"http://127.0.0.1:{dashboard}", environment, process)
    family = [process, *psutil.Process(process.pid).children(recursive=True)]
    for each in family:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    write_data(folder)
    path = folder / "sent.yaml"
    text = CONFIG.replace("PATH", str(folder)).replace("steps: 4,", "steps: 6000, checkpoint_minutes: 0.01,")
    path.write_text(text.replace("name: tiny-directory", "name: sent over"))
    return path


def test_a_sweep_is_sent_followed_stopped_and_resumed(head: Head, config: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    start = time.monotonic()
    said = head.fffsweep("submit", str(config), "--results", str(results))
    returned_s = time.monotonic() - start
    assert "study sent over: job sent-over-1" in said
    assert "fffsweep logs -f 'sent over'" in said

    study = results / "studies" / "sent%20over"
    wait_for(lambda: list((results / "store" / "work").glob("*/checkpoints/step-*.pt")), "a checkpoint", 240)
    assert returned_s < time.monotonic() - start, "submit returned before the sweep had come this far"
    assert "RUNNING" in head.fffsweep("status", "sent over")
    assert "is being driven by job sent-over-1" in head.fffsweep("resume", "sent over", code=2)

    assert "sent-over-1: STOPPED" in head.fffsweep("stop", "sent over")
    assert json.loads((study / "study.json").read_text())["state"] == "stopped"
    assert list((results / "store" / "work").glob("*/checkpoints/step-*.pt"))
    finished = set((results / "store" / "manifests").glob("*/*.json"))

    assert "job sent-over-2" in head.fffsweep("resume", "sent over")
    followed = head.fffsweep("logs", "-f", "sent over")
    assert "sent over complete" in followed
    assert "reused" in followed
    assert finished < set((results / "store" / "manifests").glob("*/*.json"))
    jobs = json.loads(head.fffsweep("status", "sent over", "--json"))["jobs"]
    assert [(job["id"], job["state"]) for job in jobs] == [("sent-over-1", "STOPPED"), ("sent-over-2", "SUCCEEDED")]


def test_nobody_without_the_token_gets_in(head: Head, tmp_path: Path) -> None:
    token = Path(head.environment["HOME"]) / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o077 == 0
    other = tmp_path / "token"
    other.write_text("0" * 64)
    assert "refuses the token" in head.fffsweep("status", code=2, RAY_AUTH_TOKEN_PATH=str(other))
    assert "refuses the token" in head.fffsweep("status", code=2, RAY_AUTH_TOKEN_PATH=str(tmp_path / "none"))
    said = head.fffsweep("status")
    assert token.read_text() not in said


def test_the_dashboard_listens_on_this_machine_alone(head: Head) -> None:
    """Without --host jobs cannot be sent from elsewhere; the port that nodes join at Ray opens on every interface."""
    port = int(head.address.rpartition(":")[2])
    listening = [
        connection.laddr
        for process in psutil.Process(head.process.pid).children(recursive=True)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {address.ip for address in listening if address.port == port} <= {"127.0.0.1", "::ffff:127.0.0.1"}
    assert any(address.port == port for address in listening)


def test_an_absent_cluster_is_one_clear_error(config: Path, tmp_path: Path) -> None:
    command = [*PROGRAM, "submit", str(config), "--results", str(tmp_path), "--address", f"http://127.0.0.1:{free_port()}"]
    ended = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert "no cluster answers at http://127.0.0.1:" in ended.stderr
    assert "Traceback" not in ended.stderr
