"""The native kernels under AddressSanitizer and UndefinedBehaviorSanitizer, without Python in the way."""

import os
import platform
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "kernels" / "native"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1", "-O1", "-std=c++20", "-Wno-psabi", "-Wno-uninitialized"]


@pytest.mark.integration
@pytest.mark.sanitizer
@pytest.mark.timeout(1500)  # five large objects, compiled with checks
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_kernels_keep_within_bounds_and_defined_behaviour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.chdir(ROOT)
    flags = runpy.run_path(str(ROOT / "setup.py"))["flags_of_sources"]()
    sources = {NATIVE / name: isa for name, isa in flags.items()} | {NATIVE / "tests" / "driver.cpp": []}

    def compile_one(source: Path) -> Path:
        target = tmp_path / f"{source.stem}.o"
        command = ["g++", *SANITIZE, *sources[source], f"-I{NATIVE}", "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True, timeout=500)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    driver = tmp_path / "driver"
    subprocess.run(["g++", *SANITIZE, *map(str, objects), "-lpthread", "-o", str(driver)], check=True, timeout=100)
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run([str(driver)], capture_output=True, text=True, timeout=500, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    # sizes, hidden sizes, threads, types: three with a backward pass, two of 8-bit weights; then two large ones
    per_isa = 8 * 6 * 2 * (3 + 2) + 2 * (3 * 2 + 2)
    cases = int(done.stdout.split()[0])
    assert cases >= per_isa * (2 if platform.machine() == "x86_64" else 1)
    assert cases % per_isa == 0
