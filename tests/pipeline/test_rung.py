"""Rungs of pretraining: judged like a short run, continued like one that never stopped."""

import itertools
import json

import pytest
import torch

from fffsweep.pipeline import schedules
from fffsweep.pipeline.model_settings import ModelSettings
from fffsweep.pipeline.portable import load_state, save_state
from fffsweep.pipeline.stage import StopRequested
from fffsweep.pipeline.stages.pretrain import Pretrain, PretrainConfig
from fffsweep.pipeline.stages.rung import Rung, RungConfig


def config_of(share=None, **recipe):
    layer = {"variant": "fff", "trees": 2, "depth": 3}
    model = ModelSettings(hidden_size=32, num_layers=1, num_heads=4, sequence_length=16, dropout=0.1, feedforward=layer)
    fields = {"steps": 30, "batch_size": 8, "micro_batch_size": 4, "batch_ramp": 0.3, "schedule": "wsd", "warmup": 0.05, "evaluations": 3}
    values = {"model": model, **fields, "log_every": 1, "validation_sequences": 24, **recipe}
    return PretrainConfig(**values) if share is None else RungConfig(**values, share=share)


def weights(context):
    from safetensors.torch import load_file

    return load_file(context.output / "model" / "model.safetensors")


def rung(context, before=None, share=1 / 3):
    if before is not None:
        context.inputs["rung"] = before.output
    return Rung().run(config_of(share), context)


def test_a_run_that_passed_two_rungs_ends_with_the_bits_of_one_that_never_stopped(new_context):
    plain, first, second, last = (new_context() for _ in range(4))
    expected = Pretrain().run(config_of(), plain)
    losses = [rung(first, share=1 / 9)["mlm/validation_loss"], rung(second, first, 1 / 3)["mlm/validation_loss"]]
    last.inputs["rung"] = second.output
    metrics = Pretrain().run(config_of(), last)
    assert {name: value for name, value in metrics.items() if name.startswith(("mlm/", "tree/"))} == {
        name: value for name, value in expected.items() if name.startswith(("mlm/", "tree/"))
    }
    ours, theirs = weights(last), weights(plain)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses[0] != losses[1]


def test_a_rung_stopped_anywhere_ends_with_the_same_loss_and_state(new_context, monkeypatch):
    monkeypatch.setattr("fffsweep.pipeline.pretraining.STOP_POLL_S", 0.0)
    whole = new_context()
    expected = rung(whole)
    interrupted = new_context()
    answers = itertools.cycle([False, False, True])  # asked at every step
    interrupted.stop_requested = lambda: next(answers)
    num_stops, metrics = 0, None
    while metrics is None:
        try:
            metrics = rung(interrupted)
        except StopRequested:
            num_stops += 1
    assert num_stops > 2
    assert metrics["mlm/validation_loss"] == expected["mlm/validation_loss"]
    ours, theirs = (load_state(context.output / "state")["model"] for context in (interrupted, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_state_is_the_one_before_the_decay(new_context):
    context = new_context()
    rung(context)
    assert load_state(context.output / "state")["progress"]["step"] == 8  # 0.8 of a third of 30
    rates = [json.loads(line)["learning_rate"] for line in (context.output / "curve.jsonl").read_text().splitlines()]
    assert rates[-3] == max(rates)
    assert rates[-1] < rates[-2] <= rates[-3]


@pytest.mark.parametrize("share", [1 / 9, 1 / 3])
def test_the_rate_of_a_rung_is_the_whole_runs_until_it_falls_to_zero(share):
    for progress in (0.0, 0.03, 0.5 * share, 0.799 * share):
        assert schedules.rung_factor(progress, share, 0.05) == schedules.factor("wsd", progress, 0.05)
    assert schedules.rung_factor(0.9 * share, share) == pytest.approx(0.5)
    assert schedules.rung_factor(share, share) == 0


def test_a_state_of_any_shape_comes_back(tmp_path):
    shared = torch.arange(6.0).reshape(2, 3)
    state = {
        "a": shared,
        "b": shared.t(),
        7: [{"x": (0.9, float("inf"))}, None, True],
        "step": torch.tensor(3.0),
        "rng": torch.get_rng_state(),
    }
    save_state(state, tmp_path / "state")
    found = load_state(tmp_path / "state")
    assert torch.equal(found["a"], shared)
    assert torch.equal(found["b"], shared.t())
    assert torch.equal(found["rng"], state["rng"])
    assert found[7] == [{"x": [0.9, float("inf")]}, None, True]
    assert float(found["step"]) == 3.0


def test_other_schedules_are_refused():
    with pytest.raises(ValueError, match="only wsd can be continued"):
        config_of(0.5, schedule="cosine", warmup=0.0)
