"""What a sweep must survive: each fault strikes a real three-node cluster at a seeded random moment.

Every test ends in `check`: all trials complete, each result published once, `fffsweep verify` green, no MLflow run left RUNNING, all
non-timing columns equal to the undisturbed sweep's bit for bit.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.chaos.cluster import ThreeNodes, wait_for
from tests.chaos.study import LIMIT_S, Sweep

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(900)]
Table = dict[str, Any]
HEADLESS_S = 150  # Ray waits a minute for a head that is gone


def lull(chance: Random) -> None:
    """A moment of chance within a pretraining."""
    time.sleep(chance.uniform(0, 0.4))


def faults_of(sweep: Sweep) -> list[str]:
    return [event["fault"] for event in sweep.events("failed")]


def test_a_worker_is_killed(sweep: Sweep, expected: Table, chance: Random) -> None:
    driver = sweep.start()
    run = sweep.wait_running(driver, "pretrain", chance.choice([1, 1, 2]))
    lull(chance)
    os.kill(run.pid, signal.SIGKILL)
    sweep.finish(driver)
    assert "infrastructure" in faults_of(sweep)
    sweep.check(expected)


def test_a_node_is_killed(sweep: Sweep, cluster: ThreeNodes, expected: Table, chance: Random) -> None:
    driver = sweep.start()
    sweep.wait_running(driver, "pretrain", chance.choice([1, 1, 2]))
    lull(chance)
    cluster.kill_worker_node()
    sweep.finish(driver)
    cluster.add_worker()
    sweep.check(expected)


def test_the_driver_is_killed(sweep: Sweep, expected: Table, chance: Random) -> None:
    driver = sweep.start()
    sweep.wait_running(driver, None, chance.randrange(1, 9))
    driver.kill()
    driver.wait()
    before = sweep.manifests()
    assert "reused" in sweep.finish(sweep.start())
    assert {key: sweep.manifests()[key] for key in before} == before
    sweep.check(expected)


def test_a_process_is_asked_to_end(sweep: Sweep, expected: Table, chance: Random) -> None:
    """SIGTERM, and SIGKILL when the grace period is over: the run saves itself, goes on elsewhere, and no try is lost."""
    driver = sweep.start()
    run = sweep.wait_running(driver, "pretrain", 1)
    lull(chance)
    os.kill(run.pid, signal.SIGTERM)
    sweep.finish(driver)
    assert faults_of(sweep) == ["preempted"]
    sweep.check(expected)


def test_a_spot_node_is_taken_back(sweep: Sweep, cluster: ThreeNodes, expected: Table, chance: Random) -> None:
    """SIGTERM to `ray start --block`: the node is drained, its run saves itself, the node ends by itself within the grace period."""
    driver = sweep.start()
    wait_for(lambda: any(cluster.runs_on_preemptible(run.pid) for run in sweep.running("pretrain")), "a run on the spot node", alive=driver)
    lull(chance)
    cluster.preempt()
    sweep.finish(driver)
    cluster.wait_preempted()
    cluster.add_preemptible()
    assert set(faults_of(sweep)) <= {"preempted"}
    sweep.check(expected)


def test_two_drivers_are_started(sweep: Sweep, expected: Table, chance: Random) -> None:
    first = sweep.start()
    sweep.wait_running(first, None, chance.randrange(1, 5))
    second = sweep.start()
    printed = sweep.finish(second, code=2)
    assert f"is driven by process {first.pid} on " in printed
    assert "Traceback" not in printed
    sweep.finish(first)
    sweep.check(expected)


def test_a_stage_hangs(sweep: Sweep, undisturbed: Sweep, expected: Table, chance: Random) -> None:
    """A stopped process stands for a hang in native code: no check of its own would ever run again."""
    timeout_s = max(8.0, 4 * undisturbed.longest_s("pretrain"))
    driver = sweep.start(f"resources.pretrain.timeout_s={timeout_s}")
    run = sweep.wait_running(driver, "pretrain", 1)
    lull(chance)
    os.kill(run.pid, signal.SIGSTOP)
    printed = sweep.finish(driver, limit_s=LIMIT_S + timeout_s)
    assert f"still running after its timeout of {timeout_s:g} s; trying again" in printed
    sweep.check(expected)


@pytest.mark.parametrize(("fault", "said"), [("leak", "its limit is 1500 MB"), ("nan", "metrics must be finite")])
def test_a_stage_is_at_fault(sweep: Sweep, faults: Path, expected: Table, chance: Random, fault: str, said: str) -> None:
    """It is not tried again, its trial fails, the sweep goes on; with the fault gone, the same command completes the study."""
    driver = sweep.start("resources.finetune.memory_bytes=1.5G")
    sweep.wait_running(driver, "pretrain", 1)
    (faults / "finetune").write_text(fault)
    printed = sweep.finish(driver, code=1)
    assert said in printed
    assert faults_of(sweep) == ["code"]
    states = sweep.trial_states()
    assert states.count("failed") >= 1
    assert set(states) <= {"failed", "complete"}
    sweep.finish(sweep.start())
    sweep.check(expected)


def test_a_checkpoint_is_damaged(sweep: Sweep, expected: Table, chance: Random) -> None:
    driver = sweep.start()
    run = sweep.wait_running(driver, "pretrain", 1)
    folder = sweep.results / "store" / "work" / run.key / "checkpoints"
    wait_for(lambda: list(folder.glob("step-*.pt")), "a checkpoint", alive=driver)
    os.kill(run.pid, signal.SIGSTOP)
    newest = max(folder.glob("step-*.pt"))
    scribble(newest, chance)
    os.kill(run.pid, signal.SIGKILL)
    sweep.finish(driver)
    assert "infrastructure" in faults_of(sweep)
    sweep.check(expected)


def test_an_artifact_is_damaged(sweep: Sweep, undisturbed: Sweep, expected: Table, chance: Random) -> None:
    """Whoever reads it notices; the result is made again, with the same bytes."""
    sweep.adopt("pretrain", undisturbed)
    pretrained = [key for key, stage in sweep.stages.items() if stage == "pretrain"]
    damaged = chance.choice([path for key in pretrained for path in sweep.objects_of(key) if path.stat().st_size > 0])
    # equal bytes are stored once: a pretraining's tokenizer is that of the prepared data
    holders = frozenset(key for key in sweep.manifests() if damaged in sweep.objects_of(key))
    scribble(damaged, chance)
    sweep.finish(sweep.start())
    assert "damaged" in faults_of(sweep)
    sweep.check(expected, remade=holders)


def scribble(path: Path, chance: Random) -> None:
    """Change one byte in place."""
    with path.open("r+b") as file:
        place = chance.randrange(path.stat().st_size)
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 0xFF]))


@pytest.fixture
def small_disk(sweep: Sweep) -> Iterator[Path]:
    """The sweep's results on a file system of 40 MB."""
    mounted = sweep.results.parent / "disk"
    mounted.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "none", str(mounted)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no right to mount a file system: {done.stderr.strip()}")
    sweep.move(mounted / "results")
    yield mounted
    sweep.kill_drivers()
    subprocess.run(["umount", "--lazy", str(mounted)], check=True)


def test_the_disk_is_full(small_disk: Path, sweep: Sweep, expected: Table, chance: Random) -> None:
    driver = sweep.start()
    sweep.wait_running(driver, "pretrain", chance.choice([1, 1, 2]))
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(2**16))
        except OSError:
            pass
    wait_for(lambda: "No space left" in sweep.output.read_text(), "the sweep to notice", alive=driver)
    filler.unlink()
    sweep.finish(driver)
    sweep.check(expected)


def test_the_head_is_killed(sweep: Sweep, cluster: ThreeNodes, undisturbed: Sweep, expected: Table, chance: Random) -> None:
    """The cluster's state goes with it, every node and the driver too; on a new cluster the same command goes on."""
    driver = sweep.start()
    sweep.wait_running(driver, None, chance.randrange(1, 6))
    cluster.kill_head()
    driver.wait(60)
    before = sweep.manifests()
    cluster.start()
    sweep.address = cluster.address
    sweep.finish(sweep.start())
    assert {key: sweep.manifests()[key] for key in before} == before
    sweep.check(expected)


def test_the_head_alone_is_killed(sweep: Sweep, cluster: ThreeNodes, undisturbed: Sweep, expected: Table, chance: Random) -> None:
    """Workers of other nodes live on without the cluster's state: the driver ends by itself, and on a new cluster the command goes on."""
    driver = sweep.start()
    sweep.wait_running(driver, "pretrain", 1)
    lull(chance)
    cluster.kill_head_alone()
    assert cluster.others_live()
    driver.wait(HEADLESS_S)
    assert driver.returncode != 0
    before = sweep.manifests()
    cluster.stop()
    cluster.start()
    sweep.address = cluster.address
    assert "reused" in sweep.finish(sweep.start())
    assert {key: sweep.manifests()[key] for key in before} == before
    sweep.check(expected)
