"""A pretraining that two workers share through Ray Train, within a sweep."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from fffsweep.pipeline.checkpoint import Checkpoints
from fffsweep.pipeline.model_settings import ModelSettings
from fffsweep.pipeline.stage import Resources, StageContext, StopRequested
from fffsweep.pipeline.stages.pretrain import Pretrain, PretrainConfig
from fffsweep.sweeps.ray_workers import on_workers
from tests.pipeline.conftest import LENGTH, write_corpus, write_tokenizer
from tests.sweeps.conftest import CONFIG, write_data

pytestmark = pytest.mark.integration


def test_a_sweep_whose_pretraining_two_workers_share(tmp_path, fffsweep):
    write_data(tmp_path)
    config = tmp_path / "shared.yaml"
    config.write_text(CONFIG.replace("PATH", str(tmp_path)).replace("batch_size: 4,", "batch_size: 4, micro_batch_size: 2,"))
    found = {}
    for workers in (1, 2):
        results = tmp_path / f"results-{workers}"
        options = ["--set", f"resources.pretrain.workers={workers}", "--set", "stages.benchmark_cpu=null"]
        options += [
            "--set",
            "objectives={quality/avg: maximize, ff/active_width: minimize}",
            "--set",
            "layouts=[1x3]",
            "--set",
            "controls=[]",
        ]
        fffsweep("run", str(config), "--results", str(results), *options)
        manifests = [json.loads(path.read_text()) for path in (results / "store" / "manifests").glob("*/*.json")]
        found[workers] = {each["key"]: each["metrics"] for each in manifests if each["run"]["stage"] == "pretrain"}
        assert not list((results / "store").rglob("answer.json")), "what the workers left is not cleared up"
    assert len(found[1]) == 1
    assert found[1].keys() == found[2].keys()
    for key, metrics in found[1].items():
        for name in ("mlm/train_loss", "mlm/train_accuracy", "mlm/validation_loss", "mlm/tokens"):
            assert found[2][key][name] == pytest.approx(metrics[name], rel=1e-4)


@pytest.fixture
def pretraining(tmp_path):
    """Starts a long pretraining on two workers of a Ray of our own; `once_it_trains` is called with the process id of worker 0."""
    import ray

    data, rng = tmp_path / "data", np.random.default_rng(0)
    write_tokenizer(data / "tokenizer")
    write_corpus(data / "corpus" / "train.arrow", 300, rng)
    write_corpus(data / "corpus" / "validation.arrow", 40, rng)
    model = ModelSettings(hidden_size=16, num_layers=1, num_heads=2, sequence_length=LENGTH, feedforward={"variant": "dense", "trees": 8})
    config = PretrainConfig(model=model, steps=100_000, batch_size=8, micro_batch_size=4, log_every=5, validation_sequences=8)

    def start(name, once_it_trains):
        told, ended = tmp_path / f"{name}-pid", threading.Event()

        def wait():
            while not told.exists():
                if ended.wait(0.1):
                    return
            once_it_trains(int(told.read_text()))

        def report(figures):
            if not told.exists():
                told.with_suffix(".aside").write_text(str(os.getpid()))
                told.with_suffix(".aside").replace(told)

        output, work = tmp_path / name / "output", tmp_path / name / "work"
        output.mkdir(parents=True)
        work.mkdir()
        context = StageContext(0, {"prepare": data}, {}, output, work, report=report)
        run = on_workers(Resources(workers=2), None, lambda node: tmp_path / f"yield-{node}")
        waiting = threading.Thread(target=wait)
        waiting.start()
        try:
            run(Pretrain(), config, context)
        finally:
            ended.set()
            waiting.join()
            assert Checkpoints(work, 60).load() is not None, "nothing was saved"

    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    yield start
    ray.shutdown()


def workers_beside(pid):
    """Process ids of the other workers of Ray Train."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:  # it has just ended
            continue
        if command.startswith(b"ray::RayTrainWorker") and int(path.parent.name) != pid:
            found.append(int(path.parent.name))
    return found


def test_a_worker_that_has_to_go_has_all_save_themselves(pretraining, tmp_path):
    import ray

    def terminate(pid):
        (other,) = workers_beside(pid)
        os.kill(other, signal.SIGTERM)

    with pytest.raises(StopRequested):
        pretraining("terminated", terminate)
    node = ray.get_runtime_context().get_node_id()
    with pytest.raises(StopRequested):
        pretraining("drained", lambda pid: (tmp_path / f"yield-{node}").touch())
