"""What `make gpu-check` says, and how it keeps its time, on rows that are made up."""

import argparse
import json
import time
from pathlib import Path

import pytest
import torch

from fffsweep.kernels import registry
from fffsweep.kernels.gate import amid
from fffsweep.kernels.gpu import check, goals
from fffsweep.kernels.gpu.deadline import Deadline, OutOfTime
from fffsweep.kernels.layer import random_layer
from fffsweep.kernels.shape import TreeShape
from fffsweep.kernels.verify import verify

ROW = {"suite": "gpu", "best": True, "mode": "hot", "hidden": 768, "layout": "1x11", "dtype": "bfloat16", "direction": "forward"}


def test_a_goal_is_held_against_the_worst_of_its_rows():
    rows = [
        ROW | {"tokens": 1, "speedup_vs_best_dense": 1.5, "speedup_vs_gather": 2.0},
        ROW | {"tokens": 16384, "speedup_vs_best_dense": 5.0, "speedup_vs_gather": 30.0},
        ROW | {"tokens": 16384, "speedup_vs_best_dense": 4.0, "speedup_vs_gather": 50.0},
        ROW | {"tokens": 16384, "speedup_vs_best_dense": 0.1, "speedup_vs_gather": 0.1, "best": False},
        ROW | {"tokens": 128, "speedup_vs_best_dense": 0.5, "speedup_vs_gather": 0.5, "mode": "cold"},
        ROW | {"tokens": 16384, "speedup_vs_best_dense": 16.0, "speedup_vs_gather": 1.0, "dtype": "float32"},
        {"suite": "training", "variant": "cmm", "precision": "bf16", "layout": "1x11", "hidden": 768, "speedup_vs_dense": 2.0},
    ]
    found = {each["goal"]: (each["ratio"], each["met"]) for each in goals.verdicts(rows)}
    assert found == {
        "bfloat16 over the best dense layer, every batch": (1.5, True),
        "bfloat16 over the best dense layer, 16,384 tokens": (4.0, False),
        "float32 without TF32 over the best dense layer, 16,384 tokens": (16.0, True),
        "1x15, bfloat16 over the best dense layer": (None, None),
        "bfloat16 forward and backward over the best dense layer": (None, None),
        "bfloat16 over gathered rows and batched products, 16,384 tokens": (30.0, False),
        "training in bfloat16 over a dense layer": (2.0, True),
    }
    lines = goals.lines(goals.verdicts(rows)).splitlines()
    assert [line.split()[-1] for line in lines] == ["met", "MISSED", "met", "measured", "measured", "MISSED", "met"]


def work(seconds):
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        pass


def test_a_deadline_ends_what_runs_and_lets_nothing_more_begin():
    began, limit = time.monotonic(), Deadline(0.05)
    with limit:
        pass
    with pytest.raises(OutOfTime), limit:
        work(20)
    assert time.monotonic() - began < 10
    with pytest.raises(OutOfTime), limit:
        pytest.fail("begun after the end")


def test_time_that_a_run_does_not_need_is_left_to_those_after_it(monkeypatch, tmp_path):
    budgets = []

    def main(arguments):
        budget, path = (arguments[arguments.index(name) + 1] for name in ("--budget-s", "--json"))
        budgets.append(float(budget))
        Path(path).write_text(json.dumps({"provenance": {"gpu": "A Card"}, "rows": [], "left_out": ["a case"]}))
        return 0

    monkeypatch.setattr(check.bench, "main", main)
    monkeypatch.setattr(check, "_missing", lambda *packages: "not run: none of them installed")
    began = time.monotonic()
    assert check._bench(argparse.Namespace(budget_s=400.0, results=tmp_path, seed=1), began) == 0
    assert len(budgets) == len(check.RUNS)
    assert budgets[0] == pytest.approx(400 * check.RUNS[0][0], rel=0.05)
    assert budgets[-1] == pytest.approx(400, rel=0.05)
    (written,) = tmp_path.glob("cmm_gpu_a_card_*.json")
    assert json.loads(written.read_text())["left_out"] == ["a case"] * len(check.RUNS)


@pytest.mark.parametrize("backward", [False, True])
def test_the_gate_holds_a_batch_as_large_as_the_timed_one(backward):
    weights, x = random_layer(TreeShape(2, 3), 12), torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    fresh, places = torch.randn(5, 12, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 39, 0, 17, 20])
    sound = registry.find("gather")
    sizes = []

    def prepare(weights):
        layer = sound.prepare(weights)
        return lambda tokens: sizes.append(len(tokens)) or layer(tokens)

    watched = registry.Implementation("watched", "cmm", prepare, supports_backward=True, paths=sound.paths)
    assert verify(amid(watched, x, places), weights, fresh, backward=backward).verified
    assert sizes == [40]
    # wrong in large batches alone: what a gate on few tokens lets pass
    broken = registry.Implementation(
        "broken", "cmm", lambda weights: lambda tokens: sound.prepare(weights)(tokens) * (len(tokens) < 30), supports_backward=True
    )
    assert verify(broken, weights, fresh).verified
    assert not verify(amid(broken, x, places), weights, fresh).verified


@pytest.mark.parametrize(
    ("code", "limit_s", "answer", "said"),
    [
        ("import sys; open(sys.argv[-1], 'w').write('{\"rows\": []}')", 60, (0, []), ""),
        ("print('GATE FAILED'); raise SystemExit(1)", 60, (1, []), "GATE FAILED"),
        ("import time; time.sleep(60)", 0.2, (0, []), "not measured in 0 s"),
    ],
    ids=["timed", "gate-failed", "too-slow"],
)
def test_training_that_fails_its_gate_fails_the_check(code, limit_s, answer, said, tmp_path, monkeypatch, capsys):
    run, part = check.subprocess.run, tmp_path / "part.json"
    monkeypatch.setattr(check, "_missing", lambda *packages: None)
    monkeypatch.setattr(check.subprocess, "run", lambda command, **how: run([command[0], "-c", code, *command[3:]], **how))
    assert check._time_training(limit_s, part) == answer
    assert said in capsys.readouterr().out
    assert not part.exists()
