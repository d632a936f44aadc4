"""A store on another file system behaves as one in a folder does, for every machine that opens it; the folder is a cache."""

import errno
import pickle
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fffsweep.pipeline.execute import execute
from fffsweep.pipeline.remote_store import RemoteStore, StoreUnreachable, open_store
from fffsweep.pipeline.stage import StageRun, StopRequested
from fffsweep.pipeline.stages.noop import Noop
from fffsweep.pipeline.store import DamagedArtifact, Store
from fffsweep.sweeps.executors import of_the_machine


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


@pytest.mark.parametrize("remaker", [0, 1], ids=["the same machine", "another machine"])
def test_damage_of_equal_length_is_mended_when_the_result_is_made_again(machines, tmp_path, remote, remaker):
    manifest = publish(machines[0], tmp_path)
    sha256 = manifest.artifacts["model/weights"].sha256
    there = remote / "objects" / sha256[:2] / sha256
    there.write_bytes(b"w" * 999 + b"x")
    reader = RemoteStore(tmp_path / "three" / "store", machines[0].address)
    with pytest.raises(DamagedArtifact, match="damaged"):
        reader.read(manifest, "model/weights")
    reader.forget(manifest.key)
    publish(machines[remaker], tmp_path / "again")
    assert there.read_bytes() == b"w" * 1000
    assert reader.read(reader.get(manifest.key), "model/weights").read_bytes() == b"w" * 1000


def test_a_manifest_that_another_machine_withdrew_is_not_published_again(machines, tmp_path):
    one, two = machines
    first = publish(one, tmp_path)
    two.forget(first.key)
    assert one.manifest_path(first.key).exists(), "it does not know yet"
    output = tmp_path / "other"
    output.mkdir()
    (output / "curve.jsonl").write_text("another\n")
    second = one.publish(first.run, {"x": 2.0}, output, {}, 1.0, 2.0)
    assert second.metrics == {"x": 2.0}
    assert two.get(first.key) == second
    assert Store(one.root).get(first.key) == second


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


def test_a_machine_that_had_the_run_before_goes_on_from_what_another_did_since(machines):
    one, two = machines
    first, later = (f"step-{step:012d}-{'0' * 16}.pt" for step in (100, 900))
    for machine, name in ((one, first), (two, later)):
        machine.fetch_work("k")
        folder = machine.work_path("k") / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
        machine.save_work("k")
    one.fetch_work("k")
    assert (one.work_path("k") / "checkpoints" / later).read_text() == later
    (two.work_path("k") / "checkpoints" / f"step-{10**3:012d}-{'0' * 16}.pt").write_text("newer")
    two.fetch_work("k")  # what is here is newer than what is there
    assert len(list((two.work_path("k") / "checkpoints").iterdir())) == 3
    one.save_work("k")
    assert {first, later} <= one._saved("k")


class Refusing:
    """A file system whose next calls, or reads of a stream, are refused in the words of pyarrow."""

    def __init__(self, files):
        self._files, self.num_left, self.named = files, 0, False

    def refuse(self):
        if self.num_left:
            self.num_left -= 1
            raise (
                OSError(5, "Input/output error") if self.named else OSError("AWS Error SLOW_DOWN during PutObject: secret_key=sesame-open")
            )

    def __getattr__(self, name):
        def call(*arguments, **named):
            self.refuse()
            found = getattr(self._files, name)(*arguments, **named)
            return BrokenStream(found, self) if name == "open_input_stream" else found

        return call


class BrokenStream:
    def __init__(self, stream, files):
        self._stream, self._files = stream, files

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._stream.close()

    def read(self, num_bytes):
        self._files.refuse()
        return self._stream.read(num_bytes)


@pytest.mark.parametrize("named", [False, True], ids=["in words", "with a number"])
def test_a_store_that_refuses_is_the_machine_s_fault_and_keeps_its_secrets(machines, tmp_path, named):
    store = machines[0]
    manifest = publish(store, tmp_path)
    store.__dict__["_remote"] = files = Refusing(store._remote)
    files.named = named
    checkpoint = store.work_path("k") / "checkpoints" / "step-1.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("half")
    artifact = store.object_path(manifest.artifacts["curve.jsonl"].sha256)
    calls = {
        "has": lambda: store.has(manifest.key),
        "get": lambda: store.get(manifest.key),
        "keys": lambda: list(store.keys()),
        "read": lambda: (artifact.unlink(missing_ok=True), store.read(manifest, "curve.jsonl")),
        "publish": lambda: publish(store, tmp_path / "again", seed=1),
        "save_work": lambda: store.save_work("k"),
        "fetch_work": lambda: store.fetch_work("another"),
        "drop_work": lambda: store.drop_work("k"),
        "forget": lambda: store.forget(manifest.key),
    }
    for name, call in calls.items():
        files.num_left = 1
        with pytest.raises(StoreUnreachable, match=f"FFFSWEEP_STORE={store.address}: ") as caught:
            call()
        assert of_the_machine(caught.value), name
        assert "sesame" not in str(caught.value)
        shutil.rmtree(tmp_path / "again", ignore_errors=True)
        call()  # and it goes on
    files.num_left = 0
    assert not store.has(manifest.key)


def test_a_download_that_breaks_off_is_told_from_a_full_disk_here(machines, tmp_path, monkeypatch):
    one, two = machines
    manifest = publish(one, tmp_path)
    two.__dict__["_remote"] = files = Refusing(two._remote)
    chunks = two._chunks

    def breaking(source):
        found = chunks(source)
        yield next(found)
        files.num_left = 1
        yield from found

    monkeypatch.setattr(two, "_chunks", breaking)
    with pytest.raises(StoreUnreachable, match="SLOW_DOWN"):
        two.read(manifest, "curve.jsonl")
    monkeypatch.setattr(two, "_chunks", chunks)
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space left") as caught:
        two.read(manifest, "curve.jsonl")
    assert not isinstance(caught.value, ConnectionError)


def test_s3_that_denies_access_is_named(tmp_path, monkeypatch):
    class Deny(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(403)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Deny)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    host = f"127.0.0.1:{server.server_port}"
    monkeypatch.setenv("FFFSWEEP_STORE", f"s3://reader:sesame-open@sweeps/x?endpoint_override={host}&scheme=http&region=us-east-1")
    try:
        with pytest.raises(StoreUnreachable, match=r"FFFSWEEP_STORE=s3://reader:\*\*\*@sweeps/x.*ACCESS_DENIED") as caught:
            open_store(tmp_path).has("0" * 40)
    finally:
        server.shutdown()
        server.server_close()
    assert "sesame" not in str(caught.value)


def test_the_environment_says_where_it_is(tmp_path, monkeypatch, remote):
    assert type(open_store(tmp_path)) is Store
    monkeypatch.setenv("FFFSWEEP_STORE", remote.as_uri())
    assert open_store(tmp_path).address == remote.as_uri()
    monkeypatch.setenv("FFFSWEEP_STORE", "ftp://user:sesame-open@host/folder")
    with pytest.raises(ValueError, match=r"FFFSWEEP_STORE=ftp://user:\*\*\*@host/folder: .*expected such as s3://") as caught:
        open_store(tmp_path)
    assert "sesame" not in str(caught.value)
