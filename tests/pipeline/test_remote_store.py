"""A store on another file system behaves as one in a folder does, for every machine that opens it; the folder is a cache."""

import pickle

import pytest

from fffsweep.pipeline.execute import execute
from fffsweep.pipeline.remote_store import RemoteStore, open_store
from fffsweep.pipeline.stage import StageRun, StopRequested
from fffsweep.pipeline.stages.noop import Noop
from fffsweep.pipeline.store import DamagedArtifact, Store


@pytest.fixture
def machines(tmp_path):
    """The same store as two machines see it."""
    return [RemoteStore(tmp_path / name / "store", (tmp_path / "remote").as_uri()) for name in ("one", "two")]


def publish(store, tmp_path, seed=0):
    output = tmp_path / f"output-{seed}"
    (output / "model").mkdir(parents=True)
    (output / "model" / "weights").write_bytes(b"w" * 1000)
    (output / "curve.jsonl").write_text("{}\n")
    return store.publish(StageRun("noop", 1, {"name": "a"}, seed), {"x": 1.0}, output, {}, 1.0, 2.0)


@pytest.fixture(autouse=True)
def remote(tmp_path):
    (tmp_path / "remote").mkdir()
    return tmp_path / "remote"


def test_what_one_machine_publishes_the_other_reads(machines, tmp_path):
    one, two = machines
    manifest = publish(one, tmp_path)
    assert two.has(manifest.key)
    assert two.get(manifest.key) == manifest
    assert list(two.keys()) == [manifest.key]
    assert two.read(manifest, "model/weights").read_bytes() == b"w" * 1000
    assert not two.has("0" * 40)
    with pytest.raises(KeyError):
        two.get("0" * 40)
    assert pickle.loads(pickle.dumps(two)).has(manifest.key)


def test_the_first_result_of_a_key_stands(machines, tmp_path):
    one, two = machines
    first = publish(one, tmp_path)
    output = tmp_path / "other"
    output.mkdir()
    (output / "curve.jsonl").write_text("another\n")
    assert two.publish(first.run, {"x": 2.0}, output, {}, 1.0, 2.0) == first


def test_a_damaged_object_is_fetched_again_or_named(machines, tmp_path, remote):
    one, two = machines
    manifest = publish(one, tmp_path)
    path = two.read(manifest, "model/weights")
    path.write_text("scribble")
    assert two.read(manifest, "model/weights").read_bytes() == b"w" * 1000
    sha256 = manifest.artifacts["model/weights"].sha256
    (remote / "objects" / sha256[:2] / sha256).write_text("scribble")
    path.unlink()
    with pytest.raises(DamagedArtifact, match="damaged"):
        two.read(manifest, "model/weights")
    two.forget(manifest.key)
    assert not one.has(manifest.key)
    assert publish(one, tmp_path / "again") == one.get(manifest.key)
    assert two.read(one.get(manifest.key), "model/weights").read_bytes() == b"w" * 1000


def test_another_machine_goes_on_from_a_checkpoint(machines, monkeypatch):
    one, two = machines
    run = StageRun("noop", 1, {"name": "a", "metrics": {}, "pause_s": 0.0}, 0)

    def stopped(self, config, context):
        (context.work / "step-1.pt").write_text("half")
        raise StopRequested

    def resumed(self, config, context):
        return {"found": float((context.work / "step-1.pt").read_text() == "half")}

    monkeypatch.setattr(Noop, "run", stopped)
    with pytest.raises(StopRequested):
        execute(run, one)
    monkeypatch.setattr(Noop, "run", resumed)
    assert execute(run, two).metrics == {"found": 1.0}
    monkeypatch.setattr(Noop, "run", stopped)  # it is finished, so it is not run again
    assert execute(run, one).metrics == {"found": 1.0}
    assert not two._remote.get_file_info(f"work/{run.key}").is_file


def test_older_checkpoints_go_on_the_remote_too(machines):
    one, two = machines
    folder = one.work_path("k") / "checkpoints"
    folder.mkdir(parents=True)
    for step in (1, 2, 3):
        (folder / f"step-{step}.pt").write_text(str(step))
        one.save_work("k")
        (folder / f"step-{step - 1}.pt").unlink(missing_ok=True)
    one.save_work("k")
    two.fetch_work("k")
    assert [path.name for path in (two.work_path("k") / "checkpoints").iterdir()] == ["step-3.pt"]
    two.drop_work("k")
    one.drop_work("k")


def test_the_environment_says_where_it_is(tmp_path, monkeypatch, remote):
    assert type(open_store(tmp_path)) is Store
    monkeypatch.setenv("FFFSWEEP_STORE", remote.as_uri())
    assert open_store(tmp_path).address == remote.as_uri()
    monkeypatch.setenv("FFFSWEEP_STORE", "ftp://user:sesame-open@host/folder")
    with pytest.raises(ValueError, match=r"FFFSWEEP_STORE=ftp://user:\*\*\*@host/folder: .*expected such as s3://") as caught:
        open_store(tmp_path)
    assert "sesame" not in str(caught.value)
