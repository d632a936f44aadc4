"""Checkpoints: whole, verified, the previous one behind the newest."""

import torch

from fffsweep.pipeline.checkpoint import Checkpoints


def test_the_newest_sound_one_is_read(tmp_path, caplog):
    store = Checkpoints(tmp_path, 60)
    assert store.load() is None
    paths = [store.save(step, {"step": step, "weights": torch.full((3,), float(step)), "curve": [{"loss": 0.5}]}) for step in (1, 2, 10)]
    assert store.load()["step"] == 10
    assert [path.exists() for path in paths] == [False, True, True]
    damaged = bytearray(paths[2].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    paths[2].write_bytes(damaged)
    state = store.load()
    assert state["step"] == 2
    assert torch.equal(state["weights"], torch.full((3,), 2.0))
    assert "cannot be used" in caplog.text
    assert paths[2].name in caplog.text
    paths[1].write_bytes(paths[1].read_bytes()[:100])
    assert store.load() is None


def test_a_file_half_written_is_not_seen(tmp_path):
    store = Checkpoints(tmp_path, 60)
    (tmp_path / ".0123456789abcdef").write_bytes(b"torn")
    assert store.load() is None


def test_due_after_the_time_given(tmp_path):
    assert Checkpoints(tmp_path, 0).due()
    assert not Checkpoints(tmp_path, 3600).due()
