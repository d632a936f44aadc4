"""What is sent to a cluster, what its answers mean, and the token; no cluster is needed for that."""

import contextlib
import os
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest

import fffsweep
from fffsweep import cluster_cli
from fffsweep.sweeps import cluster_auth, submission
from fffsweep.sweeps.config import ConfigError, SweepConfig
from fffsweep.sweeps.record import study_folder
from fffsweep.sweeps.stopping import ATTEMPT, stop_flag
from fffsweep.sweeps.submission import Cluster, pack


def test_the_packed_code_runs_by_itself(tmp_path):
    pack(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in tmp_path.rglob("*") if path.is_symlink() or "__pycache__" in path.parts]
    assert (tmp_path / "fffsweep" / "kernels" / "cmm.py").exists()
    assert sum(path.stat().st_size for path in files) < 20 * 2**20
    program = "import fffsweep.cli, fffsweep.sweeps.graph; print(fffsweep.__file__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.stdout.strip() == str(tmp_path / "fffsweep" / "__init__.py"), ended.stderr


def test_code_that_ray_would_refuse_is_refused_before(tmp_path, monkeypatch):
    package = tmp_path / "installed" / "fffsweep"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    with (package / "weights.json").open("wb") as file:
        file.truncate(submission.LIMIT_BYTES + 1)
    monkeypatch.setattr(fffsweep, "__file__", str(package / "__init__.py"))
    (tmp_path / "to").mkdir()
    with pytest.raises(ConfigError, match=r"Ray takes 100; largest: fffsweep/weights.json \(100 MiB\).*--code image"):
        pack(tmp_path / "to")


class FakeClient:
    """Jobs as a dashboard lists them; an id can be used once."""

    def __init__(self):
        self.jobs = []

    def list_jobs(self):
        return self.jobs

    def submit_job(self, entrypoint, submission_id=None, runtime_env=None, metadata=None):
        if any(job.submission_id == submission_id for job in self.jobs):
            raise RuntimeError(f"job with submission_id {submission_id} already exists")
        details = {"submission_id": submission_id, "metadata": metadata, "entrypoint": entrypoint, "message": ""}
        details["submission_id"] = submission_id = submission_id or f"raysubmit_{len(self.jobs)}"
        details["runtime_env"] = runtime_env
        self.jobs.append(SimpleNamespace(status="RUNNING", start_time=1000 * len(self.jobs), **details))
        return submission_id

    def get_job_info(self, submission_id):
        return next(job for job in self.jobs if job.submission_id == submission_id)

    def get_job_logs(self, submission_id):
        return "touch: cannot touch 'stop': Permission denied\n"


@pytest.fixture
def cluster(monkeypatch):
    made = Cluster.__new__(Cluster)
    made.address, made._client = "http://head:8265", FakeClient()
    return made


def named(config, name, **changes):
    return SweepConfig.model_validate({**config.resolved(), "name": name, **changes})


def test_every_attempt_has_an_id_of_its_own_and_names_are_quoted(cluster, tiny_directory_config, tmp_path):
    config = named(tiny_directory_config, "a b; rm -rf /")
    first = cluster.submit(config, tmp_path / "my results", code="image")
    assert (first.id, first.study, first.results) == ("a-b--rm--rf---1", "a b; rm -rf /", str(tmp_path / "my results"))
    with pytest.raises(ConfigError, match=r"is being driven by job a-b--rm--rf---1"):
        cluster.resume("a b; rm -rf /")
    cluster._client.jobs[0].status, cluster._client.jobs[0].message = "FAILED", "Job entrypoint command failed with exit code 130"
    assert cluster.find(config.name).state == "STOPPED"
    again = cluster.resume("a b; rm -rf /", code="image")
    assert again.id == "a-b--rm--rf---2"
    sent = [job.entrypoint for job in cluster._client.jobs]
    assert all(f" --results '{tmp_path}/my results' --address auto -- 'a b; rm -rf /'" in entrypoint for entrypoint in sent)
    assert [" --config sweep.json " in entrypoint for entrypoint in sent] == [True, False]


def test_a_cluster_that_has_just_been_started_is_waited_for(cluster, tiny_directory_config, tmp_path, monkeypatch):
    monkeypatch.setattr(submission, "_POLL_S", 0.0)
    refusals = iter(["No available agent to submit job"] * 3)
    ready = cluster._client.submit_job

    def submit_job(**job):
        if refusal := next(refusals, None):
            raise RuntimeError(f"Request failed with status code 500: {refusal}, please try again later..")
        ready(**job)

    cluster._client.submit_job = submit_job
    assert cluster.submit(tiny_directory_config, tmp_path, code="image").id == "tiny-directory-1"
    monkeypatch.setattr(submission, "_AGENT_S", -1.0)
    refusals = iter(["No available agent to submit job"] * 3)
    with pytest.raises(ConfigError, match="no agent to start a job with"):
        cluster.stop(cluster.find("tiny-directory"), grace_s=0)


def test_an_unknown_study_names_those_there_are(cluster, tiny_directory_config, tmp_path):
    cluster.submit(tiny_directory_config, tmp_path, code="image")
    with pytest.raises(ConfigError, match=r"'other': no study or job .* expected one of: tiny-directory"):
        cluster.find("other")
    with pytest.raises(ConfigError, match="the cluster knows no job of it"):
        cluster.resume("other")


def test_stop_sets_the_flag_of_that_study_alone(cluster, tiny_directory_config, tmp_path):
    job = cluster.submit(named(tiny_directory_config, "../../etc"), tmp_path, code="image")
    cluster._client.stop_job = lambda _: setattr(cluster._client.jobs[0], "status", "STOPPED")
    assert cluster.stop(job, grace_s=0).is_over
    study = f"{tmp_path}/studies/%2E.%2F..%2Fetc"
    assert cluster._client.jobs[1].entrypoint == f"mkdir -p -- {study} && touch -- {study}/stop-{job.attempt}"


def test_a_stop_finds_a_driver_that_has_not_begun_and_no_other_one(cluster, tiny_directory_config, tmp_path, monkeypatch):
    """The first job's driver is still on its way when it is stopped; it was never to begin, and the second one is."""
    config = named(tiny_directory_config, "a study; sleep 9")
    monkeypatch.setattr(submission, "_POLL_S", 0.0)
    cluster._client.stop_job = lambda _: setattr(cluster._client.jobs[0], "status", "STOPPED")
    first = cluster.submit(config, tmp_path, code="image")
    cluster.stop(first, grace_s=0)
    subprocess.run(cluster._client.jobs[1].entrypoint, shell=True, check=True)  # the study's folder is not there yet
    flag = stop_flag(study_folder(tmp_path, config.name), first.attempt)
    assert flag.exists()
    second = cluster.resume(config.name, code="image")
    variables = [job.runtime_env["env_vars"][ATTEMPT] for job in cluster._client.jobs if job.runtime_env]
    assert variables == [first.attempt, second.attempt]
    assert len({*variables, cluster.submit(config, tmp_path, code="image").attempt}) == 3
    assert not stop_flag(study_folder(tmp_path, config.name), second.attempt).exists()


def test_a_flag_that_cannot_be_set_is_told_of_at_once(cluster, tiny_directory_config, tmp_path, monkeypatch):
    job = cluster.submit(tiny_directory_config, tmp_path, code="image")
    submit_job = cluster._client.submit_job

    def refused(**job):
        identity = submit_job(**job)
        cluster._client.jobs[-1].status = "FAILED"
        return identity

    monkeypatch.setattr(cluster._client, "submit_job", refused)
    with pytest.raises(ConfigError, match=r"job tiny-directory-1 could not be asked to stop .*Permission denied\); make room"):
        cluster.stop(job, grace_s=600)
    assert cluster.find(job.id).state == "RUNNING"


def test_relative_data_paths_are_refused(cluster, tiny_directory_config, tmp_path):
    values = tiny_directory_config.resolved()
    values["stages"]["prepare"]["path"] = "data/words"
    with pytest.raises(ConfigError, match=r"stages.prepare.path=data/words: expected an absolute path"):
        cluster.submit(SweepConfig.model_validate(values), tmp_path)


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("HTTP 401 Unauthorized", "refuses the token"),
        ("Failed to connect to Ray at address", "no cluster answers at http://head:8265: start one"),
        ("requires the ray[default] installation", r"pip install 'fffsweep\[cluster\]'"),
    ],
)
def test_refusals_say_how_to_mend_them(reason, told):
    with pytest.raises(ConfigError, match=told):
        raise ConfigError(submission._refusal("http://head:8265", reason))


def test_a_token_is_made_once_and_is_its_owners_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "secret" / "token"))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    cluster_auth.use_token()
    assert "RAY_AUTH_MODE" not in os.environ
    cluster_auth.make_token()
    token = cluster_auth.token_path().read_text()
    assert len(token) == 64
    assert stat.S_IMODE(cluster_auth.token_path().stat().st_mode) == 0o600
    assert os.environ["RAY_AUTH_MODE"] == "token"
    cluster_auth.make_token()
    assert cluster_auth.token_path().read_text() == token


def test_the_printed_resume_goes_to_the_same_cluster(monkeypatch, capsys):
    job = submission.Job("tiny-1", "tiny", "/results", "STOPPED", "", 0.0)
    cluster = SimpleNamespace(find=lambda name: job, stop=lambda found, grace_s: found)
    monkeypatch.setattr(submission, "opened", lambda address: contextlib.nullcontext(cluster))
    cluster_cli.stop("tiny", 1.0, "http://head:8265")
    assert "fffsweep resume tiny --address http://head:8265 goes on" in capsys.readouterr().out
    cluster_cli.stop("tiny", 1.0, cluster_cli.LOCAL)
    assert "fffsweep resume tiny goes on" in capsys.readouterr().out
