"""Everything about the GPU kernels that needs a GPU, in minutes: `make gpu-check`. Needs torch, numpy and Triton, and no more.

Builds, holds every kernel against the reference, runs a few cases under compute-sanitizer where there is one, then times. What is wrong
ends the check before anything is timed. Where the packages are that the stages need, training is tested and timed too.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fffsweep.kernels.gpu import availability, bench, cases, goals

CASES_SHARE = 0.4  # of the time for everything
MOST_PROCESSES = 12  # each takes half a gigabyte of the device for itself
SANITIZER_SHARE = 0.25
TRAINING_TESTS_S = 60
TRAINING_SHARE = 0.3  # of the time left for timing, where training can be timed
TRAINING_PACKAGES = ("pydantic", "pyarrow", "tokenizers", "transformers")
TRAINING = ["--device", "cuda", "--precision", "bf16", "--batch", "128", "--steps", "8"]
RUNS: tuple[tuple[float, list[str]], ...] = (  # share of the time for the benchmark, and what is timed in it
    (0.35, ["--tokens", "1,16,128,1024,16384,65536", "--dtype", "bfloat16"]),
    (0.15, ["--tokens", "1,128,16384", "--dtype", "bfloat16", "--mode", "cold"]),
    (0.15, ["--tokens", "128,16384", "--dtype", "float32,float16"]),
    (0.15, ["--tokens", "16384", "--dtype", "bfloat16,float32", "--direction", "train"]),
    (0.1, ["--tokens", "16384", "--dtype", "bfloat16", "--layout", "1x15"]),
    (0.1, ["--tokens", "128,16384", "--dtype", "bfloat16,float32", "--slow"]),
)


def main(argv: list[str] | None = None) -> int:
    """0 if all is right and timed, 1 if something is wrong, 2 if there is no device to check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget-s", type=float, default=440.0, help="seconds that everything together may take")
    parser.add_argument("--few", action="store_true", help="run the few cases for a sanitizer, and nothing else")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="folder of the JSON")
    parser.add_argument(
        "--seed", type=int, default=time.time_ns() % (1 << 31), help="of the random inputs; by default another one each time"
    )
    options = parser.parse_args(argv)
    reason = availability.no_triton() if torch.cuda.is_available() else "there is no CUDA device"
    if reason:
        print(f"gpu-check: {reason}: expected a CUDA device, torch, numpy and Triton", file=sys.stderr)
        return 2
    began = time.monotonic()
    print(f"device: {torch.cuda.get_device_name()}, torch {torch.__version__}, seed {options.seed}")
    print(f"naive CUDA kernel: {availability.no_cuda_compiler() or 'nvcc is there'}")
    wrong, count, left_out = _run_few(options.seed) if options.few else _run_cases(options, began)
    print("\n".join(wrong) or f"{count} cases right, {left_out} left out for want of time ({time.monotonic() - began:.0f} s)")
    if wrong or options.few:
        return 1 if wrong else 0
    if _test_training() or _sanitize(options.seed, SANITIZER_SHARE * options.budget_s):
        return 1
    return _bench(options, began)


def _run_few(seed: int) -> tuple[list[str], int, int]:
    chosen = list(cases.few_cases())
    return [line for count, case in enumerate(chosen) for line in cases.run(case, seed + count)], len(chosen), 0


def _run_cases(options: argparse.Namespace, began: float) -> tuple[list[str], int, int]:
    """What is wrong, how many cases ran, how many did not; several processes, as nearly all of the time is the compiler's."""
    chosen = list(cases.all_cases())
    wrong: list[str] = []
    finished = 0
    with multiprocessing.get_context("spawn").Pool(min(os.cpu_count() or 1, MOST_PROCESSES)) as pool:
        found = pool.imap_unordered(_run_case, [(case, options.seed + count) for count, case in enumerate(chosen)])
        while finished < len(chosen):
            try:
                wrong += found.next(timeout=CASES_SHARE * options.budget_s - (time.monotonic() - began))
            except multiprocessing.TimeoutError:
                break
            finished += 1
    return wrong, finished, len(chosen) - finished


def _run_case(given: tuple[cases.Case, int]) -> list[str]:
    return cases.run(*given)


def _sanitize(seed: int, timeout_s: float) -> int:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer: not on the path, not run")
        return 0
    command = [tool, "--error-exitcode", "9", sys.executable, "-m", "fffsweep.kernels.gpu.check", "--few", "--seed", str(seed)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        print(f"compute-sanitizer: not finished after {timeout_s:.0f} s, nothing said")
        return 0
    summary = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line or "right" in line]
    print("compute-sanitizer: " + ("clean: " + "; ".join(summary) if done.returncode == 0 else done.stdout[-3000:] + done.stderr[-1000:]))
    return done.returncode


def _missing(*packages: str) -> str | None:
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"not run: {', '.join(absent)} not installed" if absent else None


def _test_training() -> int:
    """The training loops on the device, by the tests that bear the marker `gpu`."""
    tests = Path("tests/pipeline")
    reason = _missing("pytest", *TRAINING_PACKAGES) or (None if tests.is_dir() else f"not run: there is no {tests} here")
    if reason:
        print(f"training: {reason}")
        return 0
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-x", str(tests / "test_gpu_training.py")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TRAINING_TESTS_S, check=False)
    except subprocess.TimeoutExpired:
        print(f"training: not finished after {TRAINING_TESTS_S} s, nothing said")
        return 0
    print("training: " + (done.stdout.strip().splitlines()[-1] if done.returncode == 0 else done.stdout[-3000:] + done.stderr[-1000:]))
    return done.returncode


def _time_training(timeout_s: float, part: Path) -> tuple[int, list[dict[str, Any]]]:
    """Status and rows of `python -m fffsweep.pipeline.bench` on the device, by way of `part`; no rows, and why, where it gave none."""
    if reason := _missing(*TRAINING_PACKAGES):
        print(f"training speed: {reason}")
        return 0, []
    command = [sys.executable, "-m", "fffsweep.pipeline.bench", *TRAINING, "--json", str(part)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        print(f"training speed: not measured in {timeout_s:.0f} s")
        return 0, []
    if done.returncode:
        part.unlink(missing_ok=True)
        print(f"training speed: no times, status {done.returncode}\n{done.stdout[-1000:]}{done.stderr[-1000:]}")
        return done.returncode, []
    rows: list[dict[str, Any]] = json.loads(part.read_text())["rows"]
    part.unlink()
    for row in rows:
        speed = f"{row['tokens_per_s']:12,.0f} tokens/s {row['speedup_vs_dense']:6.2f} x dense"
        print(f"{row['phase']:8} {row['layout']} {row['variant']:7}{speed}")
    return 0, rows


def _bench(options: argparse.Namespace, began: float) -> int:
    def left() -> float:
        return float(options.budget_s) - (time.monotonic() - began)

    status, rows, results, part = 0, [], [], options.results / ".gpu_part.json"
    end = left() * TRAINING_SHARE if _missing(*TRAINING_PACKAGES) is None else 0.0
    shares = sum(share for share, _ in RUNS)
    for share, arguments in RUNS:
        budget = max(10.0, (left() - end) * share / shares)  # what earlier ones did not need is there for later ones
        shares -= share
        status |= bench.main([*arguments, "--budget-s", str(budget), "--json", str(part), "--seed", str(options.seed)])
        results.append(json.loads(part.read_text()))
        rows += results[-1]["rows"]
        part.unlink()
    provenance: dict[str, Any] = results[0]["provenance"] | {"command": "make gpu-check", "seed": options.seed}
    device = re.sub(r"[^a-z0-9]+", "_", str(provenance["gpu"]).lower()).strip("_")
    target = options.results / f"cmm_gpu_{device}_{datetime.datetime.now(datetime.UTC).date()}.json"
    left_out = [case for each in results for case in each["left_out"]]
    failed, training = _time_training(max(30.0, left()), part)
    status |= failed
    verdicts = goals.verdicts([*rows, *training])
    found = {"schema": bench.SCHEMA, "provenance": provenance, "left_out": left_out, "goals": verdicts, "rows": [*rows, *training]}
    target.write_text(json.dumps(found, indent=1) + "\n")
    print(table(rows))
    print(goals.lines(verdicts))
    print(f"written: {target} ({time.monotonic() - began:.0f} s)")
    return status


def table(rows: list[dict[str, Any]]) -> str:
    """The best CMM of each case beside the best dense form and beside gathering: nanoseconds a token, ratios, distance to the floor."""
    case = f"{'layout':7}{'tokens':>7} {'dtype':9}{'mode':5}{'direction':10}"
    lines = [f"{case}{'CMM':16}{'ns/token':>10}{'x dense':>9}  {'dense':20}{'x gather':>9}{'x floor':>8}"]
    for row in (row for row in rows if row["best"]):
        ratio, gather = ("-" if row[name] is None else f"{row[name]:.2f}" for name in ("speedup_vs_best_dense", "speedup_vs_gather"))
        lines.append(
            f"{row['layout']:7}{row['tokens']:7} {row['dtype']:9}{row['mode']:5}{row['direction']:10}{row['implementation']:16}"
            f"{row['ns_per_token']:10.2f}{ratio:>9}  {row['best_dense'] or '-':20}{gather:>9}{row['times_the_floor']:8.1f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
