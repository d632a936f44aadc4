"""The least time of a layer: visited nodes counted right, memory felt cold alone, no layer faster than its roofline by far."""

from __future__ import annotations

import pytest
import torch

from fffsweep.kernels import timing
from fffsweep.kernels.layer import random_layer
from fffsweep.kernels.reference import forward
from fffsweep.kernels.shape import TreeShape
from fffsweep.pipeline import roofline
from fffsweep.pipeline.roofline import Peaks, machine_peaks, num_visited, roofline_ns


@pytest.fixture
def layer():
    return random_layer(TreeShape(3, 4), 16, seed=1)


def test_visited_nodes_are_those_of_the_reference(layer):
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    expected = {(tree, int(node)) for token in forward(layer, x).paths for tree, nodes in enumerate(token) for node in nodes}
    assert num_visited(layer, x) == len(expected)
    assert num_visited(random_layer(TreeShape(7, 0), 16, seed=1), x) == 7


def test_cold_is_bound_by_memory_and_hot_by_arithmetic(layer, monkeypatch):
    monkeypatch.setattr(roofline, "machine_peaks", lambda dtype, threads: Peaks(1e9, 1e6))
    x = torch.randn(8, 16)
    arithmetic_ns = 4 * 15 * 16
    assert roofline_ns(layer, x, "float32", 1, "hot") == pytest.approx(arithmetic_ns)
    traffic = 4 * 16 * 2 * (num_visited(layer, x) + 8)
    assert roofline_ns(layer, x, "float32", 1, "cold") == pytest.approx(1e9 * traffic / 1e6 / 8)
    assert roofline_ns(layer, x, "bfloat16", 1, "cold") == pytest.approx(1e9 * traffic / 2 / 1e6 / 8)
    monkeypatch.setattr(roofline, "machine_peaks", lambda dtype, threads: Peaks(1e6, 1e12))
    assert roofline_ns(layer, x, "float32", 1, "cold") == pytest.approx(1000 * arithmetic_ns)


def test_peaks_of_this_machine_are_plausible(monkeypatch):
    monkeypatch.setattr(timing, "READ_BYTES", 16 << 20)
    machine_peaks.cache_clear()
    peaks = machine_peaks("float32", 1)
    machine_peaks.cache_clear()
    assert 1e8 < peaks.flops_per_s < 1e13
    assert 1e7 < peaks.bytes_per_s < 1e13
