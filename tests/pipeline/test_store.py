"""The result store: whole or absent, never changed, verified when read."""

import hashlib
import json
import multiprocessing
from dataclasses import replace

import pytest

from fffsweep.pipeline.stage import StageRun
from fffsweep.pipeline.store import DamagedArtifact, Store, is_weight


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def output_of(tmp_path, **files):
    folder = tmp_path / "output"
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    folder.mkdir(exist_ok=True)
    return folder


RUN = StageRun("pretrain", 1, {"tokens": 10, "path": "here"}, seed=3, inputs={"prepare": "0" * 40}, identity={"tokens": 10})


def test_what_is_published_is_read_back(store, tmp_path):
    published = store.publish(RUN, {"loss": 0.1 + 0.2}, output_of(tmp_path, a="alpha", deep__b="beta"), {"commit": "c"}, 5.0, 2.0)
    read = store.get(RUN.key)
    assert read == published
    assert read.metrics == {"loss": 0.1 + 0.2}
    assert read.run == RUN
    folder = store.checkout(store.get(RUN.key), tmp_path / "in")
    assert {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()} == {"a": "alpha", "deep/b": "beta"}


def test_the_first_manifest_stands(store, tmp_path):
    store.publish(RUN, {"loss": 1.0}, output_of(tmp_path, a="first"), {}, 0.0, 0.0)
    again = store.publish(RUN, {"loss": 2.0}, output_of(tmp_path, a="second"), {}, 0.0, 0.0)
    assert again.metrics == store.get(RUN.key).metrics == {"loss": 1.0}
    assert store.read(again, "a").read_text() == "first"


def test_equal_bytes_are_stored_once(store, tmp_path):
    store.publish(RUN, {}, output_of(tmp_path, a="same", b="same"), {}, 0.0, 0.0)
    assert len([p for p in (store.root / "objects").rglob("*") if p.is_file()]) == 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_seen_when_read_and_mended_when_made_again(store, tmp_path, damage):
    manifest = store.publish(RUN, {}, output_of(tmp_path, a="precious"), {}, 0.0, 0.0)
    path = store.object_path(manifest.artifacts["a"].sha256)
    {"flip": lambda: path.write_text("precioux"), "truncate": lambda: path.write_text("prec"), "remove": path.unlink}[damage]()
    with pytest.raises(DamagedArtifact) as error:
        store.checkout(store.get(RUN.key), tmp_path / "in")
    assert error.value.key == RUN.key
    assert "'a' of pretrain" in str(error.value)
    store.forget(RUN.key)
    assert not store.has(RUN.key)
    store.publish(RUN, {}, output_of(tmp_path, a="precious"), {}, 0.0, 0.0)
    assert store.read(store.get(RUN.key), "a").read_text() == "precious"


def test_unknown_key(store):
    with pytest.raises(KeyError):
        store.get("f" * 40)


def test_a_manifest_of_another_version_says_so(store, tmp_path):
    store.publish(RUN, {}, output_of(tmp_path), {}, 0.0, 0.0)
    path = store.manifest_path(RUN.key)
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": "fffsweep.manifest/0"}))
    with pytest.raises(ValueError, match="another version"):
        store.get(RUN.key)


def _publish(root, output, number):
    Store(root).publish(RUN, {"who": float(number)}, output, {}, 0.0, 0.0)


def test_many_publishers_of_one_key_leave_one_manifest(store, tmp_path):
    output = output_of(tmp_path, a="x" * 10000)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_publish, args=(store.root, output, n)) for n in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert list(store.keys()) == [RUN.key]
    assert store.get(RUN.key).metrics["who"] in range(4)
    assert [p for p in store.root.rglob(".*") if p.is_file()] == []


def test_the_key_depends_on_everything_that_determines_a_result():
    others = [
        replace(RUN, stage="finetune"),
        replace(RUN, version=2),
        replace(RUN, identity={"tokens": 11}),
        replace(RUN, seed=4),
        replace(RUN, inputs={"prepare": "1" * 40}),
        replace(RUN, fingerprints={"data": "x"}),
    ]
    assert len({run.key for run in [RUN, *others]}) == len(others) + 1
    assert replace(RUN, config={"tokens": 10, "path": "there"}).key == RUN.key


def test_the_key_is_the_hash_of_one_json_text():
    """Stores outlive versions: the text is put together from parts, which must give what it always was."""
    hashed = {
        "stage": RUN.stage,
        "version": RUN.version,
        "config": RUN.config if RUN.identity is None else RUN.identity,
        "seed": 5,
        "inputs": {"b": "1" * 40, "a": "2" * 40},
        "fingerprints": {"data": "ä"},
    }
    run = replace(RUN, fingerprints=hashed["fingerprints"])
    text = json.dumps(hashed, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert run.again(5, hashed["inputs"]).key == hashlib.sha256(text.encode()).hexdigest()[:40]
    assert run.again(5, hashed["inputs"]) == replace(run, seed=5, inputs=hashed["inputs"])


@pytest.mark.parametrize(("name", "large"), [("train/inputs-0.npy", True), ("model/model.safetensors", True), ("curve.jsonl", False)])
def test_recorded_activations_stay_behind_like_weights(name, large):
    assert is_weight(name) is large
