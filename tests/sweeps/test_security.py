"""Nothing of a store or a config is executed: pickles are refused, YAML makes plain values, names stay names."""

import ast
import json
import pickle
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient
from mlflow.utils.file_utils import local_file_uri_to_path

from fffsweep.pipeline.checkpoint import Checkpoints, _digest
from fffsweep.pipeline.stage import StageRun
from fffsweep.pipeline.store import Manifest, Store, one_component
from fffsweep.pipeline.tracking import Tracker
from fffsweep.sweeps.backends import sqlite_url
from fffsweep.sweeps.record import StageState, study_folder
from fffsweep.sweeps.yaml_source import ConfigError, read_source

CHECKOUT = Path(__file__).resolve().parents[2]
LAYERS = ("kernels", "pipeline", "sweeps", "dashboards")


class Evil:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_malicious_checkpoint_is_not_executed(tmp_path, how):
    mark, aside = tmp_path / "executed", tmp_path / "aside"
    if how == "torch":
        torch.save({"step": Evil(mark)}, aside)
    else:
        aside.write_bytes(pickle.dumps(Evil(mark)))
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    good = Checkpoints(folder, 60.0)
    good.save(1, {"step": 1})
    aside.replace(folder / f"step-{2:012d}-{_digest(aside)}.pt")  # its checksum is right: whoever writes the file can make it so
    assert good.load() == {"step": 1}
    assert not mark.exists()
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists()  # the trap works


def test_no_module_unpickles():
    """What reads files: torch.load with weights_only alone, no pickle, no YAML loader that makes objects."""
    calls = []
    for layer in LAYERS:
        for path in (CHECKOUT / layer).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call):
                    continue
                name = ast.unparse(node.func)
                calls.append(name)
                where = f"{path.relative_to(CHECKOUT)}:{node.lineno}"
                assert name not in ("pickle.load", "pickle.loads", "joblib.load", "dill.load", "eval", "exec"), where
                if name == "torch.load":
                    assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), where
                if name in ("yaml.load", "yaml.load_all"):
                    assert any("Safe" in ast.unparse(argument) for argument in (*node.args, *(k.value for k in node.keywords))), where
                if name.endswith(("np.load", "numpy.load")):
                    assert not any(k.arg == "allow_pickle" for k in node.keywords), where
    assert "torch.load" in calls


def test_yaml_makes_no_objects(tmp_path):
    mark, path = tmp_path / "executed", tmp_path / "evil.yaml"
    path.write_text(f'name: !!python/object/apply:pathlib.Path.touch ["{mark}"]\n')
    with pytest.raises(ConfigError):
        read_source(path)
    path.write_text(f'name: !!python/object/apply:os.system ["touch {mark}"]\n')
    with pytest.raises(ConfigError):
        read_source(path)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["..", ".", "../../outside", "/tmp/outside", ".hidden", "a/b"])
def test_mlflow_keeps_its_files_below_the_results_whatever_a_study_is_called(here, name):
    root = here / "mlartifacts"
    Tracker(sqlite_url(here / "mlflow.db"), name, root).close()
    location = MlflowClient(tracking_uri=sqlite_url(here / "mlflow.db")).get_experiment_by_name(name).artifact_location
    assert Path(local_file_uri_to_path(location)).parent == root.resolve()
    assert study_folder(here, name).resolve().parent == (here / "studies").resolve()


def test_a_plain_name_is_its_own_folder():
    assert one_component("quickstart_2-b.c") == "quickstart_2-b.c"


RUN = StageRun("pretrain", 1, {}, 0)


def tampered(tmp_path, change):
    """A store whose one manifest has an artifact `a` as `change` makes it."""
    store, output = Store(tmp_path / "store"), tmp_path / "output"
    output.mkdir()
    (output / "a").write_text("theirs")
    artifact = store.publish(RUN, {}, output, {}, 0.0, 0.0).to_json()["artifacts"]["a"]
    path = store.manifest_path(RUN.key)
    path.write_text(json.dumps({**json.loads(path.read_text()), "artifacts": change(artifact)}))
    return store


@pytest.mark.parametrize("name", ["../../precious", "PRECIOUS", "a/../../../precious", "", ".", "..", "a//b", "a/", "./a", "..\\a", "a\0b"])
def test_an_artifact_name_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    name = name.replace("PRECIOUS", str(precious))
    store = tampered(tmp_path, lambda artifact: {name: artifact})
    with pytest.raises((ValueError, RuntimeError), match="expected a relative path"):
        store.checkout(store.get(RUN.key), tmp_path / "in" / "folder")
    assert (precious.read_text(), precious.is_symlink()) == ("mine", False)


@pytest.mark.parametrize("sha256", ["../../precious", "A" * 64, "a" * 63, "a" * 64 + "\n", ""])
def test_a_checksum_that_is_none_is_refused(tmp_path, sha256):
    store = tampered(tmp_path, lambda artifact: {"a": {**artifact, "sha256": sha256}})
    with pytest.raises((ValueError, RuntimeError), match="expected 64 lower-case hexadecimal digits"):
        store.get(RUN.key)


def test_names_that_stay_inside_are_read_back(tmp_path):
    manifest = tampered(tmp_path, lambda artifact: {"model/..data/a b": artifact}).get(RUN.key)
    assert isinstance(manifest, Manifest)
    assert list(manifest.artifacts) == ["model/..data/a b"]


def test_a_recorded_key_that_leads_out_of_the_store_is_refused():
    stage = {"name": "pretrain", "label": "pretrain/0", "key": "../../precious", "replicate": 0}
    live = dict.fromkeys(("state", "attempts", "progress", "worker", "duration_s", "error"))
    with pytest.raises(ConfigError, match="expected 40 lower-case hexadecimal digits"):
        StageState.from_json({**stage, **live})
