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
from fffsweep.pipeline.store import Store
from fffsweep.sweeps.config import ConfigError, SweepConfig
from fffsweep.sweeps.controller import run_sweep
from fffsweep.sweeps.executors import Capacity, attempt, of_the_machine
from fffsweep.sweeps.limits import StageLimits
from fffsweep.sweeps.watchdog import TooLong, TooMuchMemory, alarmed, leave_fate, take_fate

ONE, TWO, ALONE = Resources(cpus=1), Resources(cpus=2), Resources(cpus=1, exclusive=True)


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


def test_an_exclusive_run_waits_for_a_whole_node():
    one_node = Capacity(cpus=2, node_cpus=2)
    assert one_node.has_room(ALONE, [])
    assert not one_node.has_room(ALONE, [ONE])
    assert not one_node.has_room(ONE, [ALONE])
    three_nodes = Capacity(cpus=6, node_cpus=2)
    assert three_nodes.has_room(ALONE, [TWO, TWO])
    assert not three_nodes.has_room(ALONE, [TWO, TWO, ONE])
    assert three_nodes.has_room(TWO, [ALONE, ALONE])


def test_workers_each_take_what_a_run_takes(tiny_directory_config):
    values = tiny_directory_config.resolved()
    values["stages"]["pretrain"]["micro_batch_size"] = 1
    values["resources"] = {"pretrain": {"workers": 2, "gpus": 1}}
    shared = SweepConfig.model_validate(values).limits_of("pretrain").applied(ONE)
    assert (shared.workers, shared.cpus, shared.gpus) == (2, 1, 1)
    assert Capacity(cpus=3, gpus=2).has_room(shared, [ONE])
    assert not Capacity(cpus=3, gpus=1).has_room(shared, [])
    assert "it asks for 2 CPUs and 2 GPUs, and there are 3 CPUs and 1 GPUs" in Capacity(cpus=3, gpus=1).lacking(shared)
    assert not Capacity(cpus=2, gpus=2).has_room(shared, [ONE])
    values["resources"]["pretrain"]["memory_bytes"] = "4G"
    with pytest.raises(ValueError, match="workers=2 with memory_bytes or early_stopping"):
        SweepConfig.model_validate(values)


def test_a_node_for_timings_stands_apart():
    capacity = Capacity(cpus=4, node_cpus=2, num_bench=1)
    assert capacity.has_room(ALONE, [TWO, TWO])
    assert not capacity.has_room(ALONE, [ALONE])
    assert capacity.has_room(TWO, [ALONE, TWO])
    assert not capacity.has_room(ONE, [ALONE, TWO, TWO])


def test_gpus_are_counted_in_fractions():
    capacity, half = Capacity(cpus=8, gpus=1.0), Resources(gpus=0.5)
    assert capacity.has_room(half, [half])
    assert not capacity.has_room(half, [half, half])
    assert capacity.has_room(ONE, [half, half])


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
