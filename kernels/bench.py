"""The kernel benchmark: `python -m fffsweep.kernels.bench`. Every implementation is gated, then timed alternating with the dense ones."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fffsweep.kernels import bench_report, registry, timing
from fffsweep.kernels.gate import candidates
from fffsweep.kernels.layer import LayerWeights, random_layer
from fffsweep.kernels.measure import DENSE_TOKENS, DTYPES, FAR_BEHIND, Contender, as_used, batches_of, contenders, num_batches
from fffsweep.kernels.shape import TreeShape, parse_layout

SCHEMA = 1
KINDS = DTYPES | {"int8": torch.float32}  # names of dtypes by the dtype of the tokens
DENSE_NEURONS = 4096  # up to that width; wider dense layers are timed on as many fewer tokens, but on no fewer than these
FEWEST_DENSE_TOKENS = 512  # of 65,535 neurons 128 tokens take 6 % longer a token than 1,024 do, 512 half a percent
SLOW_TOKENS = 128  # beyond this the naive forms are left out: they would take most of the time and tell nothing new
GPT3_WIDTH = 49_152  # feedforward neurons of GPT-3, which 1x15 is held against


@dataclass(frozen=True)
class Case:
    """One comparison: a layout at one size, in one dtype, on so many threads."""

    suite: str
    layout: str
    hidden: int
    tokens: int
    dtype: str
    threads: int
    mode: str
    direction: str
    dense_width: int

    @property
    def shape(self) -> TreeShape:
        """Shape of the layout."""
        return parse_layout(self.layout)


YARDSTICK = "torch_dense/float32"
PAPER = ["--min-time", "0.3", "--layout", "1x11,1x15,4x9,32x6,128x4,512x2"]
SUITES = {
    "quick": [
        ["--tokens", "1,128,1024", "--mode", "hot,cold", "--min-time", "0.3"],
        ["--layout", "4x9", "--tokens", "128,1024", "--mode", "cold", "--min-time", "0.3"],
        ["--tokens", "128", "--dtype", "bfloat16", "--mode", "cold", "--min-time", "0.3"],
    ],
    "paper": [
        [*PAPER, "--tokens", "1,128,1024,16384", "--mode", "hot,cold"],
        [*PAPER, "--tokens", "128,16384", "--dtype", "bfloat16"],
        [*PAPER, "--tokens", "16384", "--threads", "2"],
        [*PAPER, "--tokens", "4096", "--direction", "train"],  # of many trees a call at 16,384 takes six seconds
    ],
    "gpt3": [["--layout", "1x15", "--hidden", "12288", "--tokens", "1,16,128", "--dense-width", str(GPT3_WIDTH)]],
    "bars": [  # what the kernels are held to; docs/kernels.md has the list
        ["--tokens", "16384", "--dtype", "float32,bfloat16"],
        ["--tokens", "1,1024", "--mode", "cold"],
        ["--tokens", "16384", "--direction", "train"],
        ["--tokens", "16384", "--layout", "1x15"],
        ["--tokens", "16384", "--threads", "2"],
        ["--tokens", "16384", "--implementation", "native_avx2"],
    ],
}


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 if every case has a verified implementation, 1 if one has none, 2 for wrong arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if _device(arguments) == "cuda":
        from fffsweep.kernels.gpu import bench as gpu_bench

        return gpu_bench.main(arguments)
    try:
        groups = _parse(arguments)
        options = groups[0]
        cases = [(case, group) for group in groups for case in _cases(group)]
        saved = None if options.activations is None else _saved(options.activations, {case.hidden for case, _ in cases})
    except ValueError as error:
        print(f"fffsweep bench: {error}", file=sys.stderr)
        return 2
    origin = bench_report.provenance(arguments)  # of the code that is timed, not of what the checkout holds at the end
    rows: list[dict[str, Any]] = []
    failed = []
    for case, group in cases:
        runs = [
            run_case(case, saved, min_time_s=group.min_time, seed=group.seed + run, compiled=group.compiled, only=group.implementation)
            for run in range(group.runs)
        ]
        best = bench_report.median_run(runs)
        rows += [row | {"run": run} for run, found in enumerate(runs) for row in found]
        if best is None:
            failed.append(case)
        print(_line(case, best), flush=True)
    result = {"schema": SCHEMA, "provenance": origin, "rows": rows}
    if options.results:
        stem = options.results / bench_report.file_stem(origin)
        options.json, options.markdown = options.json or stem.with_suffix(".json"), options.markdown or stem.with_suffix(".md")
        print(f"wrote {options.json} and {options.markdown}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(bench_report.markdown(result))
    if options.plot:
        bench_report.plot(result, options.plot)
    return 1 if failed else 0


def _device(arguments: list[str]) -> str:
    """Device that is asked for: the two benchmarks have options of their own."""
    parser = argparse.ArgumentParser("fffsweep bench", add_help=False)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return str(parser.parse_known_args(arguments)[0].device)


def _parse(arguments: list[str]) -> list[argparse.Namespace]:
    """Options of each group of a suite, those given over its own; without a suite there is one group."""

    def several(text: str) -> list[str]:
        return [each.strip() for each in text.split(",") if each.strip()]

    parser = argparse.ArgumentParser("fffsweep bench", description=__doc__)
    parser.add_argument("--suite", choices=sorted(SUITES), help="a preset of the options below, which still override it")
    parser.add_argument("--layout", type=several, default=["1x11"], help="trees x depth, several by commas")
    parser.add_argument("--hidden", type=several, default=["768"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda has options of its own: --device cuda --help")
    parser.add_argument("--tokens", type=several, default=["1", "16", "128", "1024", "16384"])
    parser.add_argument(
        "--dtype", type=several, default=["float32"], help=f"of {', '.join(KINDS)}; int8 is that of the weights, x is float32"
    )
    parser.add_argument("--threads", type=several, default=["1"])
    parser.add_argument("--mode", type=several, default=["hot"], help="hot: one copy of the weights; cold: cycling those of 12 layers")
    parser.add_argument("--direction", type=several, default=["forward"], help="forward, train (forward and backward)")
    parser.add_argument(
        "--implementation", type=several, default=[], help="CMM by these alone, forced instruction sets such as native_avx2 among them"
    )
    parser.add_argument("--dense-width", type=int, default=0, help="neurons of the dense layer compared with; by default those stored")
    parser.add_argument("--activations", type=Path, help="saved activations, a float tensor [any, hidden] written by torch.save")
    parser.add_argument("--compiled", action="store_true", help="time torch.compile's dense layer too; compiling takes minutes in all")
    parser.add_argument("--min-time", type=float, default=1.0, help="seconds of alternating samples a case")
    parser.add_argument("--runs", type=int, default=1, help="times each case is run, with other tokens; the median run is shown")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--results", type=Path, help="folder for cmm_cpu_<machine>_<date>.json and .md, where those have no names")
    parser.add_argument("--plot", type=Path, help="roofline and speed-up; needs matplotlib")
    suite = parser.parse_args(arguments).suite
    groups = [parser.parse_args([*group, *arguments]) for group in (SUITES[suite] if suite else [[]])]
    for name in groups[0].implementation:
        found = registry.find(name)
        if reason := f"it is a {found.role} form" if found.role != "cmm" else found.unavailable():
            raise ValueError(f"--implementation {name}: {reason}; expected forms of CMM that can run here, or leave it out")
    if groups[0].runs < 1:
        raise ValueError(f"--runs {groups[0].runs}: expected an integer >= 1")
    return groups


def _saved(path: Path, hidden: set[int]) -> Tensor:
    """Activations of a file. Raises ValueError unless they are rows of the one hidden size that is asked for."""
    saved = torch.load(path, weights_only=True)
    if not isinstance(saved, Tensor) or saved.dim() != 2 or {saved.shape[1]} != hidden:
        found = list(saved.shape) if isinstance(saved, Tensor) else type(saved).__name__
        wanted = " and ".join(map(str, sorted(hidden)))
        raise ValueError(f"--activations {path}: holds {found}, expected a tensor [any, {wanted}], the size that --hidden says")
    return saved.float()


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    for name, values, allowed in (
        ("dtype", options.dtype, tuple(KINDS)),
        ("mode", options.mode, ("hot", "cold")),
        ("direction", options.direction, ("forward", "train")),
    ):
        for value in values:
            if value not in allowed:
                raise ValueError(f"--{name} {value}: expected one of {', '.join(allowed)}")
    numbers = {name: [_positive(name, value) for value in getattr(options, name)] for name in ("hidden", "tokens", "threads")}
    for layout in options.layout:
        shape = parse_layout(layout)
        for hidden in numbers["hidden"]:
            for dtype in options.dtype:
                for direction in options.direction:
                    for mode in options.mode:
                        for threads in numbers["threads"]:
                            for tokens in numbers["tokens"]:
                                width = options.dense_width or shape.width
                                yield Case(options.suite or "custom", layout, hidden, tokens, dtype, threads, mode, direction, width)


def _positive(name: str, text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"--{name} {text}: expected an integer >= 1")
    return int(text)


def run_case(
    case: Case,
    saved: Tensor | None = None,
    *,
    min_time_s: float = 1.0,
    seed: int = 0,
    compiled: bool = False,
    only: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Rows of one case, one for each implementation of the layout and of the dense layer, in the dtype and in float32 for the dense.

    only: names of the CMM implementations that take part, all that apply if empty.
    """
    weights = random_layer(case.shape, case.hidden, seed=seed)
    # seeds of their own: rows drawn from one stream would be tokens
    dense = random_layer(TreeShape(case.dense_width, 0), case.hidden, seed=seed + 2)
    generator = torch.Generator().manual_seed(seed + 3)
    source = torch.randn(case.tokens * num_batches(case.tokens, case.hidden), case.hidden, generator=generator) if saved is None else saved
    dense_tokens = min(case.tokens, max(FEWEST_DENSE_TOKENS, DENSE_TOKENS * DENSE_NEURONS // max(DENSE_NEURONS, case.dense_width)))
    with timing.pinned(case.threads):
        timed = _contenders(case, "cmm", weights, source, case.tokens, case.dtype, seed, slow=case.tokens <= SLOW_TOKENS, only=only)
        for each in sorted({case.dtype, "float32"}):
            timed |= _contenders(case, "dense", dense, source, dense_tokens, each, seed, slow=compiled)
        fast = [name for role in ("cmm", "dense") for name in _fast({n: e for n, e in timed.items() if e["role"] == role})]
        load = timing.load()
        with as_used(case.direction):
            series = timing.interleave({name: timed[name]["contender"].call for name in fast}, min_time_s=min_time_s) if fast else {}
    rows = [_row(case, entry, series.get(name), load) for name, entry in timed.items()]
    return bench_report.compare(rows)


def _fast(entries: dict[str, dict[str, Any]]) -> list[str]:
    """Names worth alternating samples: those far behind on their first calls are left out, but for the one that all are held against."""
    calls = {name: entry["contender"].call for name, entry in entries.items() if entry["contender"].call is not None}
    near = timing.shortlist(calls, within=FAR_BEHIND)[0] if calls else []
    return near + [name for name in calls if name == YARDSTICK and name not in near]


def _contenders(
    case: Case,
    role: str,
    weights: LayerWeights,
    source: Tensor,
    tokens: int,
    kind: str,
    seed: int,
    *,
    slow: bool,
    only: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    backward = case.direction == "train"
    chosen = [
        each
        for each in candidates(weights, KINDS[kind], backward=backward, variants=bool(only), slow=slow)
        if each.role == role and each.bits8 == (kind == "int8") and (not only or each.name in only)
    ]
    batches = batches_of(source, weights, tokens, seed)
    found = contenders(chosen, weights, batches, KINDS[kind], mode=case.mode, direction=case.direction, seed=seed)
    common = {"role": role, "dtype": kind, "tokens": tokens, "shape": weights.shape}
    return {f"{each.name}/{kind}": common | {"contender": each} for each in found}


def _row(case: Case, entry: dict[str, Any], series: timing.Series | None, load: float) -> dict[str, Any]:
    contender: Contender = entry["contender"]
    tokens, shape, kind = entry["tokens"], entry["shape"], entry["dtype"]
    scale = 1e9 / tokens
    macs = 2 * shape.active_width * case.hidden * (3 if case.direction == "train" else 1)
    peak = bench_report.peak_macs_per_ns(kind, case.threads)
    size = 1 if kind == "int8" else KINDS[kind].itemsize
    traffic = bench_report.bytes_per_token(shape, case.hidden, tokens, size, case.direction)
    return {
        "suite": case.suite,
        "layout": case.layout,
        "hidden": case.hidden,
        "tokens": case.tokens,
        "dtype": entry["dtype"],
        "threads": case.threads,
        "mode": case.mode,
        "device": "cpu",
        "direction": case.direction,
        "role": entry["role"],
        "implementation": contender.name,
        "ns_per_token": None if series is None else series.median_s * scale,
        "q20": None if series is None else series.q20_s * scale,
        "q80": None if series is None else series.q80_s * scale,
        "noisy": None if series is None else series.noisy,
        "load": load,
        "macs_per_token": macs,
        "timed_tokens": tokens,
        "bytes_per_token": traffic,
        "flop_limit": None if peak is None else macs / peak,
        "memory_limit": traffic / bench_report.read_bytes_per_ns(case.threads),
        "fraction_of_limit": None if series is None or peak is None else macs / peak / (series.median_s * scale),
        "path_flips": contender.verdict.path_flips,
        "verified": contender.verdict.verified,
        "reason": contender.verdict.reason or contender.left_out,
    }


def _line(case: Case, best: dict[str, Any] | None) -> str:
    head = f"{case.layout} hidden {case.hidden} {case.tokens} tokens {case.dtype} {case.threads} thread(s) {case.mode} {case.direction}: "
    if best is None:
        return head + "no verified implementation"
    noisy = ", noisy" if best["noisy"] else ""
    over = "no verified torch dense float32"
    if best["speedup_vs_torch_dense"] is not None:
        over = f"{best['speedup_vs_torch_dense']:.1f}x torch dense float32"
    told = f"{best['implementation']} {best['ns_per_token']:,.0f} ns a token, {over}"
    alike = f", {best['speedup_vs_best_dense']:.1f}x {best['best_dense']}" if best["best_dense"] else ", no dense layer of the dtype"
    return head + told + alike + noisy


if __name__ == "__main__":
    raise SystemExit(main())
