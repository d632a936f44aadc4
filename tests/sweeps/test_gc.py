"""What goes and what stays when disk is reclaimed."""

import json

import pytest

from fffsweep.pipeline.store import Store
from fffsweep.sweeps import gc
from fffsweep.sweeps.config import ConfigError
from fffsweep.sweeps.gc import collect, find
from fffsweep.sweeps.record import Lease, study_folder
from fffsweep.sweeps.verify import verify

NAME = "tiny-directory"


@pytest.fixture
def littered(results):
    """Leftovers of every kind, and an unfinished stage run with a checkpoint."""
    store = Store(results / "store")
    record_path = study_folder(results, NAME) / "study.json"
    record = json.loads(record_path.read_text())
    unfinished = record["trials"][-1]["stages"][-1]
    unfinished["state"], record["trials"][-1]["state"] = "waiting", "running"
    record_path.write_text(json.dumps(record))
    store.forget(unfinished["key"])
    finished = record["trials"][0]["stages"][-1]["key"]
    files = {
        "loose": store.object_path("f" * 64),
        "torn": store.root / "objects" / "ff" / ".torn",
        "done": store.work_path(finished) / "checkpoints" / "step-1.pt",
        "nobody": store.work_path("0" * 40) / "checkpoints" / "step-1.pt",
        "killed": store.work_path(unfinished["key"]) / "attempt-x" / "output" / "half",
        "kept": store.work_path(unfinished["key"]) / "checkpoints" / "step-1.pt",
        "foreign": store.root / "work" / "notes.txt",
    }
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x" * 100)
    return results, files


def test_looking_deletes_nothing(littered):
    results, files = littered
    found = find(results, young_s=-1)
    assert {entry.why for entry in found} == {
        "held by no result",
        "left of an interrupted write",
        "work of a finished stage run",
        "work of a stage run of no study",
        "left of a killed attempt",
    }
    assert all(path.exists() for path in files.values())


def test_results_and_checkpoints_of_the_unfinished_stay(littered):
    results, files = littered
    before = verify(NAME, results)
    collect(results, young_s=-1)
    assert {name for name, path in files.items() if path.exists()} == {"kept", "foreign"}
    after = verify(NAME, results)
    assert (after.num_artifacts, after.problems) == (before.num_artifacts, before.problems)
    assert find(results, young_s=-1) == []


def test_what_is_young_stays(littered):
    assert find(littered[0]) == []


def test_results_of_no_study_go_when_asked(littered):
    results, _ = littered
    (study_folder(results, NAME) / "study.json").unlink()
    num_results = len(list(Store(results / "store").keys()))
    assert not [entry for entry in find(results, young_s=-1) if entry.why == "result of no study"]
    gone = collect(results, unused=True, young_s=-1)
    assert sum(entry.why == "result of no study" for entry in gone) == num_results
    assert list(Store(results / "store").keys()) == []
    assert not list((results / "store" / "objects").glob("*/*"))


def test_nothing_goes_while_a_driver_is_at_work(littered):
    results, files = littered
    lease = Lease(study_folder(results, NAME))
    with pytest.raises(ConfigError, match=r"is driven by .*; nothing was deleted"):
        collect(results, young_s=-1)
    lease.release()
    assert all(path.exists() for path in files.values())


def test_nothing_goes_while_a_manifest_cannot_be_read(results):
    store = Store(results / "store")
    path = store.manifest_path(next(store.keys()))
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"is damaged: it is not a manifest; .*--repair withdraws it"):
        collect(results, young_s=0)


def test_looking_bears_with_a_driver_that_clears_up_meanwhile(littered, monkeypatch):
    results, files = littered
    gone = {"torn", "done"}
    size, has = gc._size, Store.has

    def cleared(path):
        for name in gone:
            files[name].unlink(missing_ok=True)
        return size(path)

    monkeypatch.setattr(gc, "_size", cleared)
    found = find(results, young_s=-1)
    assert files["loose"] in {entry.path for entry in found}
    assert files["torn"] not in {entry.path for entry in found}

    get = Store.get
    finished = files["done"].parents[1].name  # what lies in its work folder would be kept if its result were gone
    withdrawn = min(set(Store(results / "store").keys()) - {finished})
    monkeypatch.setattr(Store, "get", lambda self, key: self.forget(key) or get(self, key) if key == withdrawn else get(self, key))
    assert len(find(results, young_s=-1)) >= len(found)
    assert not has(Store(results / "store"), withdrawn)
