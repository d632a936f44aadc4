"""A sweep whose results lie in S3: another machine finds them, goes on from checkpoints there, and checks them."""

import pytest

from fffsweep.dashboards.queries import load_study
from fffsweep.pipeline.execute import execute
from fffsweep.pipeline.remote_store import open_store
from fffsweep.pipeline.stage import StageRun, StopRequested
from fffsweep.pipeline.stages.noop import Noop
from fffsweep.pipeline.store import DamagedArtifact
from fffsweep.sweeps.config import SweepConfig
from fffsweep.sweeps.controller import run_sweep
from fffsweep.sweeps.verify import verify
from tests.sweeps.conftest import Heard

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture(scope="module")
def endpoint(servers, tmp_path_factory):
    with servers.s3_server(tmp_path_factory.mktemp("s3")) as address:
        yield address


@pytest.fixture(autouse=True)
def environment(endpoint, servers, monkeypatch, request):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", servers.PASSWORD)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    folder = request.node.name
    monkeypatch.setenv("FFFSWEEP_STORE", f"s3://sweeps/{folder}?endpoint_override={endpoint}&scheme=http&region=us-east-1")


def test_a_sweep_and_another_machine(sweep_config, servers, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    smaller = SweepConfig.model_validate({**sweep_config.resolved(), "layouts": ["15x0"]})
    first = run_sweep(smaller, one, Heard(), "inline")
    assert first.state == "complete"
    assert verify(sweep_config.name, one).problems == ()
    second = run_sweep(sweep_config, two, Heard(), "inline")  # it has nothing in its own folder
    assert (second.state, second.num_reused) == ("complete", first.num_run)
    assert verify(sweep_config.name, two).problems == ()
    assert all(trial.metrics for trial in load_study(two, sweep_config.name).trials)
    store = open_store(one / "store")
    assert len(list(store.keys())) == first.num_run + second.num_run
    leaks = [path for path in tmp_path.rglob("*") if path.is_file() and servers.PASSWORD.encode() in path.read_bytes()]
    assert leaks == []

    pretrain = next(m for m in map(store.get, store.keys()) if m.run.stage == "pretrain")
    sha256 = pretrain.artifacts["curve.jsonl"].sha256
    content = store.read(pretrain, "curve.jsonl").read_bytes()
    for local in (one, two):
        (local / "store" / "objects" / sha256[:2] / sha256).unlink(missing_ok=True)
    with store._remote.open_output_stream(f"objects/{sha256[:2]}/{sha256}") as stream:
        stream.write(bytes([content[0] ^ 0xFF]) + content[1:])  # of equal length
    with pytest.raises(DamagedArtifact):
        store.read(pretrain, "curve.jsonl")
    assert any("'curve.jsonl' of pretrain" in problem for problem in verify(sweep_config.name, two).problems)
    verify(sweep_config.name, two, repair=True)
    again = run_sweep(sweep_config, two, Heard(), "inline")
    assert (again.state, again.num_run) == ("complete", 1)
    assert verify(sweep_config.name, two).problems == ()


def test_another_machine_goes_on_from_a_checkpoint(tmp_path, monkeypatch):
    run = StageRun("noop", 1, {"name": "a", "metrics": {}, "pause_s": 0.0}, 0)

    def stopped(self, config, context):
        (context.work / "step-1.pt").write_text("half")
        raise StopRequested

    monkeypatch.setattr(Noop, "run", stopped)
    with pytest.raises(StopRequested):
        execute(run, open_store(tmp_path / "one"))
    monkeypatch.setattr(Noop, "run", lambda self, config, context: {"found": float((context.work / "step-1.pt").read_text() == "half")})
    assert execute(run, open_store(tmp_path / "two")).metrics == {"found": 1.0}
