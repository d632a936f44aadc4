"""A lease has one holder at a time; a dead holder is none; whoever was taken for dead and lives on finds out."""

import json
import multiprocessing
import os
import subprocess
import sys
import time

import psutil
import pytest

from fffsweep.pipeline.lease import Claim, Lease, LeaseHeld, LeaseLost, holder_of


def elsewhere(folder, age_s):
    """Rewrite the newest lease as one of a process on another host that was last seen `age_s` ago."""
    path = max(folder.glob("epoch-*.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "boot": "another", "host": "node-7", "pid": 11}))
    os.utime(path, (time.time() - age_s,) * 2)


def test_one_holder_at_a_time_and_numbers_only_grow(tmp_path):
    first = Lease(tmp_path)
    with pytest.raises(LeaseHeld, match=rf"process {os.getpid()} on .*last sign of life \d+ s ago"):
        Lease(tmp_path)
    assert holder_of(tmp_path) is not None
    first.release()
    assert holder_of(tmp_path) is None
    second = Lease(tmp_path)
    assert (first.epoch, second.epoch) == (1, 2)
    assert second.held(now=True)
    assert not first.held(now=True)
    second.release()


def test_a_killed_holder_on_this_host_is_none_at_once(tmp_path):
    program = (
        "from pathlib import Path; from fffsweep.pipeline.lease import Lease\n"
        f"lease = Lease(Path({str(tmp_path)!r})); print(1, flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        owner.stdout.readline()
        with pytest.raises(LeaseHeld, match=f"process {owner.pid} "):
            Lease(tmp_path)
        owner.kill()
    assert Lease(tmp_path).epoch == 2


def test_setting_the_clock_makes_nobody_dead_on_this_host(tmp_path, monkeypatch):
    lease = Lease(tmp_path)
    boot_time = psutil.boot_time()
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: boot_time + 3600)  # what the kernel says of it follows the clock
    assert psutil.Process().create_time() > time.time() + 1000
    with pytest.raises(LeaseHeld):
        Lease(tmp_path)
    lease.release()


def test_a_clock_that_was_set_back_keeps_nobody_alive_elsewhere(tmp_path):
    Lease(tmp_path)
    elsewhere(tmp_path, age_s=-5)
    with pytest.raises(LeaseHeld, match="process 11 on node-7"):
        Lease(tmp_path, ttl_s=10)
    elsewhere(tmp_path, age_s=-3600)
    assert Lease(tmp_path, ttl_s=10).epoch == 2


def test_a_holder_on_another_host_is_dead_when_silent_for_long(tmp_path):
    zombie = Lease(tmp_path)
    elsewhere(tmp_path, age_s=5)
    with pytest.raises(LeaseHeld, match="process 11 on node-7"):
        Lease(tmp_path, ttl_s=10)
    elsewhere(tmp_path, age_s=11)
    assert Lease(tmp_path, ttl_s=10).epoch == 2
    with pytest.raises(LeaseLost, match="taken over by process"):
        zombie.require(now=True)
    zombie.release()
    assert json.loads((tmp_path / "epoch-00000002.json").read_text())["released"] is False


def test_signs_of_life_are_given(tmp_path):
    lease = Lease(tmp_path, ttl_s=0.06)
    path = tmp_path / "epoch-00000001.json"
    before, deadline = path.stat().st_mtime_ns, time.monotonic() + 20
    while path.stat().st_mtime_ns == before:
        assert time.monotonic() < deadline
    lease.release()


def test_a_higher_rank_in_the_same_name_takes_over_and_no_other(tmp_path):
    first = Lease(tmp_path, Claim("study", 1))
    for claim in (Claim("study", 1), Claim("other", 9), Claim()):
        with pytest.raises(LeaseHeld):
            Lease(tmp_path, claim)
    Lease(tmp_path, Claim("study", 2))
    assert not first.held(now=True)


def test_of_many_that_try_at_once_one_wins(tmp_path):
    context = multiprocessing.get_context("fork")
    won, go, done = context.SimpleQueue(), context.Event(), context.Event()

    def contend():
        go.wait()
        try:
            lease = Lease(tmp_path)
        except LeaseHeld:
            won.put(0)
        else:
            won.put(lease.epoch)
        done.wait()

    contenders = [context.Process(target=contend) for _ in range(8)]
    for each in contenders:
        each.start()
    go.set()
    epochs = [won.get() for _ in contenders]
    done.set()
    for each in contenders:
        each.join()
    assert sorted(epochs) == [0] * 7 + [1]


def test_a_lease_whose_folder_is_removed_is_lost(tmp_path):
    lease = Lease(tmp_path / "gone")
    for path in (tmp_path / "gone").iterdir():
        path.unlink()
    (tmp_path / "gone").rmdir()
    assert not lease.held(now=True)
    lease.release()
    assert not (tmp_path / "gone").exists()
