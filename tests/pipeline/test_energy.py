"""Energy from a made-up sysfs: wraps, several packages, and nothing where nothing can be read."""

import sys
from types import SimpleNamespace

import pytest
import torch

from fffsweep.pipeline.energy import EnergyMeter


def package(root, name, value, most=1000e6):
    folder = root / name
    folder.mkdir(exist_ok=True)
    (folder / "max_energy_range_uj").write_text(f"{most:.0f}\n")
    (folder / "energy_uj").write_text(f"{value:.0f}\n")
    return folder


def test_packages_are_summed_and_wraps_are_counted(tmp_path):
    for name, value in (("intel-rapl:0", 100e6), ("intel-rapl:1", 990e6), ("intel-rapl:0:0", 5e6)):
        package(tmp_path, name, value)
    meter = EnergyMeter("cpu", tmp_path)
    assert meter.total() == {"cpu": 0.0}
    package(tmp_path, "intel-rapl:0", 130e6)
    package(tmp_path, "intel-rapl:1", 15e6)  # past its largest value of 1000 J
    package(tmp_path, "intel-rapl:0:0", 900e6)  # a part of package 0: counted there already
    assert meter.total() == {"cpu": pytest.approx(30 + 25)}
    package(tmp_path, "intel-rapl:0", 131e6)
    assert meter.total() == {"cpu": pytest.approx(56)}


def test_what_cannot_be_read_is_left_out(tmp_path):
    assert EnergyMeter("cpu", tmp_path / "nowhere").total() == {}
    folder = package(tmp_path, "intel-rapl:0", 1e6)
    (folder / "energy_uj").unlink()
    assert EnergyMeter("cpu", tmp_path).total() == {}
    (folder / "energy_uj").write_text("no number\n")
    assert EnergyMeter("cuda", tmp_path).total() == {}


class Gpus:
    """As pynvml: two GPUs, their millijoules by UUID; NVML's first is not the one that torch sees."""

    def __init__(self):
        self.millijoules = {"GPU-other": 500_000, "GPU-ours": 1000}

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByIndex(self, index):
        return list(self.millijoules)[index]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return next(name for name in self.millijoules if name == uuid)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if self.millijoules[handle] is None:
            raise RuntimeError("GPU is lost")
        return self.millijoules[handle]


@pytest.fixture
def gpus(monkeypatch):
    gpus = Gpus()
    monkeypatch.setitem(sys.modules, "pynvml", gpus)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=("ours", "other")[index]))
    return gpus


def test_the_gpu_is_the_one_that_torch_computes_on(gpus, tmp_path):
    meter = EnergyMeter("cuda", tmp_path)
    gpus.millijoules = {"GPU-other": 900_000, "GPU-ours": 3500}
    assert meter.total() == {"gpu": pytest.approx(2.5)}
    assert EnergyMeter("cpu", tmp_path).total() == {}


def test_a_gpu_that_nvml_does_not_know_is_left_out(gpus, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="a part of one"))
    assert EnergyMeter("cuda", tmp_path).total() == {}


def test_a_counter_that_fails_on_the_way_ends_its_figure_and_nothing_else(gpus, tmp_path):
    package(tmp_path, "intel-rapl:0", 1e6)
    meter = EnergyMeter("cuda", tmp_path)
    gpus.millijoules["GPU-ours"] = None
    package(tmp_path, "intel-rapl:0", 5e6)
    assert meter.total() == {"cpu": pytest.approx(4)}
    gpus.millijoules["GPU-ours"] = 9000
    package(tmp_path, "intel-rapl:0", 6e6)
    assert meter.total() == {"cpu": pytest.approx(5)}, "what the GPU took meanwhile is not known"


def test_what_an_earlier_attempt_could_not_read_is_left_out(gpus, tmp_path):
    package(tmp_path, "intel-rapl:0", 1e6)
    meter = EnergyMeter("cuda", tmp_path)
    meter.only({"gpu": 12.0})
    assert set(meter.total()) == {"gpu"}
