"""Resources from the config, what fits beside what, whose fault a failure is, and the end of runs that exceed their limits."""

import errno
import json
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest

from fffsweep.pipeline.settings import canonical_json
from fffsweep.pipeline.stage import Resources, StageRun
from fffsweep.pipeline.stages.noop import Noop
from fffsweep.pipeline.store import Store
from fffsweep.sweeps import executors
from fffsweep.sweeps.capacity import Capacity, Node
from fffsweep.sweeps.config import ConfigError, SweepConfig
from fffsweep.sweeps.controller import run_sweep
from fffsweep.sweeps.executors import InlineExecutor, attempt, of_the_machine
from fffsweep.sweeps.limits import StageLimits
from fffsweep.sweeps.plan import make_plan
from fffsweep.sweeps.ray_executor import capacity_of
from fffsweep.sweeps.simulate import Cluster
from fffsweep.sweeps.watchdog import TooLong, TooMuchMemory, alarmed, leave_fate, take_fate

ONE, TWO, ALONE = Resources(cpus=1), Resources(cpus=2), Resources(cpus=1, exclusive=True)


def nodes(*cpus):
    return Capacity(tuple(Node(number) for number in cpus))


def with_resources(config, **resources):
    return SweepConfig.model_validate({**config.resolved(), "resources": resources})


def test_limits_change_what_a_stage_occupies_and_no_key(tiny_directory_config):
    config = with_resources(tiny_directory_config, pretrain={"gpus": 0.5, "memory_bytes": "4G", "timeout_s": 60, "retries": 5})
    limits = config.limits_of("pretrain")
    assert limits.applied(Resources(cpus=3)) == Resources(cpus=3, gpus=0.5, memory_bytes=4 * 10**9, timeout_s=60)
    assert limits.retries == 5
    assert config.limits_of("finetune") == StageLimits()
    assert StageLimits().applied(Resources(gpus=1.0)).gpus == 1.0  # a stage that is nothing without a GPU
    assert canonical_json(config.stages.identity()) == canonical_json(tiny_directory_config.stages.identity())


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"collect": {"gpus": 1}}, "resources.collect.gpus=1: this stage computes on CPUs"),
        ({"pretraining": {}}, "Input should be 'prepare', 'pretrain'"),
        ({"pretrain": {"timeout_s": 0}}, "greater than 0"),
        ({"pretrain": {"memory_bytes": "1k"}}, "greater than or equal to 1048576"),
        ({"finetune": {"workers": 2}}, "resources.finetune.workers=2: expected 1; pretraining alone is shared"),
        ({"pretrain": {"workers": 2}}, "resources.pretrain.workers=2: expected a divisor of the 1 micro-batches of a step; set .* to 2"),
    ],
)
def test_senseless_limits_are_refused(tiny_directory_config, resources, message):
    with pytest.raises(ValueError, match=message):
        with_resources(tiny_directory_config, **resources)


def test_fewer_processors_than_threads_are_refused(tiny_directory_config):
    values = tiny_directory_config.resolved()
    values["stages"]["pretrain"]["cpus"] = 4
    values["resources"] = {"pretrain": {"cpus": 2}}
    with pytest.raises(ValueError, match=r"resources.pretrain.cpus=2: expected at least 4"):
        SweepConfig.model_validate(values)


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        (
            {"pretrain": {"cpus": 10_000}},
            r"stage pretrain asks for 10,000 cpus, and this machine has \d+: lower .*resources.pretrain, or .*--address",
        ),
        ({"pretrain": {"workers": 2, "cpus": 8_000}}, "asks for 16,000 cpus for 2 workers"),
        ({"finetune": {"gpus": 1000}}, r"stage finetune asks for 1,000 gpus, and this machine has \d+:"),
        ({"pretrain": {"memory_bytes": "900G"}}, "asks for 900,000,000,000 memory_bytes, and this machine has"),
    ],
)
def test_what_would_wait_for_ever_is_refused_before_anything_is_started(tiny_directory_config, tmp_path, resources, message):
    values = {**tiny_directory_config.resolved(), "resources": resources}
    values["stages"]["pretrain"]["micro_batch_size"] = 1
    config = SweepConfig.model_validate(values)
    with pytest.raises(ConfigError, match=message):
        run_sweep(config, tmp_path / "results", Mock())
    assert not (tmp_path / "results").exists()


def test_a_plan_for_a_cluster_counts_what_the_config_asks_for(tiny_directory_config, tmp_path):
    assert make_plan(tiny_directory_config, tmp_path, Cluster(1, 2)).schedule.num_runs > 0
    with pytest.raises(ValueError, match="--node-cpus 2: a stage run asks for 8 CPUs"):
        make_plan(with_resources(tiny_directory_config, pretrain={"cpus": 8}), tmp_path, Cluster(1, 2))
    with pytest.raises(ValueError, match="--node-gpus 0: a stage run asks for 1 GPUs"):
        make_plan(with_resources(tiny_directory_config, pretrain={"gpus": 1}), tmp_path, Cluster(1, 2))


def test_an_exclusive_run_waits_for_a_whole_node():
    one_node = nodes(2)
    assert one_node.has_room(ALONE, [])
    assert not one_node.has_room(ALONE, [ONE])
    assert not one_node.has_room(ONE, [ALONE])
    three_nodes = nodes(2, 2, 2)
    assert three_nodes.has_room(ALONE, [TWO, TWO])
    assert not three_nodes.has_room(ALONE, [TWO, TWO, ONE])
    assert three_nodes.has_room(TWO, [ALONE, ALONE])


def test_workers_each_take_what_a_run_takes(tiny_directory_config):
    values = tiny_directory_config.resolved()
    values["stages"]["pretrain"]["micro_batch_size"] = 1
    values["resources"] = {"pretrain": {"workers": 2, "gpus": 1}}
    shared = SweepConfig.model_validate(values).limits_of("pretrain").applied(ONE)
    assert (shared.workers, shared.cpus, shared.gpus) == (2, 1, 1)
    assert Capacity((Node(3, 2),)).has_room(shared, [ONE])
    assert Capacity((Node(2, 1), Node(1, 1))).has_room(shared, [ONE])
    assert not Capacity((Node(2, 2),)).has_room(shared, [ONE])
    small = Capacity((Node(3, 1),))
    assert not small.has_room(shared, [])
    assert small.lacking(shared).endswith("it asks for 2 workers of 1 CPU and 1 GPU each, and there is room for 1")
    values["resources"]["pretrain"]["memory_bytes"] = "4G"
    with pytest.raises(ValueError, match="workers=2 with memory_bytes or early_stopping"):
        SweepConfig.model_validate(values)


def test_a_node_for_timings_stands_apart():
    capacity = Capacity((Node(2), Node(2)), bench=(Node(2),))
    assert capacity.has_room(ALONE, [TWO, TWO])
    assert not capacity.has_room(ALONE, [ALONE])
    assert capacity.has_room(TWO, [ALONE, TWO])
    assert not capacity.has_room(ONE, [ALONE, TWO, TWO])


def test_gpus_are_counted_in_fractions():
    capacity, half = Capacity((Node(8, 1.0),)), Resources(gpus=0.5)
    assert capacity.has_room(half, [half])
    assert not capacity.has_room(half, [half, half])
    assert capacity.has_room(ONE, [half, half])
    assert capacity.has_room(Resources(gpus=0.7), [Resources(gpus=0.2), Resources(gpus=0.1)])  # in floats more than 1


TOO_LARGE = [
    (nodes(4, 4, 4), Resources(cpus=8), "it asks for 8 CPUs on one node; nodes there are: 3 with 4 CPUs"),
    (nodes(4), Resources(cpus=10_000), "it asks for 10000 CPUs on one node; nodes there are: 1 with 4 CPUs"),
    (
        Capacity((Node(4, 1), Node(4, 1), Node(8))),
        Resources(gpus=2),
        "it asks for 1 CPU and 2 GPUs on one node; nodes there are: 2 with 4 CPUs and 1 GPU, 1 with 8 CPUs",
    ),
    (
        Capacity((Node(8), Node(2, 1))),
        Resources(cpus=4, gpus=1),
        "it asks for 4 CPUs and 1 GPU on one node; nodes there are: 1 with 8 CPUs, 1 with 2 CPUs and 1 GPU",
    ),
    (
        Capacity((Node(4, 0, 16e9), Node(4, 0, 16e9))),
        Resources(memory_bytes=20 * 10**9),
        "it asks for 1 CPU and 20 GB of memory on one node; nodes there are: 2 with 4 CPUs and 16 GB of memory",
    ),
    (
        Capacity((Node(8, 1),), bench=(Node(4),)),
        Resources(gpus=1, exclusive=True),
        "it asks for all of one node labelled role=bench that has 1 GPU; nodes there are: 1 with 4 CPUs",
    ),
    (nodes(0), ONE, "it asks for 1 CPU on one node; nodes there are: 1 with 0 CPUs"),
    (nodes(0), ALONE, "it asks for all of one node; nodes there are: 1 with 0 CPUs"),
    (nodes(), ONE, "it asks for 1 CPU on one node; nodes there are: none"),
]


@pytest.mark.parametrize(("capacity", "wanted", "said"), TOO_LARGE, ids=[said for _, _, said in TOO_LARGE])
def test_what_no_node_can_hold_is_not_started_and_what_it_lacks_is_said(capacity, wanted, said):
    assert not capacity.fits(wanted)
    assert not capacity.has_room(wanted, [])
    assert capacity.lacking(wanted).startswith(f"waits for a larger cluster: {said}")


def test_a_timing_has_the_largest_node_that_can_hold_it_alone():
    assert nodes(2, 8).whole_node_cpus(Resources(cpus=4, exclusive=True)) == 8
    assert nodes(2).whole_node_cpus(Resources(cpus=4, exclusive=True)) == 2  # its threads are its own affair
    assert Capacity((Node(8), Node(4, 1))).whole_node_cpus(Resources(gpus=1, exclusive=True)) == 4
    unequal = Capacity((Node(2),), bench=(Node(4), Node(8)))
    assert unequal.whole_node_cpus(ALONE) == 8  # half of it would do on the smaller one, and leave room for another here
    assert unequal.has_room(ALONE, [TWO])
    assert not unequal.has_room(ALONE, [ALONE])


def test_clearing_up_after_a_timeout_is_not_timed(tmp_path, monkeypatch):
    """As when checkpoints are brought to a remote store, or the store is asked whether another attempt published."""
    slow = []

    def endless(self, config, context):
        try:
            while True:
                time.sleep(0.01)
        finally:
            slow.append(time.sleep(0.6))

    holds = executors._holds
    monkeypatch.setattr(Noop, "run", endless)
    monkeypatch.setattr(executors, "_holds", lambda store, key: slow.append(time.sleep(0.6)) or holds(store, key))
    executor = InlineExecutor(Store(tmp_path), lambda: False, lambda event: None)
    executor.submit(StageRun("noop", 1, {"name": "a"}, 0), Resources(timeout_s=0.1))
    (event,) = executor.wait(0)
    assert (event.kind, event.fault, len(slow)) == ("failed", "infrastructure", 2)
    assert "still running after its timeout of 0.1 s" in event.message


def test_memory_is_counted():
    capacity, large = Capacity((Node(8, 0, 16e9),)), Resources(memory_bytes=6 * 10**9)
    assert capacity.has_room(large, [large, ONE])
    assert not capacity.has_room(large, [large, large])


def test_what_ray_lists_is_what_there_is():
    def listed(labels=None, **resources):
        return {"Resources": {"node:10.0.0.1": 1.0, **resources}, "Labels": labels or {}}

    bench, plain, head = listed({"role": "bench"}, CPU=4.0, memory=8e9), listed(CPU=8.0, GPU=2.0, memory=16e9), listed(memory=1e9)
    assert capacity_of([head, plain, bench]) == Capacity((Node(0, 0, 1e9), Node(8, 2, 16e9)), (Node(4, 0, 8e9),))
    assert capacity_of([bench]) == Capacity((Node(4, 0, 8e9),))
    assert not capacity_of([]).fits(ONE)


def test_faults_of_the_machine_are_told_from_those_of_the_code():
    for error in (OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "broken"), ConnectionResetError(), TimeoutError()):
        assert of_the_machine(error)
    wrapped = RuntimeError("cannot write")
    wrapped.__cause__ = OSError(errno.ENOSPC, "full")
    assert of_the_machine(wrapped)
    for error in (ValueError("NaN"), FileNotFoundError(errno.ENOENT, "no"), MemoryError(), RuntimeError("no")):
        assert not of_the_machine(error)


def test_inline_limits_end_what_runs():
    def run(**limits):
        deadline = time.monotonic() + 30
        with alarmed(Resources(**limits)):
            while limits and time.monotonic() < deadline:
                pass

    with pytest.raises(TooLong, match=r"timeout of 0\.1 s"):
        run(timeout_s=0.1)
    with pytest.raises(TooMuchMemory, match="its limit is 1 MB"):
        run(memory_bytes=2**20)
    run()


_GUARDED = """
import os, signal, sys
from pathlib import Path
from fffsweep.pipeline.stage import Resources, StageRun
from fffsweep.pipeline.store import Store
from fffsweep.sweeps.watchdog import guarded
with guarded(Resources(**eval(sys.argv[2])), Path(sys.argv[1])):
    {body}
print("survived")
"""


@pytest.mark.parametrize(
    ("limits", "body", "why"),
    [
        ({"timeout_s": 0.2}, "os.kill(os.getpid(), signal.SIGSTOP)", "timeout"),
        ({"memory_bytes": 200 * 2**20}, "held = []\n    while True: held.append(b'x' * 2**20)", "memory"),
        ({"timeout_s": 100.0, "memory_bytes": 2**40}, "pass", None),
    ],
)
def test_a_worker_that_exceeds_its_limits_is_killed_and_the_reason_kept(tmp_path, limits, body, why):
    fate = tmp_path / "work" / "fate.json"
    program = _GUARDED.format(body=body)
    ended = subprocess.run([sys.executable, "-c", program, str(fate), repr(limits)], capture_output=True, text=True, timeout=60)
    if why is None:
        assert (ended.returncode, ended.stdout, take_fate(fate)) == (0, "survived\n", None)
    else:
        assert ended.returncode == -9, ended.stderr
        assert take_fate(fate)[0] == why
    assert take_fate(fate) is None


def test_a_fate_is_told_once(tmp_path):
    leave_fate(tmp_path / "a" / "fate.json", "preempted", "saved")
    assert json.loads((tmp_path / "a" / "fate.json").read_text())["why"] == "preempted"
    assert take_fate(tmp_path / "a" / "fate.json") == ("preempted", "saved")
    assert take_fate(tmp_path / "a" / "fate.json") is None


def test_a_time_is_not_taken_on_another_machine_than_it_is_filed_under(tmp_path):
    run = StageRun("benchmark_cpu", 1, {}, 0, fingerprints={"machine": "0123456789abcdef"})
    event = attempt(run, Store(tmp_path), lambda figures: None, lambda: False)
    assert (event.kind, event.fault) == ("failed", "code")
    assert "planned for (0123456789abcdef)" in event.message
    assert not Store(tmp_path).has(run.key)
