"""Energy by the counters of the machine: processor packages (RAPL) and the GPU (NVML). What cannot be read is left out, never guessed.

The counters are of all packages and of the one GPU that this process computes on, whole: whatever else runs there is in the figure.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Joules used since the meter was made, by `cpu` and `gpu`; call `total` more often than a counter wraps, about once an hour."""

    def __init__(self, device: str, powercap: Path = POWERCAP) -> None:
        self._packages = [folder for folder in sorted(powercap.glob("intel-rapl:*")) if folder.name.count(":") == 1]
        self._gpu = _gpu_counter() if device == "cuda" else None
        self._last = self._read()
        self._joules = dict.fromkeys(("cpu", "gpu"), 0.0)
        self._readable = {name.partition(" ")[0] for name in self._last}

    def only(self, kinds: Iterable[str]) -> None:
        """Leave out every other kind, such as one that an earlier attempt could not read."""
        self._readable &= set(kinds)

    def total(self) -> dict[str, float]:
        """Joules by kind, missing if one of its counters cannot be read or once could not."""
        now = self._read()
        self._readable -= {name.partition(" ")[0] for name in self._last.keys() - now.keys()}
        for name, (value, most) in now.items():
            if name in self._last:
                passed = value - self._last[name][0]
                self._joules[name.partition(" ")[0]] += passed if passed >= 0 else passed + most
        self._last = now
        return {kind: self._joules[kind] for kind in sorted(self._readable)}

    def _read(self) -> dict[str, tuple[float, float]]:
        """Counter and its largest value, joules, by name."""
        found: dict[str, tuple[float, float]] = {}
        for folder in self._packages:
            try:
                micro = [float((folder / name).read_text()) for name in ("energy_uj", "max_energy_range_uj")]
            except (OSError, ValueError):
                continue  # root alone may read it on many machines
            found[f"cpu {folder.name}"] = (micro[0] / 1e6, micro[1] / 1e6)
        if self._gpu is not None:
            with contextlib.suppress(Exception):  # NVML's errors are of a class that is not there without the package
                found["gpu"] = (self._gpu() / 1e3, 0.0)
        return found


def _gpu_counter() -> Callable[[], float] | None:
    """Function that gives millijoules of torch's current GPU since the driver was loaded; None without NVML, raises without such a counter.

    The GPU is found by its UUID: NVML numbers all GPUs of the machine, torch those that CUDA_VISIBLE_DEVICES leaves.
    """
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}")
    except Exception:
        return None
    return lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
