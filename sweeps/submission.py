"""Sweeps as Ray jobs: sent to a cluster with their code, followed, stopped and sent again.

With `ray_executor`, the only importer of ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import re
import shlex
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import fffsweep
from fffsweep.sweeps.cluster_auth import use_token
from fffsweep.sweeps.config import ConfigError, SweepConfig
from fffsweep.sweeps.record import study_folder
from fffsweep.sweeps.stopping import ATTEMPT, stop_flag

ADDRESS = "http://127.0.0.1:8265"
LIMIT_BYTES = 100 * 2**20  # what Ray's dashboard takes
MAIN = "from fffsweep.cli import main; main()"
_SHIPPED = ("*.py", "*.so", "*.yaml", "*.json", "*.csv", "*.txt", "*.html", "*.css", "*.js", "*.svg", "*.woff2", "*.cpp", "*.h")
_STUDY, _RESULTS, _ATTEMPT = "fffsweep.study", "fffsweep.results", "fffsweep.attempt"
_OVER = ("SUCCEEDED", "FAILED", "STOPPED")
_STOPPED_CODE = "exit code 130"
_AGENT_S = 120.0
_POLL_S = 1.0

Code = Literal["ship", "image"]


@dataclass(frozen=True)
class Job:
    """One attempt at a study on a cluster. state: Ray's word for it, or `STOPPED` where `stop` had it save itself.

    attempt: its name among all attempts on all clusters.
    """

    id: str
    study: str
    results: str
    state: str
    message: str
    started_s: float
    attempt: str | None = None

    @property
    def is_over(self) -> bool:
        return self.state in _OVER


class Cluster:
    """Jobs on the cluster whose dashboard answers at `address`. Raises ConfigError if none does, or if it refuses the token."""

    def __init__(self, address: str = ADDRESS) -> None:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigError(f"address {address!r}: expected that of the cluster's dashboard, such as {ADDRESS}")
        use_token()
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        self.address = address
        try:
            self._client: Any = JobSubmissionClient(address)
        except (ConnectionError, RuntimeError, AuthenticationError) as error:
            raise ConfigError(_refusal(address, str(error))) from None

    def submit(self, config: SweepConfig, results: Path, code: Code = "ship") -> Job:
        """Send a sweep and return at once. `results` is a folder that all nodes of the cluster share.

        code: `ship` sends this installation's code along, `image` takes what is installed on the nodes.
        """
        _check_paths(config)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            (folder / "sweep.json").write_text(json.dumps(config.resolved()))
            return self._send(config.name, results, ["--config", "sweep.json"], folder, code)

    def resume(self, study: str, results: Path | None = None, code: Code = "ship") -> Job:
        """Send a study again that has ended before its end; its config is the one that its record on the cluster holds."""
        jobs = self.jobs(study)
        if jobs and not jobs[-1].is_over:
            raise ConfigError(f"study {study!r} is being driven by job {jobs[-1].id}; wait for it, or stop it first")
        if results is None and not jobs:
            raise ConfigError(f"study {study!r}: the cluster knows no job of it; say where its results lie with --results, or submit it")
        with tempfile.TemporaryDirectory() as temporary:
            return self._send(study, results or Path(jobs[-1].results), [], Path(temporary), code)

    def jobs(self, study: str | None = None) -> list[Job]:
        """Jobs of a study, or of all studies, oldest first."""
        found = [_job(details) for details in self._client.list_jobs() if _STUDY in (details.metadata or {})]
        return sorted((job for job in found if study in (None, job.study)), key=lambda job: job.started_s)

    def find(self, name: str) -> Job:
        """The newest job of a study, or the job with this id. Raises ConfigError with the studies that there are."""
        jobs = self.jobs()
        chosen = [job for job in jobs if job.id == name] or [job for job in jobs if job.study == name]
        if not chosen:
            known = ", ".join(sorted({job.study for job in jobs})) or "none"
            raise ConfigError(f"{name!r}: no study or job of that name on {self.address}; expected one of: {known}")
        return chosen[-1]

    def log(self, job: Job) -> str:
        """Everything that a job has printed."""
        return str(self._client.get_job_logs(job.id))

    def follow(self, job: Job) -> Iterator[str]:
        """What a job prints, as it prints it, until it ends."""
        lines = self._client.tail_job_logs(job.id)
        loop = asyncio.new_event_loop()
        try:
            while True:
                try:
                    yield loop.run_until_complete(anext(lines))
                except StopAsyncIteration:
                    return
        finally:
            loop.close()

    def stop(self, job: Job, grace_s: float) -> Job:
        """Have running stages save themselves and wait for the job's end; what is not done after `grace_s` is killed.

        The flag that stages poll lies in the results folder, which only the cluster may see: a small job sets it. It names the job's
        attempt, so that a driver that has not begun yet finds it, and no later one does. Raises ConfigError if it could not be set.
        """
        if job.is_over:
            return job
        flag = stop_flag(study_folder(Path(job.results), job.study), job.attempt)
        command = f"mkdir -p -- {shlex.quote(str(flag.parent))} && touch -- {shlex.quote(str(flag))}"
        setter = self._submit_job(entrypoint=command, metadata={"fffsweep.stops": job.id})
        deadline = time.monotonic() + grace_s
        while not (now := self.find(job.id)).is_over and time.monotonic() < deadline:
            self._check_set(setter, flag, job)
            time.sleep(_POLL_S)
        if not now.is_over:
            self._client.stop_job(job.id)
        return self.find(job.id)

    def _check_set(self, setter: str, flag: Path, job: Job) -> None:
        details = self._client.get_job_info(setter)
        if str(getattr(details.status, "value", details.status)) == "FAILED":
            said = (str(self._client.get_job_logs(setter)).strip().splitlines() or [str(details.message)])[-1]
            raise ConfigError(
                f"job {job.id} could not be asked to stop and goes on: {flag} cannot be written on the cluster ({said}); make room or give "
                "the right to write there, then stop it again, or end it at once with --grace 0"
            )

    def _send(self, study: str, results: Path, options: list[str], folder: Path, code: Code) -> Job:
        if code == "ship":
            pack(folder)
        command = ["cluster", "drive", *options, "--results", str(results), "--address", "auto", "--", study]
        words = ["python", "-P", "-c", MAIN, *command]
        attempt = uuid.uuid4().hex  # another cluster may give the same id to its job
        variables = {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "PYTHONUNBUFFERED": "1", ATTEMPT: attempt}
        runtime = {"working_dir": str(folder), "env_vars": variables}
        metadata = {
            _STUDY: study,
            _RESULTS: str(results),
            _ATTEMPT: attempt,
            "fffsweep.code": code,
            "fffsweep.version": fffsweep.__version__,
        }
        number = len(self.jobs(study)) + 1
        while True:
            identity = f"{re.sub('[^A-Za-z0-9_.-]', '-', study)}-{number}"
            try:
                self._submit_job(entrypoint=shlex.join(words), submission_id=identity, runtime_env=runtime, metadata=metadata)
            except RuntimeError as error:
                if "already exists" not in str(error):
                    raise
                number += 1
                continue
            return self.find(identity)

    def _submit_job(self, **job: Any) -> str:
        """The job's id. Of a cluster that has just been started the dashboard answers before the agents do that start jobs."""
        deadline = time.monotonic() + _AGENT_S
        while True:
            try:
                return str(self._client.submit_job(**job))
            except RuntimeError as error:
                if "No available agent" not in str(error):
                    raise
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"cluster {self.address} has had no agent to start a job with for {_AGENT_S:g} s: look at its nodes with "
                        "`ray status`, and whether they have the packages of 'fffsweep[cluster]'"
                    ) from None
            time.sleep(_POLL_S)


def pack(folder: Path) -> None:
    """Copy this installation's code below `folder`, as one plain package. Raises ConfigError if it exceeds what Ray takes."""
    source = Path(fffsweep.__file__).parent
    target = folder / "fffsweep"
    shutil.copytree(source, target, ignore=_other_files, symlinks=False)
    files = {path: path.stat().st_size for path in target.rglob("*") if path.is_file()}
    if sum(files.values()) > LIMIT_BYTES:
        largest = ", ".join(
            f"{path.relative_to(folder)} ({files[path] / 2**20:.0f} MiB)" for path in sorted(files, key=lambda p: -files[p])[:3]
        )
        raise ConfigError(
            f"the code to send has {sum(files.values()) / 2**20:.0f} MiB, Ray takes {LIMIT_BYTES / 2**20:.0f}; largest: {largest}; "
            "remove what is not code from the package, or bake it into the image and use --code image"
        )


def _other_files(folder: str, names: list[str]) -> set[str]:
    here = Path(folder)
    code = {name for pattern in _SHIPPED for name in (path.name for path in here.glob(pattern))}
    folders = {name for name in names if (here / name).is_dir() and not name.startswith((".", "__pycache__"))}
    return set(names) - code - folders


def _check_paths(config: SweepConfig) -> None:
    prepare = config.stages.prepare.resolved()
    for where, block in (("", prepare), *((f"tasks[{n}].", task) for n, task in enumerate(prepare["tasks"]) if isinstance(task, dict))):
        path = block.get("path")
        if path is not None and not Path(path).is_absolute():
            raise ConfigError(
                f"stages.prepare.{where}path={path}: expected an absolute path, of a folder that all nodes of the cluster share"
            )


def _job(details: Any) -> Job:
    state = str(getattr(details.status, "value", details.status))
    message = str(details.message or "")
    if state == "FAILED" and _STOPPED_CODE in message:
        state, message = "STOPPED", "saved itself; resume goes on from there"
    metadata = details.metadata
    started_s = (details.start_time or 0) / 1000
    return Job(details.submission_id, metadata[_STUDY], metadata[_RESULTS], state, message, started_s, metadata.get(_ATTEMPT))


def _refusal(address: str, reason: str) -> str:
    if "401" in reason or "403" in reason or "uthenticat" in reason:
        return (
            f"cluster {address} refuses the token: expected the one that its head was started with; copy that to ~/.ray/auth_token, "
            "or name it in RAY_AUTH_TOKEN_PATH"
        )
    if "ray[default]" in reason:
        return f"Ray {importlib.metadata.version('ray')} is installed without its job client: pip install 'fffsweep[cluster]'"
    return f"no cluster answers at {address}: start one with fffsweep cluster start, or name the address of its dashboard with --address"


@contextlib.contextmanager
def opened(address: str) -> Iterator[Cluster]:
    """A cluster; a connection that breaks meanwhile is one clear error."""
    cluster = Cluster(address)
    try:
        yield cluster
    except ConnectionError as error:
        raise ConfigError(_refusal(address, str(error))) from None
