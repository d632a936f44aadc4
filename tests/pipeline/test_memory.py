"""Peaks of memory are those of a run, not of the process that ran others before."""

import resource
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fffsweep.pipeline import memory
from fffsweep.pipeline.model_settings import ModelSettings
from fffsweep.pipeline.stages.pretrain import Pretrain, PretrainConfig

BYTES = 1 << 28


def ballast():
    """Touch so many bytes and let go of them: numpy gives that size back to the system at once."""
    return int(np.ones(BYTES, dtype=np.int8)[-1])


def training():
    model = ModelSettings(hidden_size=16, num_layers=1, num_heads=2, sequence_length=16, feedforward={"variant": "fff", "depth": 2})
    return PretrainConfig(model=model, steps=2, batch_size=2, micro_batch_size=2, evaluations=1, validation_sequences=2)


@pytest.mark.skipif(not (memory.PROCESS / "clear_refs").exists(), reason="only Linux sets the mark back")
def test_a_run_s_peak_is_its_own(new_context):
    Pretrain().run(training(), new_context())  # what it imports stays
    memory.reset_peaks()
    before = memory.peak_rss_bytes()
    ballast()
    assert memory.peak_rss_bytes() > before + 0.9 * BYTES
    own = Pretrain().run(training(), new_context())["memory/peak_rss_bytes"]
    assert 1 << 26 < own < before + 0.5 * BYTES


def test_what_a_run_takes_is_in_its_peak(new_context):
    def report(_):
        ballast()

    quiet, loud = (Pretrain().run(training(), new_context(**each))["memory/peak_rss_bytes"] for each in ({}, {"report": report}))
    assert loud > quiet + 0.5 * BYTES


def test_elsewhere_it_is_the_peak_of_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "PROCESS", tmp_path / "nowhere")
    memory.reset_peaks()
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert memory.peak_rss_bytes() == pytest.approx(1024 * highest, rel=0.01)  # a page may have come since
    monkeypatch.setattr(sys, "platform", "darwin")  # counts bytes
    assert memory.peak_rss_bytes() == pytest.approx(highest, rel=0.01)


def test_a_gpu_s_peak_is_told_where_it_was_used(monkeypatch):
    """The allocator's counters stand for a GPU."""
    gpu = SimpleNamespace(peak=900)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(gpu, "peak", 0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: gpu.peak)
    memory.reset_peaks()
    assert set(memory.memory_metrics("cuda")) == {"memory/peak_rss_bytes"}
    gpu.peak = 700
    assert memory.memory_metrics("cuda")["memory/peak_device_bytes"] == 700
    assert set(memory.memory_metrics("cpu")) == {"memory/peak_rss_bytes"}
