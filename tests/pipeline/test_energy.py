"""Energy from a made-up sysfs: wraps, several packages, and nothing where nothing can be read."""

import pytest

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
