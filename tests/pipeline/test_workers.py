"""One pretraining on two processes follows the one on a single process."""

import json

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from fffsweep.pipeline import pretraining, workers
from fffsweep.pipeline.model_settings import ModelSettings
from fffsweep.pipeline.stage import StageContext, StopRequested
from fffsweep.pipeline.stages.pretrain import Pretrain, PretrainConfig

FEEDFORWARD = {"variant": "fff", "trees": 2, "depth": 3}


def config_of(dropout=0.0, **recipe):
    model = ModelSettings(hidden_size=32, num_layers=2, num_heads=4, sequence_length=16, dropout=dropout, feedforward=FEEDFORWARD)
    fields = {"steps": 20, "batch_size": 12, "micro_batch_size": 4, "evaluations": 2, "log_every": 1, "validation_sequences": 24}
    return PretrainConfig(model=model, **{**fields, **recipe})


def worker(rank, folder, data, configs):
    """Worker `rank` of two: each of the configs, one after another; the second run of `stopped...` goes on from the first.

    `stopped by N`: worker N alone is asked to stop.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for name, config in configs:
        asked = iter([False] * 4 + [True])
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "output").mkdir(exist_ok=True)
        (folder / name / "work").mkdir(exist_ok=True)
        dist.barrier()
        context = StageContext(0, {"prepare": data}, {}, folder / name / "output", folder / name / "work")
        is_first = not list(context.work.iterdir())
        dist.barrier()  # before worker 0 writes there
        if name.startswith("stopped") and is_first:
            if not name.startswith("stopped by") or name.endswith(str(rank)):
                context.stop_requested = lambda asked=asked: next(asked)
            pretraining.STOP_POLL_S = -1
            with pytest.raises(StopRequested):
                Pretrain().run(config, context)
            pretraining.STOP_POLL_S = 0.5
            continue
        metrics = Pretrain().run(config, context)
        (folder / name / f"metrics-{rank}.json").write_text(json.dumps(metrics))
    dist.destroy_process_group()


def rows_of(output):
    return [json.loads(line) for line in (output / "curve.jsonl").read_text().splitlines()]


@pytest.mark.integration  # two processes that import everything
def test_two_workers_follow_one(tiny_data, new_context, tmp_path):
    plain, ramped = config_of(), config_of(batch_ramp=0.8, optimizer="muon")
    configs = [("plain", plain), ("ramped", ramped), ("stopped", plain), ("stopped", plain)]
    multiprocessing.spawn(worker, (tmp_path, tiny_data, configs), nprocs=2)
    for name, config in (("plain", plain), ("ramped", ramped), ("stopped", plain)):
        alone = new_context(f"alone-{name}")
        expected = Pretrain().run(config, alone)
        found = json.loads((tmp_path / name / "metrics-0.json").read_text())
        assert json.loads((tmp_path / name / "metrics-1.json").read_text()) == {}
        ours, theirs = map(rows_of, (tmp_path / name / "output", alone.output))
        assert [(row["step"], row["tokens"]) for row in ours] == [(row["step"], row["tokens"]) for row in theirs]
        # sums of the same terms in another order, carried on over twenty steps
        assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-4)
        assert [row["learning_rate"] for row in ours] == [row["learning_rate"] for row in theirs]
        assert found["mlm/validation_loss"] == pytest.approx(expected["mlm/validation_loss"], rel=1e-4)
        assert found["mlm/tokens"] == expected["mlm/tokens"]


@pytest.mark.integration
def test_one_worker_stops_all_and_they_go_on_to_the_same_bits(tiny_data, tmp_path):
    """With dropout, of which checkpoints hold worker 0's random numbers alone."""
    config, stopped = config_of(dropout=0.2), ("stopped by 0", "stopped by 1")
    configs = [("whole", config), *((name, config) for name in stopped for _ in range(2))]
    multiprocessing.spawn(worker, (tmp_path, tiny_data, configs), nprocs=2)
    for name in stopped:
        whole, halves = tmp_path / "whole" / "output", tmp_path / name / "output"
        assert [row["step"] for row in rows_of(halves)] == list(range(1, 21))
        assert [row["loss"] for row in rows_of(halves)] == [row["loss"] for row in rows_of(whole)]
        assert (halves / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


@pytest.mark.integration
def test_random_numbers_differ_from_worker_to_worker_and_from_step_to_step(tmp_path):
    multiprocessing.spawn(drawing, (tmp_path,), nprocs=2)
    drawn = [json.loads((tmp_path / f"drawn-{rank}.json").read_text()) for rank in (0, 1)]
    values = [value for worker in drawn for value in worker]
    assert len(values) == len(set(values)) == 6


def drawing(rank, folder):
    """The first random number of three steps."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = []
    for step in (0, 1, 2):
        workers.seed_step(0, step)
        found.append(torch.rand(()).item())
    (folder / f"drawn-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
