"""Running one stage: inputs verified, checkpoints kept, nothing half published."""

import subprocess
import sys
from dataclasses import replace
from typing import ClassVar

import pytest

from fffsweep.pipeline import stage as stage_module
from fffsweep.pipeline.execute import KeyBusy, execute
from fffsweep.pipeline.lease import Claim, LeaseLost
from fffsweep.pipeline.settings import Settings
from fffsweep.pipeline.stage import Resources, StageRun, StopRequested, get_stage
from fffsweep.pipeline.store import Store


class CounterConfig(Settings):
    upto: int = 3
    fail_at: int = -1
    value: float = 1.0


class Counter:
    """Counts to `upto`, a checkpoint a step."""

    name: ClassVar[str] = "counter"
    version: ClassVar[int] = 1
    sources: ClassVar[tuple[str, ...]] = ()
    Config: ClassVar[type[Settings]] = CounterConfig
    steps: ClassVar[list[int]] = []

    def resources(self, config):
        return Resources(cpus=1)

    def fingerprints(self, config):
        return {}

    def run(self, config, context):
        checkpoint = context.work / "step"
        step = int(checkpoint.read_text()) if checkpoint.exists() else 0
        while step < config.upto:
            if context.stop_requested():
                raise StopRequested
            if step == config.fail_at:
                raise RuntimeError("broken at a step")
            step += 1
            Counter.steps.append(step)
            checkpoint.write_text(str(step))
            context.progress(step, config.upto, "steps")
        (context.output / "count").write_text(str(step))
        return {"count": config.value}


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setitem(stage_module._STAGES, "counter", f"{__name__}:Counter")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Counter.__module__])
    Counter.steps = []
    return Store(tmp_path / "store")


def run_of(**config):
    return StageRun("counter", 1, CounterConfig(**config).resolved(), 0)


def test_a_stage_runs_once(store):
    reports = []
    first = execute(run_of(), store, reports.append)
    assert [r["done"] for r in reports] == [1, 2, 3]
    assert execute(run_of(), store) == first
    assert Counter.steps == [1, 2, 3]
    assert first.provenance["threads"] == 1
    assert not store.work_path(first.key).exists()


def test_a_failed_stage_publishes_nothing_and_goes_on_from_its_checkpoint(store, monkeypatch):
    run = run_of(fail_at=2)
    with pytest.raises(RuntimeError, match="broken"):
        execute(run, store)
    assert not store.has(run.key)
    original = CounterConfig.model_validate
    monkeypatch.setattr(CounterConfig, "model_validate", classmethod(lambda cls, value: original({**value, "fail_at": -1})))
    execute(run, store)
    assert Counter.steps == [1, 2, 3]


def test_a_stopped_stage_goes_on_later(store):
    answers = iter([False, True])
    with pytest.raises(StopRequested):
        execute(run_of(), store, stop_requested=lambda: next(answers))
    execute(run_of(), store)
    assert Counter.steps == [1, 2, 3]


def test_metrics_must_be_finite(store):
    class Bad(Counter):
        def run(self, config, context):
            return {"loss": float("nan")}

    sys.modules[__name__].Bad = Bad
    stage_module._STAGES["counter"] = f"{__name__}:Bad"
    with pytest.raises(ValueError, match="must be finite"):
        execute(run_of(), store)
    assert not store.has(run_of().key)


def test_inputs_are_handed_over_by_role(store):
    upstream = execute(run_of(), store)
    seen = {}

    class Reader(Counter):
        def run(self, config, context):
            seen.update({role: (folder / "count").read_text() for role, folder in context.inputs.items()}, metrics=context.input_metrics)
            return {}

    sys.modules[__name__].Reader = Reader
    stage_module._STAGES["counter"] = f"{__name__}:Reader"
    execute(replace(run_of(upto=9), inputs={"pretrain/0": upstream.key}), store)
    assert seen == {"pretrain/0": "3", "metrics": {"pretrain/0": {"count": 1.0}}}


def test_one_key_has_one_owner_at_a_time_and_a_dead_owner_is_no_owner(store):
    run = run_of()
    work = store.work_path(run.key)
    script = (
        f"import sys, time; from pathlib import Path; from fffsweep.pipeline.execute import _owning\n"
        f"with _owning(Path({str(work)!r})):\n print('owned', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout.readline() == "owned\n"
        with pytest.raises(KeyBusy):
            execute(run, store)
        owner.kill()
    assert execute(run, store).metrics == {"count": 1.0}


def test_unknown_stage_lists_the_choices():
    with pytest.raises(ValueError, match="expected one of prepare, "):
        get_stage("pretraining")


def test_every_result_carries_the_fingerprint_of_its_data(store):
    source = execute(replace(run_of(), fingerprints={"data": "abc"}), store)
    middle = execute(replace(run_of(upto=2), inputs={"prepare": source.key}), store)
    last = execute(replace(run_of(upto=4), inputs={"pretrain/0": middle.key}), store)
    assert [manifest.provenance["data"] for manifest in (source, middle, last)] == ["abc"] * 3


def test_a_later_attempt_takes_the_key_over_and_the_earlier_one_publishes_nothing(store):
    """A host that was cut off: its attempt lives on while the next one runs and publishes."""
    published = []

    class CutOff(Counter):
        def run(self, config, context):
            if not published:
                published.append(None)
                published.append(execute(run_of(), store, claim=Claim("study", 2)))
                context.stop_requested()
            return super().run(config, context)

    sys.modules[__name__].CutOff = CutOff
    stage_module._STAGES["counter"] = f"{__name__}:CutOff"
    with pytest.raises(LeaseLost, match="was taken over"):
        execute(run_of(), store, claim=Claim("study", 1))
    assert store.get(run_of().key) == published[1]
    assert Counter.steps == [1, 2, 3]
