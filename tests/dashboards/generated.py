"""Generated studies: genuine manifests and records, published as a sweep would, with invented figures. For tests only."""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np

from fffsweep.kernels.shape import TreeShape, parse_layout
from fffsweep.pipeline.machine import provenance
from fffsweep.pipeline.model_settings import FeedForward, ModelSettings
from fffsweep.pipeline.stage import StageContext, StageRun
from fffsweep.pipeline.stages.collect import Collect, CollectConfig
from fffsweep.pipeline.store import Store
from fffsweep.sweeps.record import SCHEMA, study_folder

LAYOUTS = ("512x0", "170x1", "73x2", "34x3", "16x4", "8x5", "4x6", "2x7", "1x8")
CONTROLS = ("reference_dense(512)", "none", "dense_active(1x8)", "dense_active(8x5)", "random_routing(1x8)")
POINTS = tuple((tokens, mode) for mode in ("cold", "hot") for tokens in (1, 16, 128, 1024))
SIZES = {"hidden_size": 128, "num_layers": 2, "num_heads": 2}


@contextmanager
def without_fsync():
    """Thousands of manifests need not survive a power cut."""
    with mock.patch.object(os, "fsync"):
        yield


def _run(stage, config, seed, inputs, fingerprints=None):
    return StageRun(stage=stage, version=1, config=config, seed=seed, inputs=inputs, fingerprints=fingerprints or {})


class Generator:
    """Writes one study. `learned`: whether quality rises above the baseline. `finished`: trials that are complete; the next one runs."""

    def __init__(self, results, name, layouts, controls, replicates, tasks, learned, finished, points, finetunings, steps, seed):
        self.results, self.name, self.replicates = Path(results), name, replicates
        self.tasks, self.learned, self.points, self.finetunings, self.steps = tasks, learned, points, finetunings, steps
        self.finished = len(layouts) + len(controls) if finished is None else finished
        self.store = Store(self.results / "store")
        self.noise = np.random.default_rng(seed)
        self.where = {**provenance(), "threads": 1, "device": "cpu"}
        self.clock = time.time() - 3600
        self.layouts, self.controls = layouts, controls
        self.config = {
            "name": name,
            "description": "Does depth pay against a dense layer of the same active width?",
            "model": {**SIZES, "sequence_length": 128, "dropout": 0.0},
            "layouts": list(layouts),
            "controls": list(controls),
            "stages": {
                "prepare": {"source": "wheels"},
                "pretrain": {"tokens": 400_000, "batch_size": 16},
                "finetune": {"tasks": list(tasks), "epochs": 1},
                "benchmark_cpu": {"points": [{"tokens": t, "dtype": "float32", "threads": 1, "mode": m} for t, m in points]},
            },
            "objectives": {"quality/avg": "maximize", "ff/cpu/rel_time": "minimize"},
            "sampler": "grid",
            "seeds": {"pretrain": replicates, "finetune": finetunings},
        }

    def write(self) -> Path:
        """The results folder, with the study in it."""
        trials = [self._trial(index, *spec) for index, spec in enumerate(self._specs())]
        state = "complete" if all(trial["state"] == "complete" for trial in trials) else "running"
        self.save(trials, state)
        return self.results

    def save(self, trials, state):
        """Replace the study's record, as its driver does."""
        folder = study_folder(self.results, self.name)
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "schema": SCHEMA,
            "name": self.name,
            "config": self.config,
            "objectives": self.config["objectives"],
            "created_at": time.time() - 3600,
            "updated_at": time.time(),
            "state": state,
            "driver": {"pid": os.getpid(), "host": "localhost"},
            "trials": trials,
        }
        aside = folder / ".study"
        aside.write_text(json.dumps(record))
        aside.replace(folder / "study.json")
        with (folder / "events.jsonl").open("a") as file:
            file.write(json.dumps({"time": time.time(), "event": "started", "executor": "inline"}) + "\n")

    def _specs(self):
        """id, layout, controls, in_study, feedforward settings; the reference first, equal models once."""
        roles, specs = {}, []
        for text in self.controls:
            kind, _, argument = text.rstrip(")").partition("(")
            if kind == "reference_dense":
                roles.setdefault(f"{argument}x0", []).append("reference_dense")
            elif kind == "none":
                specs.append(("none", None, ["none"], False, {"variant": "none"}))
            elif kind == "dense_active":
                shape = TreeShape(parse_layout(argument).active_width, 0)
                specs.append((text, shape.layout, [text], False, {"variant": "dense", "trees": shape.trees}))
            else:
                shape = parse_layout(argument)
                layer = {"variant": "random_routing", "trees": shape.trees, "depth": shape.depth}
                specs.append((text, shape.layout, [text], False, layer))
        for layout in reversed(self.layouts):
            shape = parse_layout(layout)
            specs.insert(0, (layout, layout, roles.pop(layout, []), True, {"variant": "fff", "trees": shape.trees, "depth": shape.depth}))
        for layout, kinds in roles.items():
            specs.insert(0, (kinds[0], layout, kinds, False, {"variant": "dense", "trees": parse_layout(layout).trees}))
        return sorted(specs, key=lambda spec: "reference_dense" not in spec[2])

    def _trial(self, index, name, layout, controls, in_study, layer):
        model = ModelSettings(**SIZES, feedforward=FeedForward(**layer))
        state = "complete" if index < self.finished else "running" if index == self.finished else "waiting"
        stages, collected = [], {}
        prepare = _run("prepare", {"source": f"wheels, for {self.name}"}, 0, {}, {"data": "3f1c" * 10})
        stages.append(self._stage("prepare", prepare, None, "complete", {"data/train_sequences": 9000.0}, {}))
        for replicate in range(self.replicates):
            shift = float(self.noise.normal(0, 0.4))
            run = _run("pretrain", {"model": model.resolved(), "tokens": 400_000}, replicate, {"prepare": prepare.key})
            first = "running" if state == "running" and replicate == 0 else state if state != "running" else "waiting"
            stages.append(self._stage(f"pretrain/{replicate}", run, replicate, first, *self._pretrained(model, shift)))
            collected[f"pretrain/{replicate}"] = run.key
            inputs = {"prepare": prepare.key, "pretrain": run.key}
            later = state if state != "running" else "waiting"
            for task in self.tasks:
                for number in range(self.finetunings):
                    tuned = _run("finetune", {"task": task}, number, inputs)
                    label = f"finetune/{replicate}/{task}/{number}"
                    stages.append(self._stage(label, tuned, replicate, later, self._finetuned(model, task, shift), {}))
                    collected[label] = tuned.key
            bench = _run("benchmark_cpu", {}, replicate, inputs, {"machine": "generated"})
            stages.append(self._stage(f"benchmark_cpu/{replicate}", bench, replicate, later, self._timed(model), {}))
            collected[f"benchmark_cpu/{replicate}"] = bench.key
        collect = _run("collect", {"tasks": list(self.tasks)}, 0, collected)
        metrics = self._collected(collected) if state == "complete" else {}
        stages.append(self._stage("collect", collect, None, later, metrics, {}))
        return {
            "id": name,
            "layout": layout,
            "controls": controls,
            "in_study": in_study,
            "number": index if in_study else None,
            "params": {"trees": layer.get("trees"), "depth": layer.get("depth", 0)},
            "model": model.resolved(),
            "state": state,
            "error": None,
            "collect_key": collect.key if state == "complete" else None,
            "stages": stages,
        }

    def _stage(self, label, run, replicate, state, metrics, files):
        duration_s = float(self.noise.uniform(1, 30))
        if state == "complete" and not self.store.has(run.key):
            output = self.results / "aside"
            for name, text in files.items():
                (output / name).parent.mkdir(parents=True, exist_ok=True)
                (output / name).write_text(text)
            output.mkdir(parents=True, exist_ok=True)
            self.clock += 1
            self.store.publish(run, metrics, output, self.where, self.clock, duration_s)
            shutil.rmtree(output)
        running = state == "running"
        return {
            "name": run.stage,
            "label": label,
            "key": run.key,
            "replicate": replicate,
            "state": state,
            "attempts": 0 if state == "waiting" else 1,
            "progress": {"done": 120_000, "total": 400_000, "unit": "tokens", "tokens_per_s": 9000.0} if running else None,
            "worker": None if state == "waiting" else "localhost:4242",
            "duration_s": duration_s if state == "complete" else None,
            "error": None,
        }

    def _loss(self, model):
        shape = model.feedforward.shape
        active = 0 if shape is None else shape.active_width
        return 5.2 + 1.2 * np.exp(-np.log1p(active) / 3)

    def _pretrained(self, model, shift):
        final, rows = self._loss(model), []
        for step in range(1, self.steps + 1):
            share = step / self.steps
            loss = final + (9.2 - final) * np.exp(-5 * share) + float(self.noise.normal(0, 0.03))
            row = {"step": step * 10, "tokens": int(400_000 * share), "loss": loss, "learning_rate": 1e-3 * (1 - share), "grad_norm": 0.4}
            row |= {"accuracy": 0.1 + 0.25 * share, "tokens_per_s": 9000.0}
            if step % 5 == 0:
                row |= {"validation_loss": loss + 0.05, "validation_accuracy": 0.1 + 0.2 * share}
            rows.append(row)
        files = {"curve.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}
        if model.feedforward.shape is not None and model.feedforward.shape.depth > 0:
            files["tree_health.json"] = json.dumps(self._health(model.feedforward.shape))
        metrics = {
            "mlm/train_loss": rows[-1]["loss"],
            "mlm/train_accuracy": rows[-1]["accuracy"],
            "mlm/validation_loss": final + 0.05 - 0.01 * shift,
            "mlm/validation_accuracy": 0.3,
            "mlm/unigram_loss": 6.9,
            "mlm/tokens": 400_000.0,
            "params/total": 1.5e6,
            "time/tokens_per_s": 9000.0 + float(self.noise.normal(0, 100)),
            "time/train_s": 44.0,
            "memory/peak_rss_bytes": 1.1e9,
        }
        return metrics, files

    def _health(self, shape):
        leaves = [(self.noise.dirichlet(np.ones(2**shape.depth)) * 4096).astype(int).tolist() for _ in range(min(shape.trees, 4))]
        layer = {"layout": shape.layout, "left_share": [0.55] * shape.depth, "leaf_entropy": 0.9, "dead_nodes": 3, "nodes": shape.width}
        return {
            "schema": "fffsweep.tree_health/1",
            "tokens": 4096,
            "layers": [{"layer": n, **layer, "leaf_usage": leaves} for n in range(2)],
        }

    def _finetuned(self, model, task, shift):
        shape, base = model.feedforward.shape, 0.51 if "sst" in task else 0.0
        gain = 0.3 if self.learned else -0.004
        if self.learned and shape is not None:
            gain = 0.36 - 0.004 * shape.depth + 0.004 * np.log1p(shape.active_width)
        score = base + gain + 0.01 * shift + float(self.noise.normal(0, 0.004))
        scores = {f"{split}/primary": score + 0.002 * (split == "validation") for split in ("selection", "validation")}
        return {**scores, "baseline/selection_primary": base, "baseline/validation_primary": base, "train/loss": 0.4, "data/bad_rows": 0.0}

    def _timed(self, model):
        shape, metrics = model.feedforward.shape, {"ff/cpu/verified": 1.0, "ff/cpu/path_flips": 0.0}
        for tokens, mode in self.points:
            rel_time = 0.0
            if shape is not None:
                work = (shape.active_width + (12 * shape.levels if shape.depth else 0)) / 512
                rel_time = work * (1 + 0.5 / tokens**0.5) * float(np.exp(self.noise.normal(0, 0.02)))
            here = f"ff/cpu/{tokens}_float32_1t_{mode}"
            metrics |= {f"{here}/rel_time": rel_time, f"{here}/ns_per_token": 9000 * rel_time, f"{here}/reference_ns_per_token": 9000.0}
            if shape is not None:
                arithmetic_ns, nodes = 7000 * shape.active_width / 512, min(shape.width, tokens * shape.active_width)
                memory_ns = 0 if mode == "hot" else 15 * nodes / tokens
                metrics[f"{here}/roofline_ns_per_token"] = max(arithmetic_ns, memory_ns)
            if (tokens, mode) == (128, "cold"):
                metrics |= {"ff/cpu/rel_time": rel_time, "ff/cpu/ns_per_token": 9000 * rel_time, "ff/cpu/reference_ns_per_token": 9000.0}
        return metrics

    def _collected(self, inputs):
        metrics = {role: self.store.get(key).metrics for role, key in inputs.items()}
        context = StageContext(0, {}, metrics, self.results, self.results)
        return Collect().run(CollectConfig(tasks=self.tasks), context)


def generate(
    results,
    name="generated",
    layouts=LAYOUTS,
    controls=CONTROLS,
    replicates=3,
    tasks=("sst2-like", "stsb"),
    learned=True,
    finished=None,
    points=POINTS,
    finetunings=2,
    steps=40,
    seed=0,
):
    """Write a study and return its generator, which has `results`, `name`, `config` and can save further records."""
    generator = Generator(results, name, layouts, controls, replicates, tuple(tasks), learned, finished, points, finetunings, steps, seed)
    with without_fsync():
        generator.write()
    return generator


def many_layouts(count):
    """`count` different layouts."""
    return [f"{trees}x{depth}" for trees in range(1, count) for depth in range(10)][:count]
