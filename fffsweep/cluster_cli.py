"""Commands about clusters: start one, send sweeps to it, follow and stop them."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from fffsweep.sweeps.config import SweepConfig
    from fffsweep.sweeps.submission import Job

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A sweep config, such as sweeps/quickstart.yaml.")]
StudyOrJob = Annotated[str, typer.Argument(metavar="STUDY", help="A study's name, or the id of one of its jobs.")]
Address = Annotated[str, typer.Option("--address", metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard.")]
SharedResults = Annotated[Path, typer.Option("--results", metavar="FOLDER", help="Folder of all results, shared by all nodes.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Replace one setting; may be repeated.")]
Name = Annotated[str | None, typer.Option("--name", help="Name of the study, instead of the config's.")]
CodeOption = Annotated[
    Literal["ship", "image"], typer.Option("--code", help="ship: send this code along; image: use what the nodes have installed.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
LOCAL = "http://127.0.0.1:8265"
RESULTS = Path("results")

cluster_app = typer.Typer(help="A Ray cluster with token authentication, its job server bound to this machine unless told otherwise.")


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    for command in (submit, status, logs, stop, resume):
        app.command()(command)
    app.add_typer(cluster_app, name="cluster")


def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    name: Name = None,
    results: SharedResults = RESULTS,
    address: Address = LOCAL,
    code: CodeOption = "ship",
) -> None:
    """Send a sweep to a cluster as a job, and return at once."""
    from fffsweep.sweeps.config import load_config
    from fffsweep.sweeps.submission import opened

    sweep = load_config(config, overrides or [], name)
    with opened(address) as cluster:
        job = cluster.submit(sweep, results.absolute(), code)
    _tell_how_to_follow(job, address)


def resume(
    study: StudyOrJob,
    results: Annotated[Path | None, typer.Option("--results", metavar="FOLDER", help="Where they lie, if the cluster forgot.")] = None,
    address: Address = LOCAL,
    code: CodeOption = "ship",
) -> None:
    """Send a study again that was stopped or broke off; it goes on from where it was."""
    from fffsweep.sweeps.submission import opened

    with opened(address) as cluster:
        known = {job.id: job.study for job in cluster.jobs()}
        job = cluster.resume(known.get(study, study), results.absolute() if results else None, code)
    _tell_how_to_follow(job, address)


def status(
    study: Annotated[str | None, typer.Argument(metavar="STUDY", help="A study's name or a job's id; without it, all of them.")] = None,
    address: Address = LOCAL,
    as_json: AsJson = False,
) -> int:
    """How the jobs of a study stand. Exit code 1 if the newest one failed."""
    from fffsweep.sweeps.submission import opened

    with opened(address) as cluster:
        jobs = cluster.jobs(cluster.find(study).study) if study else cluster.jobs()
        last = cluster.log(jobs[-1]).strip().splitlines() if jobs and study else []
    if as_json:
        print(json.dumps({"schema": "fffsweep.jobs/1", "jobs": [asdict(job) for job in jobs]}, indent=1))
    elif not jobs:
        print(f"no jobs on {address}")
    else:
        for job in jobs:
            started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.started_s)) if job.started_s else "not yet"
            print(f"{job.id}  study {job.study}  {job.state}  started {started}  results {job.results}" + f"  {job.message}".rstrip())
        print("\n".join(line for line in last[-3:]))
    return 1 if study and jobs and jobs[-1].state == "FAILED" else 0


def logs(
    study: StudyOrJob,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    address: Address = LOCAL,
) -> None:
    """What the newest job of a study has printed."""
    from fffsweep.sweeps.submission import opened

    with opened(address) as cluster:
        job = cluster.find(study)
        for text in cluster.follow(job) if follow else [cluster.log(job)]:
            sys.stdout.write(text)
            sys.stdout.flush()


def stop(
    study: StudyOrJob,
    grace_s: Annotated[float, typer.Option("--grace", metavar="SECONDS", help="After so long, kill what has not ended.")] = 600.0,
    address: Address = LOCAL,
) -> None:
    """Have running stages save themselves, then end the job; `resume` goes on from there."""
    from fffsweep.sweeps.submission import opened

    with opened(address) as cluster:
        job = cluster.stop(cluster.find(study), grace_s)
    print(
        f"{job.id}: {job.state}" + (f"; fffsweep resume {shlex.quote(job.study)}{_at(address)} goes on" if job.state == "STOPPED" else "")
    )


@cluster_app.command("start")
def cluster_start(
    host: Annotated[
        str, typer.Option("--host", help="Address of the job server; other machines need one that they can reach.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port that nodes join at.")] = 6379,
    dashboard_port: Annotated[int, typer.Option("--dashboard-port", help="Port that jobs are sent to.")] = 8265,
    block: Annotated[bool, typer.Option("--block", help="Stay until it ends, as containers and services need.")] = False,
    extra: Annotated[list[str] | None, typer.Argument(metavar="[-- RAY OPTIONS]", help="Further options of `ray start`.")] = None,
) -> int:
    """Start the head of a cluster here; its token is made if there is none."""
    address = [f"--node-ip-address={host}", f"--port={port}", f"--dashboard-host={host}", f"--dashboard-port={dashboard_port}"]
    ended = _ray_start(["--head", *address, *(["--block"] if block else []), *(extra or [])])
    if ended == 0 and not block:
        print(f"cluster at {host}:{port}; on each further machine, with the same ~/.ray/auth_token: fffsweep cluster join {host}:{port}")
        print(f"sweeps: fffsweep submit CONFIG --address http://{host}:{dashboard_port}")
    return ended


@cluster_app.command("join")
def cluster_join(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="The head's.")],
    bench: Annotated[bool, typer.Option("--bench", help="Keep this node for timings: the label role=bench.")] = False,
    block: Annotated[bool, typer.Option("--block", help="Stay until it ends; SIGTERM then has running stages save themselves.")] = False,
    extra: Annotated[list[str] | None, typer.Argument(metavar="[-- RAY OPTIONS]", help="Further options of `ray start`.")] = None,
) -> int:
    """Add this machine to a cluster, once its head answers."""
    cluster_wait(address)
    options = [*(["--labels=role=bench"] if bench else []), *(["--block"] if block else []), *(extra or [])]
    return _ray_start([f"--address={address}", *options])


@cluster_app.command("wait")
def cluster_wait(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="The head's.")],
    timeout_s: Annotated[float, typer.Option("--timeout", metavar="SECONDS")] = 300.0,
) -> None:
    """Return when the head of a cluster answers."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise typer.BadParameter(f"{address}: expected HOST:PORT, such as 127.0.0.1:6379")
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=5):
            return
        if time.monotonic() > deadline:
            raise typer.BadParameter(f"no head answers at {address} within {timeout_s:g} s: start one with fffsweep cluster start")
        time.sleep(0.5)


@cluster_app.command("token")
def cluster_token() -> None:
    """Make the token that clusters ask for, unless there is one, and print the path of its file."""
    from fffsweep.sweeps.cluster_auth import make_token, token_path

    make_token()
    print(token_path())


@cluster_app.command("drive", hidden=True)
def cluster_drive(
    study: StudyOrJob,
    results: SharedResults = RESULTS,
    address: Annotated[str | None, typer.Option("--address")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="Without it, that of the study's record.")] = None,
) -> int:
    """Drive a study: what `submit` and `resume` have a job do."""
    from fffsweep.cli import drive
    from fffsweep.sweeps.config import load_config

    results = results.absolute()
    sweep = _recorded(study, results) if config is None else load_config(config)
    os.chdir("/")  # a job's own folder is laid out anew when another node on the same machine begins to work for it
    return drive(sweep, results, "ray", address)


def _recorded(study: str, results: Path) -> SweepConfig:
    from pydantic import ValidationError

    from fffsweep.sweeps.config import ConfigError, SweepConfig
    from fffsweep.sweeps.record import load, study_folder

    stored = load(study_folder(results, study))
    if stored is None:
        raise ConfigError(f"study {study!r}: there is none under {results / 'studies'}; submit its config")
    try:
        return SweepConfig.model_validate(stored["config"])
    except ValidationError:
        raise ConfigError(f"study {study!r}: its config is of another version of fffsweep; submit it with that one") from None


def _ray_start(options: list[str]) -> int:
    """`ray start` with a token, by this environment's Ray, so that jobs find its Python first.

    The port of a node's agent is chosen: at a fixed one the agents of a machine's second node, or cluster, could not listen and no job
    would ever start there.
    """
    from fffsweep.sweeps.cluster_auth import make_token

    make_token()
    folder = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": os.pathsep.join((str(folder), os.environ.get("PATH", ""))),
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": os.environ.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "90"),
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats", "--dashboard-agent-listen-port=0", *options]
    return subprocess.run(command, env=environment).returncode


def _at(address: str) -> str:
    """What a printed command needs so as to go to the same cluster."""
    return "" if address == LOCAL else f" --address {shlex.quote(address)}"


def _tell_how_to_follow(job: Job, address: str) -> None:
    where, study = _at(address), shlex.quote(job.study)
    print(f"study {job.study}: job {job.id} on {address}, results in {job.results}")
    print(f"follow     fffsweep logs -f {study}{where}")
    print(f"how it is  fffsweep status {study}{where}")
    print(f"stop       fffsweep stop {study}{where}")
