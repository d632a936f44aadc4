"""Real servers on loopback, for tests: PostgreSQL, MLflow in front of it, and S3."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

PASSWORD = "open-sesame-4711"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def postgres_program(name: str) -> str | None:
    """Path of one of PostgreSQL's programs, on the path or where Debian puts it; None if it is not installed."""
    return shutil.which(name) or next((str(path) for path in sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))), None)


class Postgres:
    """A PostgreSQL of its own below `folder`; it refuses root, so root runs it as the user postgres."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self._as = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--clear-groups"] if os.geteuid() == 0 else []
        if self._as:
            shutil.chown(folder, "postgres", "postgres")
        secret = folder / "password"
        secret.write_text(PASSWORD)
        if self._as:
            shutil.chown(secret, "postgres", "postgres")
        self._run("initdb", "--username=sweeper", f"--pwfile={secret}", "--auth=scram-sha-256", "--no-sync", f"{folder}/data")
        self.start()
        for database in ("mlflow", "optuna"):
            self.execute(f"create database {database}")

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder} -c fsync=off"
        self._run("pg_ctl", "-D", f"{self.folder}/data", "-w", "-l", f"{self.folder}/log", "-o", options, "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", f"{self.folder}/data", "-w", "-m", "immediate", "stop")

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://sweeper:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def execute(self, statement: str) -> None:
        import psycopg

        address = {"host": "127.0.0.1", "port": self.port, "user": "sweeper", "password": PASSWORD, "dbname": "postgres"}
        with psycopg.connect(**address, autocommit=True) as connection:
            connection.execute(statement)

    def _run(self, program: str, *arguments: str) -> None:
        path = postgres_program(program)
        assert path is not None
        subprocess.run([*self._as, path, *arguments], check=True, stdout=subprocess.DEVNULL, cwd="/", timeout=120)


@contextlib.contextmanager
def postgres() -> Iterator[Postgres]:
    with tempfile.TemporaryDirectory(prefix="fffsweep-pg-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        server = Postgres(Path(folder))
        try:
            yield server
        finally:
            server.stop()


def has_postgres() -> bool:
    """Whether PostgreSQL is installed, and can be run by whoever runs the tests."""
    if postgres_program("initdb") is None:
        return False
    if os.geteuid() != 0:
        return True
    with contextlib.suppress(KeyError):
        return pwd.getpwnam("postgres").pw_uid > 0
    return False


@contextlib.contextmanager
def serving(command: list[str], url: str, log: Path, **environment: str) -> Iterator[None]:
    """A server that answers at `url` as long as the block runs."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **environment}, start_new_session=True
        )
    try:
        _wait_for(url, process, log)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait(20)


@contextlib.contextmanager
def mlflow_server(backend: str, folder: Path, port: int | None = None) -> Iterator[str]:
    """Address of an MLflow server on a database."""
    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    secret = {"MLFLOW_BACKEND_STORE_URI": backend}  # on the command line every user of the machine could read it
    with serving(command, f"{url}/health", folder / f"mlflow-{port}.log", MLFLOW_DISABLE_TELEMETRY="true", **secret):
        yield url


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """`host:port` of an S3 server, with the bucket `sweeps`."""
    import boto3

    port = free_port()
    with serving([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], f"http://127.0.0.1:{port}", folder / "s3.log"):
        keys = {"aws_access_key_id": "reader", "aws_secret_access_key": PASSWORD, "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", **keys).create_bucket(Bucket="sweeps")
        yield f"127.0.0.1:{port}"


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"no answer at {url}:\n{log.read_text()[-2000:]}")
